"""Checks the fused layers of a decoder whose modules have no weights, or only a part: on a small copy of it.

The copy has the same code and options, random weights, a few narrow layers of every kind the decoder has.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..executor import DecoderModel
from .spec import DecoderSpec, MoeSpec

# inner widths; what is left wide are hidden states and heads, which are tied to each other in many families
_NARROW = {
    "vocab_size": 1024,
    "intermediate_size": 256,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
    "pad_token_id": None,
}
_PER_LAYER = ("layer_types", "mlp_layer_types", "no_rope_layers")


class RandomDecoder:
    """A :class:`DecoderModel` of random weights."""

    def __init__(self, text_model: nn.Module, lm_head: nn.Module, config: Any, num_axes: int) -> None:
        self.text_model = text_model
        self.lm_head = lm_head
        self.config = config
        self.num_axes = num_axes
        self.token_extras: Mapping[str, int | None] = {}
        self.token_arguments = None

    def embed(self, ids: torch.Tensor, is_media: torch.Tensor) -> torch.Tensor:
        """See :class:`DecoderModel`."""
        table: Any = self.text_model.get_submodule("embed_tokens")
        rows: torch.Tensor = table(ids.masked_fill(is_media, 0))
        return rows


def small_copy(decoder: DecoderModel, spec: DecoderSpec, device: torch.device, dtype: torch.dtype) -> RandomDecoder:
    """A decoder of the same code with few and narrow layers."""
    config = copy.deepcopy(decoder.config)
    for name, value in _NARROW.items():
        if hasattr(config, name):
            setattr(config, name, value)
    count = _layers_of_every_kind(spec)
    config.num_hidden_layers = count
    for name in _PER_LAYER:
        kinds = getattr(config, name, None)
        if isinstance(kinds, Sequence):
            setattr(config, name, list(kinds[:count]))
    text_class: Any = type(decoder.text_model)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            text_model = text_class(config)
            head = nn.Linear(config.hidden_size, config.vocab_size, bias=spec.head_bias)
    finally:
        torch.set_default_dtype(before)
    small = RandomDecoder(text_model, head, config, decoder.num_axes)
    for module in (text_model.eval().requires_grad_(False), head.requires_grad_(False)):
        draw(module)
    return small


def draw(model: nn.Module) -> None:
    """Random weights with which every part matters: norms near 1, biases and corrections that are not zero."""
    generator = torch.Generator(next(model.parameters()).device).manual_seed(0)
    corrections = [(name, buffer) for name, buffer in model.named_buffers() if name.endswith("correction_bias")]
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *corrections):
            if tensor.dim() == 1 or name.endswith("correction_bias"):
                tensor.uniform_(0, 0.2, generator=generator).add_("norm" in name)
            else:
                tensor.normal_(0, 1 if "embed" in name else tensor.shape[-1] ** -0.5, generator=generator)


def _layers_of_every_kind(spec: DecoderSpec) -> int:
    """The fewest first layers that include every kind there is."""
    first: dict[Any, int] = {}
    for index, layer in enumerate(spec.layers):
        first.setdefault((layer.attention, isinstance(layer.mlp, MoeSpec)), index)
    return max(first.values()) + 1
