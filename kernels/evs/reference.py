"""Similarity of video frames in plain torch: what runs on a CPU."""

from __future__ import annotations

import torch
from torch.nn import functional


def frame_similarity_reference(features: torch.Tensor) -> torch.Tensor:
    """See :func:`triptych.kernels.evs.frame_similarity`."""
    wide = features.float()
    return functional.cosine_similarity(wide[1:], wide[:-1], dim=-1)
