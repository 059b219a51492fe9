"""Pixels to patches: normalise and patchify from uint8."""

from __future__ import annotations

import torch

from .reference import normalise_patches_reference, normalise_patchify_reference

__all__ = [
    "normalise_patches",
    "normalise_patches_reference",
    "normalise_patchify",
    "normalise_patchify_reference",
]


def normalise_patches(
    patches: torch.Tensor, mean: torch.Tensor, std: torch.Tensor, frames: int, dtype: torch.dtype
) -> torch.Tensor:
    """(pixel - mean) / std of patches cut already, in float32, then rounded to the tower's dtype.

    Args:
        patches: uint8 [P, C, F, A], contiguous; A pixels of a patch. F is ``frames``, or 1 where every frame of the
            patch is the same picture.
        mean, std: float32 [C], in units of pixel values (0 to 255).
        frames: that a patch spans.
        dtype: float32, float16 or bfloat16.

    Returns:
        [P, C * frames * A] of dtype, the tower's input.
    """
    if patches.shape[2] not in (1, frames):
        raise ValueError(f"patches of {patches.shape[2]} frames cannot fill {frames}")
    if patches.is_cuda:
        from .launch import launch_patches

        return launch_patches(patches, mean, std, frames, dtype)
    return normalise_patches_reference(patches, mean, std, frames, dtype)


def normalise_patchify(
    pixels: torch.Tensor,
    mean: torch.Tensor,
    std: torch.Tensor,
    patch: int,
    merge: int,
    temporal: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Normalised patches of a picture or video in the order of the Qwen2-VL line's processors (Wang et al. 2024).

    Args:
        pixels: uint8 [H, W, C] or [T, H, W, C], contiguous; H and W multiples of patch * merge. A last group of
            fewer than ``temporal`` frames is filled up with the last frame, so a picture repeats.
        mean, std: float32 [C], in units of pixel values.
        patch: its side in pixels. merge: patches of a merge x merge square follow one another.
        temporal: frames of a patch.
        dtype: of the result.

    Returns:
        [ceil(T / temporal) * H / patch * W / patch, C * temporal * patch * patch].
    """
    if pixels.dim() == 3:
        pixels = pixels[None]
    side = patch * merge
    if pixels.shape[1] % side or pixels.shape[2] % side:
        raise ValueError(f"pictures of {pixels.shape[2]} x {pixels.shape[1]} are not made of {side} x {side} squares")
    if pixels.is_cuda:
        from .launch import launch_patchify

        return launch_patchify(pixels, mean, std, patch, merge, temporal, dtype)
    return normalise_patchify_reference(pixels, mean, std, patch, merge, temporal, dtype)
