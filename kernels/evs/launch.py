"""Launch table of the similarity of video frames."""

from __future__ import annotations

import torch

from .._launch import pdl
from .kernel import _similarity_kernel

_BLOCK, _WARPS = 1024, 4


def launch_similarity(features: torch.Tensor) -> torch.Tensor:
    """See :func:`triptych.kernels.evs.frame_similarity`."""
    frames, height, width, channels = features.shape
    out = torch.empty((frames - 1, height, width), dtype=torch.float32, device=features.device)
    if out.numel():
        flag = pdl(features)
        _similarity_kernel[(out.numel(),)](
            features.contiguous(),
            out,
            height * width,
            channels,
            BLOCK=_BLOCK,
            PDL=flag,
            num_warps=_WARPS,
            launch_pdl=flag,
        )
    return out
