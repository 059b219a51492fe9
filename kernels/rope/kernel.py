"""Rotary embedding and KV write: a program takes some heads of one token."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice


@triton.jit
def _table_kernel(
    position_ids,  # int64 [axes, T]
    inv_freq,  # float32 [R]
    axis,  # int64 [R]
    cos,  # float32 [T, R]
    sin,  # float32 [T, R]
    axis_stride,
    tokens,
    half,  # R
    scaling,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    INTERPRETED: tl.constexpr,  # the interpreter has no libdevice
    PDL: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    columns = tl.arange(0, BLOCK_R)
    inside = (rows < tokens)[:, None] & (columns < half)[None, :]
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    frequency = tl.load(inv_freq + columns, columns < half, other=0.0)
    which = tl.load(axis + columns, columns < half, other=0)
    position = tl.load(position_ids + which[None, :] * axis_stride + rows[:, None], inside, other=0)
    angle = position.to(tl.float32) * frequency[None, :]
    # tl.cos is the hardware's approximation, which is far off at angles of thousands of radians
    if INTERPRETED:
        c, s = tl.cos(angle), tl.sin(angle)
    else:
        c, s = libdevice.cos(angle), libdevice.sin(angle)
    place = rows.to(tl.int64)[:, None] * half + columns[None, :]
    tl.store(cos + place, c * scaling, inside)
    tl.store(sin + place, s * scaling, inside)


@triton.jit
def _quantise(x, scale, FP8: tl.constexpr, dtype: tl.constexpr):
    """x as it is stored in a page: divided by the scale and clamped where pages are float8; NaN stays NaN."""
    if FP8:
        # as a tensor, for a correctly rounded division
        scaled = tl.div_rn(x.to(tl.float32), scale + tl.zeros_like(x).to(tl.float32))
        out = tl.clamp(scaled, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL).to(dtype)
    else:
        out = x.to(dtype)
    return out


@triton.jit
def _norm_weight(query_norm, key_norm, columns, inside, is_query):
    """Weights [heads, columns] of the head norm: those of queries or of keys."""
    of_query = tl.load(query_norm + columns, inside, other=0.0).to(tl.float32)
    of_key = tl.load(key_norm + columns, inside, other=0.0).to(tl.float32)
    return tl.where(is_query[:, None], of_query[None, :], of_key[None, :])


@triton.jit
def _apply_norm(x, factor, weight, is_rotated, offset, GEMMA: tl.constexpr, dtype: tl.constexpr):
    """x * factor * (offset + weight), rounded to dtype as transformers' modules do; values pass as they are."""
    normed = x * factor[:, None]
    normed = normed * (offset + weight) if GEMMA else normed.to(dtype).to(tl.float32) * weight
    return tl.where(is_rotated[:, None], normed.to(dtype).to(tl.float32), x)


@triton.jit
def _put(
    x,  # float32 [heads, columns], of the model's dtype after rounding
    columns,
    inside,
    query,
    query_row,
    key_row,
    value_row,
    heads,
    key_head,
    value_head,
    is_query,
    is_key,
    is_value,
    key_scale,
    value_scale,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    FP8: tl.constexpr,
):
    """Write each head's elements at ``columns`` where they belong: queries out, keys and values into their pages."""
    y = x.to(query.dtype.element_ty)
    tl.store(query_row + heads[:, None] * WIDTH + columns[None, :], y, is_query[:, None] & inside[None, :])
    key_place = key_row + (heads - NUM_HEADS)[:, None] * key_head + columns[None, :]
    tl.store(key_place, _quantise(y, key_scale, FP8, key_row.dtype.element_ty), is_key[:, None] & inside[None, :])
    value_place = value_row + (heads - NUM_HEADS - NUM_KV_HEADS)[:, None] * value_head + columns[None, :]
    tl.store(
        value_place, _quantise(y, value_scale, FP8, value_row.dtype.element_ty), is_value[:, None] & inside[None, :]
    )


@triton.jit
def _rotate_kernel(
    qkv,  # [T, (H + 2 Hk) * D]
    cos,  # float32 [T, R] or None
    sin,
    query_norm,  # [D] or None
    key_norm,
    slots,  # int64 [T]
    query,  # [T, H, D], out
    key_pages,  # [N, Hk, S, D], out
    value_pages,
    qkv_row,
    table_row,
    key_block,
    key_head,
    key_slot,
    value_block,
    value_head,
    value_slot,
    block_size,  # S
    eps,
    offset,
    key_scale,
    value_scale,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    WIDTH: tl.constexpr,  # D
    HALF: tl.constexpr,  # R; D / 2 where nothing is rotated
    BLOCK_HALF: tl.constexpr,  # powers of two that cover R, and D - 2 R
    BLOCK_REST: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    GEMMA: tl.constexpr,
    FP8: tl.constexpr,
    PDL: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    exists = heads < NUM_HEADS + 2 * NUM_KV_HEADS
    is_query = heads < NUM_HEADS
    is_rotated = heads < NUM_HEADS + NUM_KV_HEADS
    pair = tl.arange(0, BLOCK_HALF)
    inside = pair < HALF
    if INTERLEAVED:
        first, second = 2 * pair, 2 * pair + 1
    else:
        first, second = pair, pair + HALF
    rest = 2 * HALF + tl.arange(0, BLOCK_REST)
    inside_rest = rest < WIDTH
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    slot = tl.load(slots + token)
    # not `&`: the interpreter of Triton 3.9 makes numbers of a scalar and a block of booleans
    stored = tl.where(slot >= 0, exists, False)
    is_key = stored & is_rotated & (heads >= NUM_HEADS)
    is_value = stored & (heads >= NUM_HEADS + NUM_KV_HEADS)

    row = qkv + token * qkv_row + heads[:, None] * WIDTH
    mask = exists[:, None] & inside[None, :]
    a = tl.load(row + first[None, :], mask, other=0.0).to(tl.float32)
    b = tl.load(row + second[None, :], mask, other=0.0).to(tl.float32)
    if 2 * HALF < WIDTH:
        c = tl.load(row + rest[None, :], exists[:, None] & inside_rest[None, :], other=0.0).to(tl.float32)
    if query_norm is not None:
        squares = tl.sum(a * a + b * b, 1)
        if 2 * HALF < WIDTH:
            squares += tl.sum(c * c, 1)
        factor = tl.rsqrt(squares / WIDTH + eps)
        dtype: tl.constexpr = qkv.dtype.element_ty
        w = _norm_weight(query_norm, key_norm, first, inside, is_query)
        a = _apply_norm(a, factor, w, is_rotated, offset, GEMMA, dtype)
        w = _norm_weight(query_norm, key_norm, second, inside, is_query)
        b = _apply_norm(b, factor, w, is_rotated, offset, GEMMA, dtype)
        if 2 * HALF < WIDTH:
            w = _norm_weight(query_norm, key_norm, rest, inside_rest, is_query)
            c = _apply_norm(c, factor, w, is_rotated, offset, GEMMA, dtype)
    if cos is not None:
        cosine = tl.load(cos + token * table_row + pair, inside, other=0.0)[None, :]
        sine = tl.load(sin + token * table_row + pair, inside, other=0.0)[None, :]
        rotated_a = a * cosine - b * sine
        rotated_b = b * cosine + a * sine
        a = tl.where(is_rotated[:, None], rotated_a, a)
        b = tl.where(is_rotated[:, None], rotated_b, b)

    query_row = query + token * NUM_HEADS * WIDTH
    key_row = key_pages + (slot // block_size) * key_block + (slot % block_size) * key_slot
    value_row = value_pages + (slot // block_size) * value_block + (slot % block_size) * value_slot
    # fmt: off
    _put(a, first, inside, query, query_row, key_row, value_row, heads, key_head, value_head, is_query, is_key,
         is_value, key_scale, value_scale, NUM_HEADS, NUM_KV_HEADS, WIDTH, FP8)
    _put(b, second, inside, query, query_row, key_row, value_row, heads, key_head, value_head, is_query, is_key,
         is_value, key_scale, value_scale, NUM_HEADS, NUM_KV_HEADS, WIDTH, FP8)
    if 2 * HALF < WIDTH:
        _put(c, rest, inside_rest, query, query_row, key_row, value_row, heads, key_head, value_head, is_query, is_key,
             is_value, key_scale, value_scale, NUM_HEADS, NUM_KV_HEADS, WIDTH, FP8)
    # fmt: on


@triton.jit
def _store_kernel(
    key,  # [T, Hk, D]
    value,  # [T, Hk, Dv]
    slots,  # int64 [T]
    key_pages,  # [N, Hk, S, D], out
    value_pages,  # [N, Hk, S, Dv], out
    key_row,
    key_in_head,
    value_row,
    value_in_head,
    key_block,
    key_head,
    key_slot,
    value_block,
    value_head,
    value_slot,
    block_size,
    key_scale,
    value_scale,
    NUM_KV_HEADS: tl.constexpr,
    KEY_WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    BLOCK_KEY: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    FP8: tl.constexpr,
    PDL: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    slot = tl.load(slots + token)
    if slot >= 0:
        block, place = slot // block_size, slot % block_size
        columns = tl.arange(0, BLOCK_KEY)
        mask = (heads < NUM_KV_HEADS)[:, None] & (columns < KEY_WIDTH)[None, :]
        x = tl.load(key + token * key_row + heads[:, None] * key_in_head + columns[None, :], mask, other=0.0)
        target = key_pages + block * key_block + place * key_slot + heads[:, None] * key_head + columns[None, :]
        tl.store(target, _quantise(x, key_scale, FP8, key_pages.dtype.element_ty), mask)
        columns = tl.arange(0, BLOCK_VALUE)
        mask = (heads < NUM_KV_HEADS)[:, None] & (columns < VALUE_WIDTH)[None, :]
        x = tl.load(value + token * value_row + heads[:, None] * value_in_head + columns[None, :], mask, other=0.0)
        target = value_pages + block * value_block + place * value_slot + heads[:, None] * value_head + columns[None, :]
        tl.store(target, _quantise(x, value_scale, FP8, value_pages.dtype.element_ty), mask)
