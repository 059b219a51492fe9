"""The same in plain PyTorch: the truth of tests, and what a CPU runs."""

from __future__ import annotations

import itertools

import torch

# scores, or elements of keys, held at once: 64 MiB of float32
_HELD = 1 << 24


def _take(pages: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """Pages of these blocks; float8 as bytes, which every device can index."""
    return pages.view(torch.uint8)[blocks].view(pages.dtype) if pages.element_size() == 1 else pages[blocks]


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
    """See :func:`..decode`; sums in float32. Requests go together, padded to the longest: few and larger operations."""
    batch, heads, dim = query.shape
    kv_heads, page, dim_value = value_pages.shape[1:]
    out = torch.zeros((batch, heads, dim_value), dtype=query.dtype, device=query.device)
    contexts = context_lens.tolist()
    longest = max(contexts, default=0)
    if longest == 0:
        return out
    # whole blocks from the first key that any request sees
    first = 0 if window is None else max(0, min(contexts) - window) // page
    blocks = -(-longest // page) - first
    requests = max(1, _HELD // (blocks * page * kv_heads * max(dim, dim_value)))
    for begin in range(0, batch, requests):
        part = slice(begin, begin + requests)
        length = context_lens[part, None]
        at = torch.arange(first * page, (first + blocks) * page, device=query.device)
        seen = at < length
        if window is not None:
            seen &= at >= length - window
        # a block of which nothing is seen may have any number
        used = seen.view(-1, blocks, page).any(2)
        numbers = block_table[part, first : first + blocks].where(used, 0).long()
        # [B, Hk, L, D]
        keys, values = (
            _take(pages, numbers).transpose(1, 2).flatten(2, 3).float() for pages in (key_pages, value_pages)
        )
        rows = query[part].float() * (scaling * key_scale)
        scores = rows.view(-1, kv_heads, heads // kv_heads, dim) @ keys.transpose(2, 3)
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        scores.masked_fill_(~seen[:, None, None], -torch.inf)
        if sinks is not None:
            sink = sinks.float().view(1, kv_heads, -1, 1).expand(*scores.shape[:3], 1)
            weights = torch.cat([scores, sink], -1).softmax(-1)[..., :-1]
        else:
            weights = scores.softmax(-1)
        # what is not seen may be NaN, and 0 * NaN is NaN
        result = weights @ values.masked_fill_(~seen[:, None, :, None], 0.0) * value_scale
        # a row that sees nothing is padding
        out[part] = result.flatten(1, 2).masked_fill_((length == 0)[:, :, None], 0.0).to(query.dtype)
    return out


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
    bounds = itertools.pairwise(query_starts.tolist())
    for request, ((begin, end), context) in enumerate(zip(bounds, context_lens.tolist(), strict=True)):
        if begin == end or context == 0:
            continue
        before = context - (end - begin)
        # whole blocks from the first key that any row sees
        first = 0 if window is None else max(0, before - window + 1) // page
        blocks = block_table[request, first : -(-context // page)].long()
        low = first * page
        # [Hk, L, D]: the keys low to context
        keys, values = (
            _take(pages, blocks).transpose(0, 1).flatten(1, 2)[:, : context - low].float() * scale
            for pages, scale in ((key_pages, key_scale), (value_pages, value_scale))
        )
        at = torch.arange(low, context, device=query.device)
        rows = max(1, _HELD // (heads * len(at)))
        for start in range(begin, end, rows):
            part = query[start : min(start + rows, end)].float() * scaling
            # [Hk, G * n, D]: the heads of a kv head in one product
            packed = part.view(len(part), kv_heads, group, -1).permute(1, 2, 0, 3).flatten(1, 2)
            scores = (packed @ keys.transpose(1, 2)).view(kv_heads, group, len(part), -1)
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
            result = (weights.flatten(1, 2) @ values).view(kv_heads, group, len(part), -1)
            out[start : start + len(part)] = result.permute(2, 0, 1, 3).flatten(1, 2).to(query.dtype)
    return out
