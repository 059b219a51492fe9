"""Gated activations: one program for a stretch of one row."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def activate(x, KIND: tl.constexpr):
    """The activation in float32: SiLU, GELU (Hendrycks and Gimpel 2016) exact or in its tanh form."""
    if KIND == "silu":
        out = x * tl.sigmoid(x)
    elif KIND == "gelu_tanh":
        # 0.5 * (1 + tanh(u)) is sigmoid(2 u); u = sqrt(2 / pi) * (x + 0.044715 x^3)
        out = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    else:
        out = x * 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
    return out


@triton.jit
def _gated_kernel(
    gate_up,  # [T, 2 F]
    out,  # [T, F]
    row_stride,
    width,  # F
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    source = gate_up + row * row_stride + columns
    gate = tl.load(source, inside, other=0.0).to(tl.float32)
    up = tl.load(source + width, inside, other=0.0).to(tl.float32)
    rounded = activate(gate, KIND).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row * width + columns, (rounded * up).to(out.dtype.element_ty), inside)
