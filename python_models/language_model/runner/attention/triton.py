"""Attention by the kernels of this project (on a CPU, by their references)."""

from __future__ import annotations

import torch

from triptych.kernels import attention as kernels

from ..context import How
from .paged import PagedStep, scaling_of


class TritonStep(PagedStep):
    """Slices of one token go through the decode kernel, longer ones through the prefill kernel."""

    def attend_stored(self, layer: int, query: torch.Tensor, how: How) -> torch.Tensor:
        """See :class:`~..context.AttentionContext`."""
        self.layer = layer
        batch, scale = self.batch, self.cache.scale
        keys, values = self.cache.pages[layer]
        table = batch.tables[self.cache.group_of[layer]]
        singles = batch.num_singles
        scaling = scaling_of(how, query.shape[-1])
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
