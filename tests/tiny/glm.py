"""GLM-4.1V, GLM-4.5V, GLM-4.6V, GLM-OCR."""

from __future__ import annotations

from typing import Any

import transformers

from .common import Tiny, bpe

_NAMED = {
    "image_token": "<|image|>",
    "video_token": "<|video|>",
    "image_start_token": "<|begin_of_image|>",
    "image_end_token": "<|end_of_image|>",
    "video_start_token": "<|begin_of_video|>",
    "video_end_token": "<|end_of_video|>",
}
_ROLES = ["<|system|>", "<|user|>", "<|assistant|>"]
_TEMPLATE = (
    "[gMASK]<sop>"
    "{%- for m in messages -%}"
    "{{ '<|' + m['role'] + '|>\n' }}"
    "{%- if m['content'] is string -%}{{ m['content'] }}{%- else -%}{%- for c in m['content'] -%}"
    "{%- if c['type'] == 'image' -%}<|begin_of_image|><|image|><|end_of_image|>"
    "{%- elif c['type'] == 'video' -%}<|begin_of_video|><|video|><|end_of_video|>"
    "{%- else -%}{{ c['text'] }}{%- endif -%}{%- endfor -%}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|assistant|>\n' }}{%- endif -%}"
)
_VISION: dict[str, Any] = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "out_hidden_size": 64,
    "num_heads": 2,
    "patch_size": 8,
    "image_size": 64,
}
_EXPERTS = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
}


def _tokenizer() -> Any:
    special = ["<|endoftext|>", "[gMASK]", "<sop>", *_ROLES, *_NAMED.values()]
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe(special),
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        model_specific_special_tokens=_NAMED,
        extra_special_tokens=special[1:],
        padding_side="left",
    )


def _text(tokenizer: Any) -> dict[str, Any]:
    return {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "partial_rotary_factor": 0.5,
            "mrope_section": [2, 1, 1],
        },
        "eos_token_id": tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|user|>"]),
        "pad_token_id": tokenizer.pad_token_id,
    }


def _ids(tokenizer: Any) -> dict[str, int]:
    return {f"{name}_id": tokenizer.convert_tokens_to_ids(token) for name, token in _NAMED.items()}


def _processor(tokenizer: Any, kind: str) -> Any:
    def part(name: str, size: int) -> Any:
        smallest = 1 if name == "Image" else 2
        size_of = {"shortest_edge": smallest * 32 * 32, "longest_edge": size}
        return getattr(transformers, f"{kind}{name}Processor")(patch_size=8, size=size_of)

    return getattr(transformers, f"{kind}Processor")(
        image_processor=part("Image", 2 * 112 * 112),
        video_processor=part("Video", 8 * 64 * 64),
        tokenizer=tokenizer,
        chat_template=_TEMPLATE,
    )


def _glm4v() -> tuple[Any, Any]:
    tokenizer = _tokenizer()
    config = transformers.Glm4vConfig(text_config=_text(tokenizer), vision_config=_VISION, **_ids(tokenizer))
    return transformers.Glm4vForConditionalGeneration(config), _processor(tokenizer, "Glm4v")


def _glm4v_moe() -> tuple[Any, Any]:
    tokenizer = _tokenizer()
    text = _text(tokenizer) | _EXPERTS
    config = transformers.Glm4vMoeConfig(text_config=text, vision_config=_VISION, **_ids(tokenizer))
    return transformers.Glm4vMoeForConditionalGeneration(config), _processor(tokenizer, "Glm4v")


def _glm46v() -> tuple[Any, Any]:
    tokenizer = _tokenizer()
    config = transformers.Glm46VConfig(
        text_config=_text(tokenizer) | {"model_type": "glm4v_text"},
        vision_config=_VISION | {"model_type": "glm4v_vision"},
        **_ids(tokenizer),
    )
    return transformers.Glm46VForConditionalGeneration(config), _processor(tokenizer, "Glm46V")


def _glm_ocr() -> tuple[Any, Any]:
    tokenizer = _tokenizer()
    config = transformers.GlmOcrConfig(text_config=_text(tokenizer), vision_config=_VISION, **_ids(tokenizer))
    return transformers.GlmOcrForConditionalGeneration(config), _processor(tokenizer, "Glm46V")


_WITHOUT = dict.fromkeys(
    ("image_and_video", "mixed"),
    "transformers takes the tokens of a video for those of pictures where a prompt has both (tests/parity/test_glm.py)",
)
FAMILIES = {
    "glm4v": Tiny(_glm4v, ("image", "video"), quick=True, without=_WITHOUT),
    "glm4v_moe": Tiny(_glm4v_moe, ("image", "video"), without=_WITHOUT),
    "glm46v": Tiny(_glm46v, ("image", "video"), without=_WITHOUT),
    "glm_ocr": Tiny(_glm_ocr, ("image", "video"), without=_WITHOUT),
}
