"""Llama Nemotron Super and Ultra (NVIDIA 2025, arXiv:2505.00949): text.

Llama after a search over architectures (Puzzle, arXiv:2411.19146): each layer has its own number of key heads and width
of its MLP, and in the place of either may stand a linear layer or nothing at all. Compared with ``modeling_decilm.py``
and the names of weights of nvidia/Llama-3_3-Nemotron-Super-49B-v1 (``self_attn.linear_attn``, ``mlp.linear_mlp``).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from ..contract.errors import ErrorKind, TriptychError
from ..contract.settings import Settings
from . import composite
from .loading import model_class
from .text_only import TextPreprocessor, TextProcessor
from .transformers_encoder import TransformersEncoder
from .transformers_family import TransformersFamily
from .transformers_preprocessor import TransformersPreprocessor

# The width of an MLP is a multiple of this.
_MLP_MULTIPLE = 256
# Options of attention that change what it computes.
_UNKNOWN_ATTENTION = (
    "window_length",
    "num_sink_tokens",
    "sparsify",
    "unshifted_sink",
    "use_prefill_window_in_sink_attention",
)
_NOT_LLAMA = frozenset({"architectures", "auto_map", "model_type", "torch_dtype", "dtype", "transformers_version"})


class NasConfig(model_class("LlamaConfig")):  # type: ignore[misc]
    """Llama's, with ``block_configs``: what each layer is."""

    model_type = "nemotron-nas"


class NasAttention(composite.block("llama", "LlamaAttention")):  # type: ignore[misc]
    """Attention with a number of key heads of its own."""

    def __init__(self, config: Any, layer: int, block: Mapping[str, Any]) -> None:
        own = type(config)(**{**config.to_dict(), "num_key_value_heads": _key_heads(config, block)})
        super().__init__(own, layer)
        # which kind of attention is computed is set there for all layers
        self.config = config


class NasLinear(nn.Module):
    """One matrix in the place of attention or of an MLP."""

    def __init__(self, name: str, width: int, bias: bool) -> None:
        super().__init__()
        self.name = name
        self.add_module(name, nn.Linear(width, width, bias=bias))

    def forward(self, hidden_states: torch.Tensor, **_: Any) -> torch.Tensor:
        """[..., H] -> [..., H]."""
        out: torch.Tensor = self.get_submodule(self.name)(hidden_states)
        return out


class NasLayer(nn.Module):
    """A layer of Llama of which either half may be another or missing."""

    def __init__(self, config: Any, layer: int) -> None:
        super().__init__()
        attention, mlp = (config.block_configs[layer][part] for part in ("attention", "ffn"))
        norm = composite.block("llama", "LlamaRMSNorm")
        if not attention.get("no_op"):
            self.input_layernorm = norm(config.hidden_size, eps=config.rms_norm_eps)
            self.self_attn = (
                NasLinear("linear_attn", config.hidden_size, config.attention_bias)
                if attention.get("replace_with_linear")
                else NasAttention(config, layer, attention)
            )
        if not mlp.get("no_op"):
            self.post_attention_layernorm = norm(config.hidden_size, eps=config.rms_norm_eps)
            self.mlp = (
                NasLinear("linear_mlp", config.hidden_size, config.mlp_bias)
                if mlp.get("replace_with_linear")
                else _mlp(config, mlp)
            )

    def forward(self, hidden_states: torch.Tensor, **options: Any) -> torch.Tensor:
        """[1, T, H] -> [1, T, H]."""
        x = hidden_states
        if hasattr(self, "self_attn"):
            found = self.self_attn(hidden_states=self.input_layernorm(x), **options)
            x = x + (found[0] if isinstance(found, tuple) else found)
        if hasattr(self, "mlp"):
            x = x + self.mlp(self.post_attention_layernorm(x))
        return x


class NasModel(model_class("LlamaModel")):  # type: ignore[misc]
    """The decoder stack."""

    config_class = NasConfig

    def __init__(self, config: Any) -> None:
        count = config.num_hidden_layers
        # Llama's own layers are not wanted
        config.num_hidden_layers = 0
        try:
            super().__init__(config)
        finally:
            config.num_hidden_layers = count
        self.layers = nn.ModuleList([NasLayer(config, layer) for layer in range(count)])


class NasForCausalLM(model_class("LlamaForCausalLM")):  # type: ignore[misc]
    """Stack and head."""

    config_class = NasConfig

    def __init__(self, config: Any) -> None:
        nn.Module.__init__(self)
        model_class("PreTrainedModel").__init__(self, config)
        self.model = NasModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


class NasPreprocessor(TextPreprocessor):
    """Template and tokenizer of tokenizer.json."""

    def load_processor(self, folder: Path, settings: Settings) -> Any:
        """transformers has no class for this ``model_type``."""
        return TextProcessor(composite.load_tokenizer(folder))


class NemotronNas(TransformersFamily):
    """Llama Nemotron Super and Ultra."""

    towers: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    modality_encoders: ClassVar[Mapping[str, str]] = {}
    preprocessor_class: ClassVar[type[TransformersPreprocessor]] = NasPreprocessor
    encoder_classes: ClassVar[Mapping[str, type[TransformersEncoder]]] = {}

    def load_class(self) -> Any:
        """Names of weights are the published ones."""
        return NasForCausalLM

    def load_config(self) -> Any:
        """Raises TriptychError (UNSUPPORTED), naming the layer, where attention has options that are not known here."""
        raw = self.checkpoint.config
        blocks = composite.required(raw, "block_configs")
        if len(blocks) != composite.required(raw, "num_hidden_layers"):
            raise _unsupported(f"config.json has {len(blocks)} block_configs for {raw['num_hidden_layers']} layers")
        for layer, block in enumerate(blocks):
            if options := [name for name in _UNKNOWN_ATTENTION if block["attention"].get(name)]:
                raise _unsupported(f"layer {layer} has attention with {', '.join(options)}")
        values = {key: value for key, value in raw.items() if key not in _NOT_LLAMA and value is not None}
        config = NasConfig(**values)
        attends = [not (b["attention"].get("no_op") or b["attention"].get("replace_with_linear")) for b in blocks]
        # what the engine keeps pages for
        config.layer_types = ["full_attention" if attend else "mlp" for attend in attends]
        return config

    def load_tokenizer(self) -> Any:
        """That of tokenizer.json."""
        return composite.load_tokenizer(self.checkpoint.folder)


def _mlp(config: Any, block: Mapping[str, Any]) -> Any:
    width = block.get("intermediate_size")
    if width is None:
        width = int(2 * block["ffn_mult"] * config.hidden_size / 3)
        width += -width % _MLP_MULTIPLE
    return composite.block("llama", "LlamaMLP")(type(config)(**{**config.to_dict(), "intermediate_size": width}))


def _key_heads(config: Any, block: Mapping[str, Any]) -> int:
    return int(config.num_attention_heads // block["n_heads_in_group"])


def _unsupported(message: str) -> TriptychError:
    return TriptychError(ErrorKind.UNSUPPORTED, message, "settings.model")
