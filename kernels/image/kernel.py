"""Normalisation of pixels: a program makes a stretch of one patch."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _normalise(pixel, mean, std, channel, inside):
    """(pixel - mean) / std in float32, with torch's correctly rounded division."""
    m = tl.load(mean + channel, inside, other=0.0)
    s = tl.load(std + channel, inside, other=1.0)
    return tl.div_rn(pixel.to(tl.float32) - m, s)


@triton.jit
def _patches_kernel(
    patches,  # uint8 [P, C, F, A]
    mean,  # float32 [C]
    std,
    out,  # [P, C * frames * A]
    CHANNELS: tl.constexpr,
    STORED: tl.constexpr,  # F: frames, or 1
    FRAMES: tl.constexpr,
    AREA: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    patch = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < CHANNELS * FRAMES * AREA
    channel = column // (FRAMES * AREA)
    frame = (column // AREA) % FRAMES if STORED > 1 else 0
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    source = patch * (CHANNELS * STORED * AREA) + (channel * STORED + frame) * AREA + column % AREA
    value = _normalise(tl.load(patches + source, inside, other=0), mean, std, channel, inside)
    tl.store(out + patch * (CHANNELS * FRAMES * AREA) + column, value.to(out.dtype.element_ty), inside)


@triton.jit
def _patchify_kernel(
    pixels,  # uint8 [T, H, W, C]
    mean,  # float32 [C]
    std,
    out,  # [P, C * temporal * patch * patch]
    frames,  # T
    height,
    width,
    CHANNELS: tl.constexpr,
    PATCH: tl.constexpr,
    MERGE: tl.constexpr,
    TEMPORAL: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    index = tl.program_id(0)
    rows, columns = height // PATCH, width // PATCH
    # patches run over a square of MERGE x MERGE, then over squares, then over time
    within = index % (MERGE * MERGE)
    square = (index // (MERGE * MERGE)) % ((rows // MERGE) * (columns // MERGE))
    time = index // (rows * columns)
    row = (square // (columns // MERGE)) * MERGE + within // MERGE
    column = (square % (columns // MERGE)) * MERGE + within % MERGE

    element = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = element < CHANNELS * TEMPORAL * PATCH * PATCH
    channel = element // (TEMPORAL * PATCH * PATCH)
    frame = tl.minimum(time * TEMPORAL + (element // (PATCH * PATCH)) % TEMPORAL, frames - 1)
    y = row * PATCH + (element // PATCH) % PATCH
    x = column * PATCH + element % PATCH
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    source = ((frame.to(tl.int64) * height + y) * width + x) * CHANNELS + channel
    value = _normalise(tl.load(pixels + source, inside, other=0), mean, std, channel, inside)
    target = index.to(tl.int64) * (CHANNELS * TEMPORAL * PATCH * PATCH) + element
    tl.store(out + target, value.to(out.dtype.element_ty), inside)
