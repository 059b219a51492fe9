"""Attention over a paged KV cache: one kernel for decode, short and long queries, and one that merges splits.

FlashAttention-2 (Dao 2023) with the keys of a tile found through the block table, and with the keys of a query shared
out over programs where there are too few queries to fill the GPU (split-KV, "flash decoding", Dao et al. 2023).
"""

from __future__ import annotations

import triton
import triton.language as tl

_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _blocks(table, first, begin, end, BLOCK_N: tl.constexpr, PAGE: tl.constexpr):
    """Blocks of the tile of keys at ``first``: one number, or [BLOCK_N] where a tile is no part of one page."""
    if PAGE % BLOCK_N == 0:
        block = tl.load(table + first // PAGE, first < end, other=0)
    else:
        at = first + tl.arange(0, BLOCK_N)
        block = tl.load(table + at // PAGE, (at >= begin) & (at < end), other=0)
    return block


@triton.jit
def _rows(block, first, block_stride, token_stride, BLOCK_N: tl.constexpr, PAGE: tl.constexpr):
    """Where the tile's rows lie in the pages of a kv head, int64 [BLOCK_N, 1]."""
    at = (first + tl.arange(0, BLOCK_N)) % PAGE
    return (block.to(tl.int64) * block_stride + at * token_stride)[:, None]


@triton.jit
def _read(at, mask, WIDTH: tl.constexpr, BLOCK: tl.constexpr, BOUNDED: tl.constexpr, DTYPE: tl.constexpr):
    """A tile as DTYPE; nothing is masked that need not be."""
    # what is not there may hold anything, NaN too, and 0 * NaN is NaN
    tile = tl.load(at, mask, other=0.0) if BOUNDED or WIDTH != BLOCK else tl.load(at)
    return tile.to(DTYPE)


@triton.jit
def _pass(
    acc,
    peak,
    total,
    block,  # blocks of the first tile
    query,
    positions,
    span_start,
    span_end,
    keys,
    values,
    table,
    low,
    high,
    begin,
    end,
    key_block,
    key_token,
    value_block,
    value_token,
    scale,  # factor on query . key, more than 0
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PAGE: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SPANS: tl.constexpr,
    MASKED: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Online softmax over the keys [low, high), in tiles. Not MASKED: every row sees all of them.

    Returns acc, peak, total, and the blocks of the tile that follows.
    """
    wide = tl.arange(0, BLOCK_D)
    wide_value = tl.arange(0, BLOCK_DV)
    for first in range(low, high, BLOCK_N):
        at = first + tl.arange(0, BLOCK_N)
        there = (at >= begin) & (at < end)
        # the next tile's blocks, a tile ahead: otherwise every tile would wait for the table before its keys
        next_block = _blocks(table, first + BLOCK_N, begin, end, BLOCK_N, PAGE)
        key_at = keys + _rows(block, first, key_block, key_token, BLOCK_N, PAGE) + wide[None, :]
        key = _read(key_at, there[:, None] & (wide < D)[None, :], D, BLOCK_D, MASKED, DTYPE)
        scores = tl.dot(query, tl.trans(key), input_precision=PRECISION)
        if SOFTCAP > 0:
            # tanh(x) = 1 - 2 / (exp(2 x) + 1), right at both infinities of exp
            grown = tl.exp2(scores * (scale * (2.0 * _LOG2E / SOFTCAP)))
            scores = 1.0 - 2.0 / (grown + 1.0)
            factor = SOFTCAP * _LOG2E
        else:
            # multiplied on the way into exp2, together with the subtraction
            factor = scale * _LOG2E
        if MASKED:
            seen = at[None, :] <= positions[:, None]
            if SPANS:
                seen |= (at[None, :] >= span_start[:, None]) & (at[None, :] < span_end[:, None])
            if WINDOW > 0:
                seen &= at[None, :] > positions[:, None] - WINDOW
            scores = tl.where(seen & (at < end)[None, :], scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1) * factor)
        # rows that have seen nothing yet: -inf - -inf is NaN
        base = tl.where(new_peak == float("-inf"), 0.0, new_peak) if MASKED else new_peak
        shrink = tl.exp2(peak - base)
        weights = tl.exp2(scores * factor - base[:, None])
        total = total * shrink + tl.sum(weights, 1)
        value_at = values + _rows(block, first, value_block, value_token, BLOCK_N, PAGE) + wide_value[None, :]
        value = _read(value_at, there[:, None] & (wide_value < DV)[None, :], DV, BLOCK_DV, MASKED, DTYPE)
        acc = acc * shrink[:, None]
        acc = tl.dot(weights.to(DTYPE), value, acc, input_precision=PRECISION)
        peak = new_peak
        block = next_block
    return acc, peak, total, block


@triton.jit(
    do_not_specialize=["table_row", "span_row", "splits"],
    do_not_specialize_on_alignment=["block_table", "context_lens", "query_starts", "spans", "sinks"],
)
def _attend_kernel(
    query,  # [T, H, D]
    key_pages,  # [N, Hk, PAGE, D]
    value_pages,  # [N, Hk, PAGE, DV]
    block_table,  # int32 [B, M]
    context_lens,  # int32 [B]
    query_starts,  # int32 [B + 1], or None: one token for each request
    spans,  # int32 [T, 2], or None
    sinks,  # [H], or None
    out,  # [T, H, DV], written with one split
    partial,  # float32 [T, H, splits, DV], written with several: what each split gives by itself
    log_sums,  # float32 [T, H, splits]: log2 of the sum of exponentials of each split
    splits,
    scale,
    value_scale,
    query_token,
    query_head,
    key_block,
    key_head,
    key_token,
    value_block,
    value_head,
    value_token,
    table_row,
    span_row,
    out_token,
    out_head,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,  # query heads of a kv head
    PACK: tl.constexpr,  # rows of a tile are tokens x PACK heads; GROUP or 1
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    PAGE: tl.constexpr,
    WINDOW: tl.constexpr,  # 0: none
    SOFTCAP: tl.constexpr,  # 0: none
    PHASES: tl.constexpr,  # tiles that every row sees whole go without masks
    DTYPE: tl.constexpr,  # what is multiplied
    PRECISION: tl.constexpr,
    SAME_LAYOUT: tl.constexpr,  # key and value pages have the same strides: rows are found once
    PDL: tl.constexpr,
):
    if SAME_LAYOUT:
        value_block = key_block
        value_token = key_token
    request = tl.program_id(1)
    # the last tiles of a prompt see most, so they start first
    tile = (tl.num_programs(2) - 1 - tl.program_id(2)) // splits
    split = tl.program_id(2) % splits
    first_head = tl.program_id(0) * PACK
    kv_head = first_head // GROUP
    context = tl.load(context_lens + request)
    if query_starts is None:
        start = request
        length = 1
    else:
        start = tl.load(query_starts + request)
        length = tl.load(query_starts + request + 1) - start
    if tile * BLOCK_M < length * PACK:
        rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        is_row = rows < length * PACK
        tokens = start.to(tl.int64) + rows // PACK
        heads = first_head + rows % PACK
        before = context - length
        positions = before + rows // PACK
        # the positions of the tile's first and last rows, and the keys that any of its rows sees: [low, high)
        first_position = before + tile * BLOCK_M // PACK
        last_position = before + tl.minimum((tile * BLOCK_M + BLOCK_M - 1) // PACK, length - 1)
        begin = 0
        if WINDOW > 0:
            begin = tl.maximum(first_position - WINDOW + 1, 0)
        low = begin // BLOCK_N * BLOCK_N
        high = last_position + 1
        if spans is None:
            span_start = positions
            span_end = positions
        else:
            span_start = tl.load(spans + tokens * span_row, is_row, other=0)
            span_end = tl.load(spans + tokens * span_row + 1, is_row, other=0)
            high = tl.maximum(high, tl.max(span_end, 0))
        high = tl.minimum(high, context)
        end = high
        if partial is not None:
            share = tl.cdiv(tl.cdiv(high - low, BLOCK_N), splits) * BLOCK_N
            low += split * share
            high = tl.minimum(high, low + share)
        acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
        peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        wide = tl.arange(0, BLOCK_D)
        table = block_table + request.to(tl.int64) * table_row
        block = _blocks(table, low, begin, high, BLOCK_N, PAGE)
        # no kernel of ours writes lengths, tables or spans: they may be read while the kernel before still runs
        if PDL:
            tl.extra.cuda.gdc_wait()
            tl.extra.cuda.gdc_launch_dependents()
        if low < high:
            keys = key_pages + kv_head.to(tl.int64) * key_head
            values = value_pages + kv_head.to(tl.int64) * value_head
            q = tl.load(
                query + tokens[:, None] * query_token + heads[:, None] * query_head + wide[None, :],
                is_row[:, None] & (wide < D)[None, :],
                other=0.0,
            ).to(DTYPE)
            # three stretches: [low, inner), where windows of rows begin; [inner, outer), which every row sees whole;
            # [outer, high), where positions of rows lie
            inner = low
            outer = low
            if PHASES:
                if WINDOW > 0:
                    inner = tl.cdiv(tl.maximum(last_position - WINDOW + 1, 0), BLOCK_N) * BLOCK_N
                    inner = tl.minimum(tl.maximum(inner, low), high)
                outer = tl.minimum(first_position + 1, high) // BLOCK_N * BLOCK_N
                outer = tl.maximum(outer, inner)
            for stretch in tl.static_range(0, 3):
                if stretch == 2 or (PHASES and (stretch == 1 or WINDOW > 0)):
                    acc, peak, total, block = _pass(
                        acc,
                        peak,
                        total,
                        block,
                        q,
                        positions,
                        span_start,
                        span_end,
                        keys,
                        values,
                        table,
                        low if stretch == 0 else (inner if stretch == 1 else outer),
                        inner if stretch == 0 else (outer if stretch == 1 else high),
                        begin,
                        end,
                        key_block,
                        key_token,
                        value_block,
                        value_token,
                        scale,
                        D,
                        DV,
                        BLOCK_D,
                        BLOCK_DV,
                        BLOCK_N,
                        PAGE,
                        WINDOW,
                        SOFTCAP,
                        spans is not None,
                        stretch != 1,
                        DTYPE,
                        PRECISION,
                    )
        wide_value = tl.arange(0, BLOCK_DV)
        mask = is_row[:, None] & (wide_value < DV)[None, :]
        if partial is not None:
            place = (tokens * HEADS + heads) * splits + split
            # a row that sees nothing here has log sum -inf, and its part is never read
            some = total > 0
            total = tl.where(some, total, 1.0)
            tl.store(log_sums + place, tl.where(some, peak + tl.log2(total), float("-inf")), is_row)
            part = acc * (1.0 / total)[:, None]
            tl.store(partial + place[:, None] * DV + wide_value[None, :], part, mask & some[:, None])
        else:
            if sinks is not None:
                sink = tl.load(sinks + heads, is_row, other=0.0).to(tl.float32) * _LOG2E
                with_sink = tl.maximum(peak, sink)
                shrink = tl.exp2(peak - with_sink)
                total = total * shrink + tl.exp2(sink - with_sink)
                acc = acc * shrink[:, None]
            # rows that see nothing are padding: zeros
            factor = value_scale / tl.where(total > 0, total, 1.0)
            place = out + tokens[:, None] * out_token + heads[:, None] * out_head + wide_value[None, :]
            tl.store(place, (acc * factor[:, None]).to(out.dtype.element_ty), mask)
    elif PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit(do_not_specialize=["splits"], do_not_specialize_on_alignment=["sinks"])
def _merge_kernel(
    partial,  # float32 [T, H, splits, DV]
    log_sums,  # float32 [T, H, splits]
    sinks,  # [H], or None
    out,  # [T, H, DV]
    splits,
    value_scale,
    out_token,
    out_head,
    HEADS: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_S: tl.constexpr,  # power of two, at least splits
    BLOCK_DV: tl.constexpr,
    PDL: tl.constexpr,
):
    """out = sum of the splits' results, each weighted by its share of the sum of exponentials."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    columns = tl.program_id(2) * BLOCK_DV + tl.arange(0, BLOCK_DV)
    split = tl.arange(0, BLOCK_S)
    place = (token * HEADS + head) * splits + split
    sums = tl.load(log_sums + place, split < splits, other=float("-inf"))
    there = sums > float("-inf")
    parts = tl.load(
        partial + place[:, None] * DV + columns[None, :], there[:, None] & (columns < DV)[None, :], other=0.0
    )
    peak = tl.max(sums, 0)
    if sinks is not None:
        sink = tl.load(sinks + head).to(tl.float32) * _LOG2E
        peak = tl.maximum(peak, sink)
    peak = tl.where(peak == float("-inf"), 0.0, peak)
    weights = tl.exp2(sums - peak)
    total = tl.sum(weights, 0)
    if sinks is not None:
        total += tl.exp2(sink - peak)
    factor = value_scale / tl.where(total > 0, total, 1.0)
    result = tl.sum(parts * weights[:, None], 0) * factor
    tl.store(out + token * out_token + head * out_head + columns, result.to(out.dtype.element_ty), columns < DV)
