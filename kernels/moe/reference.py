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
    """See :func:`triptych.kernels.moe.experts`; one expert after the other, in the order of transformers' modules."""
    out = torch.zeros_like(x)
    top_k = experts.shape[1]
    chosen, order = torch.sort(experts.flatten() - first_expert, stable=True)
    used, counts = torch.unique_consecutive(chosen, return_counts=True)
    scales = weights.flatten()[order].unsqueeze(-1)
    tokens = order.div(top_k, rounding_mode="floor")
    begin = 0
    for expert, count in zip(used.tolist(), counts.tolist(), strict=True):
        end = begin + count
        if 0 <= expert < len(gate_up):
            rows = tokens[begin:end]
            hidden = gated_reference(functional.linear(x[rows], gate_up[expert]), activation)
            y = functional.linear(hidden, down[expert]) * scales[begin:end]
            out.index_add_(0, rows, y.to(out.dtype))
        begin = end
    return out
