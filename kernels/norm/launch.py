"""Launch table of the RMS norm."""

from __future__ import annotations

import torch

from .._launch import next_power_of_2, pdl
from .kernel import _rms_norm_kernel

MAX_WIDTH = 16384
# widest row -> warps. Few rows leave most SMs idle, so latency counts: 8 to 16 elements a thread
_WARPS = ((1024, 4), (4096, 8), (8192, 16), (MAX_WIDTH, 32))


def launch(
    x: torch.Tensor, weight: torch.Tensor | None, eps: float, residual: torch.Tensor | None, offset: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`triptych.kernels.norm.rms_norm`."""
    rows, width = x.shape
    if width > MAX_WIDTH:
        raise ValueError(f"rows of {width} are too wide: at most {MAX_WIDTH}")
    if x.stride(1) != 1 or (residual is not None and residual.stride(1) != 1):
        raise ValueError("elements of a row must lie next to each other")
    out = torch.empty((rows, width), dtype=x.dtype, device=x.device)
    total = x if residual is None else torch.empty_like(out)
    if rows:
        flag = pdl(x)
        _rms_norm_kernel[(rows,)](
            x,
            residual,
            weight,
            out,
            None if residual is None else total,
            x.stride(0),
            0 if residual is None else residual.stride(0),
            width,
            eps,
            float(offset),
            BLOCK=next_power_of_2(width),
            GEMMA=offset != 0,
            PDL=flag,
            num_warps=next(warps for widest, warps in _WARPS if width <= widest),
            launch_pdl=flag,
        )
    return out, total
