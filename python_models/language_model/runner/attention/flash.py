"""Attention by the flash_attn package (https://github.com/Dao-AILab/flash-attention), where it is installed."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

from ....contract.errors import ErrorKind, TriptychError
from ..context import How
from ..executor import LayerShape
from ..kv_cache import KVCache
from .paged import PagedStep, scaling_of

_BLOCK_MULTIPLE = 256
_WIDEST_HEAD = 256


class FlashStep(PagedStep):
    """Single tokens by ``flash_attn_with_kvcache``, longer slices by ``flash_attn_varlen_func``, both on the pages."""

    @staticmethod
    def check(layers: tuple[LayerShape, ...], cache: KVCache) -> None:
        """Raise UNSUPPORTED where the package is missing or cannot read these pages."""
        reason = None
        if importlib.util.find_spec("flash_attn") is None:
            reason = "the package flash-attn is not installed"
        elif cache.block_size % _BLOCK_MULTIPLE:
            reason = f"its block size must be a multiple of {_BLOCK_MULTIPLE}, not {cache.block_size} (--block-size)"
        elif cache.quantised:
            reason = "it does not read an fp8 KV cache"
        elif any(shape.key != shape.value or shape.key[1] > _WIDEST_HEAD for shape in layers if shape.keeps):
            reason = f"it needs keys and values of one width, at most {_WIDEST_HEAD}"
        if reason is not None:
            raise _unsupported(reason)

    def attend_stored(self, layer: int, query: torch.Tensor, how: How) -> torch.Tensor:
        """See :class:`~..context.AttentionContext`."""
        from flash_attn import flash_attn_varlen_func, flash_attn_with_kvcache

        self.layer = layer
        batch = self.batch
        if how.sinks is not None:
            raise _unsupported("it has no attention sinks")
        if batch.spans is not None:
            raise _unsupported("it has no bidirectional spans inside causal attention")
        # it wants [num_blocks, block_size, Hk, D] with any strides
        keys, values = (pages.transpose(1, 2) for pages in self.cache.pages[layer])
        table = batch.tables[self.cache.group_of[layer]]
        singles = batch.num_singles
        options: dict[str, Any] = {
            "softmax_scale": scaling_of(how, query.shape[-1]),
            "causal": True,
            "window_size": (-1, -1) if how.window is None else (how.window - 1, 0),
            "softcap": how.softcap or 0.0,
        }
        parts = []
        if singles:
            found = flash_attn_with_kvcache(
                query[:singles, None],
                keys,
                values,
                cache_seqlens=batch.context_lens[:singles],
                block_table=table[:singles],
                **options,
            )
            parts.append(found[:, 0])
        if batch.max_query_len:
            ends = batch.context_lens[singles:].cumsum(0, dtype=torch.int32)
            parts.append(
                flash_attn_varlen_func(
                    query[singles:],
                    keys,
                    values,
                    cu_seqlens_q=batch.query_starts,
                    cu_seqlens_k=torch.nn.functional.pad(ends, (1, 0)),
                    max_seqlen_q=batch.max_query_len,
                    max_seqlen_k=int(batch.host.contexts.max()),
                    block_table=table[singles:],
                    **options,
                )
            )
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def _unsupported(reason: str) -> TriptychError:
    return TriptychError(
        ErrorKind.UNSUPPORTED,
        f"attention_backend flash_attn cannot be used: {reason}",
        "settings.attention_backend",
        "language_model",
    )
