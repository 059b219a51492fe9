"""Attention by the kernels of this project (on a CPU, by their references)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from triptych.kernels import attention as kernels

from ..context import How
from ..inputs import Batch
from ..kv_cache import KVCache
from ..latent import Latent
from .paged import PagedStep, scaling_of


class TritonStep(PagedStep):
    """Slices of one token go through the decode kernel, longer ones through the prefill kernel."""

    def __init__(self, cache: KVCache, batch: Batch) -> None:
        super().__init__(cache, batch)
        self._compiled: set[Any] = set()
        self._seen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

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
            single = query[:singles] if how.latent is None else how.latent.absorb(query[:singles])
            parts.append(
                kernels.decode(
                    single,
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
            if how.latent is not None:
                parts[0] = how.latent.project(parts[0])
        if batch.query_starts is not None:
            table = table[singles:]
            if how.latent is not None:
                keys, values, table = self._expand(layer, how.latent, query.dtype)
                scale = 1.0
            parts.append(
                kernels.prefill(
                    query[singles:],
                    keys,
                    values,
                    table,
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

    def _expand(
        self, layer: int, latent: Latent, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Pages of keys and values, made of the latents that the longer slices see, and the block table of those."""
        host, size = self.batch.host, self.cache.block_size
        group = self.cache.group_of[layer]
        if group not in self._seen:
            counts = -(-host.contexts[host.num_singles :] // size)
            tables = host.tables[group][host.num_singles :]
            blocks = np.concatenate([row[:count] for row, count in zip(tables, counts, strict=True)])
            local = (counts.cumsum() - counts)[:, None] + np.arange(counts.max())
            # what lies behind a request's own blocks is read by nobody
            local = np.minimum(local, len(blocks) - 1).astype(np.int32)
            device = self.cache.device
            self._seen[group] = (
                torch.from_numpy(blocks.astype(np.int64)).to(device),
                torch.from_numpy(local).to(device),
            )
        blocks, table = self._seen[group]
        latents, _ = self.cache.read(layer, blocks[:, None], dtype)
        return *latent.expand(latents[:, 0]), table

    def _compile(self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, how: How) -> None:
        """Every form of the kernels that a layer like this can ask for."""
        # needs Triton, which is for GPUs here
        from triptych.kernels.attention.launch import warm_up

        if how.latent is not None:
            # the longer slices' own pages; absorbed queries go to those that are stored
            expanded = how.latent.expand(keys.new_zeros(1, keys.shape[2], keys.shape[3], dtype=query.dtype))
            self._compile(query, *expanded, replace(how, latent=None))
            query = how.latent.absorb(query[:1])
        like = query.shape[1:], keys.shape[1:], values.shape[1:], how.window, how.softcap, how.sinks is not None
        if like not in self._compiled:
            self._compiled.add(like)
            spans = self.batch.spans is not None
            warm_up(query, keys, values, window=how.window, softcap=how.softcap, sinks=how.sinks, spans=spans)
