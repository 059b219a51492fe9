"""Attention of packed sequences, each over itself: what vision and audio towers need."""

from __future__ import annotations

import torch

from .kernel import launch
from .reference import packed_attention_reference

__all__ = ["packed_attention", "packed_attention_reference"]


def packed_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    starts: torch.Tensor,
    max_length: int,
    scaling: float,
) -> torch.Tensor:
    """Softmax attention in which every token sees all tokens of its own sequence, and no other.

    Args:
        query, key, value: [T, H, D], any strides over T and H; D contiguous.
        starts: int32 [B + 1]: sequence b is tokens starts[b] to starts[b + 1].
        max_length: no sequence is longer. On the host, so that launching needs no synchronisation.
        scaling: factor on query . key.

    Returns:
        [T, H, D], contiguous.
    """
    if query.is_cuda:
        return launch(query, key, value, starts, max_length, scaling)
    return packed_attention_reference(query, key, value, starts, scaling)
