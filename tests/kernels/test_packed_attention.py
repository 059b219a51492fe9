"""Attention over packed sequences against the reference, and in a tower."""

from __future__ import annotations

import pytest
import torch

from triptych.kernels.packed_attention import packed_attention_reference
from triptych.kernels.packed_attention.kernel import _kernel, launch


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [16, 72, 80, 128])
@pytest.mark.parametrize("lengths", [[1], [64], [65, 1, 7], [3, 0, 130]])
def test_equals_the_reference(device, assert_close, dtype, width, lengths):
    torch.manual_seed(0)
    total = sum(lengths)
    # as towers have it: one projection, so strides are three times the width
    qkv = torch.randn(total, 3, 2, width, device=device).to(dtype)
    query, key, value = qkv.unbind(1)
    starts = torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)
    out = launch(query, key, value, starts, max(lengths), width**-0.5)
    assert_close(out, packed_attention_reference(query, key, value, starts, width**-0.5))


@pytest.mark.parametrize(("block_m", "warps"), [(64, 4), (128, 8)])
def test_compiles_for_the_h200(compile_sm90, block_m, warps):
    strides = ("q_token", "q_head", "k_token", "k_head", "v_token", "v_head", "o_token", "o_head")
    built = compile_sm90(
        _kernel,
        {
            **dict.fromkeys(("query", "key", "value", "out"), "*bf16:16"),
            "starts": "*i32:16",
            "scale": "fp32",
            **dict.fromkeys(strides, "i32:16"),
            "width": "i32:16",
        },
        {"BLOCK_M": block_m, "BLOCK_N": 64, "WIDTH": 128, "PRECISION": "tf32", "UPCAST": False},
        num_warps=warps,
        num_stages=2,
    )
    assert built.spilled == 0
    assert built.shared < 227 * 1024
