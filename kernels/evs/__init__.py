"""Similarity of video frames for efficient video sampling."""

from __future__ import annotations

import torch

from .reference import frame_similarity_reference

__all__ = ["frame_similarity", "frame_similarity_reference", "keep_mask", "num_kept"]


def frame_similarity(features: torch.Tensor) -> torch.Tensor:
    """Cosine similarity of each token with the token at the same place one frame before.

    Args:
        features: [T, h, w, C], contiguous; float32, float16 or bfloat16.

    Returns:
        float32 [T - 1, h, w].
    """
    if features.is_cuda:
        from .launch import launch_similarity

        return launch_similarity(features)
    return frame_similarity_reference(features)


def num_kept(frames: int, tokens_per_frame: int, rate: float) -> int:
    """Tokens of a video that remain at a pruning rate in [0, 1): its share, but never less than one frame.

    Needs no pixels, so the prompt's length is known before the encoder runs.
    """
    if not 0 <= rate < 1:
        raise ValueError(f"the pruning rate is at least 0 and less than 1, not {rate}")
    return max(tokens_per_frame, int(frames * tokens_per_frame * (1 - rate)))


def keep_mask(similarity: torch.Tensor, rate: float) -> torch.Tensor:
    """Which tokens of a video to keep: all of the first frame, then those least similar to the frame before.

    Efficient Video Sampling (Bagrov et al. 2025, arXiv 2510.14624). Of equally similar tokens the earlier stay.

    Args:
        similarity: [T - 1, h, w], of :func:`frame_similarity`.
        rate: share of tokens to drop, in [0, 1).

    Returns:
        bool [T, h, w] with exactly :func:`num_kept` true. No synchronisation with the host.
    """
    frames, height, width = similarity.shape[0] + 1, *similarity.shape[1:]
    area = height * width
    rest = num_kept(frames, area, rate) - area
    order = similarity.flatten().argsort(stable=True)
    mask = torch.zeros(frames * area, dtype=torch.bool, device=similarity.device)
    mask[:area] = True
    mask[area + order[:rest]] = True
    return mask.view(frames, height, width)
