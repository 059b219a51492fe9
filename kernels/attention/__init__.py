"""Paged attention: split-KV decode and prefill over ragged batches."""

from __future__ import annotations

import torch

from .reference import decode_reference, prefill_reference

__all__ = ["decode", "decode_reference", "prefill", "prefill_reference"]


def decode(
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
    num_splits: int | None = None,
) -> torch.Tensor:
    """Attention of one new token for each request over its paged KV cache (PagedAttention, Kwon et al. 2023).

    On a GPU nothing is read back and the grid depends on shapes alone: a captured CUDA graph is right for any context
    lengths and block numbers written into the same tensors later.

    Args:
        query: [B, H, D], D contiguous; float32, float16 or bfloat16. Head h reads kv head h // (H // Hk).
        key_pages: [N, Hk, S, D], of the query's dtype or float8_e4m3fn; D contiguous.
        value_pages: [N, Hk, S, Dv], likewise.
        block_table: int32 [B, M]; token t of request b is in block block_table[b, t // S], place t % S. Entries past
            the context, and those wholly before the window, are never used.
        context_lens: int32 [B], the new token included, whose key and value are stored already. 0 is a padding row,
            whose result is zeros.
        scaling: factor on query . key, more than 0.
        window: the token sees itself and the window - 1 tokens before it; None is all.
        softcap: scores become softcap * tanh(score / softcap) (Gemma 2).
        sinks: [H], a score per head that takes probability and gives nothing (gpt-oss).
        key_scale, value_scale: what stored keys and values are multiplied by (float8 pages).
        num_splits: programs that share a request's keys; None takes what the launch table says.

    Returns:
        [B, H, Dv] of the query's dtype.

    Raises:
        ValueError: shapes, dtypes or strides that do not fit.
    """
    _check(query, key_pages, value_pages, block_table, context_lens, scaling, window)
    if query.shape[0] != block_table.shape[0]:
        raise ValueError(f"{query.shape[0]} queries for {block_table.shape[0]} requests: decode takes one for each")
    if not query.is_cuda:
        return decode_reference(
            query,
            key_pages,
            value_pages,
            block_table,
            context_lens,
            scaling=scaling,
            window=window,
            softcap=softcap,
            sinks=sinks,
            key_scale=key_scale,
            value_scale=value_scale,
        )
    from .launch import launch

    return launch(
        query,
        key_pages,
        value_pages,
        block_table,
        context_lens,
        None,
        1,
        scaling=scaling,
        window=window,
        softcap=softcap,
        sinks=sinks,
        spans=None,
        key_scale=key_scale,
        value_scale=value_scale,
        num_splits=num_splits,
    )


def prefill(
    query: torch.Tensor,
    key_pages: torch.Tensor,
    value_pages: torch.Tensor,
    block_table: torch.Tensor,
    context_lens: torch.Tensor,
    query_starts: torch.Tensor,
    *,
    max_query_len: int,
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    spans: torch.Tensor | None = None,
    key_scale: float = 1.0,
    value_scale: float = 1.0,
) -> torch.Tensor:
    """Causal attention of the new tokens of each request over its paged KV cache, the new tokens included.

    Request b's tokens are query[query_starts[b]:query_starts[b + 1]], n of them, at the positions context_lens[b] - n
    to context_lens[b] - 1; what lies before them is a prefix that was stored earlier. Rows of the query past
    query_starts[B] belong to nobody; what they get is undefined.

    Args:
        query: [T, H, D]; pages, table, scaling, window, softcap, sinks and scales as for :func:`decode`.
        context_lens: int32 [B], the new tokens included.
        query_starts: int32 [B + 1], ascending from 0.
        max_query_len: no request has more new tokens. On the host, so that launching needs no synchronisation. Up to
            16 (speculative verification) the kernel works as decode does: heads packed, keys split.
        spans: int32 [T, 2], absolute [start, end) in which this token also sees forward, bidirectionally (pictures of
            Gemma 3); 0, 0 for none. A window holds inside a span too: key > query - window.

    Returns:
        [T, H, Dv] of the query's dtype.

    Raises:
        ValueError: shapes, dtypes or strides that do not fit.
    """
    _check(query, key_pages, value_pages, block_table, context_lens, scaling, window)
    if query_starts.shape != (block_table.shape[0] + 1,):
        raise ValueError(f"query_starts of shape {tuple(query_starts.shape)} for {block_table.shape[0]} requests")
    if spans is not None and spans.shape != (query.shape[0], 2):
        raise ValueError(f"spans of shape {tuple(spans.shape)} for {query.shape[0]} tokens")
    if not query.is_cuda:
        return prefill_reference(
            query,
            key_pages,
            value_pages,
            block_table,
            context_lens,
            query_starts,
            scaling=scaling,
            window=window,
            softcap=softcap,
            sinks=sinks,
            spans=spans,
            key_scale=key_scale,
            value_scale=value_scale,
        )
    from .launch import launch

    return launch(
        query,
        key_pages,
        value_pages,
        block_table,
        context_lens,
        query_starts,
        max_query_len,
        scaling=scaling,
        window=window,
        softcap=softcap,
        sinks=sinks,
        spans=spans,
        key_scale=key_scale,
        value_scale=value_scale,
    )


def _check(
    query: torch.Tensor,
    key_pages: torch.Tensor,
    value_pages: torch.Tensor,
    block_table: torch.Tensor,
    context_lens: torch.Tensor,
    scaling: float,
    window: int | None,
) -> None:
    """What would make the kernels read wrong memory."""
    if key_pages.shape[:3] != value_pages.shape[:3] or key_pages.shape[3] != query.shape[2]:
        raise ValueError(
            f"query {tuple(query.shape)}, key pages {tuple(key_pages.shape)} and value pages "
            f"{tuple(value_pages.shape)} do not fit together"
        )
    if query.shape[1] % key_pages.shape[1]:
        raise ValueError(f"{query.shape[1]} query heads are no multiple of {key_pages.shape[1]} kv heads")
    if key_pages.dtype != value_pages.dtype or key_pages.dtype not in (query.dtype, torch.float8_e4m3fn):
        raise ValueError(f"pages of {key_pages.dtype} and {value_pages.dtype} for queries of {query.dtype}")
    if query.stride(2) != 1 or key_pages.stride(3) != 1 or value_pages.stride(3) != 1:
        raise ValueError("elements of a head must lie next to each other")
    if block_table.dtype != torch.int32 or context_lens.dtype != torch.int32 or block_table.stride(1) != 1:
        raise ValueError("the block table and the context lengths must be int32, and rows of the table contiguous")
    if context_lens.shape[0] != block_table.shape[0]:
        raise ValueError(f"{context_lens.shape[0]} context lengths for {block_table.shape[0]} rows of the block table")
    if scaling <= 0:
        raise ValueError(f"a scaling of {scaling}; more than 0")
    if window is not None and window < 1:
        raise ValueError(f"a window of {window} tokens; at least 1, or None")
