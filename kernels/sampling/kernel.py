"""Sampling without a sort: thresholds on the bits of exp(logit - maximum).

Such a weight lies in [0, 1], so its float32 bits, read as an integer, order as it does. Sums of weights are integers
too, in units of 2^-40: exact, the same whatever the order of summation, hence the same draw in any batch.

A draw is five launches. Three read the row, a chunk per program: maxima; how many weights lie in each sixteenth of an
octave, from which a short kernel brackets the thresholds; sums of what surely stays, and a list of the few tokens
between the brackets. The last, one program for a row, finds thresholds and token from list, sums and one chunk.
"""

from __future__ import annotations

import triton
import triton.language as tl

# bits of 2^-40, the least weight that counts, and of the first float32 beyond 1
_LEAST = tl.constexpr((127 - 40) << 23)
_BEYOND = tl.constexpr((127 << 23) + 1)
# weights are counted in bins of 2^19 successive float32, the largest first; 512 of them reach down to 2^-32
_BINS = tl.constexpr(512)
_SHIFT = tl.constexpr(19)
_UNIT = tl.constexpr(2.0**40)
_GREEDY_BELOW = tl.constexpr(1e-5)
_NO_TOKEN = tl.constexpr(2**31 - 1)


@triton.jit
def _best_kernel(
    logits,  # [N, V]
    values,  # float32 [N, chunks], out: the largest logit of each chunk
    tokens,  # int32 [N, chunks], out: the lowest token that has it
    tally,  # int32 [N, _BINS + 1], out: zeros; or None
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
    if tally is not None:  # noqa: SIM102  decided while compiling, the other is not
        if chunk == 0:
            tl.store(tally + row * (_BINS + 1) + tl.arange(0, _BINS), tl.zeros((_BINS,), tl.int32))
            tl.store(tally + row * (_BINS + 1) + _BINS, 0)


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
def _settings(values, tokens, temperature, top_k, row, chunks, BLOCK: tl.constexpr):
    """Of a row: the best token, temperature, maximum / temperature, top-k, whether the best token is the answer."""
    best, token = _best_of_row(values, tokens, row, chunks, BLOCK)
    heat = tl.load(temperature + row).to(tl.float32)
    k = tl.load(top_k + row).to(tl.int32)
    plain = (heat < _GREEDY_BELOW) | (k == 1) | (best == float("inf")) | (best == float("-inf"))
    return token, heat, tl.div_rn(best, tl.where(plain, 1.0, heat)), k, plain


@triton.jit
def _count_kernel(
    logits,  # [N, V]
    values,  # float32 [N, chunks], of _best_kernel
    tokens,  # int32 [N, chunks]
    temperature,  # [N]
    top_k,  # [N]
    top_p,  # [N]
    tally,  # int32 [N, _BINS + 1]; each bin's count is added, for rows that top-k or top-p may cut
    row_stride,
    vocabulary,
    chunks,
    BLOCK: tl.constexpr,  # power of two that covers the chunks
    CHUNK: tl.constexpr,
    PDL: tl.constexpr,
):
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    _token, heat, top, k, plain = _settings(values, tokens, temperature, top_k, row, chunks, BLOCK)
    cuts = (tl.load(top_p + row) < 1.0) | ((k > 0) & (k < vocabulary))
    if cuts & (not plain):
        _, _, bits = _tile(logits + row * row_stride, chunk * CHUNK, vocabulary, heat, top, CHUNK)
        bins = tl.minimum((-bits + _BEYOND - 1) >> _SHIFT, _BINS - 1)
        counts = tl.histogram(bins, _BINS, bits >= _LEAST)
        tl.atomic_add(tally + row * (_BINS + 1) + tl.arange(0, _BINS), counts, counts > 0, sem="relaxed")


@triton.jit
def _least_of(bins):
    """Bits of the least weight of a bin."""
    return tl.where(bins == _BINS - 1, _LEAST, -((bins + 1) << _SHIFT) + _BEYOND)


@triton.jit
def _floor(min_p, row):
    """Bits of the least weight that min-p keeps."""
    return tl.minimum(tl.load(min_p + row).to(tl.float32), 1.0).to(tl.int32, bitcast=True)


@triton.jit
def _window_kernel(
    top_k,  # [N]
    top_p,  # [N]
    min_p,  # [N]
    tally,  # int32 [N, _BINS + 1], of _count_kernel
    bounds,  # int32 [N, 4], out: low, high, above, cut, see below
    vocabulary,
    PDL: tl.constexpr,
):
    """Where the cuts of a row lie, as far as the bins' counts tell.

    low, high: weights with bits of high or more surely stay, those below low surely go; the same where nothing in
    between is left to find. above: how many have high or more, where top-k cuts. cut: top-k leaves some weight out.
    """
    row = tl.program_id(0).to(tl.int64)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    k = tl.load(top_k + row).to(tl.int32)
    bins = tl.arange(0, _BINS)
    counts = tl.load(tally + row * (_BINS + 1) + bins)
    reached = tl.cumsum(counts, 0)
    cut = (k > 0) & (k < vocabulary) & (tl.sum(counts, 0) > k)
    kth = tl.sum((reached < k).to(tl.int32), 0)
    first = kth
    last = kth
    share = tl.load(top_p + row).to(tl.float64)
    if share < 1.0:
        # of what top-k leaves, every sum lies between those of the bins' least and largest weights
        most = tl.where(cut, k, vocabulary)
        left = (tl.minimum(reached, most) - tl.minimum(reached - counts, most)).to(tl.int64)
        little = left * _amount(_least_of(bins).to(tl.float32, bitcast=True))
        much = left * _amount((-(bins << _SHIFT) + _BEYOND - 1).to(tl.float32, bitcast=True))
        head_little, head_much = tl.cumsum(little, 0), tl.cumsum(much, 0)
        tail_little = (tl.sum(little, 0) - head_little).to(tl.float64)
        tail_much = (tl.sum(much, 0) - head_much).to(tl.float64)
        # down to a bin's least weight the share is reached where (1 - share) * head >= share * tail; rounding aside
        enough = (1.0 - share) * head_little.to(tl.float64) >= share * tail_much * (1.0 + 1e-9) + 2.0
        missing = (1.0 - share) * head_much.to(tl.float64) * (1.0 + 1e-9) + 2.0 < share * tail_little
        first = tl.sum(missing.to(tl.int32), 0)
        last = tl.where(cut, kth, tl.minimum(tl.sum(1 - enough.to(tl.int32), 0), _BINS - 1))
    searched = cut | (share < 1.0)
    low = tl.where(searched, _least_of(last), _LEAST)
    high = tl.where(searched, -(first << _SHIFT) + _BEYOND, _LEAST)
    above = tl.sum(tl.where(bins < first, counts, 0), 0)
    # from high on min-p alone decides
    at_least = _floor(min_p, row)
    tl.store(bounds + 4 * row, tl.where(at_least >= high, at_least, low))
    tl.store(bounds + 4 * row + 1, tl.maximum(high, at_least))
    tl.store(bounds + 4 * row + 2, above)
    tl.store(bounds + 4 * row + 3, cut.to(tl.int32))


@triton.jit
def _gather_kernel(
    logits,  # [N, V]
    values,  # float32 [N, chunks], of _best_kernel
    tokens,  # int32 [N, chunks]
    temperature,  # [N]
    top_k,  # [N]
    tally,  # int32 [N, _BINS + 1]; the last is the list's length, which is added to
    bounds,  # int32 [N, 4], of _window_kernel
    sums,  # int64 [N, 2, chunks], out: of the weights that surely stay, and of all
    listed,  # int32 [N, 2, ROOM], out: bits of the weights in between and their columns, in any order
    row_stride,
    vocabulary,
    chunks,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    ROOM: tl.constexpr,
    PDL: tl.constexpr,
):
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    _token, heat, top, _k, plain = _settings(values, tokens, temperature, top_k, row, chunks, BLOCK)
    if not plain:
        low, high = tl.load(bounds + 4 * row), tl.load(bounds + 4 * row + 1)
        columns, weight, bits = _tile(logits + row * row_stride, chunk * CHUNK, vocabulary, heat, top, CHUNK)
        amount = _amount(weight)
        tl.store(sums + 2 * row * chunks + chunk, tl.sum(tl.where(bits >= high, amount, 0), 0))
        tl.store(sums + (2 * row + 1) * chunks + chunk, tl.sum(amount, 0))
        inside = (bits >= low) & (bits < high)
        count = tl.sum(inside.to(tl.int32), 0)
        if count > 0:
            start = tl.atomic_add(tally + row * (_BINS + 1) + _BINS, count, sem="relaxed")
            place = start + tl.cumsum(inside.to(tl.int32), 0) - 1
            fits = inside & (place < ROOM)
            tl.store(listed + 2 * row * ROOM + place, bits, fits)
            tl.store(listed + (2 * row + 1) * ROOM + place, columns, fits)


@triton.jit
def _items(logits, listed, start, length, vocabulary, heat, top, low, high, ROOM: tl.constexpr, TILE: tl.constexpr):
    """Columns and bits of a tile of the list; where it has no room of the row, bits 0 outside the window."""
    at = start + tl.arange(0, TILE)
    if length <= ROOM:
        bits = tl.load(listed + at, at < length, other=0)
        columns = tl.load(listed + ROOM + at, at < length, other=0)
    else:
        columns, _, bits = _tile(logits, start, vocabulary, heat, top, TILE)
        bits = tl.where((bits >= low) & (bits < high), bits, 0)
    return columns, bits


@triton.jit
def _measure(columns, bits, source, threshold, last, before, ROOM: tl.constexpr, TILE: tl.constexpr):
    """Count and sum of the weights beyond the threshold, or just there up to column ``last``; of columns < ``before``.

    Args: columns, bits: the first tile of :func:`_items`. source: arguments of `_items`, to read the others.
    """
    logits, listed, length, vocabulary, heat, top, low, high = source
    kept = ((bits > threshold) | ((bits == threshold) & (columns <= last))) & (columns < before)
    count = tl.sum(kept.to(tl.int32), 0)
    total = tl.sum(tl.where(kept, _amount(bits.to(tl.float32, bitcast=True)), 0), 0)
    for start in range(TILE, tl.where(length <= ROOM, length, vocabulary), TILE):
        columns, bits = _items(logits, listed, start, length, vocabulary, heat, top, low, high, ROOM, TILE)
        kept = ((bits > threshold) | ((bits == threshold) & (columns <= last))) & (columns < before)
        count += tl.sum(kept.to(tl.int32), 0)
        total += tl.sum(tl.where(kept, _amount(bits.to(tl.float32, bitcast=True)), 0), 0)
    return count, total


@triton.jit
def _reach(bits, source, least, WEIGHTS: tl.constexpr, ROOM: tl.constexpr, TILE: tl.constexpr):
    """Count, or sum, of the weights with bits of at least ``least``; arguments as for :func:`_measure`."""
    logits, listed, length, vocabulary, heat, top, low, high = source
    amount = _amount(bits.to(tl.float32, bitcast=True)) if WEIGHTS else tl.full((TILE,), 1, tl.int32)
    reached = tl.sum(tl.where(bits >= least, amount, 0), 0)
    for start in range(TILE, tl.where(length <= ROOM, length, vocabulary), TILE):
        _, bits = _items(logits, listed, start, length, vocabulary, heat, top, low, high, ROOM, TILE)
        amount = _amount(bits.to(tl.float32, bitcast=True)) if WEIGHTS else tl.full((TILE,), 1, tl.int32)
        reached += tl.sum(tl.where(bits >= least, amount, 0), 0)
    return reached


@triton.jit
def _search(columns, bits, source, low, base, need, WEIGHTS: tl.constexpr, ROOM: tl.constexpr, TILE: tl.constexpr):
    """The largest threshold t in the window with base + S(bits >= t) >= need, where S counts, or adds weights up.

    Args: low: a threshold that has it.

    Returns: t, how many weights are beyond it, their sum, how many are just there; of those in the window.
    """
    vocabulary, high = source[3], source[7]
    while high - low > 1:
        middle = low + (high - low) // 2
        enough = base + _reach(bits, source, middle, WEIGHTS, ROOM, TILE) >= need
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
    count, total = _measure(columns, bits, source, low, -1, vocabulary, ROOM, TILE)
    reached, _ = _measure(columns, bits, source, low, vocabulary, vocabulary, ROOM, TILE)
    return low, count, total, reached - count


# a single chunk, as a constant, is more than the compiler of Triton 3.6 can take
@triton.jit(do_not_specialize=["chunks"])
def _draw_kernel(
    logits,  # [N, V]
    values,  # float32 [N, chunks], of _best_kernel
    tokens,  # int32 [N, chunks]
    temperature,  # [N]
    top_k,  # [N]
    top_p,  # [N]
    min_p,  # [N]
    uniform,  # float64 [N]
    tally,  # int32 [N, _BINS + 1], of _gather_kernel
    bounds,  # int32 [N, 4], of _window_kernel
    sums,  # int64 [N, 2, chunks], of _gather_kernel
    listed,  # int32 [N, 2, ROOM]
    out,  # int64 [N]
    row_stride,
    vocabulary,
    chunks,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    ROOM: tl.constexpr,
    TILE: tl.constexpr,  # items that stay in registers
    PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    token, heat, top, k, plain = _settings(values, tokens, temperature, top_k, row, chunks, BLOCK)
    if plain:
        tl.store(out + row, token.to(tl.int64))
    else:
        logits += row * row_stride
        listed += 2 * row * ROOM
        low, high = tl.load(bounds + 4 * row), tl.load(bounds + 4 * row + 1)
        length = tl.load(tally + row * (_BINS + 1) + _BINS)
        at = tl.arange(0, BLOCK)
        sure = tl.load(sums + 2 * row * chunks + at, at < chunks, other=0)
        certain = tl.sum(sure, 0)
        total = tl.sum(tl.load(sums + (2 * row + 1) * chunks + at, at < chunks, other=0), 0)
        columns, bits = _items(logits, listed, 0, length, vocabulary, heat, top, low, high, ROOM, TILE)
        source = (logits, listed, length, vocabulary, heat, top, low, high)

        # kept: bits beyond the threshold, and just there up to the column ``last``
        threshold = low
        last = vocabulary
        if low < high:
            # of the ``equal`` weights just at the threshold the first ``stay``
            above = tl.load(bounds + 4 * row + 2)
            share = tl.load(top_p + row).to(tl.float64)
            at_least = _floor(min_p, row)
            beyond = above * 0
            stay = tl.full((), 0, tl.int64)
            equal = above * 0
            if tl.load(bounds + 4 * row + 3) != 0:
                threshold, beyond, more, equal = _search(
                    columns, bits, source, low, above, k, WEIGHTS=False, ROOM=ROOM, TILE=TILE
                )
                stay = (k - above - beyond).to(tl.int64)
                total = certain + more + stay * _amount(threshold.to(tl.float32, bitcast=True))
            if share < 1.0:
                wanted = share * total.to(tl.float64)
                need = wanted.to(tl.int64)
                need = tl.maximum(need + (need.to(tl.float64) < wanted).to(tl.int64), 1)
                threshold, beyond, more, equal = _search(
                    columns, bits, source, threshold, certain, need, WEIGHTS=True, ROOM=ROOM, TILE=TILE
                )
                weight = _amount(threshold.to(tl.float32, bitcast=True))
                stay = (need - certain - more + weight - 1) // weight
            if at_least > threshold:
                threshold = at_least
            elif stay < equal:
                first = above * 0 - 1
                while last - first > 1:
                    middle = first + (last - first) // 2
                    count, _ = _measure(columns, bits, source, threshold, middle, vocabulary, ROOM, TILE)
                    last = tl.where(count - beyond >= stay, middle, last)
                    first = tl.where(count - beyond >= stay, first, middle)

        _, left = _measure(columns, bits, source, threshold, last, vocabulary, ROOM, TILE)
        total = certain + left
        target = (tl.load(uniform + row).to(tl.float64) * total.to(tl.float64)).to(tl.int64)
        target = tl.minimum(target, total - 1)
        # the first chunk up to whose end the sum exceeds the target, and the sum before it
        chunk = chunks - 1
        before = chunk * 0
        while before < chunk:
            middle = before + (chunk - before) // 2
            _, left = _measure(columns, bits, source, threshold, last, (middle + 1) * CHUNK, ROOM, TILE)
            passed = tl.sum(tl.where(at <= middle, sure, 0), 0) + left > target
            chunk = tl.where(passed, middle, chunk)
            before = tl.where(passed, before, middle + 1)
        _, left = _measure(columns, bits, source, threshold, last, chunk * CHUNK, ROOM, TILE)
        reached = tl.sum(tl.where(at < chunk, sure, 0), 0) + left
        places, weight, bits = _tile(logits, chunk * CHUNK, vocabulary, heat, top, CHUNK)
        kept = (bits > threshold) | ((bits == threshold) & (places <= last))
        passed = reached + tl.cumsum(tl.where(kept, _amount(weight), 0), 0) > target
        tl.store(out + row, tl.min(tl.where(passed, places, _NO_TOKEN), 0).to(tl.int64))
