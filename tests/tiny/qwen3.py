"""Qwen3-VL, dense and with mixtures of experts; Qwen3-Omni, as it is published and its thinker alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

from .common import Tiny, draw_weights
from .qwen import IMAGE_SIZE, TEMPLATE, VIDEO_SIZE, make_tokenizer, text_shape, vision_ids, vision_processors

VISION: dict[str, Any] = {
    "depth": 3,
    "hidden_size": 32,
    "intermediate_size": 48,
    "out_hidden_size": 64,
    "num_heads": 2,
    "patch_size": 8,
    "num_position_embeddings": 64,
    "deepstack_visual_indexes": [0, 1],
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}


def text(tokenizer: Any) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2], "mrope_interleaved": True}
    return text_shape(tokenizer) | {"head_dim": 16, "rope_parameters": rope}


def processors() -> dict[str, Any]:
    return {
        "image_processor": transformers.Qwen2VLImageProcessor(patch_size=8, size=IMAGE_SIZE),
        "video_processor": transformers.Qwen3VLVideoProcessor(
            patch_size=8, size=VIDEO_SIZE, cap_pixels_per_frame=False, fps=2, max_frames=8
        ),
    }


def _processor(tokenizer: Any) -> Any:
    return transformers.Qwen3VLProcessor(tokenizer=tokenizer, chat_template=TEMPLATE, **processors())


def qwen3_vl() -> tuple[Any, Any]:
    tokenizer = make_tokenizer()
    config = transformers.Qwen3VLConfig(text_config=text(tokenizer), vision_config=VISION, **vision_ids(tokenizer))
    return transformers.Qwen3VLForConditionalGeneration(config), _processor(tokenizer)


def qwen3_vl_moe() -> tuple[Any, Any]:
    tokenizer = make_tokenizer()
    config = transformers.Qwen3VLMoeConfig(
        text_config=text(tokenizer) | EXPERTS, vision_config=VISION, **vision_ids(tokenizer)
    )
    return transformers.Qwen3VLMoeForConditionalGeneration(config), _processor(tokenizer)


def _qwen3_vl_moe(folder: Path) -> None:
    """Published experts are stored the other way round than transformers has them."""
    save(*qwen3_vl_moe(), folder)
    weights = load_file(folder / "whole" / "model.safetensors")
    for name in [name for name in weights if ".experts." in name]:
        assert weights[name].shape[1] != weights[name].shape[2]
        weights[name] = weights[name].transpose(1, 2).contiguous()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text((folder / "whole" / "config.json").read_text())


def save(model: Any, processor: Any, folder: Path) -> None:
    """The model in transformers' format into folder/whole, all but it and its configuration into the folder."""
    draw_weights(model)
    tokenizer = processor.tokenizer
    model.generation_config = transformers.GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(folder / "whole")
    processor.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)


def qwen3_omni_thinker() -> tuple[Any, Any]:
    tokenizer = make_tokenizer()
    config = transformers.Qwen3OmniMoeThinkerConfig(
        text_config=text(tokenizer) | EXPERTS,
        vision_config=VISION,
        audio_config={
            "num_mel_bins": 16,
            "encoder_layers": 2,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 48,
            "d_model": 32,
            "max_source_positions": 100,
            "n_window": 50,
            "n_window_infer": 100,
            "conv_chunksize": 50,
            "downsample_hidden_size": 8,
            "output_dim": 64,
        },
        audio_token_id=tokenizer.audio_token_id,
        audio_start_token_id=tokenizer.audio_bos_token_id,
        position_id_per_seconds=13,
        **vision_ids(tokenizer),
    )
    processor = transformers.Qwen3OmniMoeProcessor(
        image_processor=transformers.Qwen2VLImageProcessor(patch_size=8, size=IMAGE_SIZE),
        video_processor=vision_processors()["video_processor"],
        feature_extractor=transformers.WhisperFeatureExtractor(feature_size=16, chunk_length=4),
        tokenizer=tokenizer,
        chat_template=TEMPLATE,
    )
    return transformers.Qwen3OmniMoeThinkerForConditionalGeneration(config), processor


def _qwen3_omni(folder: Path) -> None:
    """The thinker is a part of what is published."""
    save(*qwen3_omni_thinker(), folder)
    weights = {f"thinker.{name}": value for name, value in load_file(folder / "whole" / "model.safetensors").items()}
    save_file(weights | {"talker.codec_head.weight": torch.zeros(2, 2)}, folder / "model.safetensors")
    thinker = json.loads((folder / "whole" / "config.json").read_text())
    config = {
        "architectures": ["Qwen3OmniMoeForConditionalGeneration"],
        "model_type": "qwen3_omni_moe",
        "enable_audio_output": True,
        "talker_config": {"model_type": "qwen3_omni_moe_talker"},
        "thinker_config": thinker,
    }
    (folder / "config.json").write_text(json.dumps(config))


FAMILIES = {
    "qwen3_vl": Tiny(qwen3_vl, ("image", "video"), quick=True),
    "qwen3_omni_moe": Tiny(_qwen3_omni, ("image", "video", "audio")),
    "qwen3_omni_moe_thinker": Tiny(qwen3_omni_thinker, ("image", "video", "audio")),
    "qwen3_vl_moe": Tiny(_qwen3_vl_moe, ("image", "video")),
}
