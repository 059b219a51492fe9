"""Makes fused decoders: of a loaded checkpoint, of slices of one, or of random weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..executor import DecoderModel
from .decoder import FusedDecoder
from .shard import Collectives, Shard
from .source import ModuleSource, WeightSource
from .spec import UnfitError, read_spec
from .verify import difference
from .weights import Fuser


def build(
    decoder: DecoderModel,
    shard: Shard | None = None,
    collectives: Collectives | None = None,
    source: WeightSource | None = None,
    *,
    check: bool = True,
) -> FusedDecoder | str:
    """A fused decoder of a decoder of transformers, or why there is none.

    Without ``source`` the weights are the modules' own: each layer's are put together, one layer at a time, and the
    modules go on working with views of them, whatever the result. Nothing is held twice.

    Args:
        decoder: loaded; on the meta device it is enough where there is a ``source``.
        shard: this process's part; None is everything.
        collectives: needed where ``shard`` is one of several.
        source: where weights come from.
        check: compare every layer with transformers' before it may serve. Where the modules have no weights, or this
            is one shard of several, there is nothing to compare with.
    """
    shard = shard or Shard()
    modules = ModuleSource(decoder.text_model, decoder.lm_head)
    try:
        spec = read_spec(decoder.text_model, decoder.lm_head, decoder.config, decoder.num_axes)
        fuser = Fuser(spec, source or modules, shard)
        with torch.no_grad():
            layers = [fuser.layer(layer) for layer in spec.layers]
            fused = FusedDecoder(
                spec,
                fuser.whole("embed_tokens.weight"),
                layers,
                fuser.whole("norm.weight"),
                fuser.head(),
                shard,
                collectives,
            )
    except UnfitError as unfit:
        return str(unfit)
    if check and source is None and shard.size == 1:
        return difference(decoder, fused) or fused
    return fused


@dataclass(frozen=True)
class _Random:
    """A :class:`DecoderModel` without a checkpoint."""

    text_model: nn.Module
    lm_head: nn.Module
    embed: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    config: Any
    num_axes: int


def random_weights(config: Any, device: str, dtype: torch.dtype, *, check: bool = False) -> FusedDecoder:
    """A fused decoder with random weights, drawn on the device: for benchmarks.

    Args:
        config: transformers' text config, such as ``Qwen2Config(...)``.
        device, dtype: of the weights.
        check: as in :func:`build`.

    Raises:
        ValueError: there are no fused layers for this config; says why.
    """
    import transformers

    auto: Any = transformers.AutoModel
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model: Any = auto.from_config(config)
            head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
    finally:
        torch.set_default_dtype(before)
    table = model.get_input_embeddings()
    axes = 3 if (config.rope_parameters or {}).get("mrope_section") else 1

    def embed(ids: torch.Tensor, is_media: torch.Tensor) -> torch.Tensor:
        rows: torch.Tensor = table(ids.masked_fill(is_media, 0))
        return rows

    head.requires_grad_(False)
    decoder = _Random(model.eval().requires_grad_(False), head, embed, config, axes)
    fused = build(decoder, check=check)
    if isinstance(fused, str):
        raise ValueError(fused)
    return fused
