"""PaddleOCR-VL."""

from __future__ import annotations

from typing import Any

import transformers

from .common import Tiny
from .qwen import IMAGE_SIZE, TEMPLATE, make_tokenizer, text_shape, vision_ids


def _paddleocr_vl() -> tuple[Any, Any]:
    tokenizer = make_tokenizer()
    config = transformers.PaddleOCRVLConfig(
        text_config=text_shape(tokenizer) | {"head_dim": 16},
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 64,
            "patch_size": 8,
        },
        tie_word_embeddings=False,
        **vision_ids(tokenizer),
    )
    processor = transformers.PaddleOCRVLProcessor(
        image_processor=transformers.PaddleOCRVLImageProcessor(patch_size=8, size=IMAGE_SIZE),
        tokenizer=tokenizer,
        chat_template=TEMPLATE,
    )
    return transformers.PaddleOCRVLForConditionalGeneration(config), processor


FAMILIES = {"paddleocr_vl": Tiny(_paddleocr_vl, ("image",))}
