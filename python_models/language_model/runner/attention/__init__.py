"""Attention over the paged KV cache: one file for each backend, and how transformers' layers reach it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from ....contract.errors import ErrorKind, TriptychError

if TYPE_CHECKING:
    from ..executor import LayerShape
    from ..inputs import Batch
    from ..kv_cache import KVCache
    from .paged import PagedStep

Backend = Callable[["KVCache", "Batch"], "PagedStep"]
"""Makes the attention context of a step."""


def resolve(name: str, device: str) -> str:
    """The backend that "auto" stands for."""
    if name == "auto":
        return "triton" if torch.device(device).type == "cuda" else "sdpa"
    return name


def load_backend(name: str, layers: tuple[LayerShape, ...], cache: KVCache) -> Backend:
    """The backend "triton", "flash_attn" or "sdpa".

    Raises:
        TriptychError: UNSUPPORTED, saying why it cannot serve these layers.
    """
    if name == "triton":
        from .triton import TritonStep

        return TritonStep
    if name == "sdpa":
        from .sdpa import SdpaStep

        return SdpaStep
    if name == "flash_attn":
        from .flash import FlashStep

        FlashStep.check(layers, cache)
        return FlashStep
    raise TriptychError(
        ErrorKind.INVALID_REQUEST,
        f"attention_backend must be triton, flash_attn or sdpa, not {name!r}",
        "settings.attention_backend",
    )
