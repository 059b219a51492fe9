"""One program for one row, which stays in registers between its sum of squares and its scaling."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _rms_norm_kernel(
    x,  # [T, H]
    residual,  # [T, H] or None
    weight,  # [H] or None
    out,  # [T, H]
    total,  # [T, H] or None: x + residual
    x_row,
    residual_row,
    width,
    eps,
    offset,
    BLOCK: tl.constexpr,  # power of two, at least the width
    GEMMA: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    value = tl.load(x + row * x_row + columns, inside, other=0.0).to(tl.float32)
    if weight is not None:
        scale = tl.load(weight + columns, inside, other=0.0).to(tl.float32)
    if residual is not None:
        value += tl.load(residual + row * residual_row + columns, inside, other=0.0).to(tl.float32)
        stored = value.to(total.dtype.element_ty)
        tl.store(total + row * width + columns, stored, inside)
        # the sum as the next layer will read it
        value = stored.to(tl.float32)
    mean = tl.sum(value * value, 0) / width
    normed = value * tl.rsqrt(mean + eps)
    if weight is not None:
        if GEMMA:
            normed *= offset + scale
        else:
            normed = normed.to(out.dtype.element_ty).to(tl.float32) * scale
    tl.store(out + row * width + columns, normed.to(out.dtype.element_ty), inside)
