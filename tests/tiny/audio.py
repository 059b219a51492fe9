"""Qwen2-Audio."""

from __future__ import annotations

from typing import Any

import transformers

from .common import Tiny
from .qwen import make_tokenizer, text_shape

_QWEN2_TEMPLATE = (
    "{% set count = namespace(value=0) %}"
    "{%- for m in messages -%}"
    "{%- if loop.first and m['role'] != 'system' -%}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{%- endif -%}"
    "{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{%- if m['content'] is string -%}{{ m['content'] }}{%- else -%}{%- for c in m['content'] -%}"
    "{%- if c['type'] == 'audio' -%}{%- set count.value = count.value + 1 -%}"
    "{{ 'Audio ' + count.value|string + ': <|audio_start|><|audio_pad|><|audio_end|>\n' }}"
    "{%- else -%}{{ c['text'] }}{%- endif -%}{%- endfor -%}{%- endif -%}"
    "{{ '<|im_end|>\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)


def _qwen2_audio() -> tuple[Any, Any]:
    tokenizer = make_tokenizer()
    text = text_shape(tokenizer) | {
        "model_type": "qwen2",
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    }
    config = transformers.Qwen2AudioConfig(
        text_config=text,
        audio_config={
            "model_type": "qwen2_audio_encoder",
            "num_mel_bins": 16,
            "encoder_layers": 2,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 48,
            "d_model": 32,
            "max_source_positions": 100,
        },
        audio_token_index=tokenizer.audio_token_id,
    )
    processor = transformers.Qwen2AudioProcessor(
        feature_extractor=transformers.WhisperFeatureExtractor(feature_size=16, chunk_length=2),
        tokenizer=tokenizer,
        chat_template=_QWEN2_TEMPLATE,
    )
    return transformers.Qwen2AudioForConditionalGeneration(config), processor


FAMILIES = {"qwen2_audio": Tiny(_qwen2_audio, ("audio",))}
