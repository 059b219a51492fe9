"""Makes fused decoders: of a loaded checkpoint, of slices of one, or of random weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ....families.base import WeightSource
from ..executor import RECURRENT_LAYERS, DecoderModel
from .decoder import FusedDecoder
from .rehearsal import RandomDecoder, draw, small_copy
from .shard import Collectives, Shard
from .source import ModuleSource
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
        check: compare every layer with transformers' before it may serve; where the modules have no weights, or this
            is one shard of several, the layers of a small copy of the decoder.
    """
    if decoder.token_extras:
        return f"its layers need {', '.join(decoder.token_extras)} of each token"
    if recurrent := set(getattr(decoder.config, "layer_types", None) or ()) & RECURRENT_LAYERS:
        return f"it has layers of type {', '.join(sorted(recurrent))}"
    shard = shard or Shard()
    modules = ModuleSource(decoder.text_model, decoder.lm_head)
    try:
        spec = read_spec(decoder.text_model, decoder.lm_head, decoder.config, decoder.num_axes)
        fuser = Fuser(spec, source or modules, shard)
        with torch.no_grad():
            table, norm = fuser.whole("embed_tokens.weight"), fuser.whole("norm.weight")
            layers = []
            for layer in spec.layers:
                layers.append(fuser.layer(layer))
                if table.is_cuda:
                    # what the parts took goes back at once: it fits nothing that comes
                    torch.cuda.empty_cache()
            fused = FusedDecoder(spec, table, layers, norm, fuser.head(table), shard, collectives)
    except UnfitError as unfit:
        return str(unfit)
    if not check:
        return fused
    if source is None and shard.size == 1:
        return difference(decoder, fused) or fused
    small = small_copy(decoder, spec, fused.device, fused.dtype)
    rehearsed = build(small)
    return rehearsed if isinstance(rehearsed, str) else fused


def random_decoder(config: Any, device: str, dtype: torch.dtype) -> RandomDecoder:
    """transformers' decoder with random weights, drawn on the device: for benchmarks.

    Args:
        config: transformers' text config, such as ``Qwen2Config(...)``.
        device, dtype: of the weights.
    """
    import transformers

    auto: Any = transformers.AutoModel
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = auto.from_config(config).eval().requires_grad_(False)
            head = nn.Linear(config.hidden_size, config.vocab_size, bias=False).requires_grad_(False)
    finally:
        torch.set_default_dtype(before)
    draw(model)
    axes = 3 if (config.rope_parameters or {}).get("mrope_section") else 1
    return RandomDecoder(model, head, config, axes)


def random_weights(config: Any, device: str, dtype: torch.dtype, *, check: bool = False) -> FusedDecoder:
    """A fused decoder with random weights, see :func:`random_decoder`.

    Raises:
        ValueError: there are no fused layers for this config; says why.
    """
    fused = build(random_decoder(config, device, dtype), check=check)
    if isinstance(fused, str):
        raise ValueError(fused)
    return fused
