"""What every attention backend does alike: put the new keys and values into their pages."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch

from triptych.kernels import rope as rope_kernels

from ..context import HeadNorm, How, Rope
from ..cross import CrossStep
from ..inputs import Batch
from ..kv_cache import KVCache
from ..recurrent import StateContext


class PagedStep(ABC):
    """The :class:`~..context.AttentionContext` of one step; subclasses attend.

    Attributes:
        layer: the layer that came last, for messages.
        rehearsing: each layer also compiles what other batches will need.
        states: of recurrent layers, for decoders that have some.
        cross: see :class:`~..context.AttentionContext`.
    """

    capturable: ClassVar[bool] = True
    """The same launches do for every step of a batch size, so they can be replayed as a CUDA graph."""

    def __init__(self, cache: KVCache, batch: Batch) -> None:
        self.cache = cache
        self.batch = batch
        self.layer = -1
        self.rehearsing = False
        self.states: StateContext | None = None
        self.cross: CrossStep | None = None
        self._places: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def attend(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, how: How) -> torch.Tensor:
        """See :class:`~..context.AttentionContext`."""
        self.layer = layer
        if layer in self.cache.sharing:
            return self.attend_stored(layer, query.transpose(0, 1).contiguous(), how)
        group = self.cache.group_of[layer]
        if group not in self._places:
            slots, size = self.batch.slots[group], self.cache.block_size
            blocks = slots.div(size, rounding_mode="floor")
            self._places[group] = blocks, slots - blocks * size
        self.cache.write(layer, self._places[group], key.transpose(0, 1), value.transpose(0, 1))
        return self.attend_stored(layer, query.transpose(0, 1).contiguous(), how)

    def rotate_and_store(
        self, layer: int, qkv: torch.Tensor, heads: tuple[int, int], rope: Rope | None, norm: HeadNorm | None
    ) -> torch.Tensor:
        """See :class:`~..context.AttentionContext`."""
        self.layer = layer
        keys, values = self.cache.pages[layer]
        options: dict[str, Any] = {}
        if norm is not None:
            options = {"query_norm": norm.query, "key_norm": norm.key, "eps": norm.eps, "norm_offset": norm.offset}
        return rope_kernels.rotate_and_store(
            qkv,
            None if rope is None else rope.cos,
            None if rope is None else rope.sin,
            keys,
            values,
            self.batch.slots[self.cache.group_of[layer]],
            num_heads=heads[0],
            num_kv_heads=heads[1],
            interleaved=rope is not None and rope.interleaved,
            key_scale=self.cache.scale,
            value_scale=self.cache.scale,
            **options,
        )

    @abstractmethod
    def attend_stored(self, layer: int, query: torch.Tensor, how: How) -> torch.Tensor:
        """See :class:`~..context.AttentionContext`."""


def scaling_of(how: How, width: int) -> float:
    """The factor on query . key, spelled out."""
    return how.scaling if how.scaling is not None else width**-0.5
