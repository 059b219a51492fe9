"""Families without a file of their own, which the generic adapter serves: pictures, videos, sounds, text alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers

from .common import Tiny
from .llava import CLIP, SIGLIP, SQUARE, make_tokenizer, template, text_shape
from .qwen import IMAGE_SIZE, TEMPLATE, VIDEO_SIZE
from .qwen import make_tokenizer as qwen_tokenizer

_ONE_SOUND = dict.fromkeys(("two_audios", "two"), "its processor takes one sound with every text")


def _vipllava() -> tuple[Any, Any]:
    tokenizer = make_tokenizer("<image>")
    config = transformers.VipLlavaConfig(
        vision_config=CLIP,
        text_config=text_shape(tokenizer, "llama"),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layers=[-2, -1],
        image_seq_length=16,
    )
    processor = transformers.LlavaProcessor(
        image_processor=transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=SQUARE),
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template("<image>\\n"),
    )
    return transformers.VipLlavaForConditionalGeneration(config), processor


def _idefics3() -> tuple[Any, Any]:
    tiles = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
    special = ["<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>", *tiles]
    tokenizer = make_tokenizer(*special, bos=False)
    config = transformers.Idefics3Config(
        text_config=text_shape(tokenizer, "llama"),
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 8,
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        pad_token_id=tokenizer.pad_token_id,
    )
    processor = transformers.Idefics3Processor(
        image_processor=transformers.Idefics3ImageProcessor(
            size={"longest_edge": 64}, max_image_size={"longest_edge": 32}
        ),
        tokenizer=tokenizer,
        image_seq_len=4,
        chat_template=template("<image>"),
    )
    return transformers.Idefics3ForConditionalGeneration(config), processor


def _aya_vision() -> tuple[Any, Any]:
    special = ["<image>", "<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_PATCH|>", "<|IMG_LINE_BREAK|>"]
    tokenizer = make_tokenizer(*special, "TILE", "TILE_GLOBAL", bos=False)
    text = text_shape(tokenizer, "cohere2", logit_scale=0.25, sliding_window=16)
    config = transformers.AyaVisionConfig(
        vision_config=SIGLIP,
        text_config={k: v for k, v in text.items() if k not in ("rms_norm_eps", "tie_word_embeddings")},
        image_token_index=tokenizer.convert_tokens_to_ids("<|IMG_PATCH|>"),
        downsample_factor=2,
        adapter_layer_norm_eps=1e-6,
        alignment_intermediate_size=64,
    )
    processor = transformers.AyaVisionProcessor(
        image_processor=transformers.GotOcr2ImageProcessor(
            size=SQUARE, min_patches=1, max_patches=4, crop_to_patches=True
        ),
        tokenizer=tokenizer,
        patch_size=8,
        img_size=32,
        downsample_factor=2,
        chat_template=template("<image>"),
    )
    return transformers.AyaVisionForConditionalGeneration(config), processor


def _video_llama_3() -> tuple[Any, Any]:
    tokenizer = qwen_tokenizer()
    config = transformers.VideoLlama3Config(
        text_config=text_shape(tokenizer, "qwen2"),
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "patch_size": 8,
        },
        image_token_id=tokenizer.image_token_id,
        video_token_id=tokenizer.video_token_id,
    )
    processor = transformers.VideoLlama3Processor(
        image_processor=transformers.VideoLlama3ImageProcessor(patch_size=8, size=IMAGE_SIZE),
        video_processor=transformers.VideoLlama3VideoProcessor(patch_size=8, size=VIDEO_SIZE),
        tokenizer=tokenizer,
        chat_template=TEMPLATE,
    )
    return transformers.VideoLlama3ForConditionalGeneration(config), processor


def _qwen3_5() -> tuple[Any, Any]:
    tokenizer = qwen_tokenizer()
    config = transformers.Qwen3_5Config(
        text_config=text_shape(
            tokenizer,
            "qwen3_5_text",
            num_hidden_layers=4,
            linear_key_head_dim=8,
            linear_value_head_dim=8,
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            layer_types=["linear_attention", "full_attention"] * 2,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": 1e4,
                "partial_rotary_factor": 0.5,
                "mrope_section": [2, 1, 1],
                "mrope_interleaved": True,
            },
        ),
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "out_hidden_size": 64,
            "num_heads": 2,
            "patch_size": 8,
            "num_position_embeddings": 64,
        },
        image_token_id=tokenizer.image_token_id,
        video_token_id=tokenizer.video_token_id,
        vision_start_token_id=tokenizer.vision_bos_token_id,
        vision_end_token_id=tokenizer.vision_eos_token_id,
        tie_word_embeddings=False,
    )
    processor = transformers.Qwen3VLProcessor(
        image_processor=transformers.Qwen2VLImageProcessor(patch_size=8, size=IMAGE_SIZE),
        video_processor=transformers.Qwen3VLVideoProcessor(patch_size=8, size=VIDEO_SIZE, max_frames=8),
        tokenizer=tokenizer,
        chat_template=TEMPLATE,
    )
    return transformers.Qwen3_5ForConditionalGeneration(config), processor


def _glmasr() -> tuple[Any, Any]:
    tokenizer = qwen_tokenizer()
    config = transformers.GlmAsrConfig(
        text_config=text_shape(tokenizer, "llama"),
        audio_config={
            "hidden_size": 32,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_mel_bins": 16,
            "max_position_embeddings": 400,
        },
        audio_token_id=tokenizer.audio_token_id,
        tie_word_embeddings=False,
    )
    processor = transformers.GlmAsrProcessor(
        feature_extractor=transformers.WhisperFeatureExtractor(feature_size=16, chunk_length=4),
        tokenizer=tokenizer,
        chat_template=TEMPLATE,
        audio_token=tokenizer.audio_token,
    )
    return transformers.GlmAsrForConditionalGeneration(config), processor


def _qwen3_asr() -> tuple[Any, Any]:
    tokenizer = qwen_tokenizer()
    config = transformers.Qwen3ASRConfig(
        text_config=text_shape(tokenizer, "qwen3"),
        audio_config={
            "num_mel_bins": 16,
            "encoder_layers": 2,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 48,
            "d_model": 32,
            "output_dim": 64,
            "downsample_hidden_size": 8,
        },
        audio_token_id=tokenizer.audio_token_id,
        timestamp_token_id=tokenizer.convert_tokens_to_ids("<|endoftext|>"),
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=False,
    )
    processor = transformers.Qwen3ASRProcessor(
        feature_extractor=transformers.Qwen3ASRFeatureExtractor(feature_size=16),
        tokenizer=tokenizer,
        chat_template=TEMPLATE,
    )
    return transformers.Qwen3ASRForConditionalGeneration(config), processor


def _text(model_type: str, **options: Any) -> Callable[[], tuple[Any, Any]]:
    def make() -> tuple[Any, Any]:
        tokenizer = qwen_tokenizer()
        tokenizer.chat_template = TEMPLATE
        shape = text_shape(tokenizer, model_type, **options)
        del shape["model_type"]
        config = transformers.AutoConfig.for_model(model_type, **shape)
        return transformers.AutoModelForCausalLM.from_config(config), tokenizer

    return make


FAMILIES = {
    "aya_vision": Tiny(_aya_vision, ("image",)),
    "glmasr": Tiny(_glmasr, ("audio",), without=_ONE_SOUND),
    "idefics3": Tiny(_idefics3, ("image",)),
    "qwen3_5": Tiny(_qwen3_5, ("image", "video")),
    "qwen3_asr": Tiny(_qwen3_asr, ("audio",), without=_ONE_SOUND),
    "video_llama_3": Tiny(_video_llama_3, ("image", "video")),
    "vipllava": Tiny(_vipllava, ("image",)),
    "gpt_oss": Tiny(_text("gpt_oss", num_local_experts=4, num_experts_per_tok=2, sliding_window=16)),
    "granite": Tiny(_text("granite", logits_scaling=4.0)),
    "llama": Tiny(_text("llama"), quick=True),
    "qwen3": Tiny(_text("qwen3")),
}
