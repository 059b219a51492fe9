"""Expert operations in plain torch, until those of ``kernels.moe`` are there."""

from __future__ import annotations

import torch

from .....kernels.activation import gated


def route(
    logits: torch.Tensor,
    top_k: int,
    *,
    renormalise: bool,
    scoring: str,
    bias: torch.Tensor | None = None,
    groups: tuple[int, int] = (1, 1),
    scale: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and numbers of the chosen experts."""
    scores = logits.float().softmax(-1) if scoring == "softmax" else logits.float().sigmoid()
    choice = scores if bias is None else scores + bias
    if groups[0] > 1:
        parts = choice.view(len(choice), groups[0], -1)
        best = parts.topk(2, -1)[0].sum(-1)
        kept = torch.zeros_like(best).scatter_(1, best.topk(groups[1], -1)[1], 1).bool()
        choice = parts.masked_fill(~kept[..., None], -torch.inf).flatten(1)
    chosen = choice.topk(top_k, -1)[1]
    weights = scores.gather(1, chosen)
    if renormalise:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return weights * scale, chosen


def experts(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    weights: torch.Tensor,
    experts: torch.Tensor,
    *,
    activation: str,
    first_expert: int = 0,
) -> torch.Tensor:
    """The chosen experts' weighted sum."""
    out = torch.zeros_like(x)
    for expert in range(len(gate_up)):
        token, place = (experts == expert + first_expert).nonzero(as_tuple=True)
        inner = gated(x[token] @ gate_up[expert].T, activation)
        out.index_add_(0, token, (inner @ down[expert].T * weights[token, place, None]).to(x.dtype))
    return out
