"""FlashAttention-2 (Dao 2023) over packed sequences without a mask inside a sequence."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_LOG2E = 1.4426950408889634


@triton.jit
def _kernel(
    query,
    key,
    value,
    out,
    starts,
    scale,  # scaling * log2(e): softmax is computed with exp2
    q_token,
    q_head,
    k_token,
    k_head,
    v_token,
    v_head,
    o_token,
    o_head,
    width,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,  # the interpreter multiplies bfloat16 as if it were integers
):
    sequence = tl.program_id(2)
    low = tl.load(starts + sequence)
    high = tl.load(starts + sequence + 1)
    first = low + tl.program_id(0) * BLOCK_M
    if first < high:
        head = tl.program_id(1)
        rows = first + tl.arange(0, BLOCK_M)
        columns = tl.arange(0, WIDTH)
        inside = columns < width
        wanted = (rows < high)[:, None] & inside[None, :]
        q = tl.load(query + rows.to(tl.int64)[:, None] * q_token + head * q_head + columns[None, :], wanted, other=0.0)
        q = q.to(tl.float32) if UPCAST else q
        best = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        acc = tl.zeros((BLOCK_M, WIDTH), tl.float32)
        for start in range(low, high, BLOCK_N):
            places = start + tl.arange(0, BLOCK_N)
            known = places < high
            at = places.to(tl.int64)
            k = tl.load(
                key + at[None, :] * k_token + head * k_head + columns[:, None],
                known[None, :] & inside[:, None],
                other=0.0,
            )
            k = k.to(tl.float32) if UPCAST else k
            scores = tl.dot(q, k, input_precision=PRECISION) * scale
            scores = tl.where(known[None, :], scores, float("-inf"))
            top = tl.maximum(best, tl.max(scores, 1))
            shrink = tl.exp2(best - top)
            weights = tl.exp2(scores - top[:, None])
            total = total * shrink + tl.sum(weights, 1)
            v = tl.load(
                value + at[:, None] * v_token + head * v_head + columns[None, :],
                known[:, None] & inside[None, :],
                other=0.0,
            )
            v = v.to(tl.float32) if UPCAST else v
            acc = acc * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
            best = top
        acc = acc / total[:, None]
        place = out + rows.to(tl.int64)[:, None] * o_token + head * o_head + columns[None, :]
        tl.store(place, acc.to(out.dtype.element_ty), wanted)


def launch(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    starts: torch.Tensor,
    max_length: int,
    scaling: float,
) -> torch.Tensor:
    """See :func:`..packed_attention`."""
    tokens, heads, width = query.shape
    out = torch.empty((tokens, heads, width), dtype=query.dtype, device=query.device)
    single = query.dtype == torch.float32
    # windows of a vision tower are 64 tokens: one tile each
    block_m, block_n, warps = (64, 64, 4) if max_length <= 256 or single else (128, 64, 8)
    grid = (triton.cdiv(max_length, block_m), heads, starts.shape[0] - 1)
    _kernel[grid](
        query,
        key,
        value,
        out,
        starts,
        scaling * _LOG2E,
        query.stride(0),
        query.stride(1),
        key.stride(0),
        key.stride(1),
        value.stride(0),
        value.stride(1),
        out.stride(0),
        out.stride(1),
        width,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        WIDTH=max(16, triton.next_power_of_2(width)),
        PRECISION="ieee" if single else "tf32",
        UPCAST=not query.is_cuda,
        num_warps=warps,
        num_stages=2,
    )
    return out
