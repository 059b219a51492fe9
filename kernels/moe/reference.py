"""Mixture of experts in plain torch: what runs on a CPU."""

from __future__ import annotations

import torch
from torch.nn import functional

from ..activation import gated_reference


def route_reference(
    logits: torch.Tensor,
    top_k: int,
    *,
    renormalise: bool,
    scoring: str,
    bias: torch.Tensor | None = None,
    groups: tuple[int, int] = (1, 1),
    scale: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`triptych.kernels.moe.route`."""
    scores = logits.float().sigmoid() if scoring == "sigmoid" else logits.softmax(-1, dtype=torch.float32)
    choice = scores if bias is None else scores + bias
    count, keep = groups
    if keep < count:
        by_group = choice.reshape(*choice.shape[:-1], count, -1)
        strength = by_group.topk(min(2, by_group.shape[-1]), -1).values.sum(-1)
        kept = torch.zeros_like(strength, dtype=torch.bool).scatter_(-1, strength.topk(keep, -1).indices, True)
        choice = by_group.masked_fill(~kept.unsqueeze(-1), float("-inf")).flatten(-2)
    experts = choice.topk(top_k, -1).indices
    weights = scores.gather(-1, experts)
    if renormalise:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return weights if scale == 1.0 else weights * scale, experts


def experts_reference(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    weights: torch.Tensor,
    experts: torch.Tensor,
    *,
    activation: str,
    first_expert: int = 0,
) -> torch.Tensor:
    """See :func:`triptych.kernels.moe.experts`; adds up in the order of the experts, as transformers' modules do."""
    chosen, order = torch.sort(experts.flatten() - first_expert, stable=True)
    used, counts = (values.tolist() for values in torch.unique_consecutive(chosen, return_counts=True))
    # sorted: the pairs of experts elsewhere come first and last
    before = sum(count for expert, count in zip(used, counts, strict=True) if expert < 0)
    here = [(expert, count) for expert, count in zip(used, counts, strict=True) if 0 <= expert < len(gate_up)]
    out = torch.zeros_like(x)
    if not here:
        return out
    order = order[before : before + sum(count for _, count in here)]
    tokens = order.div(experts.shape[1], rounding_mode="floor")
    sizes = [count for _, count in here]
    rows = torch.split(x[tokens], sizes)
    both = torch.cat([functional.linear(part, gate_up[expert]) for (expert, _), part in zip(here, rows, strict=True)])
    hidden = torch.split(gated_reference(both, activation), sizes)
    parts = torch.cat([functional.linear(part, down[expert]) for (expert, _), part in zip(here, hidden, strict=True)])
    return out.index_add_(0, tokens, (parts * weights.flatten()[order].unsqueeze(-1)).to(out.dtype))
