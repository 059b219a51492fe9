"""Linear layers in plain torch: what runs on a CPU, and on a GPU where cuBLAS is faster."""

from __future__ import annotations

import torch
from torch.nn import functional

from ..activation import gated
from ..norm import rms_norm


def linear_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    norm: tuple[torch.Tensor, float, float] | None = None,
    gate: str | None = None,
) -> torch.Tensor:
    """See :func:`triptych.kernels.linear.linear`; one op after the other."""
    if norm is not None:
        x, _ = rms_norm(x, norm[0], norm[1], offset=norm[2])
    out = functional.linear(x, weight, bias)
    if gate is not None:
        out = gated(out, gate)
    return out if residual is None else residual + out
