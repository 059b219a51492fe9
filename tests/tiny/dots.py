"""dots.ocr, dots.vlm1: in their published format, beside a forward pass of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch.nn import functional

from .common import Tiny, bpe
from .reference import Reference, draw, write_checkpoint

_WIDTH, _HEADS, _LAYERS, _INNER, _PATCH, _TEXT = 32, 2, 2, 48, 8, 64
_SPECIAL = [
    "<|endoftext|>",
    "<|img|>",
    "<|imgpad|>",
    "<|endofimg|>",
    "<|video_pad|>",
    "<|user|>",
    "<|endofuser|>",
    "<|assistant|>",
    "<|endofassistant|>",
]
_TEMPLATE = (
    "{%- for m in messages -%}"
    "{%- if m.role == 'system' -%}{{- '<|system|>' + m.content + '<|endofsystem|>\n' -}}"
    "{%- elif m.role == 'user' -%}{{- '<|user|>' -}}"
    "{%- if m.content is string -%}{{- m.content -}}{%- else -%}{%- for c in m.content -%}"
    "{%- if c.type == 'image' -%}{{- '<|img|><|imgpad|><|endofimg|>' -}}{%- else -%}{{- c.text -}}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}{{- '<|endofuser|>' -}}"
    "{%- elif m.role == 'assistant' -%}{{- '<|assistant|>' + m.content -}}"
    "{%- if not loop.last -%}{{- '<|endofassistant|>' -}}{%- endif -%}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if messages[-1].role != 'assistant' -%}{{- '<|assistant|>' -}}{%- endif -%}"
)
# the same of texts alone
_TEXTS = (
    "{%- for m in messages -%}"
    "{%- if m.role == 'system' -%}{{- '<|system|>' + m.content + '<|endofsystem|>\n' -}}"
    "{%- elif m.role == 'user' -%}{{- '<|user|>' + m.content + '<|endofuser|>' -}}"
    "{%- elif m.role == 'assistant' -%}{{- '<|assistant|>' + m.content -}}"
    "{%- if not loop.last -%}{{- '<|endofassistant|>' -}}{%- endif -%}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if messages[-1].role != 'assistant' -%}{{- '<|assistant|>' -}}{%- endif -%}"
)
_VISION = {
    "embed_dim": _WIDTH,
    "hidden_size": _TEXT,
    "intermediate_size": _INNER,
    "num_hidden_layers": _LAYERS,
    "num_attention_heads": _HEADS,
    "num_channels": 3,
    "patch_size": _PATCH,
    "post_norm": True,
    "rms_norm_eps": 1e-05,
    "spatial_merge_size": 2,
    "temporal_patch_size": 1,
    "use_bias": False,
    "attn_implementation": "flash_attention_2",
    "init_merger_std": 0.02,
    "initializer_range": 0.02,
    "is_causal": False,
    "gradient_checkpointing": False,
}
_QWEN2 = {
    "attention_bias": True,
    "hidden_act": "silu",
    "hidden_size": _TEXT,
    "intermediate_size": 96,
    "max_position_embeddings": 2048,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000,
    "rope_scaling": None,
    "sliding_window": 2048,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "max_window_layers": 28,
    "vocab_size": 512,
}
_DEEPSEEK_V3 = {
    "attention_bias": False,
    "ep_size": 1,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": _TEXT,
    "intermediate_size": 96,
    "kv_lora_rank": 16,
    "max_position_embeddings": 2048,
    "moe_intermediate_size": 32,
    "moe_layer_freq": 1,
    "n_group": 2,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000,
    "rope_scaling": None,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "v_head_dim": 16,
    "vocab_size": 512,
}


def _vision_weights() -> dict[str, torch.Tensor]:
    shapes: dict[str, tuple[int, ...]] = {
        "patch_embed.patchifier.proj.weight": (_WIDTH, 3, _PATCH, _PATCH),
        "patch_embed.patchifier.proj.bias": (_WIDTH,),
        "patch_embed.patchifier.norm.weight": (_WIDTH,),
        "post_trunk_norm.weight": (_WIDTH,),
        "merger.ln_q.weight": (_WIDTH,),
        "merger.ln_q.bias": (_WIDTH,),
        "merger.mlp.0.weight": (4 * _WIDTH, 4 * _WIDTH),
        "merger.mlp.0.bias": (4 * _WIDTH,),
        "merger.mlp.2.weight": (_TEXT, 4 * _WIDTH),
        "merger.mlp.2.bias": (_TEXT,),
    }
    for k in range(_LAYERS):
        shapes |= {
            f"blocks.{k}.norm1.weight": (_WIDTH,),
            f"blocks.{k}.attn.qkv.weight": (3 * _WIDTH, _WIDTH),
            f"blocks.{k}.attn.proj.weight": (_WIDTH, _WIDTH),
            f"blocks.{k}.norm2.weight": (_WIDTH,),
            f"blocks.{k}.mlp.fc1.weight": (_INNER, _WIDTH),
            f"blocks.{k}.mlp.fc2.weight": (_WIDTH, _INNER),
            f"blocks.{k}.mlp.fc3.weight": (_INNER, _WIDTH),
        }
    return draw({f"vision_tower.{name}": shape for name, shape in shapes.items()})


def _write(folder: Path, model_type: str, architecture: str, text_class: str, text: dict[str, Any]) -> None:
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe(_SPECIAL),
        eos_token="<|endofassistant|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=_SPECIAL[1:-1],
    )
    config = text | {
        "architectures": [architecture],
        "model_type": model_type,
        "auto_map": {"AutoConfig": "configuration_dots.DotsConfig", "AutoModelForCausalLM": "modeling_dots.Dots"},
        "image_token_id": tokenizer.convert_tokens_to_ids("<|imgpad|>"),
        "video_token_id": tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        "torch_dtype": "bfloat16",
        "vision_config": _VISION,
    }
    preprocessor = {
        "min_pixels": 32 * 32,
        "max_pixels": 112 * 112,
        "patch_size": _PATCH,
        "temporal_patch_size": 1,
        "merge_size": 2,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "DotsVLProcessor",
    }
    template = _TEMPLATE if model_type == "dots_ocr" else _TEXTS
    model = getattr(transformers, text_class)(getattr(transformers, text_class).config_class(**text))
    write_checkpoint(
        folder,
        config,
        tokenizer,
        text=model,
        prefix="",
        towers=_vision_weights(),
        files={"preprocessor_config.json": preprocessor, "chat_template.json": {"chat_template": template}},
    )


def _rms(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight


def _turn(x: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Rotate [patches, heads, D]: a quarter of the pairs (d, d + D/2) by the row, a quarter by the column."""
    quarter = x.shape[-1] // 4
    speed = 10000.0 ** (-torch.arange(quarter) / quarter)
    angle = torch.cat([rows[:, None] * speed, columns[:, None] * speed], dim=1)[:, None]
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], dim=-1)


def _see(w: dict[str, torch.Tensor], patches: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """One picture, patches [height * width, 3 * pixels] in squares of four -> rows."""
    w = {name.removeprefix("vision_tower."): tensor for name, tensor in w.items()}
    places = torch.arange(height * width).view(height // 2, 2, width // 2, 2).transpose(1, 2).flatten()
    squares = torch.cartesian_prod(*(torch.arange(n) for n in (height // 2, width // 2, 2, 2)))
    rows, columns = 2 * squares[:, 0] + squares[:, 2], 2 * squares[:, 1] + squares[:, 3]
    assert torch.equal(rows * width + columns, places)
    x = functional.linear(
        patches, w["patch_embed.patchifier.proj.weight"].flatten(1), w["patch_embed.patchifier.proj.bias"]
    )
    x = _rms(x, w["patch_embed.patchifier.norm.weight"])
    for k in range(_LAYERS):
        b = {name.removeprefix(f"blocks.{k}."): tensor for name, tensor in w.items()}
        q, key, value = (
            functional.linear(_rms(x, b["norm1.weight"]), b["attn.qkv.weight"]).view(len(x), 3, _HEADS, -1).unbind(1)
        )
        q, key = _turn(q, rows, columns), _turn(key, rows, columns)
        scores = torch.einsum("qhd,khd->hqk", q, key) / q.shape[-1] ** 0.5
        mixed = torch.einsum("hqk,khd->qhd", scores.softmax(-1), value).flatten(1)
        x = x + mixed @ b["attn.proj.weight"].T
        y = _rms(x, b["norm2.weight"])
        x = x + (functional.silu(y @ b["mlp.fc1.weight"].T) * (y @ b["mlp.fc3.weight"].T)) @ b["mlp.fc2.weight"].T
    x = _rms(x, w["post_trunk_norm.weight"])
    x = functional.layer_norm(x, x.shape[-1:], w["merger.ln_q.weight"], w["merger.ln_q.bias"], 1e-6).view(
        -1, 4 * _WIDTH
    )
    x = functional.gelu(functional.linear(x, w["merger.mlp.0.weight"], w["merger.mlp.0.bias"]))
    return functional.linear(x, w["merger.mlp.2.weight"], w["merger.mlp.2.bias"])


def _reference(text_class: str, folder: Path) -> tuple[Any, Any]:
    processor = transformers.Qwen2VLProcessor(
        image_processor=transformers.Qwen2VLImageProcessor.from_pretrained(folder),
        tokenizer=transformers.PreTrainedTokenizerFast.from_pretrained(folder),
        video_processor=transformers.Qwen2VLVideoProcessor(),
        chat_template=_TEMPLATE,
    )
    processor.image_token = "<|imgpad|>"

    def rows(w: dict[str, torch.Tensor], inputs: dict[str, Any]) -> dict[int, torch.Tensor]:
        if "pixel_values" not in inputs:
            return {}
        grids = inputs["image_grid_thw"].tolist()
        parts = inputs["pixel_values"].split([height * width for _, height, width in grids])
        seen = [_see(w, part, height, width) for part, (_, height, width) in zip(parts, grids, strict=True)]
        return {processor.tokenizer.convert_tokens_to_ids("<|imgpad|>"): torch.cat(seen)}

    return Reference(folder, getattr(transformers, text_class), rows), processor


def _family(model_type: str, architecture: str, text_class: str, text: dict[str, Any]) -> Tiny:
    return Tiny(
        lambda folder: _write(folder, model_type, architecture, text_class, text),
        ("image",),
        reference=lambda folder: _reference(text_class, folder),
    )


FAMILIES = {
    "dots_ocr": _family("dots_ocr", "DotsOCRForCausalLM", "Qwen2ForCausalLM", _QWEN2),
    "dots_vlm": _family("dots_vlm", "DotsVLMForCausalLM", "DeepseekV3ForCausalLM", _DEEPSEEK_V3),
}
