"""RMS norm, with the residual addition."""

from __future__ import annotations

import torch

from .reference import rms_norm_reference

__all__ = ["rms_norm", "rms_norm_reference"]


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    *,
    residual: torch.Tensor | None = None,
    offset: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Root mean square norm (Zhang and Sennrich 2019) of ``x + residual``, rounded as transformers' modules round.

    Args:
        x: [T, H], H at most 16384; float32, float16 or bfloat16.
        weight: [H]; None is all ones.
        eps: added to the mean square.
        residual: [T, H], same dtype as x.
        offset: added to the weight. 0 is Llama's order (normed, rounded to x's dtype, times weight), anything else
            Gemma's (normed times offset + weight in float32, then rounded).

    Returns:
        The normed rows and ``x + residual`` (x itself without a residual), both [T, H] of x's dtype.
    """
    if x.is_cuda:
        from .launch import launch

        return launch(x, weight, eps, residual, offset)
    return rms_norm_reference(x, weight, eps, residual=residual, offset=offset)
