"""RMS norm in plain torch: what runs on a CPU."""

from __future__ import annotations

import torch


def rms_norm_reference(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    *,
    residual: torch.Tensor | None = None,
    offset: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`triptych.kernels.norm.rms_norm`; x of any shape [..., H]."""
    if residual is not None:
        x = x + residual
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if weight is None:
        return normed.to(x.dtype), x
    if offset:
        return (normed * (offset + weight.float())).to(x.dtype), x
    return (weight * normed.to(x.dtype)).to(x.dtype), x
