"""Softmax attention with everything that decoders ask of it, in plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention

from ..context import How


def attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, how: How
) -> torch.Tensor:
    """Softmax attention.

    Args:
        query: [B, H, n, D]; H is a multiple of Hk, query head h uses key head h // (H // Hk). Packed queries, where
            the heads that share a key head are laid along n, have H = Hk.
        key: [B, Hk, m, D].
        value: [B, Hk, m, Dv].
        mask: additive, broadcast to [B, H, n, m]; None is causal, with n = m.
        how: see :class:`How`; ``window`` is part of the mask.

    Returns:
        [B, H, n, Dv].
    """
    groups = query.shape[1] // key.shape[1]
    if how.softcap is None and how.sinks is None:
        if mask is None:
            return F.scaled_dot_product_attention(
                query, key, value, is_causal=True, scale=how.scaling, enable_gqa=groups > 1
            )
        # grouped heads with a mask would take the slowest kernel on GPU
        key, value = _repeat(key, groups), _repeat(value, groups)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=how.scaling)
    if mask is None:
        ages = torch.arange(query.shape[2], device=query.device)[:, None] - torch.arange(
            key.shape[2], device=key.device
        )
        mask = additive(seen_by_age(ages, None), query.dtype)
    key, value = _repeat(key, groups), _repeat(value, groups)
    scale = how.scaling if how.scaling is not None else query.shape[-1] ** -0.5
    scores = (query @ key.transpose(2, 3)) * scale
    if how.softcap is not None:
        scores = torch.tanh(scores / how.softcap) * how.softcap
    scores = scores + mask
    if how.sinks is not None:
        batch, heads, tokens, _ = scores.shape
        # sinks of packed heads lie along the tokens, as the heads do
        packed = how.sinks.to(scores.dtype).numel() != heads
        sinks = how.sinks.to(scores.dtype).view((1, heads, tokens, 1) if packed else (1, heads, 1, 1))
        scores = torch.cat([scores, sinks.expand(batch, heads, tokens, 1)], dim=-1)
        return scores.softmax(-1, dtype=torch.float32)[..., :-1].to(value.dtype) @ value
    return scores.softmax(-1, dtype=torch.float32).to(value.dtype) @ value


def seen_by_age(ages: torch.Tensor, window: int | None) -> torch.Tensor:
    """Whether a token of that age (0 is the token itself, negative lies ahead) is seen."""
    seen = ages >= 0
    return seen if window is None else seen & (ages < window)


def additive(seen: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """0 where seen, else the lowest number."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, torch.finfo(dtype).min)


def _repeat(states: torch.Tensor, count: int) -> torch.Tensor:
    return states if count == 1 else states.repeat_interleave(count, dim=1)
