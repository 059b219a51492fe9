"""Attention by torch's scaled_dot_product_attention: the backend of CPUs, and the reference on GPUs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch

from ..context import How
from ..inputs import Array, Batch
from ..kv_cache import KVCache
from ..latent import Latent
from .paged import PagedStep
from .plain import additive, attention, seen_by_age

_FEW_BLOCKS = 32


class SdpaStep(PagedStep):
    """Gathers the pages of each request and attends over them.

    Slices of one token attend together in a few padded calls, longer ones one after the other. Index tensors and
    masks are made once per step and used by all layers. Blocks that fell out of a group's window are not read.
    """

    # what is read depends on the lengths of the requests
    capturable: ClassVar[bool] = False

    def __init__(self, cache: KVCache, batch: Batch) -> None:
        super().__init__(cache, batch)
        self._of_group: dict[int, tuple[list[_Singles], list[_Chunk]]] = {}

    def attend_stored(self, layer: int, query: torch.Tensor, how: How) -> torch.Tensor:
        """See :class:`~..context.AttentionContext`."""
        self.layer = layer
        group = self.cache.group_of[layer]
        if group not in self._of_group:
            self._of_group[group] = _singles(self.cache, self.batch, group), _chunks(self.cache, self.batch, group)
        singles, chunks = self._of_group[group]
        if how.latent is not None:
            return self._attend_latents(layer, query, how, how.latent, singles, chunks)
        if len(singles) == 1 and len(singles[0].rows) == query.shape[0]:
            return singles[0].attend(layer, query, how)
        # rows that only pad a batch see nothing
        out = query.new_zeros(*query.shape[:2], self.cache.pages[layer][1].shape[-1])
        for some in singles:
            out[some.rows] = some.attend(layer, query[some.rows], how)
        for chunk in chunks:
            out[chunk.tokens] = chunk.attend(layer, query[chunk.tokens], how)
        return out

    def _attend_latents(
        self,
        layer: int,
        query: torch.Tensor,
        how: How,
        latent: Latent,
        singles: Sequence[_Singles],
        chunks: Sequence[_Chunk],
    ) -> torch.Tensor:
        out = query.new_zeros(*query.shape[:2], latent.value_width)
        for some in singles:
            out[some.rows] = latent.project(some.attend(layer, latent.absorb(query[some.rows]), how))
        for chunk in chunks:
            out[chunk.tokens] = chunk.attend(layer, query[chunk.tokens], how)
        return out


class _Singles:
    """Requests that bring one token each and attend together, padded to the longest of them."""

    def __init__(self, cache: KVCache, host_rows: Array, table: Array, ages: Array) -> None:
        """Args: rows int64 [B] of the batch; their blocks [B, n]; ages [B, n * block_size] of the tokens in them."""
        self.rows = torch.from_numpy(host_rows).to(cache.device)
        self._cache = cache
        self._table = torch.from_numpy(table).to(cache.device)
        self._ages = torch.from_numpy(ages).to(cache.device)
        self._masks: dict[int | None, torch.Tensor] = {}

    def attend(self, layer: int, query: torch.Tensor, how: How) -> torch.Tensor:
        """query [B, H, D] -> [B, H, Dv]."""
        batch, heads, width = query.shape
        keys, values = self._cache.read(layer, self._table, query.dtype)
        if how.window not in self._masks:
            self._masks[how.window] = additive(seen_by_age(self._ages, how.window), query.dtype)[:, None, None]
        # query heads that share a key head stand in the place of query tokens: nothing is repeated
        packed = query.reshape(batch, keys.shape[1], -1, width)
        return attention(packed, keys, values, self._masks[how.window], how).reshape(batch, heads, -1)


class _Chunk:
    """Several tokens of one request."""

    def __init__(self, cache: KVCache, tokens: slice, table: Array, seen_from: int, batch: Batch, row: int) -> None:
        """Args: its tokens in the batch; blocks int64 [n] to read; the first token in them; its row of the batch."""
        host = batch.host
        self.tokens = tokens
        self._cache = cache
        self._table = torch.from_numpy(table)[None].to(cache.device)
        self._start, self._context, self._first = int(host.starts[row]), int(host.contexts[row]), seen_from
        self._spans: torch.Tensor | None = None
        if batch.spans is not None and host.spans is not None:
            own = slice(tokens.start - host.num_singles, tokens.stop - host.num_singles)
            self._spans = batch.spans[own] if host.spans[own].any() else None
        self._masks: dict[int | None, torch.Tensor | None] = {}

    def attend(self, layer: int, query: torch.Tensor, how: How) -> torch.Tensor:
        """query [n, H, D] -> [n, H, Dv]."""
        keys, values = self._cache.read(layer, self._table, query.dtype)
        count = self._context - self._first
        if how.latent is not None:
            keys, values = how.latent.expand(keys[:, 0, :count])
        if how.window not in self._masks:
            self._masks[how.window] = self._mask(how.window, query.dtype)
        mask = self._masks[how.window]
        out = attention(query.transpose(0, 1)[None], keys[:, :, :count], values[:, :, :count], mask, how)
        return out[0].transpose(0, 1)

    def _mask(self, window: int | None, dtype: torch.dtype) -> torch.Tensor | None:
        """Additive [1, 1, tokens, places]; None where plain causal attention over the chunk itself is meant."""
        if self._start == 0 and self._spans is None and (window is None or window >= self._context):
            return None
        places = torch.arange(self._first, self._context, device=self._cache.device)
        ages = torch.arange(self._start, self._context, device=self._cache.device)[:, None] - places
        seen = seen_by_age(ages, window)
        if self._spans is not None:
            inside = (places >= self._spans[:, :1]) & (places < self._spans[:, 1:])
            seen |= inside if window is None else inside & (ages < window)
        return additive(seen, dtype)[None, None]


def _singles(cache: KVCache, batch: Batch, group: int) -> list[_Singles]:
    host, size = batch.host, cache.block_size
    window = cache.groups[group].window
    contexts = host.contexts[: host.num_singles].astype(np.int64)
    counts = -(-contexts // size)
    firsts = np.zeros_like(counts) if window is None else np.maximum(contexts - window, 0) // size
    counts -= firsts
    # padding at most doubles what is read; short contexts are not worth a call of their own
    classes: dict[int, list[int]] = {}
    for row, count in enumerate(counts.tolist()):
        classes.setdefault(count.bit_length() if count > _FEW_BLOCKS else 0, []).append(row)
    found = []
    for chosen in classes.values():
        rows = np.array(chosen)
        columns = np.arange(counts[rows].max())
        wanted = firsts[rows, None] + columns
        table = host.tables[group][rows[:, None], np.minimum(wanted, host.tables[group].shape[1] - 1)]
        table = np.where(columns < counts[rows, None], table, cache.num_blocks[group]).astype(np.int64)
        places = firsts[rows, None] * size + np.arange(columns.shape[0] * size)
        found.append(_Singles(cache, rows, table, contexts[rows, None] - 1 - places))
    return found


def _chunks(cache: KVCache, batch: Batch, group: int) -> list[_Chunk]:
    host, size = batch.host, cache.block_size
    window = cache.groups[group].window
    found = []
    offset = host.num_singles
    for row in range(host.num_singles, len(host.lengths)):
        first = 0 if window is None else max(int(host.starts[row]) - window + 1, 0) // size
        table = host.tables[group][row, first : -(-int(host.contexts[row]) // size)].astype(np.int64)
        end = offset + int(host.lengths[row])
        found.append(_Chunk(cache, slice(offset, end), table, first * size, batch, row))
        offset = end
    return found
