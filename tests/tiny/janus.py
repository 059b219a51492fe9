"""Janus, in transformers' format and as it is published; DeepSeek-VL."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file

from .common import Tiny, bpe, draw_weights

_NAMED = {
    "image_token": "<image_placeholder>",
    "boi_token": "<begin_of_image>",
    "eoi_token": "<end_of_image>",
}
BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
_SIDE = {"height": 32, "width": 32}
# DeepSeek's own has no marks around a system message.
_TEMPLATE = (
    "{%- for m in messages -%}"
    "{{ {'user': '<|User|>: ', 'assistant': '<|Assistant|>: ', 'system': ''}[m['role']] }}"
    "{%- if m['content'] is string -%}{{ m['content'] }}{%- else -%}{%- for c in m['content'] -%}"
    "{{ '<image_placeholder>\n' if c['type'] == 'image' else c['text'] }}"
    "{%- endfor -%}{%- endif -%}"
    "{{ '<｜end▁of▁sentence｜>' if m['role'] == 'assistant' else '\n\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|Assistant|>:{%- endif -%}"
)


def _tokenizer(named: dict[str, str]) -> Any:
    special = [BOS, EOS, PAD, "<|User|>", "<|Assistant|>", *named.values()]
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe(special),
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_specific_special_tokens=named,
        extra_special_tokens=special[3:],
        padding_side="left",
    )


def llama(tokenizer: Any) -> dict[str, Any]:
    """A small Llama."""
    return {
        "model_type": "llama",
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def _janus() -> tuple[Any, Any]:
    tokenizer = _tokenizer(_NAMED)
    config = transformers.JanusConfig(
        text_config=llama(tokenizer),
        vision_config={
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 8,
            "mlp_ratio": 1.5,
            "projection_dim": 64,
            "num_image_tokens": 16,
        },
        vq_config={
            "embed_dim": 8,
            "num_embeddings": 16,
            "latent_channels": 8,
            "base_channels": 32,
            "channel_multiplier": [1, 1],
            "num_res_blocks": 1,
            "num_patches": 4,
            "projection_dim": 64,
            "image_token_embed_dim": 64,
        },
        image_token_id=tokenizer.image_token_id,
        tie_word_embeddings=False,
    )
    processor = transformers.JanusProcessor(
        image_processor=transformers.JanusImageProcessor(size=_SIDE),
        tokenizer=tokenizer,
        num_image_tokens=16,
        chat_template=_TEMPLATE,
    )
    return transformers.JanusForConditionalGeneration(config), processor


def timm_name(name: str, output: str) -> str:
    """Name of a weight of a tower of SigLIP's shape -> timm's; ``output``: of attention."""
    for pattern, replacement in (
        (r"^embeddings\.patch_embedding\.", "patch_embed.proj."),
        (r"^embeddings\.position_embedding\.weight$", "pos_embed"),
        (r"^post_layernorm\.", "norm."),
        (r"^encoder\.layers\.(\d+)\.layer_norm(\d)\.", r"blocks.\1.norm\2."),
        (rf"^encoder\.layers\.(\d+)\.self_attn\.{output}\.", r"blocks.\1.attn.proj."),
        (r"^encoder\.layers\.(\d+)\.self_attn\.", r"blocks.\1.attn."),
        (r"^encoder\.layers\.(\d+)\.mlp\.", r"blocks.\1.mlp."),
    ):
        new, count = re.subn(pattern, replacement, name)
        if count:
            return new
    raise ValueError(f"a name that no tower has: {name}")


def timm_weights(tower: Any, output: str) -> dict[str, torch.Tensor]:
    """A tower's weights as timm stores them, with a pooling layer that nothing uses."""
    out = {timm_name(name, output): tensor for name, tensor in tower.state_dict().items() if "head" not in name}
    for name in [n for n in out if "attn.q_proj" in n]:
        parts = [out.pop(name.replace("q_proj", f"{part}_proj")) for part in "qkv"]
        out[name.replace("q_proj", "qkv")] = torch.cat(parts)
    out["pos_embed"] = out["pos_embed"][None]
    out["attn_pool.latent"] = torch.randn(1, 1, out["norm.weight"].numel())
    return out


def _published_janus(folder: Path) -> None:
    model, processor = _janus()
    draw_weights(model)
    tokenizer = processor.tokenizer
    processor.chat_template = (
        "{{ bos_token }}{% set s = namespace(text='You are a helpful language and vision assistant. You are able to "
        "understand the visual content that the user provides, and assist the user with a variety of tasks using "
        "natural language.') %}{% for m in messages if m.role == 'system' %}{% set s.text = m.content %}{% endfor %}"
        "{{ s.text }}\n\n"
        "{% for m in messages if m.role != 'system' %}{% set c = namespace(text='') %}"
        "{% if m.content is string %}{% set c.text = m.content %}{% else %}{% for p in m.content %}"
        "{% set c.text = c.text + ('<image_placeholder>\n' if p.type == 'image' else p.text) %}{% endfor %}{% endif %}"
        "{{ '<|User|>: ' if m.role == 'user' else '<|Assistant|>: ' }}{{ c.text.strip() }}"
        "{{ '\n\n' if m.role == 'user' else eos_token }}{% endfor %}<|Assistant|>:"
    )
    model.generation_config = transformers.GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(folder / "whole")
    processor.save_pretrained(folder / "whole")
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    weights = {
        f"vision_model.vision_tower.{n}": t
        for n, t in timm_weights(model.model.vision_model, "projection_layer").items()
    }
    weights |= {f"language_model.model.{n}": t for n, t in model.model.language_model.state_dict().items()}
    weights["language_model.lm_head.weight"] = model.lm_head.weight
    for name, tensor in model.model.aligner.state_dict().items():
        weights["aligner." + name.replace("fc1", "layers.0").replace("hidden_layers.0", "layers.2")] = tensor
    # a little of the half that draws pictures
    weights["gen_embed.weight"] = model.model.generation_embeddings.weight
    weights["gen_vision_model.quantize.codebook_used"] = torch.zeros(16)
    save_file({n: t.contiguous() for n, t in weights.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    text = llama(tokenizer)
    config = {
        "aligner_config": {
            "cls": "MlpProjector",
            "model_type": "aligner",
            "params": {"depth": 2, "input_dim": 32, "n_embed": 64, "projector_type": "mlp_gelu"},
        },
        "architectures": ["MultiModalityCausalLM"],
        "gen_vision_config": {
            "cls": "VQ-16",
            "model_type": "gen_vision",
            "params": {"image_token_size": 16, "n_embed": 8},
        },
        "language_config": {k: v for k, v in text.items() if not k.endswith("_token_id")} | {"torch_dtype": "bfloat16"},
        "model_type": "multi_modality",
        "torch_dtype": "bfloat16",
        "vision_config": {
            "cls": "CLIPVisionTower",
            "model_type": "vision",
            "params": {
                "image_size": 32,
                "model_name": "siglip_large_patch16_384",
                "select_feature": "same",
                "select_layer": -1,
                "patch_size": 8,
                "width": 32,
                "layers": 2,
                "heads": 2,
                "mlp_ratio": 1.5,
            },
        },
    }
    images = {
        "background_color": [127, 127, 127],
        "do_normalize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_processor_type": "VLMImageProcessor",
        "image_size": 32,
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "min_size": 14,
        "processor_class": "VLChatProcessor",
        "rescale_factor": 0.00392156862745098,
    }
    options = {"num_image_tokens": 16, "image_tag": _NAMED["image_token"], "processor_class": "VLChatProcessor"}
    for name, content in {"config": config, "preprocessor_config": images, "processor_config": options}.items():
        (folder / f"{name}.json").write_text(json.dumps(content))


_SIGLIP = {
    "model_type": "siglip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
    "vision_use_head": False,
}


def _deepseek_vl() -> tuple[Any, Any]:
    tokenizer = _tokenizer({"image_token": "<image_placeholder>"})
    config = transformers.DeepseekVLConfig(
        text_config=llama(tokenizer),
        vision_config=_SIGLIP,
        image_token_id=tokenizer.image_token_id,
        tie_word_embeddings=False,
    )
    processor = transformers.DeepseekVLProcessor(
        image_processor=transformers.DeepseekVLImageProcessor(size=_SIDE),
        tokenizer=tokenizer,
        num_image_tokens=16,
        chat_template=_TEMPLATE,
    )
    return transformers.DeepseekVLForConditionalGeneration(config), processor


def _deepseek_vl_hybrid() -> tuple[Any, Any]:
    tokenizer = _tokenizer({"image_token": "<image_placeholder>"})
    config = transformers.DeepseekVLHybridConfig(
        text_config=llama(tokenizer),
        vision_config=_SIGLIP,
        high_res_vision_config={
            "model_type": "sam_vision_model",
            "hidden_size": 32,
            "output_channels": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 64,
            "patch_size": 16,
            "mlp_dim": 48,
            "window_size": 2,
            "global_attn_indexes": [1],
            "num_pos_feats": 16,
        },
        image_token_id=tokenizer.image_token_id,
        tie_word_embeddings=False,
    )
    processor = transformers.DeepseekVLHybridProcessor(
        image_processor=transformers.DeepseekVLHybridImageProcessor(
            size=_SIDE, high_res_size={"height": 64, "width": 64}, high_res_image_mean=[0.5, 0.4, 0.3]
        ),
        tokenizer=tokenizer,
        num_image_tokens=16,
        chat_template=_TEMPLATE,
    )
    return transformers.DeepseekVLHybridForConditionalGeneration(config), processor


FAMILIES = {
    "deepseek_vl": Tiny(_deepseek_vl, ("image",)),
    "deepseek_vl_hybrid": Tiny(_deepseek_vl_hybrid, ("image",)),
    "janus": Tiny(_janus, ("image",)),
    "janus_published": Tiny(_published_janus, ("image",)),
}
