"""Similarity of video frames: one program for one token of one frame."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _similarity_kernel(
    features,  # [T, places, C]
    out,  # float32 [T - 1, places]
    places,
    width,  # C
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    dot = tl.zeros((BLOCK,), tl.float32)
    before = tl.zeros((BLOCK,), tl.float32)
    after = tl.zeros((BLOCK,), tl.float32)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    for start in tl.range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < width
        a = tl.load(features + token * width + columns, inside, other=0.0).to(tl.float32)
        b = tl.load(features + (token + places) * width + columns, inside, other=0.0).to(tl.float32)
        dot += a * b
        before += a * a
        after += b * b
    # torch.nn.functional.cosine_similarity's guard against a vector of zeros
    norms = tl.maximum(tl.sqrt(tl.sum(before, 0)), 1e-8) * tl.maximum(tl.sqrt(tl.sum(after, 0)), 1e-8)
    tl.store(out + token, tl.sum(dot, 0) / norms)
