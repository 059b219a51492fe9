"""DeepSeek-OCR and OCR-2, in transformers' format and as they are published."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file

from .common import Tiny, bpe, draw_weights

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
GROUNDING = ["<|ref|>", "<|/ref|>", "<|det|>", "<|/det|>", "<|grounding|>"]
# As the published prompts are written: nothing around a message.
_PLAIN = (
    "{%- macro write(content) -%}{%- if content is string -%}{{ content }}{%- else -%}"
    "{%- for c in content -%}{{ '<image>\n' if c['type'] == 'image' else c['text'] }}{%- endfor -%}"
    "{%- endif -%}{%- endmacro -%}"
    "{{ bos_token }}{%- for m in messages -%}{{ write(m['content']) | trim }}{%- endfor -%}"
)


def tokenizer_of(special: Sequence[str], named: dict[str, str] | None = None) -> Any:
    """A tokenizer that adds nothing of its own."""
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe([BOS, EOS, PAD, *special]),
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        extra_special_tokens=list(special),
        padding_side="left",
        **({"model_specific_special_tokens": named} if named else {}),
    )


def text_of(tokenizer: Any) -> dict[str, Any]:
    """A small text model with experts."""
    return {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 2048,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "n_group": 1,
        "topk_group": 1,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }


def _ocr2() -> tuple[Any, Any]:
    """Towers of small patches: as many tokens, of fewer pixels."""
    tokenizer = tokenizer_of(["<image>", *GROUNDING], {"image_token": "<image>"})
    config = transformers.DeepseekOcr2Config(
        text_config=text_of(tokenizer) | {"mlp_layer_types": ["dense", "sparse", "sparse"]},
        vision_config={
            "sam_config": {
                "hidden_size": 16,
                "output_channels": 16,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "image_size": 256,
                "patch_size": 4,
                "mlp_ratio": 1.5,
                "global_attn_indexes": [],
                "downsample_channels": [24, 32],
            },
            "encoder_config": {
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "vocab_size": 8,
            },
        },
        image_token_id=tokenizer.image_token_id,
    )
    processor = transformers.DeepseekOcr2Processor(
        image_processor=transformers.DeepseekOcr2ImageProcessor(size={"height": 256, "width": 256}, tile_size=192),
        tokenizer=tokenizer,
        chat_template=_PLAIN,
        patch_size=4,
    )
    return transformers.DeepseekOcr2ForConditionalGeneration(config), processor


_SAM_NAMES = (
    (r"\.layers\.(\d+)\.layer_norm(\d)\.", r".blocks.\1.norm\2."),
    (r"\.layers\.(\d+)\.", r".blocks.\1."),
    (r"\.patch_embed\.projection\.", ".patch_embed.proj."),
    (r"\.neck\.conv1\.", ".neck.0."),
    (r"\.neck\.layer_norm1\.", ".neck.1."),
    (r"\.neck\.conv2\.", ".neck.2."),
    (r"\.neck\.layer_norm2\.", ".neck.3."),
    (r"\.proj\.conv1\.", ".net_2."),
    (r"\.proj\.conv2\.", ".net_3."),
)


def _published_name(name: str) -> str:
    """Of a weight of DeepseekOcr2ForConditionalGeneration or UnlimitedOcrForConditionalGeneration."""
    if name.startswith("model.vision_tower.sam_encoder."):
        name = name.replace("vision_tower.sam_encoder", "sam_model")
        for pattern, replacement in _SAM_NAMES:
            name, count = re.subn(pattern, replacement, name)
            if count:
                break
        return name
    for old, new in (
        ("model.vision_tower.vision_encoder.encoder.", "model.vision_model.transformer."),
        ("model.vision_tower.vision_encoder.embeddings.", "model.vision_model.embeddings."),
        ("model.vision_tower.vision_encoder.pre_layrnorm.", "model.vision_model.pre_layrnorm."),
        ("model.vision_tower.vision_encoder.", "model.qwen2_model.model.model."),
        ("model.vision_tower.query_768_resolution.", "model.qwen2_model.query_768."),
        ("model.vision_tower.query_1024_resolution.", "model.qwen2_model.query_1024."),
        ("model.multi_modal_projector.", "model.projector.layers."),
        ("model.view_separator", "model.view_seperator"),
        ("model.language_model.", "model."),
    ):
        if name.startswith(old):
            return name.replace(old, new)
    return name


def experts_apart(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """Weights of all experts in one -> one for each, as published."""
    root = name.rpartition(".")[0]
    if name.endswith("experts.gate_up_proj"):
        parts = [dict(zip(("gate_proj", "up_proj"), both.chunk(2), strict=True)) for both in tensor]
    else:
        parts = [{"down_proj": down} for down in tensor]
    return {f"{root}.{k}.{part}.weight": v for k, own in enumerate(parts) for part, v in own.items()}


def _published_weights(model: Any) -> dict[str, torch.Tensor]:
    out: dict[str, torch.Tensor] = {}
    state = {_published_name(name): tensor for name, tensor in model.state_dict().items()}
    for name, tensor in state.items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            out |= experts_apart(name, tensor)
        elif "vision_model.transformer" in name and (found := re.search(r"\.([qkv])_proj\.", name)):
            if found.group(1) == "q":
                joined = [state[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
                out[name.replace("q_proj", "qkv_proj")] = torch.cat(joined)
        else:
            out[name] = tensor
    return {name: tensor.contiguous() for name, tensor in out.items()}


def language_of(text: dict[str, Any]) -> dict[str, Any]:
    """``language_config`` as it is published: that of DeepSeek-V2 with its keys for MLA empty."""
    return text | {
        "architectures": ["DeepseekV2ForCausalLM"],
        "first_k_dense_replace": 1,
        "kv_lora_rank": None,
        "lm_head": True,
        "q_lora_rank": None,
        "qk_nope_head_dim": 0,
        "qk_rope_head_dim": 0,
        "rm_head": False,
        "topk_method": "greedy",
        "torch_dtype": "bfloat16",
        "use_mla": False,
        "v_head_dim": 0,
    }


def _write_published(
    folder: Path,
    architecture: str,
    make: Callable[[Any, dict[str, Any]], tuple[Any, Any]],
    vision: dict[str, Any],
    projector: int,
    options: dict[str, Any],
) -> None:
    tokenizer = tokenizer_of(["<image>", *GROUNDING, "<|User|>", "<|Assistant|>"])
    text = text_of(tokenizer)
    model, processor = make(tokenizer, text)
    draw_weights(model)
    model.generation_config = transformers.GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(folder / "whole")
    processor.save_pretrained(folder / "whole")
    tokenizer.save_pretrained(folder)
    save_file(_published_weights(model), folder / "model.safetensors", metadata={"format": "pt"})
    config = text | {
        "architectures": [architecture],
        "auto_map": {"AutoConfig": "modeling_x.Config", "AutoModel": "modeling_x.Model"},
        "candidate_resolutions": [[1024, 1024]],
        "global_view_pos": "head",
        "language_config": language_of(text),
        "model_type": "deepseek_vl_v2",
        "projector_config": {
            "input_dim": projector,
            "model_type": "mlp_projector",
            "n_embed": text["hidden_size"],
            "projector_type": "linear",
        },
        "tile_tag": "2D",
        "torch_dtype": "bfloat16",
        "vision_config": {"mlp_ratio": 3.7362, "model_type": "vision", **vision},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "processor_config.json").write_text(
        json.dumps({"processor_class": "DeepseekVLV2Processor", "patch_size": 16, "downsample_ratio": 4, **options})
    )


def _published_ocr(folder: Path) -> None:
    def make(tokenizer: Any, text: dict[str, Any]) -> tuple[Any, Any]:
        config = transformers.UnlimitedOcrConfig(
            text_config=text | {"layer_types": ["full_attention"] * 3, "first_k_dense_replace": 1},
            vision_config={
                "sam_config": {
                    "hidden_size": 32,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 2,
                    "image_size": 128,
                    "mlp_dim": 128,
                    "global_attn_indexes": [1],
                    "downsample_channels": [24, 32],
                },
                "encoder_config": {
                    "hidden_size": 32,
                    "intermediate_size": 128,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 2,
                    "image_size": 56,
                },
            },
            image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        )
        images = transformers.UnlimitedOcrImageProcessor(
            size={"height": 128, "width": 128}, tile_size=96, max_patches=6
        )
        processor = transformers.UnlimitedOcrProcessor(
            image_processor=images, tokenizer=tokenizer, chat_template=_PLAIN
        )
        return transformers.UnlimitedOcrForConditionalGeneration(config), processor

    vision = {
        "image_size": 128,
        "model_name": "deeplip_b_l",
        "width": {
            "clip-l-14-224": {"heads": 2, "image_size": 56, "layers": 2, "patch_size": 14, "width": 32},
            "sam_vit_b": {
                "downsample_channels": [24, 32],
                "global_attn_indexes": [1],
                "heads": 2,
                "layers": 2,
                "width": 32,
            },
        },
    }
    _write_published(folder, "DeepseekOCRForCausalLM", make, vision, 64, {"base_size": 128, "image_size": 96})


def _published_ocr2(folder: Path) -> None:
    qwen2 = {"intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}

    def make(tokenizer: Any, text: dict[str, Any]) -> tuple[Any, Any]:
        config = transformers.DeepseekOcr2Config(
            text_config=text | {"mlp_layer_types": ["dense", "sparse", "sparse"]},
            vision_config={
                "sam_config": {
                    "hidden_size": 16,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 2,
                    "global_attn_indexes": [],
                    "downsample_channels": [24, 32],
                },
                "encoder_config": qwen2
                | {
                    "hidden_size": 32,
                    "vocab_size": 8,
                    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
                },
            },
            image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        )
        processor = transformers.DeepseekOcr2Processor(
            image_processor=transformers.DeepseekOcr2ImageProcessor(), tokenizer=tokenizer, chat_template=_PLAIN
        )
        return transformers.DeepseekOcr2ForConditionalGeneration(config), processor

    vision = {
        "image_size": 1024,
        "model_name": "deepencoderv2",
        "width": {
            "qwen2-0-5b": {"dim": 32, **qwen2},
            "sam_vit_b": {
                "downsample_channels": [24, 1024],
                "global_attn_indexes": [],
                "heads": 2,
                "layers": 2,
                "width": 16,
            },
        },
    }
    _write_published(folder, "DeepseekOCR2ForCausalLM", make, vision, 32, {})


FAMILIES = {
    "deepseek_ocr": Tiny(_published_ocr, ("image",)),
    "deepseek_ocr2": Tiny(_ocr2, ("image",)),
    "deepseek_ocr2_published": Tiny(_published_ocr2, ("image",)),
}
