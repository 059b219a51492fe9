"""Qwen3-VL, dense and with mixtures of experts."""

from __future__ import annotations

from typing import Any

import transformers

from .common import Tiny
from .qwen import IMAGE_SIZE, TEMPLATE, VIDEO_SIZE, make_tokenizer, text_shape, vision_ids

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
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


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


def _qwen3_vl() -> tuple[Any, Any]:
    tokenizer = make_tokenizer()
    config = transformers.Qwen3VLConfig(text_config=text(tokenizer), vision_config=VISION, **vision_ids(tokenizer))
    return transformers.Qwen3VLForConditionalGeneration(config), _processor(tokenizer)


def _qwen3_vl_moe() -> tuple[Any, Any]:
    tokenizer = make_tokenizer()
    config = transformers.Qwen3VLMoeConfig(
        text_config=text(tokenizer) | EXPERTS, vision_config=VISION, **vision_ids(tokenizer)
    )
    return transformers.Qwen3VLMoeForConditionalGeneration(config), _processor(tokenizer)


FAMILIES = {
    "qwen3_vl": Tiny(_qwen3_vl, ("image", "video"), quick=True),
    "qwen3_vl_moe": Tiny(_qwen3_vl_moe, ("image", "video")),
}
