"""Mixture of experts: routing, order of the tokens by expert, one GEMM for all experts, sum over a token's experts.

A pair is (token, place among the token's experts): pair p belongs to token p // top_k. A slot is a block of up to
BLOCK_M pairs of one expert; how many slots there can be follows from shapes alone, so grids need nothing from the
device.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..activation.kernel import activate
from ..linear.kernel import dot_steps


@triton.jit
def _route_kernel(
    logits,  # [T, EXPERTS]
    bias,  # float32 [EXPERTS] or None
    weights,  # float32 [T, TOP_K]
    experts,  # int64 [T, TOP_K]
    logits_row,
    scale,
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,  # powers of two, at least GROUPS, EXPERTS / GROUPS, TOP_K
    BLOCK_SIZE: tl.constexpr,
    BLOCK_TOP: tl.constexpr,
    SIGMOID: tl.constexpr,
    RENORMALISE: tl.constexpr,
    PDL: tl.constexpr,
):
    SIZE: tl.constexpr = EXPERTS // GROUPS
    token = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, BLOCK_GROUPS)
    place = tl.arange(0, BLOCK_SIZE)
    number = group[:, None] * SIZE + place[None, :]
    known = (group < GROUPS)[:, None] & (place < SIZE)[None, :]
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    logit = tl.load(logits + token * logits_row + number, known, other=float("-inf")).to(tl.float32)
    if SIGMOID:
        score = tl.sigmoid(logit)
    else:
        score = tl.exp(logit - tl.max(tl.max(logit, 1), 0))
        score = score / tl.sum(tl.sum(score, 1), 0)
    choice = score
    if bias is not None:
        choice += tl.load(bias + number, known, other=0.0)
    choice = tl.where(known, choice, float("-inf"))
    if TOP_GROUPS < GROUPS:
        # a group is as strong as its two best experts together
        best = tl.max(choice, 1)
        best_number = tl.min(tl.where(choice == best[:, None], number, EXPERTS), 1)
        strength = best
        if SIZE > 1:
            strength += tl.max(tl.where(number == best_number[:, None], float("-inf"), choice), 1)
        chosen = group < 0
        for _ in tl.static_range(TOP_GROUPS):
            strongest = tl.min(tl.where(strength == tl.max(strength, 0), group, BLOCK_GROUPS), 0)
            chosen = chosen | (group == strongest)
            strength = tl.where(group == strongest, float("-inf"), strength)
        choice = tl.where(chosen[:, None], choice, float("-inf"))
    lane = tl.arange(0, BLOCK_TOP)
    value = tl.zeros([BLOCK_TOP], tl.float32)
    index = tl.zeros([BLOCK_TOP], tl.int64)
    for turn in tl.static_range(TOP_K):
        # of equal ones the first; a NaN equals none and must still name an expert
        first = tl.min(tl.min(tl.where(choice == tl.max(tl.max(choice, 1), 0), number, EXPERTS - 1), 1), 0)
        here = number == first
        value = tl.where(lane == turn, tl.sum(tl.sum(tl.where(here, score, 0.0), 1), 0), value)
        index = tl.where(lane == turn, first.to(tl.int64), index)
        choice = tl.where(here, float("-inf"), choice)
    if RENORMALISE:
        value = value / (tl.sum(value, 0) + 1e-20)
    value *= scale
    tl.store(weights + token * TOP_K + lane, value, lane < TOP_K)
    tl.store(experts + token * TOP_K + lane, index, lane < TOP_K)


@triton.jit(do_not_specialize=["first_expert", "pairs"])
def _count_kernel(
    experts,  # int64 [pairs]
    counts,  # int32 [experts here]
    first_expert,
    pairs,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    expert = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    found = tl.zeros([BLOCK], tl.int32)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    for start in range(0, pairs, BLOCK):
        inside = start + lane < pairs
        chosen = tl.load(experts + start + lane, inside, other=0) - first_expert
        found += (inside & (chosen == expert)).to(tl.int32)
    tl.store(counts + expert, tl.sum(found, 0))


@triton.jit(do_not_specialize=["first_expert", "pairs", "slots"])
def _place_kernel(
    experts,  # int64 [pairs]
    counts,  # int32 [EXPERTS] or None: counted here
    order,  # int32 [pairs]: the pairs of experts that are here, by expert, then by number
    slot_expert,  # int32 [slots]: -1 = nothing to do
    slot_begin,  # int32 [slots]: where in order the slot's pairs begin, and where its expert's end
    slot_end,
    first_expert,
    pairs,
    slots,
    EXPERTS: tl.constexpr,  # how many are here; one program for each
    BLOCK_EXPERTS: tl.constexpr,  # power of two, at least EXPERTS
    BLOCK_M: tl.constexpr,
    BLOCK: tl.constexpr,
    COUNT_BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    expert = tl.program_id(0)
    number = tl.arange(0, BLOCK_EXPERTS)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    if counts is not None:
        count = tl.load(counts + number, number < EXPERTS, other=0)
    else:
        lane = tl.arange(0, COUNT_BLOCK)
        found = tl.zeros([COUNT_BLOCK, BLOCK_EXPERTS], tl.int32)
        for start in range(0, pairs, COUNT_BLOCK):
            inside = start + lane < pairs
            chosen = tl.load(experts + start + lane, inside, other=0) - first_expert
            found += (inside[:, None] & (chosen[:, None] == number[None, :])).to(tl.int32)
        # a pair whose expert is elsewhere may equal a number past the last one here
        count = tl.where(number < EXPERTS, tl.sum(found, 0), 0)
    slot_count = (count + (BLOCK_M - 1)) // BLOCK_M
    begin = tl.sum(tl.where(number < expert, count, 0), 0)
    end = begin + tl.sum(tl.where(number == expert, count, 0), 0)
    slot = tl.sum(tl.where(number < expert, slot_count, 0), 0)
    for block in range((end - begin + (BLOCK_M - 1)) // BLOCK_M):
        tl.store(slot_expert + slot + block, expert)
        tl.store(slot_begin + slot + block, begin + block * BLOCK_M)
        tl.store(slot_end + slot + block, end)
    lane = tl.arange(0, BLOCK)
    if expert == EXPERTS - 1:
        for start in range(tl.sum(slot_count, 0), slots, BLOCK):
            tl.store(slot_expert + start + lane, tl.full([BLOCK], -1, tl.int32), start + lane < slots)
    place = begin
    for start in range(0, pairs, BLOCK):
        inside = start + lane < pairs
        chosen = tl.load(experts + start + lane, inside, other=0) - first_expert
        mine = (inside & (chosen == expert)).to(tl.int32)
        tl.store(order + place + tl.cumsum(mine, 0) - 1, start + lane, mine == 1)
        place += tl.sum(mine, 0)


@triton.jit
def _grouped_kernel(
    x,  # [pairs / DIVISOR, K]
    weight,  # [experts, count_n, K]; with a gate [experts, 2 count_n, K], gates first
    scales,  # [pairs] or None: what each pair's result is multiplied by
    out,  # [pairs, count_n]
    order,
    slot_expert,
    slot_begin,
    slot_end,
    x_row,
    expert_stride,
    weight_row,
    count_n,
    K: tl.constexpr,
    DIVISOR: tl.constexpr,  # pair p reads row p // DIVISOR of x
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GATE: tl.constexpr,  # "" or the activation
    UPCAST: tl.constexpr,
    PDL: tl.constexpr,
):
    GATED: tl.constexpr = GATE != ""
    dtype = out.dtype.element_ty
    slot = tl.program_id(1)
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    expert = tl.load(slot_expert + slot)
    if expert >= 0:
        places = tl.load(slot_begin + slot) + tl.arange(0, BLOCK_M)
        used = places < tl.load(slot_end + slot)
        pairs = tl.load(order + places, used, other=0).to(tl.int64)
        weight_rows = weight + expert.to(tl.int64) * expert_stride + rows.to(tl.int64) * weight_row
        weight_up_rows = weight_rows + tl.cast(count_n, tl.int64) * weight_row if GATED else weight_rows
        y, y_up = dot_steps(
            x + pairs // DIVISOR * x_row,
            used,
            weight_rows,
            weight_up_rows,
            rows < count_n,
            0,
            K,
            K,
            K % BLOCK_K == 0,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
            GATED,
            "",
            UPCAST,
        )
        y = y.to(dtype).to(tl.float32)
        if GATED:
            y = activate(y, GATE).to(dtype).to(tl.float32) * y_up.to(dtype).to(tl.float32)
        if scales is not None:
            y *= tl.load(scales + pairs, used, other=0.0).to(tl.float32)[None, :]
        inside = (rows < count_n)[:, None] & used[None, :]
        tl.store(out + pairs[None, :] * count_n + rows[:, None], y.to(dtype), inside)


@triton.jit(do_not_specialize=["first_expert"])
def _combine_kernel(
    parts,  # [T * TOP_K, width]; rows of pairs whose expert is elsewhere are not written
    experts,  # int64 [T, TOP_K]
    out,  # [T, width]
    width,
    first_expert,
    EXPERTS: tl.constexpr,  # how many are here
    TOP_K: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    token = tl.program_id(1).to(tl.int64)
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    total = tl.zeros([BLOCK], tl.float32)
    # always in this order: the same sum every time
    for place in tl.static_range(TOP_K):
        pair = token * TOP_K + place
        expert = tl.load(experts + pair) - first_expert
        # not `&`: the interpreter of Triton 3.9 makes numbers of a scalar and a block of booleans
        here = tl.where((expert >= 0) & (expert < EXPERTS), columns < width, False)
        total += tl.load(parts + pair * width + columns, here, other=0.0).to(tl.float32)
    tl.store(out + token * width + columns, total.to(out.dtype.element_ty), columns < width)
