"""Launch table of the mixture of experts."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .._launch import next_power_of_2, pdl
from .kernel import _combine_kernel, _count_kernel, _grouped_kernel, _place_kernel, _route_kernel


@dataclass(frozen=True)
class Tile:
    """Launch of ``_grouped_kernel``: rows of the weight (with a gate: pairs) and columns of a step, warps, stages."""

    block_n: int
    block_k: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Entry:
    """Pairs of a slot, and the tiles of the two projections."""

    block_m: int
    up: Tile
    down: Tile


# most pairs per expert -> entry. Up to 16 pairs an expert the weights' bytes are all that counts; past that padding
# to full slots costs less than the better rate of large tiles gains
TABLE: tuple[tuple[float, Entry], ...] = (
    (6, Entry(16, Tile(64, 128, 4, 4), Tile(64, 128, 4, 4))),
    (20, Entry(32, Tile(64, 128, 4, 3), Tile(64, 128, 4, 4))),
    (64, Entry(64, Tile(64, 64, 4, 4), Tile(128, 64, 8, 4))),
    (float("inf"), Entry(128, Tile(128, 64, 8, 3), Tile(128, 64, 8, 4))),
)
# up to so many pairs each program counts them all itself, which saves a kernel
_COUNT_IN_PLACE = 1024
_BLOCK = 1024


def select(pairs: int, experts: int) -> Entry:
    """The table's entry for ``pairs`` (token, expert) pairs over ``experts`` experts."""
    return next(entry for most, entry in TABLE if pairs <= most * experts)


def launch_route(
    logits: torch.Tensor,
    top_k: int,
    renormalise: bool,
    scoring: str,
    bias: torch.Tensor | None,
    groups: tuple[int, int],
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`triptych.kernels.moe.route`."""
    tokens, count = logits.shape
    if logits.stride(1) != 1:
        raise ValueError("elements of a row must lie next to each other")
    weights = torch.empty((tokens, top_k), dtype=torch.float32, device=logits.device)
    experts = torch.empty((tokens, top_k), dtype=torch.int64, device=logits.device)
    if tokens:
        flag = pdl(logits)
        _route_kernel[(tokens,)](
            logits,
            bias,
            weights,
            experts,
            logits.stride(0),
            float(scale),
            EXPERTS=count,
            TOP_K=top_k,
            GROUPS=groups[0],
            TOP_GROUPS=groups[1],
            BLOCK_GROUPS=next_power_of_2(groups[0]),
            BLOCK_SIZE=next_power_of_2(count // groups[0]),
            BLOCK_TOP=next_power_of_2(top_k),
            SIGMOID=scoring == "sigmoid",
            RENORMALISE=renormalise,
            PDL=flag,
            num_warps=1,
            launch_pdl=flag,
        )
    return weights, experts


def launch_experts(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    weights: torch.Tensor,
    experts: torch.Tensor,
    activation: str,
    first_expert: int,
    entry: Entry | None = None,
) -> torch.Tensor:
    """See :func:`triptych.kernels.moe.experts`; ``entry`` overrides the table's."""
    tokens, top_k = experts.shape
    hidden = x.shape[1]
    count, ffn = gate_up.shape[0], gate_up.shape[1] // 2
    if x.stride(1) != 1 or gate_up.stride(2) != 1 or down.stride(2) != 1:
        raise ValueError("elements of a row must lie next to each other")
    pairs = tokens * top_k
    out = torch.empty((tokens, hidden), dtype=x.dtype, device=x.device)
    if not pairs:
        return out.zero_()
    entry = entry or select(pairs, count)
    experts, weights = experts.contiguous(), weights.contiguous()
    flag = pdl(x)
    order, slots = _placed(experts, count, first_expert, entry.block_m, flag)
    inner = torch.empty((pairs, ffn), dtype=x.dtype, device=x.device)
    parts = torch.empty((pairs, hidden), dtype=x.dtype, device=x.device)
    for source, weight, scales, target, tile, divisor, gate in (
        (x, gate_up, None, inner, entry.up, top_k, activation),
        (inner, down, weights, parts, entry.down, 1, ""),
    ):
        columns = target.shape[1]
        _grouped_kernel[(-(-columns // tile.block_n), slots.shape[1])](
            source,
            weight,
            scales,
            target,
            order,
            *slots.unbind(),
            source.stride(0),
            weight.stride(0),
            weight.stride(1),
            columns,
            K=source.shape[1],
            DIVISOR=divisor,
            BLOCK_M=entry.block_m,
            BLOCK_N=tile.block_n,
            BLOCK_K=tile.block_k,
            GATE=gate,
            UPCAST=not x.is_cuda,
            PDL=flag,
            num_warps=tile.warps,
            num_stages=tile.stages,
            launch_pdl=flag,
        )
    block = min(next_power_of_2(hidden), 1024)
    _combine_kernel[(-(-hidden // block), tokens)](
        parts,
        experts,
        out,
        hidden,
        first_expert,
        EXPERTS=count,
        TOP_K=top_k,
        BLOCK=block,
        PDL=flag,
        num_warps=4,
        launch_pdl=flag,
    )
    return out


def _placed(
    experts: torch.Tensor, count: int, first_expert: int, block_m: int, flag: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """(order int32 [pairs], slots int32 [3, most slots]) as ``_place_kernel`` writes them."""
    pairs = experts.numel()
    # each expert in use adds at most block_m - 1 empty places
    most = (pairs + min(count, pairs) * (block_m - 1)) // block_m
    # each row starts at 16 bytes: else a kernel would be compiled again for some numbers of tokens
    most = -(-most // 4) * 4
    order = torch.empty(pairs, dtype=torch.int32, device=experts.device)
    slots = torch.empty((3, most), dtype=torch.int32, device=experts.device)
    block = min(next_power_of_2(pairs), _BLOCK)
    counts = None
    if pairs > _COUNT_IN_PLACE:
        counts = torch.empty(count, dtype=torch.int32, device=experts.device)
        _count_kernel[(count,)](
            experts, counts, first_expert, pairs, BLOCK=block, PDL=flag, num_warps=4, launch_pdl=flag
        )
    _place_kernel[(count,)](
        experts,
        counts,
        order,
        *slots.unbind(),
        first_expert,
        pairs,
        most,
        EXPERTS=count,
        BLOCK_EXPERTS=next_power_of_2(count),
        BLOCK_M=block_m,
        BLOCK=block,
        COUNT_BLOCK=min(block, 32),
        PDL=flag,
        num_warps=4,
        launch_pdl=flag,
    )
    return order, slots
