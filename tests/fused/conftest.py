"""Tiny decoders of every family that has fused layers."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from triptych.python_models.families import torchvision_fix
from triptych.python_models.language_model.runner.fused.verify import DenseContext

torchvision_fix.install()

import transformers  # noqa: E402

torch.set_num_threads(1)

VOCABULARY = 303
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 96,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
_BOTH = ["sliding_attention", "full_attention"] * 2
_MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
_PARTIAL = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
_PARTIAL_MROPE = {**_PARTIAL, "mrope_section": [2, 1, 1]}
_MOE = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "decoder_sparse_step": 1}
_GLM_MOE = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 1.5,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
_GEMMA3_ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
}

# name -> (text config class, options, axes of positions)
FAMILIES: dict[str, tuple[str, dict[str, Any], int]] = {
    "llama": ("LlamaConfig", {"rope_parameters": _LLAMA3, "mlp_bias": True, "attention_bias": True}, 1),
    "llama_tied": ("LlamaConfig", {"tie_word_embeddings": True}, 1),
    "mistral": ("MistralConfig", {"sliding_window": 9}, 1),
    "ministral": ("MinistralConfig", {"sliding_window": 9, "layer_types": _BOTH}, 1),
    "qwen2": ("Qwen2Config", {"rope_parameters": _YARN}, 1),
    "qwen2_sliding": (
        "Qwen2Config",
        {"use_sliding_window": True, "sliding_window": 9, "layer_types": _BOTH},
        1,
    ),
    "qwen3": ("Qwen3Config", {"num_attention_heads": 5, "num_key_value_heads": 1}, 1),
    "phi3": ("Phi3Config", {"sliding_window": 9, "rope_parameters": _PARTIAL}, 1),
    "granite": (
        "GraniteConfig",
        {
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.4,
            "attention_multiplier": 0.2,
            "logits_scaling": 2.0,
        },
        1,
    ),
    "smollm3": ("SmolLM3Config", {"no_rope_layers": [1, 1, 0, 1]}, 1),
    "gemma2": (
        "Gemma2Config",
        {
            "sliding_window": 9,
            "layer_types": _BOTH,
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 5.0,
            "query_pre_attn_scalar": 24,
        },
        1,
    ),
    "gemma3": (
        "Gemma3TextConfig",
        {"sliding_window": 9, "layer_types": _BOTH, "rope_parameters": _GEMMA3_ROPE, "query_pre_attn_scalar": 24},
        1,
    ),
    "glm": ("GlmConfig", {"rope_parameters": _PARTIAL, "attention_bias": True}, 1),
    "glm4": ("Glm4Config", {"rope_parameters": _PARTIAL}, 1),
    "ernie4_5": ("Ernie4_5Config", {"use_bias": True}, 1),
    "qwen2_vl": ("Qwen2VLTextConfig", {"rope_parameters": _MROPE}, 3),
    "qwen2_5_vl": ("Qwen2_5_VLTextConfig", {"rope_parameters": _MROPE}, 3),
    "qwen2_5_omni": ("Qwen2_5OmniTextConfig", {"rope_parameters": _MROPE}, 3),
    "paddleocr_vl": ("PaddleOCRTextConfig", {"rope_parameters": _MROPE}, 3),
    "qwen3_vl": ("Qwen3VLTextConfig", {"rope_parameters": _MROPE}, 3),
    "glm4v": ("Glm4vTextConfig", {"rope_parameters": _PARTIAL_MROPE}, 3),
    "glm_ocr": ("GlmOcrTextConfig", {"rope_parameters": _MROPE}, 3),
    "mixtral": ("MixtralConfig", {"num_local_experts": 6, "num_experts_per_tok": 2, "sliding_window": 9}, 1),
    "qwen2_moe": ("Qwen2MoeConfig", {**_MOE, "shared_expert_intermediate_size": 40, "mlp_only_layers": [1]}, 1),
    "qwen3_moe": ("Qwen3MoeConfig", {**_MOE, "norm_topk_prob": True, "mlp_only_layers": [2]}, 1),
    "qwen3_moe_raw": ("Qwen3MoeConfig", {**_MOE, "norm_topk_prob": False}, 1),
    "qwen3_vl_moe": ("Qwen3VLMoeTextConfig", {**_MOE, "rope_parameters": _MROPE}, 3),
    "qwen3_omni_moe": ("Qwen3OmniMoeTextConfig", {**_MOE, "rope_parameters": _MROPE, "norm_topk_prob": True}, 3),
    "glm4_moe": ("Glm4MoeConfig", {**_GLM_MOE, "rope_parameters": _PARTIAL, "use_qk_norm": True}, 1),
    "glm4v_moe": ("Glm4vMoeTextConfig", {**_GLM_MOE, "rope_parameters": _PARTIAL_MROPE, "attention_bias": True}, 3),
    "ernie4_5_moe": (
        "Ernie4_5_MoeConfig",
        {
            "moe_num_experts": 6,
            "moe_k": 2,
            "moe_intermediate_size": 24,
            "moe_num_shared_experts": 2,
            "moe_layer_start_index": 1,
            "moe_layer_end_index": 3,
            "use_bias": True,
        },
        1,
    ),
}
# no AutoModel knows these
_CLASSES = {
    "qwen2_5_omni": ("qwen2_5_omni", "Qwen2_5OmniThinkerTextModel"),
    "qwen3_omni_moe": ("qwen3_omni_moe", "Qwen3OmniMoeThinkerTextModel"),
    "paddleocr_vl": ("paddleocr_vl", "PaddleOCRTextModel"),
}
MIXTURES = [name for name in FAMILIES if "moe" in name or name == "mixtral"]


@dataclass
class Decoder:
    """What an executor is made of."""

    text_model: Any
    lm_head: Any
    config: Any
    num_axes: int
    token_extras: Mapping[str, int | None] = field(default_factory=dict)
    token_arguments: Callable[[torch.Tensor], Mapping[str, torch.Tensor]] | None = None

    def embed(self, ids: torch.Tensor, is_media: torch.Tensor) -> torch.Tensor:
        rows: torch.Tensor = self.text_model.get_input_embeddings()(ids.masked_fill(is_media, 0))
        return rows


@dataclass
class Tiny:
    """A decoder to fuse, and an untouched copy of transformers' with its own attention and masks."""

    decoder: Decoder
    reference: Decoder

    def logits(self, embeddings: torch.Tensor, position_ids: torch.Tensor, **extra: Any) -> torch.Tensor:
        """Reference logits [T, V] of one request."""
        with torch.no_grad():
            hidden = self.reference.text_model(
                inputs_embeds=embeddings[None],
                position_ids=position_ids[:, None] if len(position_ids) > 1 else position_ids,
                use_cache=False,
                **extra,
            ).last_hidden_state
            out: torch.Tensor = self.reference.lm_head(hidden[0])
        config = self.reference.config
        out = out / getattr(config, "logits_scaling", 1.0)
        if cap := getattr(config, "final_logit_softcapping", None):
            out = torch.tanh(out / cap) * cap
        return out

    def prompt(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids int64 [T] and position ids int64 [axes, T], each axis on its own way."""
        places = torch.arange(length)
        axes = [places // (axis + 1) + 3 * axis for axis in range(self.decoder.num_axes)]
        return places * 7919 % VOCABULARY, torch.stack(axes)


def draw_weights(model: torch.nn.Module) -> None:
    """Weights wide enough that logits are far from flat, and no bias or correction that is zero."""
    generator = torch.Generator().manual_seed(0)
    corrections = [(n, b) for n, b in model.named_buffers() if "correction" in n]
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *corrections]:
            if tensor.dim() == 1 or "correction" in name:
                tensor.copy_(torch.rand(tensor.shape, generator=generator) * 0.2 + ("norm" in name))
            else:
                scale = 1.0 if "embed" in name else tensor.shape[-1] ** -0.5
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * scale)


def make_decoder(name: str, **options: Any) -> Decoder:
    config_class, own, axes = FAMILIES[name]
    config = getattr(transformers, config_class)(**{**_COMMON, **own, **options})
    if name in _CLASSES:
        package, model_class = _CLASSES[name]
        module = importlib.import_module(f"transformers.models.{package}.modeling_{package}")
        model = getattr(module, model_class)._from_config(config, attn_implementation="eager").eval()
    else:
        model = transformers.AutoModel.from_config(config, attn_implementation="eager").eval()
    head = torch.nn.Linear(config.hidden_size, config.vocab_size, bias=False)
    both = torch.nn.ModuleDict({"text": model, "head": head})
    draw_weights(both)
    if config.tie_word_embeddings:
        head.weight = model.get_input_embeddings().weight
    both.requires_grad_(False)
    return Decoder(model, head, config, axes)


@pytest.fixture(scope="session")
def _decoders() -> dict[str, Decoder]:
    return {}


@pytest.fixture
def make_tiny(_decoders: dict[str, Decoder]) -> Callable[[str], Tiny]:
    """Family name -> a fresh :class:`Tiny`."""

    def make(name: str) -> Tiny:
        if name not in _decoders:
            _decoders[name] = make_decoder(name)
        reference = _decoders[name]
        return Tiny(copy.deepcopy(reference), reference)

    return make


@pytest.fixture
def context() -> DenseContext:
    """A dense attention context of one request."""
    return DenseContext(256)
