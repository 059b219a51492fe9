"""What the launch table says for an H200 compiles for it, fits its shared memory and spills no registers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton.language as tl

from triptych.kernels._launch import next_power_of_2
from triptych.kernels.attention.kernel import _attend_kernel, _merge_kernel
from triptych.kernels.attention.launch import MAX_SHORT_QUERY, choose, kind_of

SHARED_LIMIT = 227 * 1024
NAMES = {torch.bfloat16: "bf16", torch.float32: "fp32", torch.float8_e4m3fn: "fp8e4nv"}
STRIDES = ("query_token", "query_head", "key_block", "key_head", "key_token", "value_block", "value_head")
STRIDES += ("value_token", "out_token", "out_head")

CASES: dict[str, dict[str, Any]] = {
    "decode": {},
    "decode, split": {"split": True},
    "decode, pages of 64": {"page": 64},
    "decode, float8 pages": {"pages": torch.float8_e4m3fn, "requests": 128},
    "decode, gpt-oss": {"heads": (64, 8), "dim": 64, "window": 128, "sinks": True, "split": True},
    "decode, gemma": {"heads": (16, 8), "dim": 256, "window": 1024, "softcap": 50.0, "split": True},
    "decode, head dim 80": {"heads": (32, 32), "dim": 80},
    "decode, latent": {"heads": (16, 1), "dim": 576, "dim_value": 512, "split": True},
    "decode, float32": {"dtype": torch.float32},
    "verification": {"length": 5, "split": True},
    "verification of 16": {"length": 16, "split": True},
    "prefill": {"length": 2048},
    "prefill, chunk": {"length": 128, "split": True},
    "prefill, pages of 64": {"length": 2048, "page": 64},
    "prefill, float8 pages": {"length": 2048, "pages": torch.float8_e4m3fn},
    "prefill, gemma 3": {"heads": (16, 8), "dim": 256, "length": 2048, "window": 1024, "spans": True},
    "prefill, head dim 256, float8 pages": {"dim": 256, "heads": (16, 8), "length": 512, "pages": torch.float8_e4m3fn},
    "prefill, window and sinks": {"heads": (64, 8), "dim": 64, "length": 1024, "window": 128, "sinks": True},
    "prefill, float32": {"length": 512, "dtype": torch.float32},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_attend_compiles(compile_sm90, case):
    built = _compile(compile_sm90, **case)
    assert built.shared < SHARED_LIMIT
    # Triton 3.9 spills ten registers of the fastest launch for a head dim of 256 with window and spans, 3.6 none
    assert built.spilled <= (64 if case is CASES["prefill, gemma 3"] else 0)


def _compile(
    compile_sm90: Any,
    *,
    heads: tuple[int, int] = (28, 4),
    dim: int = 128,
    dim_value: int | None = None,
    page: int = 16,
    dtype: torch.dtype = torch.bfloat16,
    pages: torch.dtype | None = None,
    requests: int = 1,
    length: int = 1,
    split: bool = False,
    window: int = 0,
    softcap: float = 0.0,
    sinks: bool = False,
    spans: bool = False,
) -> Any:
    pages, dim_value, group = pages or dtype, dim_value or dim, heads[0] // heads[1]
    short = length <= MAX_SHORT_QUERY
    pack = group if short else 1
    size = requests * heads[1] if short else length
    params = choose(kind_of(length), (9, 0), dim, pages.itemsize, size)
    multiplied = tl.float16 if pages.itemsize == 1 else tl.dtype(NAMES[dtype])
    signature = {
        "query": f"*{NAMES[dtype]}:16",
        "key_pages": f"*{NAMES[pages]}:16",
        "value_pages": f"*{NAMES[pages]}:16",
        "block_table": "*i32",
        "context_lens": "*i32",
        "out": f"*{NAMES[dtype]}:16",
        "splits": "i32",
        "scale": "fp32",
        "value_scale": "fp32",
        "table_row": "i32",
        "span_row": "i32",
        **dict.fromkeys(STRIDES, "i32:16"),
    }
    optional = {
        "query_starts": (length > 1, "*i32"),
        "spans": (spans, "*i32"),
        "sinks": (sinks, f"*{NAMES[dtype]}"),
        "partial": (split, "*fp32:16"),
        "log_sums": (split, "*fp32:16"),
    }
    signature |= {name: kind for name, (there, kind) in optional.items() if there}
    constants = {
        **{name: None for name, (there, _) in optional.items() if not there},
        "HEADS": heads[0],
        "GROUP": group,
        "PACK": pack,
        "D": dim,
        "DV": dim_value,
        "BLOCK_M": min(params.block_m, max(16, next_power_of_2(pack))) if length == 1 else params.block_m,
        "BLOCK_N": params.block_n,
        "BLOCK_D": next_power_of_2(dim),
        "BLOCK_DV": next_power_of_2(dim_value),
        "PAGE": page,
        "WINDOW": window,
        "SOFTCAP": softcap,
        "PHASES": not short,
        "DTYPE": multiplied,
        "PRECISION": "ieee" if multiplied == tl.float32 else "tf32",
        "SAME_LAYOUT": dim == dim_value,
        "PDL": True,
    }
    return compile_sm90(
        _attend_kernel,
        signature,
        constants,
        num_warps=params.num_warps,
        num_stages=params.num_stages,
        launch_pdl=True,
    )


@pytest.mark.parametrize(("splits", "width", "sinks"), [(16, 128, True), (128, 128, False), (16, 64, False)])
def test_merge_compiles(compile_sm90, splits, width, sinks):
    signature = {"partial": "*fp32:16", "log_sums": "*fp32:16", "out": "*bf16:16", "value_scale": "fp32"}
    signature |= {"splits": "i32", "out_token": "i32:16", "out_head": "i32:16"} | ({"sinks": "*bf16"} if sinks else {})
    constants = {"HEADS": 28, "DV": width, "BLOCK_S": splits, "BLOCK_DV": width, "PDL": True}
    constants |= {} if sinks else {"sinks": None}
    built = compile_sm90(_merge_kernel, signature, constants, num_warps=4, launch_pdl=True)
    assert built.shared < SHARED_LIMIT
    assert built.spilled == 0


def test_tiles_are_read_ahead(compile_sm90):
    """Keys and values come by asynchronous copies of 16 bytes, decode's too: none of it is worth running otherwise."""
    for case in ({}, {"page": 64}, {"length": 2048}):
        ptx = _compile(compile_sm90, **case).ptx
        assert ptx.count("cp.async.cg.shared.global") >= 24
        assert "cp.async.ca.shared.global" not in ptx
    assert "wgmma.mma_async" in ptx
