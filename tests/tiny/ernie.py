"""ERNIE 4.5 VL."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import transformers
from PIL import ImageFont

from .common import Tiny, bpe
from .qwen import IMAGE_SIZE, text_shape

_NAMED = {
    "image_token": "<|IMAGE_PLACEHOLDER|>",
    "image_start_token": "<|IMAGE_START|>",
    "image_end_token": "<|IMAGE_END|>",
    "video_token": "<|VIDEO_PLACEHOLDER|>",
    "video_start_token": "<|VIDEO_START|>",
    "video_end_token": "<|VIDEO_END|>",
}
_TEMPLATE = (
    "{{ '<|begin_of_sentence|>' }}{% set count = namespace(image=0, video=0) %}"
    "{%- for m in messages -%}"
    "{{ {'user': 'User: ', 'assistant': 'Assistant: ', 'system': ''}[m['role']] }}"
    "{%- if m['content'] is string -%}{{ m['content'] }}{%- else -%}{%- for c in m['content'] -%}"
    "{%- if c['type'] == 'image' -%}{%- set count.image = count.image + 1 -%}"
    "{{ 'Picture ' + count.image|string + ':<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>' }}"
    "{%- elif c['type'] == 'video' -%}{%- set count.video = count.video + 1 -%}"
    "{{ 'Video ' + count.video|string + ':<|VIDEO_START|><|VIDEO_PLACEHOLDER|><|VIDEO_END|>' }}"
    "{%- else -%}{{ c['text'] }}{%- endif -%}{%- endfor -%}{%- endif -%}"
    "{{ '</s>' if m['role'] == 'assistant' else '\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}Assistant: {%- endif -%}"
)
_FOLDER = tempfile.TemporaryDirectory()


def _tokenizer() -> Any:
    special = ["<pad>", "<|begin_of_sentence|>", "</s>", *_NAMED.values()]
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe(special),
        bos_token="<|begin_of_sentence|>",
        eos_token="</s>",
        pad_token="<pad>",
        model_specific_special_tokens=_NAMED,
        extra_special_tokens=list(_NAMED.values()),
        padding_side="left",
    )


def _font() -> str:
    """The one that pillow brings along, as a file; it draws times on frames."""
    path = Path(_FOLDER.name) / "Tiny-Regular.ttf"
    path.write_bytes(ImageFont.load_default(10).font_bytes)
    return str(path)


def _ernie4_5_vl_moe() -> tuple[Any, Any]:
    tokenizer = _tokenizer()
    text = text_shape(tokenizer) | {
        "moe_k": 2,
        "moe_num_experts": 4,
        "moe_num_shared_experts": 1,
        "moe_intermediate_size": [32, 16],
        # height and width, then time
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 4]},
    }
    config = transformers.Ernie4_5_VLMoeConfig(
        text_config=text,
        vision_config={"depth": 2, "hidden_size": 32, "num_heads": 2, "patch_size": 8, "intermediate_size": 48},
        tie_word_embeddings=False,
        **{f"{name}_id": getattr(tokenizer, f"{name}_id") for name in _NAMED},
    )
    processor = transformers.Ernie4_5_VLMoeProcessor(
        image_processor=transformers.Ernie4_5_VLMoeImageProcessor(patch_size=8, size=IMAGE_SIZE),
        video_processor=transformers.Ernie4_5_VLMoeVideoProcessor(
            patch_size=8, size={"shortest_edge": 32 * 32, "longest_edge": 64 * 64}, font=_font()
        ),
        tokenizer=tokenizer,
        chat_template=_TEMPLATE,
    )
    return transformers.Ernie4_5_VLMoeForConditionalGeneration(config), processor


FAMILIES = {"ernie4_5_vl_moe": Tiny(_ernie4_5_vl_moe, ("image", "video"))}
