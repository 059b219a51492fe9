"""InternVL in OpenGVLab's format, with each kind of text model, and the same in transformers' format."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file

from triptych.python_models.families.templates import TEMPLATES

from .common import Tiny, draw_weights
from .internvl import NAMED, VISION, make_processor
from .llava import make_tokenizer, text_shape

_VISION = (
    ("model.vision_tower.", "vision_model."),
    (".encoder.layer.", ".encoder.layers."),
    (".lambda_1", ".ls1"),
    (".lambda_2", ".ls2"),
    (".attention.projection_layer.", ".attn.proj."),
    (".attention.q_norm.", ".attn.q_norm."),
    (".attention.k_norm.", ".attn.k_norm."),
    (".layernorm_before.", ".norm1."),
    (".layernorm_after.", ".norm2."),
    (".cls_token", ".class_embedding"),
    (".position_embeddings", ".position_embedding"),
    (".patch_embeddings.projection.", ".patch_embedding."),
    ("model.multi_modal_projector.layer_norm.", "mlp1.0."),
    ("model.multi_modal_projector.linear_1.", "mlp1.1."),
    ("model.multi_modal_projector.linear_2.", "mlp1.3."),
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
)
_INTERNLM2 = (
    ("language_model.lm_head.", "language_model.output."),
    (".embed_tokens.", ".tok_embeddings."),
    (".self_attn.o_proj.", ".attention.wo."),
    (".mlp.gate_proj.", ".feed_forward.w1."),
    (".mlp.down_proj.", ".feed_forward.w2."),
    (".mlp.up_proj.", ".feed_forward.w3."),
    (".input_layernorm.", ".attention_norm."),
    (".post_attention_layernorm.", ".ffn_norm."),
)
_DYNAMIC = {"factor": 2.0, "type": "dynamic"}
# LongRoPE under its first name; no test is as long as where it changes
_FACTORS = {"long_factor": [2.0 + k for k in range(8)], "short_factor": [1.0 + 0.1 * k for k in range(8)]}
_SWITCH = {"original_max_position_embeddings": 1024}
_SPECIAL = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")


def published(model: Any, text: str) -> dict[str, torch.Tensor]:
    """The weights under OpenGVLab's names, fused as there."""
    config = model.config.text_config
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    out: dict[str, torch.Tensor] = {}
    joined: dict[str, dict[str, torch.Tensor]] = {}
    for name, value in model.state_dict().items():
        match = re.match(r"(.*vision_tower.*\.attention|.*\.self_attn)\.([qkv])_proj\.(\w+)$", name)
        if match and ("vision_tower" in name or text == "internlm2"):
            joined.setdefault(f"{match[1]}.{match[3]}", {})[match[2]] = value
        else:
            out[name] = value
    for name, parts in joined.items():
        place, _, ending = name.rpartition(".")
        q, k, v = (parts[letter] for letter in "qkv")
        if "vision_tower" in name:
            out[f"{place.removesuffix('attention')}attn.qkv.{ending}"] = torch.cat([q, k, v])
            continue
        grouped = q.view(groups, heads // groups, -1, q.shape[-1])
        single = [part.view(groups, 1, -1, part.shape[-1]) for part in (k, v)]
        fused = torch.cat([grouped, *single], dim=1).reshape(-1, q.shape[-1])
        out[f"{place.removesuffix('self_attn')}attention.wqkv.{ending}"] = fused
    renames = (*_VISION, *(_INTERNLM2 if text == "internlm2" else ()))
    for own, theirs in renames:
        out = {name.replace(own, theirs): value for name, value in out.items()}
    return {name: value.clone().contiguous() for name, value in out.items()}


def _make(folder: Path, text: str, template: str, *, large_tower: bool = False) -> None:
    """Write both formats.

    Args:
        folder: of the published one; the other goes into ``whole``.
        text: model_type of the text model.
        template: that config.json names.
        large_tower: as InternViT-6B: norms of queries and keys, RMSNorm, no biases.
    """
    tokenizer = make_tokenizer(*_SPECIAL, named=NAMED, bos=text != "qwen2")
    rope: dict[str, Any] = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e6}
    if text == "phi3":
        rope = _FACTORS | _SWITCH | {"rope_type": "longrope", "rope_theta": 1e4}
    options = {"rope_parameters": rope} | (_SWITCH if text == "phi3" else {})
    shape = text_shape(tokenizer, "llama" if text == "internlm2" else text, **options)
    tower = {
        "attention_bias": not large_tower,
        "use_qk_norm": large_tower,
        "norm_type": "rms_norm" if large_tower else "layer_norm",
    }
    config = transformers.InternVLConfig(
        vision_config=VISION | tower,
        text_config=shape,
        image_token_id=tokenizer.context_image_token_id,
        image_seq_length=4,
        tie_word_embeddings=False,
    )
    model = transformers.InternVLForConditionalGeneration(config)
    draw_weights(model)
    model.generation_config = transformers.GenerationConfig(
        eos_token_id=[tokenizer.eos_token_id, *TEMPLATES[template].end_ids(tokenizer)]
    )
    processor = make_processor(tokenizer)
    processor.chat_template = TEMPLATES[template].text
    for part in (processor.image_processor, processor.video_processor):
        part.image_mean, part.image_std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    model.save_pretrained(folder / "whole")
    processor.save_pretrained(folder / "whole")

    tokenizer.save_pretrained(folder)
    saved = json.loads((folder / "tokenizer_config.json").read_text())
    for name in NAMED:
        saved.pop(name, None)
    saved.pop("model_specific_special_tokens", None)
    if text == "internlm2":
        saved |= {
            "tokenizer_class": "InternLM2Tokenizer",
            "auto_map": {"AutoTokenizer": ["tokenization_internlm2.InternLM2Tokenizer", None]},
        }
    (folder / "tokenizer_config.json").write_text(json.dumps(saved))
    language = {key: value for key, value in shape.items() if key not in ("rope_parameters", "head_dim")} | {
        "architectures": ["InternLM2ForCausalLM"],
        "model_type": text,
        "rope_theta": rope["rope_theta"],
        "rope_scaling": _FACTORS | {"type": "su"} if text == "phi3" else _DYNAMIC,
        **({"bias": False} if text == "internlm2" else {}),
    }
    raw = {
        "architectures": ["InternVLChatModel"],
        "auto_map": {"AutoConfig": "configuration_internvl_chat.InternVLChatConfig"},
        "downsample_ratio": 0.5,
        "dynamic_image_size": True,
        "force_image_size": 32,
        "llm_config": language,
        "max_dynamic_patch": 4,
        "min_dynamic_patch": 1,
        "model_type": "internvl_chat",
        "ps_version": "v2",
        "select_layer": -1,
        "template": template,
        "torch_dtype": "float32",
        "use_thumbnail": True,
        "vision_config": {
            "hidden_act": "gelu",
            "hidden_size": 32,
            # before pictures were made smaller or larger
            "image_size": 64,
            "intermediate_size": 48,
            "layer_norm_eps": 1e-06,
            "model_type": "intern_vit_6b",
            "norm_type": tower["norm_type"],
            "num_attention_heads": 2,
            "num_hidden_layers": 2,
            "patch_size": 8,
            "qk_normalization": large_tower,
            "qkv_bias": not large_tower,
        },
    }
    (folder / "config.json").write_text(json.dumps(raw))
    (folder / "generation_config.json").write_text(json.dumps({"_from_model_config": True}))
    save_file(published(model, text), folder / "model.safetensors", metadata={"format": "pt"})


FAMILIES = {
    "internvl2_internlm2": Tiny(partial(_make, text="internlm2", template="internlm2-chat"), ("image", "video")),
    "internvl2_llama": Tiny(partial(_make, text="llama", template="Hermes-2", large_tower=True), ("image", "video")),
    "internvl2_phi3": Tiny(partial(_make, text="phi3", template="phi3-chat"), ("image", "video")),
    "internvl3_published": Tiny(partial(_make, text="qwen2", template="internvl2_5"), ("image", "video")),
}
