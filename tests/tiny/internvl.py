"""InternVL in transformers' format."""

from __future__ import annotations

from typing import Any

import transformers

from .common import Tiny
from .llava import SQUARE, make_tokenizer, template, text_shape

NAMED = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": [32, 32],
    "patch_size": [8, 8],
}


def make_processor(tokenizer: Any) -> Any:
    """At most four tiles beside the whole picture."""
    return transformers.InternVLProcessor(
        image_processor=transformers.GotOcr2ImageProcessor(
            size=SQUARE, min_patches=1, max_patches=4, crop_to_patches=True
        ),
        video_processor=transformers.InternVLVideoProcessor(size=SQUARE),
        tokenizer=tokenizer,
        image_seq_length=4,
        chat_template=template("<IMG_CONTEXT>\\n", "<video>\\n"),
    )


def _internvl() -> tuple[Any, Any]:
    tokenizer = make_tokenizer(named=NAMED, bos=False)
    config = transformers.InternVLConfig(
        vision_config=VISION,
        text_config=text_shape(tokenizer, "qwen2"),
        image_token_id=tokenizer.context_image_token_id,
        image_seq_length=4,
        tie_word_embeddings=False,
    )
    return transformers.InternVLForConditionalGeneration(config), make_processor(tokenizer)


FAMILIES = {"internvl": Tiny(_internvl, ("image", "video"))}
