"""RMS norm: the kernel against the reference, the reference against transformers' modules."""

from __future__ import annotations

import pytest
import torch
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from triptych.kernels.norm import rms_norm, rms_norm_reference
from triptych.kernels.norm.kernel import _rms_norm_kernel
from triptych.kernels.norm.launch import launch


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (1, 3584), (3, 80), (5, 257), (2, 16384)])
@pytest.mark.parametrize(("with_residual", "with_weight", "offset"), [(0, 1, 0.0), (1, 1, 0.0), (1, 1, 1.0), (1, 0, 0)])
def test_equals_the_reference(device, assert_close, dtype, shape, with_residual, with_weight, offset):
    torch.manual_seed(0)
    # rows of a wider array, as a view of fused weights gives them
    x = torch.randn(shape[0], shape[1] + 8, device=device).to(dtype)[:, : shape[1]]
    residual = torch.randn(shape, device=device).to(dtype) if with_residual else None
    weight = torch.randn(shape[1], device=device).to(dtype) if with_weight else None
    out, total = launch(x, weight, 1e-5, residual, offset)
    expected, expected_total = rms_norm_reference(x, weight, 1e-5, residual=residual, offset=offset)
    assert_close(out, expected)
    # the interpreter cuts bfloat16 off where a GPU rounds
    if device == "cuda" or dtype != torch.bfloat16:
        assert torch.equal(total, expected_total)
    else:
        assert_close(total, expected_total)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_reference_is_what_transformers_computes(dtype):
    torch.manual_seed(0)
    x, residual, weight = torch.randn(7, 96).to(dtype), torch.randn(7, 96).to(dtype), torch.randn(96).to(dtype)
    for module, offset in ((LlamaRMSNorm(96, eps=1e-5), 0.0), (Gemma3RMSNorm(96, eps=1e-5), 1.0)):
        module.weight.data = weight
        normed, total = rms_norm(x, weight, 1e-5, residual=residual, offset=offset)
        assert torch.equal(normed, module(residual + x))
        assert torch.equal(total, residual + x)


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_the_kernel_rounds_as_transformers_does(device, offset):
    """In half precision the two orders differ in many elements, so the wrong one cannot pass."""
    torch.manual_seed(0)
    x, weight = torch.randn(20, 256, device=device).half(), torch.randn(256, device=device).half()
    out, _ = launch(x, weight, 1e-5, None, offset)
    right = rms_norm_reference(x, weight, 1e-5, offset=offset)[0]
    normed = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-5)
    late = (normed * (weight.float() + offset)).half()
    early = ((weight.float() + offset) * normed.half().float()).half()
    assert (out != right).float().mean() < 1e-2
    assert (out != (early if offset else late)).float().mean() > 0.05


def test_no_rows(device):
    out, total = launch(torch.randn(0, 64, device=device), None, 1e-5, None, 0.0)
    assert out.shape == total.shape == (0, 64)


def test_refuses_what_it_cannot_do(device):
    with pytest.raises(ValueError, match="too wide"):
        launch(torch.randn(1, 16385, device=device), None, 1e-5, None, 0.0)
    with pytest.raises(ValueError, match="next to each other"):
        launch(torch.randn(64, 4, device=device).T, None, 1e-5, None, 0.0)


@pytest.mark.parametrize(("width", "warps"), [(3584, 8), (5376, 16), (16384, 32)])
@pytest.mark.parametrize("gemma", [False, True])
def test_compiles_for_the_h200(compile_sm90, width, warps, gemma):
    built = compile_sm90(
        _rms_norm_kernel,
        {
            **dict.fromkeys(("x", "residual", "weight", "out", "total"), "*bf16:16"),
            **dict.fromkeys(("x_row", "residual_row", "width"), "i32:16"),
            **dict.fromkeys(("eps", "offset"), "fp32"),
        },
        {"BLOCK": 1 << (width - 1).bit_length(), "GEMMA": gemma, "PDL": True},
        num_warps=warps,
        launch_pdl=True,
    )
    assert built.spilled == 0
    assert "griddepcontrol.wait" in built.ptx
    assert "ld.global.v4" in built.ptx
