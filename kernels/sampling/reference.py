"""Sampling in plain torch: what runs on a CPU."""

from __future__ import annotations

import torch

# a temperature below this is greedy
GREEDY_BELOW = 1e-5


def greedy_reference(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`triptych.kernels.sampling.greedy`."""
    # the maximum is NaN where anything is
    return logits.argmax(dim=-1), logits.amax(dim=-1).isfinite()


def draw_reference(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    uniform: torch.Tensor,
) -> torch.Tensor:
    """See :func:`triptych.kernels.sampling.draw`."""
    size = logits.shape[-1]
    best, usable = greedy_reference(logits)
    plain = (temperature < GREEDY_BELOW) | (top_k == 1) | ~usable
    if plain.all():
        return best
    heat = temperature.masked_fill(plain, 1.0)
    probabilities = (logits.float() / heat[:, None]).softmax(dim=-1)
    limit = torch.where((top_k > 0) & (top_k < size), top_k, size)
    cut = ((limit < size) | (top_p < 1)) & ~plain
    if cut.any():
        kept = _top(probabilities[cut], limit[cut, None], top_p[cut, None].double())
        probabilities[cut] = kept
    floor = min_p[:, None] * probabilities.amax(dim=-1, keepdim=True)
    probabilities = probabilities.masked_fill(probabilities < floor, 0.0)
    total = probabilities.cumsum(dim=-1, dtype=torch.float64)
    # strictly beyond the draw, so a token without probability is never met
    found = torch.searchsorted(total, uniform[:, None] * total[:, -1:], right=True)[:, 0]
    return torch.where(plain, best, found.clamp(max=size - 1))


def _top(probabilities: torch.Tensor, limit: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    """Zero all but the top-k and nucleus (Holtzman et al. 2020) tokens of each row; the nucleus is of what k left."""
    ordered, index = probabilities.sort(dim=-1, descending=True, stable=True)
    ordered = ordered.masked_fill(torch.arange(ordered.shape[-1], device=ordered.device) >= limit, 0.0)
    total = ordered.cumsum(dim=-1, dtype=torch.float64)
    # a token stays while those before it fall short of the share; at 1 rounding must not cut anything
    before = total - ordered
    ordered = ordered.masked_fill((before >= share * total[:, -1:]) & (share < 1), 0.0)
    return torch.zeros_like(probabilities).scatter(1, index, ordered)
