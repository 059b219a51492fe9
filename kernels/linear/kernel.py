"""Linear layers of few rows: every weight is read once, as fast as memory gives it.

Two ways. ``_fma_kernel`` (up to 4 rows of x) multiplies and adds in float32 without tensor cores: a program owns a few
rows of the weight. ``_dot_kernel`` (up to 128 rows of x) uses tensor cores with the weight as the left factor,
``out^T = weight @ x^T``, so that its many rows fill the wide side of the instruction and x pads to 16 rows only.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..activation.kernel import activate


@triton.jit
def prefetch_rows(pointers, size, wanted, COUNT: tl.constexpr):
    """Ask for ``size`` bytes behind each of COUNT pointers to be brought to L2; both are multiples of 16.

    pointers: [COUNT]; wanted: int32 [COUNT], 0 = not this one. One thread asks for each.
    """
    tl.inline_asm_elementwise(
        "{ .reg .pred p, q; .reg .u32 t; mov.u32 t, %tid.x; setp.lt.u32 p, t, $4; setp.ne.and.u32 q, $3, 0, p; "
        "@q cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0; }",
        "=r,l,r,r,r",
        [pointers.to(tl.int64), size, wanted, COUNT],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _weight_tile(weight, rows, columns, row_stride, count, K: tl.constexpr, EVEN: tl.constexpr):
    """[1, BLOCK_N, BLOCK_K] of the weight; zero where there is none."""
    inside = (rows < count)[None, :, None]
    if not EVEN:
        inside = inside & (columns < K)[None, None, :]
    pointers = weight + rows.to(tl.int64)[None, :, None] * row_stride + columns[None, None, :]
    return tl.load(pointers, inside, other=0.0, eviction_policy="evict_first")


@triton.jit
def _x_tile(x, tokens, columns, x_row, count, K: tl.constexpr):
    """float32 [M, 1, BLOCK_K] of x; zero where there is none."""
    inside = (tokens < count)[:, None, None] & (columns < K)[None, None, :]
    pointers = x + tokens.to(tl.int64)[:, None, None] * x_row + columns[None, None, :]
    return tl.load(pointers, inside, other=0.0).to(tl.float32)


@triton.jit
def _norm_tile(norm, columns, K: tl.constexpr):
    """float32 [1, 1, BLOCK_K] of the norm's weight."""
    return tl.load(norm + columns[None, None, :], (columns < K)[None, None, :], other=0.0).to(tl.float32)


@triton.jit
def _normed(value, scale, rstd, offset, dtype: tl.constexpr, GEMMA: tl.constexpr):
    """The norm's last step, rounded as kernels.norm rounds."""
    value *= rstd[:, :, None]
    value = value * (offset + scale) if GEMMA else value.to(dtype).to(tl.float32) * scale
    return value.to(dtype).to(tl.float32)


@triton.jit
def _extras(bias, residual, tokens, rows, inside, residual_row, count_n, GATE: tl.constexpr, BIAS: tl.constexpr):
    """float32 bias, bias of the up projection and residual of a tile of results; 0 where there is none.

    tokens, rows: index tensors that broadcast to the tile's shape; inside: mask of that shape.
    """
    known = rows < count_n
    first = 0.0
    second = 0.0
    added = 0.0
    if BIAS:
        first = tl.load(bias + rows, known, other=0.0).to(tl.float32)
        if GATE != "":
            second = tl.load(bias + count_n + rows, known, other=0.0).to(tl.float32)
    if residual is not None:
        added = tl.load(residual + tokens.to(tl.int64) * residual_row + rows, inside, other=0.0).to(tl.float32)
    return first, second, added


@triton.jit
def _finish(y, y_up, extras, out, tokens, rows, inside, count_n, GATE: tl.constexpr):
    """Bias, gate, residual and the store of a tile of float32 results, rounded where separate ops would round."""
    dtype = out.dtype.element_ty
    y = (y + extras[0]).to(dtype).to(tl.float32)
    if GATE != "":
        y = activate(y, GATE).to(dtype).to(tl.float32) * (y_up + extras[1]).to(dtype).to(tl.float32)
        y = y.to(dtype).to(tl.float32)
    tl.store(out + tokens.to(tl.int64) * count_n + rows, (y + extras[2]).to(dtype), inside)


@triton.jit(do_not_specialize=["groups", "prefetch", "count_m"])
def _fma_kernel(
    x,  # [count_m, K]
    weight,  # [count_n, K]; with a gate [2 count_n, K], gates first
    bias,  # [count_n] or [2 count_n] or None
    residual,  # [count_m, count_n] or None
    norm,  # [K] or None
    out,  # [count_m, count_n]
    x_row,
    weight_row,
    residual_row,
    count_m,
    count_n,
    eps,
    offset,
    groups,  # a program owns groups * BLOCK_N rows of the weight
    prefetch,  # bytes of each row to bring to L2 while the kernel before this one runs; a multiple of 16
    K: tl.constexpr,
    M: tl.constexpr,  # 1, 2 or 4, at least count_m
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GATE: tl.constexpr,  # "" or the activation
    BIAS: tl.constexpr,
    NORM: tl.constexpr,
    GEMMA: tl.constexpr,
    PDL: tl.constexpr,
):
    STEPS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    EVEN: tl.constexpr = K % BLOCK_K == 0
    tokens = tl.arange(0, M)
    lanes = tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_K)
    first = tl.program_id(0) * (groups * BLOCK_N)
    weight_up = weight + tl.cast(count_n, tl.int64) * weight_row
    if PDL:
        # every program of this kernel is on its SM when the next one starts, so that one takes only what is free
        tl.extra.cuda.gdc_launch_dependents()
    tile = _weight_tile(weight, first + lanes, columns, weight_row, count_n, K, EVEN)
    if GATE != "":
        tile_up = _weight_tile(weight_up, first + lanes, columns, weight_row, count_n, K, EVEN)
    if NORM:
        scale = _norm_tile(norm, columns, K)
    if PDL:
        if prefetch > 0:
            if STEPS == 1:
                later = (first + BLOCK_N + lanes).to(tl.int64)
                start = later * weight_row
                wanted = ((groups > 1) & (later < count_n)).to(tl.int32)
            else:
                start = (first + lanes).to(tl.int64) * weight_row + BLOCK_K
                wanted = (first + lanes < count_n).to(tl.int32)
            prefetch_rows(weight + start, prefetch, wanted, BLOCK_N)
            if GATE != "":
                prefetch_rows(weight_up + start, prefetch, wanted, BLOCK_N)
        tl.extra.cuda.gdc_wait()

    dtype: tl.constexpr = x.dtype.element_ty
    value = _x_tile(x, tokens, columns, x_row, count_m, K)
    if NORM:
        squares = value * value
        for step in range(1, STEPS):
            later = _x_tile(x, tokens, columns + step * BLOCK_K, x_row, count_m, K)
            squares += later * later
        rstd = tl.rsqrt(tl.sum(squares, 2) / K + eps)
        if STEPS == 1:
            value = _normed(value, scale, rstd, offset, dtype, GEMMA)

    for group in range(groups):
        rows = first + group * BLOCK_N + lanes
        inside = (tokens < count_m)[:, None] & (rows < count_n)[None, :]
        # early: they come from as far as a tile
        extras = _extras(bias, residual, tokens[:, None], rows[None, :], inside, residual_row, count_n, GATE, BIAS)
        acc = tl.zeros([M, BLOCK_N, BLOCK_K], tl.float32)
        if GATE != "":
            acc_up = tl.zeros([M, BLOCK_N, BLOCK_K], tl.float32)
        for step in range(STEPS):
            current = tile.to(tl.float32)
            if GATE != "":
                current_up = tile_up.to(tl.float32)
            # the next tile is on its way while this one is used
            ended = step == STEPS - 1
            next_rows = tl.where(ended, rows + BLOCK_N, rows)
            next_rows = tl.where(ended & (group == groups - 1), count_n, next_rows)
            next_columns = tl.where(ended, 0, (step + 1) * BLOCK_K) + columns
            tile = _weight_tile(weight, next_rows, next_columns, weight_row, count_n, K, EVEN)
            if GATE != "":
                tile_up = _weight_tile(weight_up, next_rows, next_columns, weight_row, count_n, K, EVEN)
            if STEPS > 1:
                value = _x_tile(x, tokens, columns + step * BLOCK_K, x_row, count_m, K)
                if NORM:
                    scale = _norm_tile(norm, columns + step * BLOCK_K, K)
                    value = _normed(value, scale, rstd, offset, dtype, GEMMA)
            acc += current * value
            if GATE != "":
                acc_up += current_up * value
        y = tl.sum(acc, 2)
        y_up = y
        if GATE != "":
            y_up = tl.sum(acc_up, 2)
        _finish(y, y_up, extras, out, tokens[:, None], rows[None, :], inside, count_n, GATE)


@triton.jit
def dot_steps(
    x_rows,  # [BLOCK_M] pointers to the first element of each row
    x_known,  # [BLOCK_M]
    weight_rows,  # [BLOCK_N] pointers
    weight_up_rows,  # [BLOCK_N] pointers; weight_rows again without a gate
    weight_known,  # [BLOCK_N]
    begin,  # first column
    end,  # after the last column
    K: tl.constexpr,
    EVEN: tl.constexpr,  # no step reaches over K
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GATED: tl.constexpr,
    EVICTION: tl.constexpr,  # "evict_first" for weights that nobody reads again soon, else ""
    UPCAST: tl.constexpr,  # the interpreter multiplies bfloat16 as if it were integers
):
    """float32 [BLOCK_N, BLOCK_M] weight @ x^T over columns begin to end, twice where gated (else both are one)."""
    columns = tl.arange(0, BLOCK_K)
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    acc_up = tl.zeros([BLOCK_N, BLOCK_M], tl.float32) if GATED else acc
    for start in range(begin, end, BLOCK_K):
        k = start + columns
        weight_inside = weight_known[:, None]
        x_inside = x_known[None, :]
        if not EVEN:
            weight_inside = weight_inside & (k < K)[None, :]
            x_inside = x_inside & (k < K)[:, None]
        tile = tl.load(weight_rows[:, None] + k[None, :], weight_inside, other=0.0, eviction_policy=EVICTION)
        value = tl.load(x_rows[None, :] + k[:, None], x_inside, other=0.0)
        if UPCAST:
            tile = tile.to(tl.float32)
            value = value.to(tl.float32)
        acc = tl.dot(tile, value, acc, input_precision="ieee")
        if GATED:
            tile_up = tl.load(weight_up_rows[:, None] + k[None, :], weight_inside, other=0.0, eviction_policy=EVICTION)
            if UPCAST:
                tile_up = tile_up.to(tl.float32)
            acc_up = tl.dot(tile_up, value, acc_up, input_precision="ieee")
    if not GATED:
        acc_up = acc
    return acc, acc_up


@triton.jit(do_not_specialize=["count_m", "prefetch"])
def _dot_kernel(
    x,  # [count_m, K]
    weight,  # [count_n, K]; with a gate [2 count_n, K], gates first
    bias,  # [count_n] or [2 count_n] or None
    residual,  # [count_m, count_n] or None
    out,  # [count_m, count_n]
    partial,  # None, or float32 [splits, count_m, columns of the weight]: sums for _reduce_kernel
    x_row,
    weight_row,
    residual_row,
    count_m,
    count_n,
    span,  # columns of a split, a multiple of BLOCK_K
    prefetch,  # bytes of each row to bring to L2 while the kernel before this one runs; a multiple of 16
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GATE: tl.constexpr,
    BIAS: tl.constexpr,
    UPCAST: tl.constexpr,
    PDL: tl.constexpr,
):
    GATED: tl.constexpr = GATE != ""
    tokens = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    begin = tl.program_id(1) * span
    x_rows = x + tokens.to(tl.int64) * x_row
    weight_rows = weight + rows.to(tl.int64) * weight_row
    weight_up_rows = weight_rows + tl.cast(count_n, tl.int64) * weight_row if GATED else weight_rows
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        if prefetch > 0:
            wanted = (rows < count_n).to(tl.int32)
            prefetch_rows(weight_rows + begin, prefetch, wanted, BLOCK_N)
            if GATED:
                prefetch_rows(weight_up_rows + begin, prefetch, wanted, BLOCK_N)
        tl.extra.cuda.gdc_wait()
    y, y_up = dot_steps(
        x_rows,
        tokens < count_m,
        weight_rows,
        weight_up_rows,
        rows < count_n,
        begin,
        min(begin + span, K),
        K,
        K % BLOCK_K == 0,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
        GATED,
        "evict_first",
        UPCAST,
    )
    inside = (rows < count_n)[:, None] & (tokens < count_m)[None, :]
    if partial is None:
        extras = _extras(bias, residual, tokens[None, :], rows[:, None], inside, residual_row, count_n, GATE, BIAS)
        _finish(y, y_up, extras, out, tokens[None, :], rows[:, None], inside, count_n, GATE)
    else:
        width = 2 * count_n if GATED else count_n
        place = partial + (tl.program_id(1).to(tl.int64) * count_m + tokens)[None, :] * width + rows[:, None]
        tl.store(place, y, inside)
        if GATED:
            tl.store(place + count_n, y_up, inside)


@triton.jit(do_not_specialize=["count_m", "splits"])
def _reduce_kernel(
    partial,  # float32 [splits, count_m, columns of the weight]
    bias,
    residual,
    out,  # [count_m, count_n]
    residual_row,
    count_m,
    count_n,
    splits,
    BLOCK: tl.constexpr,
    GATE: tl.constexpr,
    BIAS: tl.constexpr,
    PDL: tl.constexpr,
):
    token = tl.program_id(1)
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = rows < count_n
    width = 2 * count_n if GATE != "" else count_n
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    extras = _extras(bias, residual, token, rows, inside, residual_row, count_n, GATE, BIAS)
    y = tl.zeros([BLOCK], tl.float32)
    y_up = tl.zeros([BLOCK], tl.float32)
    # always in this order: the same sum every time
    for split in range(splits):
        source = partial + (tl.cast(split, tl.int64) * count_m + token) * width + rows
        y += tl.load(source, inside, other=0.0)
        if GATE != "":
            y_up += tl.load(source + count_n, inside, other=0.0)
    _finish(y, y_up, extras, out, token, rows, inside, count_n, GATE)
