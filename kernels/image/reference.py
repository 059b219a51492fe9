"""Normalisation of pixels in plain torch: what runs on a CPU."""

from __future__ import annotations

import torch


def normalise_patches_reference(
    patches: torch.Tensor, mean: torch.Tensor, std: torch.Tensor, frames: int, dtype: torch.dtype
) -> torch.Tensor:
    """See :func:`triptych.kernels.image.normalise_patches`."""
    wide = patches.to(torch.float32).sub_(mean.view(1, -1, 1, 1)).div_(std.view(1, -1, 1, 1))
    return wide.to(dtype).expand(-1, -1, frames, -1).reshape(len(patches), -1)


def normalise_patchify_reference(
    pixels: torch.Tensor,
    mean: torch.Tensor,
    std: torch.Tensor,
    patch: int,
    merge: int,
    temporal: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """See :func:`triptych.kernels.image.normalise_patchify`; pixels [T, H, W, C]."""
    if pad := -len(pixels) % temporal:
        pixels = torch.cat([pixels, pixels[-1:].expand(pad, -1, -1, -1)])
    frames, height, width, channels = pixels.shape
    wide = pixels.to(torch.float32).sub_(mean).div_(std).to(dtype)
    # time, its frames, rows of squares, rows in a square, rows of pixels, the same for columns, channels
    parts = wide.view(
        frames // temporal,
        temporal,
        height // (patch * merge),
        merge,
        patch,
        width // (patch * merge),
        merge,
        patch,
        channels,
    )
    return parts.permute(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(-1, channels * temporal * patch * patch)
