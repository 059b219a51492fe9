"""What DeepSeek's published formats share: tokenizer, options of the processor, text models, names of weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..contract.errors import ErrorKind, TriptychError
from . import composite

CONTROL_TOKENS = frozenset({"<|grounding|>", "<|ref|>", "<|/ref|>", "<|det|>", "<|/det|>"})
"""Published prompts ask with them for places in a picture."""
IMAGE_TOKEN = "<image>"
# What the published processor adds to a tokenizer that lacks it, in its order.
_ADDED = (
    "<｜▁pad▁｜>",
    IMAGE_TOKEN,
    "<|ref|>",
    "<|/ref|>",
    "<|det|>",
    "<|/det|>",
    "<|grounding|>",
    "<|User|>",
    "<|Assistant|>",
)
_TEXT = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "moe_intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "rms_norm_eps",
    "n_routed_experts",
    "n_shared_experts",
    "num_experts_per_tok",
    "n_group",
    "topk_group",
    "topk_method",
    "routed_scaling_factor",
    "attention_bias",
    "bos_token_id",
    "eos_token_id",
    "rope_theta",
    "rope_scaling",
    "tie_word_embeddings",
)


def load_tokenizer(folder: Path) -> Any:
    """The published tokenizer with all tokens that prompts need."""
    tokenizer = composite.load_tokenizer(folder)
    known = tokenizer.get_vocab()
    if missing := [token for token in _ADDED if token not in known]:
        from tokenizers import AddedToken

        tokenizer.add_tokens([AddedToken(t, normalized=False, special=True) for t in missing], special_tokens=True)
    return tokenizer


def processor_options(folder: Path) -> dict[str, Any]:
    """processor_config.json, empty where there is none."""
    path = folder / "processor_config.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def dense_text_config(raw: Mapping[str, Any]) -> dict[str, Any]:
    """``language_config`` of a text model with plain attention (``use_mla`` false), in transformers' words.

    Raises:
        TriptychError: UNSUPPORTED for another router than greedy softmax.
    """
    if raw.get("use_mla", True):
        raise _unsupported("config.json describes a text model with use_mla true")
    expected = {"scoring_func": "softmax", "topk_method": "greedy", "norm_topk_prob": False}
    for key, value in expected.items():
        if raw.get(key, value) != value:
            raise _unsupported(f"config.json has {key} {raw[key]!r} in a text model without MLA; supported: {value!r}")
    found = {key: raw[key] for key in _TEXT if raw.get(key) is not None}
    return found | {"mlp_layer_types": mlp_layer_types(raw), "topk_method": "greedy"}


def mlp_layer_types(raw: Mapping[str, Any]) -> list[str]:
    """ "dense" or "sparse" (experts) for each layer."""
    first, every = int(raw.get("first_k_dense_replace", 0)), int(raw.get("moe_layer_freq", 1))
    sparse = raw.get("n_routed_experts") is not None
    return [
        "sparse" if sparse and layer >= first and layer % every == 0 else "dense"
        for layer in range(int(raw["num_hidden_layers"]))
    ]


def _unsupported(message: str) -> TriptychError:
    return TriptychError(ErrorKind.UNSUPPORTED, message, "settings.model")
