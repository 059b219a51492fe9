"""The same in plain PyTorch."""

from __future__ import annotations

import itertools

import torch


def packed_attention_reference(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, starts: torch.Tensor, scaling: float
) -> torch.Tensor:
    """See :func:`..packed_attention`; sums in float32."""
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    bounds = starts.tolist()
    for low, high in itertools.pairwise(bounds):
        q, k, v = (part[low:high].transpose(0, 1).float() for part in (query, key, value))
        out[low:high] = ((q @ k.transpose(1, 2) * scaling).softmax(-1) @ v).transpose(0, 1).to(query.dtype)
    return out
