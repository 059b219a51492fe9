"""Attention by the kernels of this project (on a CPU, by their references)."""

from __future__ import annotations

from typing import Any

import torch

from triptych.kernels import attention as kernels

from ..context import How
from ..inputs import Batch
from ..kv_cache import KVCache
from .paged import PagedStep, scaling_of


class TritonStep(PagedStep):
    """Slices of one token go through the decode kernel, longer ones through the prefill kernel."""

    def __init__(self, cache: KVCache, batch: Batch) -> None:
        super().__init__(cache, batch)
        self._compiled: set[Any] = set()

    def attend_stored(self, layer: int, query: torch.Tensor, how: How) -> torch.Tensor:
        """See :class:`~..context.AttentionContext`."""
        self.layer = layer
        batch, scale = self.batch, self.cache.scale
        keys, values = self.cache.pages[layer]
        table = batch.tables[self.cache.group_of[layer]]
        singles = batch.num_singles
        scaling = scaling_of(how, query.shape[-1])
        if self.rehearsing and query.is_cuda:
            self._compile(query, keys, values, how)
        parts = []
        if singles:
            parts.append(
                kernels.decode(
                    query[:singles],
                    keys,
                    values,
                    table[:singles],
                    batch.context_lens[:singles],
                    scaling=scaling,
                    window=how.window,
                    softcap=how.softcap,
                    sinks=how.sinks,
                    key_scale=scale,
                    value_scale=scale,
                )
            )
        if batch.query_starts is not None:
            parts.append(
                kernels.prefill(
                    query[singles:],
                    keys,
                    values,
                    table[singles:],
                    batch.context_lens[singles:],
                    batch.query_starts,
                    max_query_len=batch.max_query_len,
                    scaling=scaling,
                    window=how.window,
                    softcap=how.softcap,
                    sinks=how.sinks,
                    spans=batch.spans,
                    key_scale=scale,
                    value_scale=scale,
                )
            )
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _compile(self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, how: How) -> None:
        """Every form of the kernels that a layer like this can ask for."""
        # needs Triton, which is for GPUs here
        from triptych.kernels.attention.launch import warm_up

        like = query.shape[1:], keys.shape[1:], values.shape[1:], how.window, how.softcap, how.sinks is not None
        if like not in self._compiled:
            self._compiled.add(like)
            spans = self.batch.spans is not None
            warm_up(query, keys, values, window=how.window, softcap=how.softcap, sinks=how.sinks, spans=spans)
