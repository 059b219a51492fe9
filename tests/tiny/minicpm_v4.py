"""MiniCPM-V 4.6, 4.7 and MiniCPM-OCR."""

from __future__ import annotations

from functools import partial
from typing import Any

import transformers

from .common import Tiny, bpe

_NAMED = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "image_start_token": "<image>",
    "image_end_token": "</image>",
    "slice_start_token": "<slice>",
    "slice_end_token": "</slice>",
    "image_id_start_token": "<image_id>",
    "image_id_end_token": "</image_id>",
}
_TEMPLATE = (
    "{%- for m in messages -%}"
    "{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{%- if m['content'] is string -%}{{ m['content'] }}{%- else -%}{%- for c in m['content'] -%}"
    "{%- if c['type'] == 'image' -%}<|image_pad|>\n"
    "{%- elif c['type'] == 'video' -%}<|video_pad|>\n"
    "{%- else -%}{{ c['text'] }}{%- endif -%}{%- endfor -%}{%- endif -%}"
    "{{ '<|im_end|>\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)


def _make(name: str, mode: str) -> tuple[Any, Any]:
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *_NAMED.values(), "<newline>"]
    own = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe(special),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_specific_special_tokens=_NAMED,
        extra_special_tokens=[s for s in special if s not in ("<|im_end|>", "<|endoftext|>")],
        padding_side="left",
    )
    text = {
        "model_type": "qwen3_5_text",
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "layer_types": ["linear_attention", "full_attention"] * 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "max_position_embeddings": 2048,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "partial_rotary_factor": 0.5,
            "mrope_section": [2, 1, 1],
            "mrope_interleaved": True,
        },
        "bos_token_id": own.convert_tokens_to_ids("<|endoftext|>"),
        "eos_token_id": own.eos_token_id,
        "pad_token_id": own.pad_token_id,
    }
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 64,
        "patch_size": 8,
    }
    ids = {"image_start_id": "<image>", "image_end_id": "</image>", "slice_start_id": "<slice>"}
    ids |= {"slice_end_id": "</slice>", "newline_id": "<newline>"}
    config = getattr(transformers, f"{name}Config")(
        text_config=text,
        vision_config=vision,
        insert_layer_id=1,
        image_token_id=own.image_token_id,
        video_token_id=own.video_token_id,
        downsample_mode=mode,
        tie_word_embeddings=False,
        **({key: own.convert_tokens_to_ids(token) for key, token in ids.items()} if name == "MiniCPMV4_7" else {}),
        **({} if name == "MiniCPMOcr" else {"image_size": 64}),
    )
    shape = {"scale_resolution": 64, "patch_size": 8, "max_slice_nums": 4, "downsample_mode": mode}
    # 4.7 has the processors of 4.6
    parts = "MiniCPMOcr" if name == "MiniCPMOcr" else "MiniCPMV4_6"
    processor = getattr(transformers, f"{name}Processor")(
        image_processor=getattr(transformers, f"{parts}ImageProcessor")(**shape),
        video_processor=getattr(transformers, f"{parts}VideoProcessor")(**shape),
        tokenizer=own,
        chat_template=_TEMPLATE,
    )
    return getattr(transformers, f"{name}ForConditionalGeneration")(config), processor


_TAKES = ("image", "video")
FAMILIES = {
    "minicpm_ocr": Tiny(partial(_make, "MiniCPMOcr", "4x"), _TAKES),
    "minicpmv4_6": Tiny(partial(_make, "MiniCPMV4_6", "16x"), _TAKES),
    "minicpmv4_7": Tiny(partial(_make, "MiniCPMV4_7", "16x"), _TAKES),
}
