"""Sampling without a sort: thresholds by bisection on the bits of exp(logit - maximum).

Such a weight lies in [0, 1], so its float32 bits, read as an integer, order as it does. Sums of weights are integers
too, in units of 2^-40: exact, the same whatever the order of summation, hence the same draw in any batch.
"""

from __future__ import annotations

import triton
import triton.language as tl

# bits of 2^-40, the least weight that counts, and of the first float32 beyond 1
_LEAST = tl.constexpr((127 - 40) << 23)
_BEYOND = tl.constexpr((127 << 23) + 1)
_UNIT = tl.constexpr(2.0**40)
_GREEDY_BELOW = tl.constexpr(1e-5)
_NO_TOKEN = tl.constexpr(2**31 - 1)


@triton.jit
def _best_kernel(
    logits,  # [N, V]
    values,  # float32 [N, chunks], out: the largest logit of each chunk
    tokens,  # int32 [N, chunks], out: the lowest token that has it
    row_stride,
    vocabulary,
    chunks,
    CHUNK: tl.constexpr,
    PDL: tl.constexpr,
):
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    columns = chunk * CHUNK + tl.arange(0, CHUNK)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    x = tl.load(logits + row * row_stride + columns, columns < vocabulary, other=float("-inf")).to(tl.float32)
    # NaN would lose every comparison; the largest of all makes the row unusable just the same
    x = tl.where(x != x, float("inf"), x)
    best = tl.max(x, 0)
    token = tl.min(tl.where(x == best, columns, _NO_TOKEN), 0)
    tl.store(values + row * chunks + chunk, best)
    tl.store(tokens + row * chunks + chunk, token)


@triton.jit
def _best_of_row(values, tokens, row, chunks, BLOCK: tl.constexpr):
    """Largest logit of a row and the lowest token that has it."""
    at = tl.arange(0, BLOCK)
    value = tl.load(values + row * chunks + at, at < chunks, other=float("-inf"))
    token = tl.load(tokens + row * chunks + at, at < chunks, other=_NO_TOKEN)
    best = tl.max(value, 0)
    return best, tl.min(tl.where(value == best, token, _NO_TOKEN), 0)


@triton.jit
def _merge_kernel(
    values,  # float32 [N, chunks]
    tokens,  # int32 [N, chunks]
    out,  # int64 [N]
    usable,  # bool [N], out
    chunks,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    best, token = _best_of_row(values, tokens, row, chunks, BLOCK)
    tl.store(out + row, token.to(tl.int64))
    tl.store(usable + row, (best < float("inf")) & (best > float("-inf")))


@triton.jit
def _weight(x, heat, top):
    """exp((x - maximum) / temperature), the same bits wherever it is computed; top = maximum / temperature."""
    return tl.exp(tl.div_rn(x, heat + tl.zeros_like(x)) - top)


@triton.jit
def _amount(weight):
    """A weight as an integer."""
    return (weight * _UNIT).to(tl.int64)


@triton.jit
def _tile(logits, start, vocabulary, heat, top, TILE: tl.constexpr):
    """Columns of a tile of a row, their weights and the weights' bits; outside the vocabulary weights are 0."""
    columns = start + tl.arange(0, TILE)
    x = tl.load(logits + columns, columns < vocabulary, other=float("-inf")).to(tl.float32)
    weight = _weight(x, heat, top)
    return columns, weight, weight.to(tl.int32, bitcast=True)


@triton.jit
def _measure(logits, vocabulary, heat, top, least, TILE: tl.constexpr):
    """How many weights have bits of at least ``least``, and their sum."""
    count = tl.zeros((TILE,), tl.int32)
    total = tl.zeros((TILE,), tl.int64)
    for start in tl.range(0, vocabulary, TILE, num_stages=3):
        _, weight, bits = _tile(logits, start, vocabulary, heat, top, TILE)
        count += (bits >= least).to(tl.int32)
        total += tl.where(bits >= least, _amount(weight), 0)
    return tl.sum(count, 0).to(tl.int64), tl.sum(total, 0)


@triton.jit
def _search(logits, scratch, vocabulary, heat, top, need, low, count, at, WEIGHTS: tl.constexpr, TILE: tl.constexpr):
    """The largest threshold t with S(bits >= t) >= need, where S counts, or adds weights up.

    Args: low: a threshold that has S >= need; ``count`` weights reach it, of S = ``at``. scratch: int32 [TILE].

    Returns: t, S(bits >= t), S(bits > t).
    """
    high = low * 0 + _BEYOND
    above = at * 0
    count_above = count * 0
    # halve the range over the whole row until what lies in it fits a tile
    while (count - count_above > TILE) & (high - low > 1):
        middle = low + (high - low) // 2
        n, total = _measure(logits, vocabulary, heat, top, middle, TILE)
        s = total if WEIGHTS else n
        enough = s >= need
        low = tl.where(enough, middle, low)
        at = tl.where(enough, s, at)
        count = tl.where(enough, n, count)
        high = tl.where(enough, high, middle)
        above = tl.where(enough, above, s)
        count_above = tl.where(enough, count_above, n)
    if high - low > 1:
        found = 0
        for start in tl.range(0, vocabulary, TILE):
            _, _, bits = _tile(logits, start, vocabulary, heat, top, TILE)
            inside = (bits >= low) & (bits < high)
            place = found + tl.cumsum(inside.to(tl.int32), 0) - 1
            tl.store(scratch + place, bits, inside)
            found += tl.sum(inside.to(tl.int32), 0)
        # other threads of this program wrote what is read now
        tl.debug_barrier()
        at_list = tl.arange(0, TILE)
        bits = tl.load(scratch + at_list, at_list < found, other=0)
        amount = _amount(bits.to(tl.float32, bitcast=True)) if WEIGHTS else (bits > 0).to(tl.int64)
        beyond = above
        while high - low > 1:
            middle = low + (high - low) // 2
            s = beyond + tl.sum(tl.where(bits >= middle, amount, 0), 0)
            enough = s >= need
            low = tl.where(enough, middle, low)
            at = tl.where(enough, s, at)
            high = tl.where(enough, high, middle)
            above = tl.where(enough, above, s)
        # scratch may be used again
        tl.debug_barrier()
    return low, at, above


@triton.jit
def _kth_chunk(values, row, chunks, heat, top, k, BLOCK: tl.constexpr):
    """The k-th largest weight among the chunks' largest, in bits: at least k of the row reach it. Or the least."""
    at = tl.arange(0, BLOCK)
    value = tl.load(values + row * chunks + at, at < chunks, other=float("-inf"))
    bits = _weight(value, heat, top).to(tl.int32, bitcast=True)
    low = k * 0 + _LEAST
    if k <= chunks:
        high = k * 0 + _BEYOND
        while high - low > 1:
            middle = low + (high - low) // 2
            enough = tl.sum((bits >= middle).to(tl.int32), 0) >= k
            low = tl.where(enough, middle, low)
            high = tl.where(enough, high, middle)
    return low


@triton.jit
def _cut(logits, vocabulary, heat, top, threshold, stay, TILE: tl.constexpr):
    """The token of the ``stay``-th weight, in vocabulary order, whose bits are exactly ``threshold``."""
    seen = stay * 0
    start = 0
    last = 0
    while (seen < stay) & (start < vocabulary):
        columns, _, bits = _tile(logits, start, vocabulary, heat, top, TILE)
        equal = bits == threshold
        rank = seen + tl.cumsum(equal.to(tl.int64), 0)
        last = tl.max(tl.where(equal & (rank <= stay), columns, last), 0)
        seen += tl.sum(equal.to(tl.int64), 0)
        start += TILE
    return last


@triton.jit
def _kept(logits, start, vocabulary, heat, top, threshold, last, TILE: tl.constexpr):
    """Columns of a tile and their weights, as integers, 0 where a token was cut."""
    columns, weight, bits = _tile(logits, start, vocabulary, heat, top, TILE)
    kept = (bits > threshold) | ((bits == threshold) & (columns <= last))
    return columns, tl.where(kept, _amount(weight), 0)


@triton.jit
def _draw_kernel(
    logits,  # [N, V]
    values,  # float32 [N, chunks], of _best_kernel
    tokens,  # int32 [N, chunks]
    temperature,  # [N]
    top_k,  # [N]
    top_p,  # [N]
    min_p,  # [N]
    uniform,  # float64 [N]
    scratch,  # int32 [N, TILE]
    out,  # int64 [N]
    row_stride,
    vocabulary,
    chunks,
    BLOCK: tl.constexpr,  # power of two that covers the chunks
    TILE: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    best, token = _best_of_row(values, tokens, row, chunks, BLOCK)
    heat = tl.load(temperature + row).to(tl.float32)
    k = tl.load(top_k + row).to(tl.int32)
    usable = (best < float("inf")) & (best > float("-inf"))
    if (heat < _GREEDY_BELOW) | (k == 1) | (not usable):
        tl.store(out + row, token.to(tl.int64))
    else:
        logits += row * row_stride
        scratch += row * TILE
        top = tl.div_rn(best, heat)
        share = tl.load(top_p + row).to(tl.float64)
        floor = tl.load(min_p + row).to(tl.float32)
        # kept: bits beyond the threshold, and of the ``equal`` just there the first ``stay``; all where both are 0
        threshold = _LEAST + k * 0
        stay = tl.full((), 0, tl.int64)
        equal = tl.full((), 0, tl.int64)
        by_k = (k > 0) & (k < vocabulary)
        if by_k:
            low = _kth_chunk(values, row, chunks, heat, top, k, BLOCK)
            count, _ = _measure(logits, vocabulary, heat, top, low, TILE)
            # fewer than k have any weight: nothing to cut
            if count > k:
                threshold, at, above = _search(
                    logits, scratch, vocabulary, heat, top, k.to(tl.int64), low, count, count, False, TILE
                )
                equal = at - above
                stay = k - above
            else:
                threshold = low
        if share < 1.0:
            weight = _amount(threshold.to(tl.float32, bitcast=True))
            _, total = _measure(logits, vocabulary, heat, top, threshold + (equal > 0).to(tl.int32), TILE)
            total += stay * weight
            wanted = share * total.to(tl.float64)
            need = wanted.to(tl.int64)
            need = tl.maximum(need + (need.to(tl.float64) < wanted).to(tl.int64), 1)
            # all weights below this one together are less than what may be missing
            small = (total - need).to(tl.float32) / vocabulary * (0.999 / _UNIT)
            low = tl.maximum(threshold, small.to(tl.int32, bitcast=True))
            count, at = _measure(logits, vocabulary, heat, top, low, TILE)
            threshold, at, above = _search(logits, scratch, vocabulary, heat, top, need, low, count, at, True, TILE)
            weight = _amount(threshold.to(tl.float32, bitcast=True))
            equal = (at - above) // weight
            stay = (need - above + weight - 1) // weight
        at_least = tl.minimum(floor, 1.0).to(tl.int32, bitcast=True)
        if at_least > threshold:
            threshold = at_least
            stay = equal * 0
            equal = equal * 0
        last = vocabulary
        if stay < equal:
            last = _cut(logits, vocabulary, heat, top, threshold, stay, TILE)

        total = tl.full((), 0, tl.int64)
        for start in tl.range(0, vocabulary, TILE):
            _, amount = _kept(logits, start, vocabulary, heat, top, threshold, last, TILE)
            total += tl.sum(amount, 0)
        target = (tl.load(uniform + row).to(tl.float64) * total.to(tl.float64)).to(tl.int64)
        target = tl.minimum(target, total - 1)
        before = tl.full((), 0, tl.int64)
        chosen = tl.full((), -1, tl.int32)
        start = 0
        while chosen < 0:
            columns, amount = _kept(logits, start, vocabulary, heat, top, threshold, last, TILE)
            reached = before + tl.sum(amount, 0)
            if reached > target:
                passed = before + tl.cumsum(amount, 0) > target
                chosen = tl.min(tl.where(passed, columns, _NO_TOKEN), 0)
            before = reached
            start += TILE
        tl.store(out + row, chosen.to(tl.int64))
