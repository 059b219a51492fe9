"""Attention over the paged KV cache, plugged into transformers' decoder layers under a name of our own.

The decoder computes queries, keys and values of all requests of a step in one flat batch [1, T]; this module writes
the new keys and values into the pages and lets every token attend to its own request only. The step's context
travels as a keyword argument through the decoder, so there is no global state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention

from .context import AttentionContext, How
from .step import Slice

ATTENTION = "triptych_paged"
"""Name in transformers' attention registry. It has no entry in the mask registry, so decoders build no masks."""

_FEW_BLOCKS = 32


def paged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    context: AttentionContext | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """The function that transformers calls in every layer.

    Args:
        module: the attention layer; ``layer_idx`` names its pages.
        query: [1, H, T, D].
        key: [1, Hk, T, D], new tokens only.
        value: [1, Hk, T, Dv].
        attention_mask: always None.
        scaling, sliding_window, softcap, s_aux: see :class:`How`.
        context: the step, given to the decoder by the runner.

    Returns:
        [1, T, H, Dv] and no weights.
    """
    if context is None or attention_mask is not None:
        raise RuntimeError(f"{type(module).__name__} did not pass the step's context on to its attention function")
    sinks = s_aux if s_aux is not None else getattr(module, "sinks", None)
    how = How(scaling, sliding_window, softcap, sinks)
    layer: Any = module.layer_idx
    return context.attend(layer, query[0], key[0], value[0], how)[None], None


def register() -> None:
    """Make :func:`paged_attention` known to transformers as `ATTENTION`."""
    # imported here: whoever made the decoder has prepared the process for this import
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(ATTENTION, paged_attention)


class KVCache:
    """Pages of every layer; layers may differ in heads and widths.

    Per layer one tensor for keys and one for values, [num_blocks, block_size, Hk, D]; token ``t`` of a request lies
    in slot ``block_table[t // block_size] * block_size + t % block_size``. One block more than asked for, number
    ``num_blocks``, is never written: it pads block tables with zeros.
    """

    def __init__(
        self,
        shapes: Mapping[int, tuple[tuple[int, int], tuple[int, int]]],
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: str,
    ) -> None:
        """Args: ``shapes``: layer -> ((Hk, D) of keys, (Hk, Dv) of values)."""
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.dtype = dtype
        self.device = device
        self._pages: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._slots: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        for layer, (key, value) in shapes.items():
            keys = torch.zeros(num_blocks + 1, block_size, *key, dtype=dtype, device=device)
            values = torch.zeros(num_blocks + 1, block_size, *value, dtype=dtype, device=device)
            self._pages[layer] = keys, values
            self._slots[layer] = keys.flatten(0, 1), values.flatten(0, 1)

    def write(self, layer: int, slots: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        """Store key [Hk, T, D] and value [Hk, T, Dv] in slots int64 [T]."""
        keys, values = self._slots[layer]
        keys.index_copy_(0, slots, key.transpose(0, 1))
        values.index_copy_(0, slots, value.transpose(0, 1))

    def scrub(self, blocks: Sequence[int]) -> None:
        """Zero blocks, so that a NaN left in them cannot reach their next owner through masked places."""
        index = torch.tensor(blocks, dtype=torch.int64, device=self.device)
        for pair in self._pages.values():
            for pages in pair:
                pages.index_fill_(0, index, 0)

    def read(self, layer: int, blocks: torch.Tensor, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Blocks int64 [batch * n] -> keys [batch, Hk, n * block_size, D] and values likewise."""
        keys, values = self._pages[layer]
        found = keys.index_select(0, blocks), values.index_select(0, blocks)
        first, second = (part.view(batch, -1, *part.shape[2:]).transpose(1, 2) for part in found)
        return first, second


class _Group:
    """Requests that bring one token each and attend together, padded to the longest of them."""

    def __init__(self, rows: Sequence[int], slices: Sequence[Slice], cache: KVCache) -> None:
        self.rows = rows
        counts = [slices[i].start // cache.block_size + 1 for i in rows]
        longest = max(counts)
        table = np.full((len(rows), longest), cache.num_blocks, dtype=np.int64)
        for k, (i, count) in enumerate(zip(rows, counts, strict=True)):
            table[k, :count] = slices[i].block_tables[0][:count]
        self.blocks = torch.from_numpy(table.reshape(-1)).to(cache.device)
        ends = torch.tensor([[slices[i].start + 1] for i in rows], device=cache.device)
        places = torch.arange(longest * cache.block_size, device=cache.device)
        self._ages = ends - 1 - places
        self._cache = cache
        self._masks: dict[int | None, torch.Tensor] = {}

    def mask(self, window: int | None) -> torch.Tensor:
        """Additive [rows, 1, 1, places]."""
        if window not in self._masks:
            self._masks[window] = _additive(self._ages, window, self._cache.dtype)[:, None, None]
        return self._masks[window]


class _Chunk:
    """Several tokens of one request."""

    def __init__(self, offset: int, part: Slice, cache: KVCache) -> None:
        self.span = slice(offset, offset + len(part))
        self.fresh = part.start == 0
        self.context = part.start + len(part)
        used = part.block_tables[0][: -(-self.context // cache.block_size)]
        self.blocks = torch.from_numpy(used.astype(np.int64)).to(cache.device)
        self._start, self._length = part.start, len(part)
        self._cache = cache
        self._masks: dict[int | None, torch.Tensor] = {}

    def mask(self, window: int | None) -> torch.Tensor | None:
        """Additive [1, 1, tokens, context]; None where plain causal attention over the chunk itself is meant."""
        if self.fresh and (window is None or window >= self._length):
            return None
        if window not in self._masks:
            places = torch.arange(self.context, device=self._cache.device)
            ages = places[self._start :, None] - places
            self._masks[window] = _additive(ages, window, self._cache.dtype)[None, None]
        return self._masks[window]


class PagedStep:
    """The attention context of one step: where every token's keys and values go and what it sees.

    Index tensors and masks are made once per step and used by all layers. Slices of one token (decodes) attend
    together in a few padded groups, one call each; longer slices one after the other.
    """

    def __init__(self, cache: KVCache, slices: Sequence[Slice]) -> None:
        """Args: ``slices``: in the order of the flat batch, those of one token first."""
        self._cache = cache
        size = cache.block_size
        slots = []
        groups: dict[int, list[int]] = {}
        self._chunks: list[_Chunk] = []
        offset = 0
        for index, part in enumerate(slices):
            places = np.arange(part.start, part.start + len(part))
            table = part.block_tables[0].astype(np.int64)
            slots.append(table[places // size] * size + places % size)
            if len(part) == 1:
                # padding at most doubles what is read; short contexts are not worth a call of their own
                blocks = len(part.block_tables[0])
                groups.setdefault(blocks.bit_length() if blocks > _FEW_BLOCKS else 0, []).append(index)
            else:
                self._chunks.append(_Chunk(offset, part, cache))
            offset += len(part)
        self._groups = [_Group(rows, slices, cache) for rows in groups.values()]
        self._rows = [torch.tensor(g.rows, device=cache.device) for g in self._groups]
        self._slots = torch.from_numpy(np.concatenate(slots)).to(cache.device)

    def attend(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, how: How) -> torch.Tensor:
        """See :class:`AttentionContext`."""
        self._cache.write(layer, self._slots, key, value)
        heads, total, _ = query.shape
        only_group = len(self._groups) == 1 and not self._chunks
        if only_group:
            return self._singles(layer, query, self._groups[0], how)
        out = query.new_empty(total, heads, value.shape[-1])
        for group, rows in zip(self._groups, self._rows, strict=True):
            out[rows] = self._singles(layer, query[:, rows], group, how)
        for chunk in self._chunks:
            out[chunk.span] = self._chunk(layer, query, key, value, chunk, how)
        return out

    def _singles(self, layer: int, query: torch.Tensor, group: _Group, how: How) -> torch.Tensor:
        """query [H, B, D], one token of each request -> [B, H, Dv]."""
        heads, batch, width = query.shape
        keys, values = self._cache.read(layer, group.blocks, batch)
        # query heads that share a key head stand in the place of query tokens: nothing is repeated
        packed = query.transpose(0, 1).reshape(batch, keys.shape[1], -1, width)
        out = attention(packed, keys, values, group.mask(how.window), how)
        return out.reshape(batch, heads, -1)

    def _chunk(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, chunk: _Chunk, how: How
    ) -> torch.Tensor:
        """Tokens of one request -> [n, H, Dv]."""
        if chunk.fresh:
            keys, values = key[None, :, chunk.span], value[None, :, chunk.span]
        else:
            keys, values = self._cache.read(layer, chunk.blocks, 1)
            keys, values = keys[:, :, : chunk.context], values[:, :, : chunk.context]
        out = attention(query[None, :, chunk.span], keys, values, chunk.mask(how.window), how)
        return out[0].transpose(0, 1)


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
        mask = _additive(ages, None, query.dtype)
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


def _repeat(states: torch.Tensor, count: int) -> torch.Tensor:
    return states if count == 1 else states.repeat_interleave(count, dim=1)


def _additive(ages: torch.Tensor, window: int | None, dtype: torch.dtype) -> torch.Tensor:
    """0 where a token of that age (0 is the token itself, negative lies ahead) is seen, else the lowest number."""
    seen = ages >= 0
    if window is not None:
        seen &= ages < window
    return torch.zeros(ages.shape, dtype=dtype, device=ages.device).masked_fill_(~seen, torch.finfo(dtype).min)
