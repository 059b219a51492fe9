"""Qwen2-VL, Qwen2.5-VL, Qwen2.5-Omni."""

from __future__ import annotations

from typing import Any

import transformers

from .common import Tiny, bpe

NAMED = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "vision_bos_token": "<|vision_start|>",
    "vision_eos_token": "<|vision_end|>",
    "audio_token": "<|audio_pad|>",
    "audio_bos_token": "<|audio_start|>",
    "audio_eos_token": "<|audio_end|>",
}
TEMPLATE = (
    "{%- for m in messages -%}"
    "{%- if m['role'] not in ('system', 'user', 'assistant') -%}"
    "{{ raise_exception('unknown role ' + m['role']) }}{%- endif -%}"
    "{%- if m['role'] == 'system' and not loop.first -%}"
    "{{ raise_exception('the system message must come first') }}{%- endif -%}"
    "{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{%- if m['content'] is string -%}{{ m['content'] }}{%- else -%}{%- for c in m['content'] -%}"
    "{%- if c['type'] == 'image' -%}<|vision_start|><|image_pad|><|vision_end|>"
    "{%- elif c['type'] == 'video' -%}<|vision_start|><|video_pad|><|vision_end|>"
    "{%- elif c['type'] == 'audio' -%}<|audio_start|><|audio_pad|><|audio_end|>"
    "{%- else -%}{{ c['text'] }}{%- endif -%}{%- endfor -%}{%- endif -%}"
    "{{ '<|im_end|>\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)
IMAGE_SIZE = {"shortest_edge": 32 * 32, "longest_edge": 112 * 112}
VIDEO_SIZE = {"shortest_edge": 2 * 32 * 32, "longest_edge": 8 * 64 * 64}
VISION: dict[str, Any] = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "out_hidden_size": 64,
    "num_heads": 2,
    "patch_size": 8,
    "window_size": 32,
    "fullatt_block_indexes": [1],
}


def make_tokenizer() -> Any:
    special = ["<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>", *NAMED.values()]
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe(special),
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        model_specific_special_tokens=NAMED,
        extra_special_tokens=[s for s in special if s not in ("<|im_end|>", "<|pad|>")],
        padding_side="left",
    )


def text_shape(tokenizer: Any) -> dict[str, Any]:
    return {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
        "bos_token_id": tokenizer.convert_tokens_to_ids("<|endoftext|>"),
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def vision_ids(tokenizer: Any) -> dict[str, int]:
    return {
        "image_token_id": tokenizer.image_token_id,
        "video_token_id": tokenizer.video_token_id,
        "vision_start_token_id": tokenizer.vision_bos_token_id,
        "vision_end_token_id": tokenizer.vision_eos_token_id,
    }


def vision_processors() -> dict[str, Any]:
    return {
        "image_processor": transformers.Qwen2VLImageProcessor(patch_size=8, size=IMAGE_SIZE),
        "video_processor": transformers.Qwen2VLVideoProcessor(
            patch_size=8, size=VIDEO_SIZE, cap_pixels_per_frame=False, fps=2.0, max_frames=8
        ),
    }


def qwen2_vl() -> tuple[Any, Any]:
    tokenizer = make_tokenizer()
    config = transformers.Qwen2VLConfig(
        text_config=text_shape(tokenizer),
        vision_config={"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "patch_size": 8},
        **vision_ids(tokenizer),
    )
    processor = transformers.Qwen2VLProcessor(tokenizer=tokenizer, chat_template=TEMPLATE, **vision_processors())
    return transformers.Qwen2VLForConditionalGeneration(config), processor


def qwen2_5_vl() -> tuple[Any, Any]:
    tokenizer = make_tokenizer()
    config = transformers.Qwen2_5_VLConfig(
        text_config=text_shape(tokenizer), vision_config=VISION, **vision_ids(tokenizer)
    )
    processor = transformers.Qwen2_5_VLProcessor(tokenizer=tokenizer, chat_template=TEMPLATE, **vision_processors())
    return transformers.Qwen2_5_VLForConditionalGeneration(config), processor


def _qwen2_5_omni() -> tuple[Any, Any]:
    tokenizer = make_tokenizer()
    ids = vision_ids(tokenizer)
    config = transformers.Qwen2_5OmniThinkerConfig(
        text_config=text_shape(tokenizer),
        vision_config=VISION,
        audio_config={
            "num_mel_bins": 16,
            "encoder_layers": 2,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 48,
            "d_model": 32,
            "max_source_positions": 100,
            "n_window": 25,
            "output_dim": 64,
        },
        audio_token_index=tokenizer.audio_token_id,
        image_token_index=ids.pop("image_token_id"),
        video_token_index=ids.pop("video_token_id"),
        audio_start_token_id=tokenizer.audio_bos_token_id,
        audio_end_token_id=tokenizer.audio_eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **ids,
    )
    processor = transformers.Qwen2_5OmniProcessor(
        feature_extractor=transformers.WhisperFeatureExtractor(feature_size=16, chunk_length=4),
        tokenizer=tokenizer,
        chat_template=TEMPLATE,
        **vision_processors(),
    )
    return transformers.Qwen2_5OmniThinkerForConditionalGeneration(config), processor


FAMILIES = {
    "qwen2_vl": Tiny(qwen2_vl, ("image", "video"), quick=True),
    "qwen2_5_vl": Tiny(qwen2_5_vl, ("image", "video"), quick=True),
    "qwen2_5_omni": Tiny(_qwen2_5_omni, ("image", "video", "audio"), quick=True),
}
