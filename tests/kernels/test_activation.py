"""Gated activations against the reference."""

from __future__ import annotations

import pytest
import torch

from triptych.kernels.activation import KINDS, gated, gated_reference
from triptych.kernels.activation.kernel import _gated_kernel
from triptych.kernels.activation.launch import launch

# exp(100) and beyond is infinite, as it should be; the interpreter says so
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (1, 1025), (9, 300), (65, 96)])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_reference(device, assert_close, dtype, shape, kind):
    torch.manual_seed(0)
    rows, width = shape
    x = (4 * torch.randn(rows, 2 * width + 8, device=device)).to(dtype)[:, : 2 * width]
    assert_close(launch(x, kind), gated_reference(x, kind))


@pytest.mark.parametrize("kind", KINDS)
def test_large_values_do_not_overflow(device, kind):
    gate = torch.tensor([[-100.0, -1e4, 100.0, 1e4, 0.0]], device=device)
    out = launch(torch.cat([gate, torch.ones_like(gate)], dim=1), kind)
    assert torch.equal(out, torch.tensor([[0.0, 0.0, 100.0, 1e4, 0.0]], device=device))


def test_no_rows(device):
    assert launch(torch.randn(0, 64, device=device), "silu").shape == (0, 32)


def test_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="'relu' is not one of silu, gelu_tanh, gelu"):
        gated(torch.zeros(1, 4), "relu")
    with pytest.raises(ValueError, match="equally wide"):
        gated(torch.zeros(1, 5), "silu")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("block", "warps"), [(256, 2), (512, 2), (1024, 4)])
def test_compiles_for_the_h200(compile_sm90, kind, block, warps):
    built = compile_sm90(
        _gated_kernel,
        {"gate_up": "*bf16:16", "out": "*bf16:16", "row_stride": "i32:16", "width": "i32:16"},
        {"KIND": kind, "BLOCK": block, "PDL": True},
        num_warps=warps,
        launch_pdl=True,
    )
    assert built.spilled == 0
    assert "griddepcontrol.wait" in built.ptx
