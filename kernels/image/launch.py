"""Launch table of the normalisation of pixels."""

from __future__ import annotations

import torch

from .._launch import pdl
from .kernel import _patches_kernel, _patchify_kernel

# elements of a program: a patch of 3 x 2 x 14 x 14 takes two
_BLOCK, _WARPS = 1024, 4


def launch_patches(
    patches: torch.Tensor, mean: torch.Tensor, std: torch.Tensor, frames: int, dtype: torch.dtype
) -> torch.Tensor:
    """See :func:`triptych.kernels.image.normalise_patches`."""
    count, channels, stored, area = patches.shape
    out = torch.empty((count, channels * frames * area), dtype=dtype, device=patches.device)
    if count:
        flag = pdl(patches)
        _patches_kernel[(count, -(-out.shape[1] // _BLOCK))](
            patches.contiguous(),
            mean,
            std,
            out,
            CHANNELS=channels,
            STORED=stored,
            FRAMES=frames,
            AREA=area,
            BLOCK=_BLOCK,
            PDL=flag,
            num_warps=_WARPS,
            launch_pdl=flag,
        )
    return out


def launch_patchify(
    pixels: torch.Tensor,
    mean: torch.Tensor,
    std: torch.Tensor,
    patch: int,
    merge: int,
    temporal: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """See :func:`triptych.kernels.image.normalise_patchify`; pixels [T, H, W, C]."""
    frames, height, width, channels = pixels.shape
    count = -(-frames // temporal) * (height // patch) * (width // patch)
    out = torch.empty((count, channels * temporal * patch * patch), dtype=dtype, device=pixels.device)
    if count:
        flag = pdl(pixels)
        _patchify_kernel[(count, -(-out.shape[1] // _BLOCK))](
            pixels.contiguous(),
            mean,
            std,
            out,
            frames,
            height,
            width,
            CHANNELS=channels,
            PATCH=patch,
            MERGE=merge,
            TEMPORAL=temporal,
            BLOCK=_BLOCK,
            PDL=flag,
            num_warps=_WARPS,
            launch_pdl=flag,
        )
    return out
