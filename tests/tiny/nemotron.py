"""Nemotron Omni."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

from triptych.python_models.families.qwen_vision import video_metadata

from .common import Tiny, bpe

NAMED = {
    "image_token": "<image>",
    "video_token": "<video>",
    "audio_token": "<so_embedding>",
    "image_start_token": "<img>",
    "image_end_token": "</img>",
}
TEMPLATE = (
    "{%- for m in messages -%}"
    "{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{%- if m['content'] is string -%}{{ m['content'] }}{%- else -%}{%- for c in m['content'] -%}"
    "{%- if c['type'] == 'image' -%}<image>\n"
    "{%- elif c['type'] == 'video' -%}<video>\n"
    "{%- elif c['type'] == 'audio' -%}<so_embedding>\n"
    "{%- else -%}{{ c['text'] }}{%- endif -%}{%- endfor -%}{%- endif -%}"
    "{{ '<|im_end|>\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)


def tokenizer(named: Mapping[str, str] = NAMED, more: tuple[str, ...] = ("<so_start>", "<so_end>")) -> Any:
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *named.values(), *more]
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe(special),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_specific_special_tokens=dict(named),
        extra_special_tokens=[s for s in special if s not in ("<|im_end|>", "<|endoftext|>")],
        padding_side="left",
    )


def text(own: Any) -> dict[str, Any]:
    """Mamba-2, attention, a plain and a gated expert network, each a layer of its own."""
    return {
        "model_type": "nemotron_h",
        "vocab_size": 512,
        "hidden_size": 64,
        "layers_block_type": ["linear_attention", "mlp", "full_attention", "moe", "linear_attention"],
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size": 96,
        "ssm_state_size": 8,
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "n_groups": 2,
        "conv_kernel": 4,
        "chunk_size": 8,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "moe_intermediate_size": 32,
        "moe_shared_expert_intermediate_size": 32,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 2048,
        "bos_token_id": own.convert_tokens_to_ids("<|endoftext|>"),
        "eos_token_id": own.eos_token_id,
        "pad_token_id": own.pad_token_id,
    }


def _omni() -> tuple[Any, Any]:
    own = tokenizer()
    vision = {
        "model_type": "radio",
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "mlp_ratio": 2.0,
        "patch_size": 16,
        "image_size": 64,
        "max_img_size": 256,
        "num_cls_tokens": 1,
        "num_registers": 1,
        "video_temporal_patch_size": 2,
        "summary_idxs": [0],
    }
    audio = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "num_mel_bins": 16,
        "subsampling_conv_channels": 8,
        "conv_kernel_size": 5,
        "projection_hidden_size": 48,
        "projection_bias": False,
    }
    config = transformers.NemotronH_Omni_Reasoning_V3_Config(
        vision_config=vision,
        text_config=text(own),
        audio_config=audio,
        force_image_size=64,
        projector_hidden_size=48,
        vision_hidden_size=32,
        image_token_id=own.image_token_id,
        video_token_id=own.video_token_id,
        audio_token_id=own.audio_token_id,
    )
    processor = transformers.NemotronH_Omni_Reasoning_V3Processor(
        image_processor=transformers.NemotronH_Omni_Reasoning_V3ImageProcessor(
            patch_size=16, min_num_patches=16, max_num_patches=64
        ),
        video_processor=transformers.NemotronH_Omni_Reasoning_V3VideoProcessor(
            patch_size=16, video_target_num_patches=16, norm_mean=[0.5] * 3, norm_std=[0.5] * 3
        ),
        tokenizer=own,
        feature_extractor=transformers.ParakeetFeatureExtractor(feature_size=16),
        chat_template=TEMPLATE,
    )
    return transformers.NemotronH_Omni_Reasoning_V3(config), processor


def whole(folder: Path) -> tuple[Any, Any]:
    """transformers' model, which concatenates what its ``get_video_features`` gives as if it were a list."""
    model = transformers.NemotronH_Omni_Reasoning_V3.from_pretrained(folder, dtype=torch.float32).eval()
    run = model.get_video_features

    # generate looks at its arguments
    @functools.wraps(run)
    def get_video_features(*args: Any, **options: Any) -> Any:
        out = run(*args, **options)
        out.pooler_output = [out.pooler_output]
        return out

    model.get_video_features = get_video_features
    return model, transformers.AutoProcessor.from_pretrained(folder)


def inputs(processor: Any, text: str, media: Mapping[str, list[Any]]) -> Any:
    """transformers' processor takes one video, and its metadata not in a list."""
    arguments: dict[str, Any] = {}
    if "image" in media:
        arguments["images"] = [image.pixels for image in media["image"]]
    if "video" in media:
        (video,) = media["video"]
        arguments["videos"] = [video.frames]
        arguments["videos_kwargs"] = {"do_sample_frames": False, "video_metadata": video_metadata(video)}
    if "audio" in media:
        arguments["audio"] = [sound.samples for sound in media["audio"]]
    return processor(text=[text], return_tensors="pt", **arguments)


_WITHOUT = dict.fromkeys(
    ("image_and_video", "mixed"), "transformers' forward takes rows of pictures or of a video, not both"
)
FAMILIES = {
    "nemotron_h_omni": Tiny(_omni, ("image", "video", "audio"), without=_WITHOUT, reference=whole, inputs=inputs)
}
