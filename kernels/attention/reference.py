"""The same in plain PyTorch: the truth of tests, and what a CPU runs."""

from __future__ import annotations

import itertools

import torch

# scores held at once: 64 MiB of float32
_SCORES = 1 << 24


def decode_reference(
    query: torch.Tensor,
    key_pages: torch.Tensor,
    value_pages: torch.Tensor,
    block_table: torch.Tensor,
    context_lens: torch.Tensor,
    *,
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    key_scale: float = 1.0,
    value_scale: float = 1.0,
) -> torch.Tensor:
    """See :func:`..decode`; sums in float32."""
    starts = torch.arange(query.shape[0] + 1, dtype=torch.int32)
    return prefill_reference(
        query,
        key_pages,
        value_pages,
        block_table,
        context_lens,
        starts,
        scaling=scaling,
        window=window,
        softcap=softcap,
        sinks=sinks,
        key_scale=key_scale,
        value_scale=value_scale,
    )


def prefill_reference(
    query: torch.Tensor,
    key_pages: torch.Tensor,
    value_pages: torch.Tensor,
    block_table: torch.Tensor,
    context_lens: torch.Tensor,
    query_starts: torch.Tensor,
    *,
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    spans: torch.Tensor | None = None,
    key_scale: float = 1.0,
    value_scale: float = 1.0,
) -> torch.Tensor:
    """See :func:`..prefill`; sums in float32."""
    tokens, heads, _ = query.shape
    kv_heads, page, dim_value = value_pages.shape[1:]
    group = heads // kv_heads
    out = torch.zeros((tokens, heads, dim_value), dtype=query.dtype, device=query.device)
    for request, (begin, end) in enumerate(itertools.pairwise(query_starts.tolist())):
        context = int(context_lens[request])
        if begin == end or context == 0:
            continue
        before = context - (end - begin)
        # whole blocks from the first key that any row sees
        first = 0 if window is None else max(0, before - window + 1) // page
        blocks = block_table[request, first : -(-context // page)].long()
        low = first * page
        # [Hk, L, D]: the keys low to context
        keys, values = (
            pages[blocks].transpose(0, 1).flatten(1, 2)[:, : context - low].float() * scale
            for pages, scale in ((key_pages, key_scale), (value_pages, value_scale))
        )
        at = torch.arange(low, context, device=query.device)
        rows = max(1, _SCORES // (heads * len(at)))
        for start in range(begin, end, rows):
            part = query[start : min(start + rows, end)].float() * scaling
            # [Hk, G * n, D]: the heads of a kv head in one product
            packed = part.unflatten(1, (kv_heads, group)).permute(1, 2, 0, 3).flatten(1, 2)
            scores = (packed @ keys.transpose(1, 2)).unflatten(1, (group, -1))
            if softcap is not None:
                scores = torch.tanh(scores / softcap) * softcap
            position = torch.arange(start, start + len(part), device=query.device)[:, None] - begin + before
            seen = at <= position
            if spans is not None:
                span = spans[start : start + len(part)].long()
                seen |= (at >= span[:, :1]) & (at < span[:, 1:])
            if window is not None:
                seen &= at > position - window
            scores.masked_fill_(~seen, -torch.inf)
            if sinks is not None:
                sink = sinks.float().view(kv_heads, group, 1, 1).expand(*scores.shape[:3], 1)
                weights = torch.cat([scores, sink], -1).softmax(-1)[..., :-1]
            else:
                weights = scores.softmax(-1)
            result = (weights.flatten(1, 2) @ values).unflatten(1, (group, -1))
            out[start : start + len(part)] = result.permute(2, 0, 1, 3).flatten(1, 2).to(query.dtype)
    return out
