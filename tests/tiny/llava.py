"""LLaVA 1.5, NeXT, NeXT-Video, OneVision; Pixtral, Mistral Small 3.1 and LightOnOCR with Pixtral's tower."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import transformers
from tokenizers import processors

from .common import Tiny, bpe

CLIP: dict[str, Any] = {
    "model_type": "clip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
    "projection_dim": 32,
}
SIGLIP: dict[str, Any] = {
    "model_type": "siglip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
    "vision_use_head": False,
}
_PIXTRAL: dict[str, Any] = {
    "model_type": "pixtral",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "head_dim": 16,
    "image_size": 64,
    "patch_size": 8,
}
SQUARE = {"height": 32, "width": 32}
# height, width
PINPOINTS = [[32, 64], [64, 32], [64, 64], [96, 32], [32, 96]]


def template(image: str, video: str = "") -> str:
    """ChatML with these texts for media."""
    return (
        "{%- for m in messages -%}{{ '<|im_start|>' + m['role'] + '\n' }}"
        "{%- if m['content'] is string -%}{{ m['content'] }}{%- else -%}{%- for c in m['content'] -%}"
        "{%- if c['type'] == 'image' -%}{{ '" + image + "' }}"
        "{%- elif c['type'] == 'video' -%}{{ '" + video + "' }}"
        "{%- else -%}{{ c['text'] }}{%- endif -%}{%- endfor -%}{%- endif -%}"
        "{{ '<|im_end|>\n' }}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
    )


def make_tokenizer(*media: str, named: dict[str, str] | None = None, bos: bool = True) -> Any:
    """With these tokens for media; ``named`` ones are attributes of it; ``bos`` begins every text."""
    named = named or {}
    special = ["<s>", "</s>", "<pad>", "<unk>", "<|im_start|>", "<|im_end|>", *media, *named.values()]
    raw = bpe(special)
    if bos:
        raw.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", raw.token_to_id("<s>"))]
        )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        **({"model_specific_special_tokens": named} if named else {}),
        extra_special_tokens=special[4:],
        padding_side="left",
    )


def text_shape(tokenizer: Any, model_type: str, **options: Any) -> dict[str, Any]:
    """Options of a small decoder."""
    return {
        "model_type": model_type,
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
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **options,
    }


def _llava() -> tuple[Any, Any]:
    tokenizer = make_tokenizer("<image>")
    config = transformers.LlavaConfig(
        vision_config=CLIP,
        text_config=text_shape(tokenizer, "llama"),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
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
    return transformers.LlavaForConditionalGeneration(config), processor


def _llava_next() -> tuple[Any, Any]:
    tokenizer = make_tokenizer("<image>")
    config = transformers.LlavaNextConfig(
        vision_config=CLIP,
        text_config=text_shape(tokenizer, "mistral", sliding_window=None),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=16,
        image_grid_pinpoints=PINPOINTS,
    )
    processor = transformers.LlavaNextProcessor(
        image_processor=transformers.LlavaNextImageProcessor(
            size={"shortest_edge": 32}, crop_size=SQUARE, image_grid_pinpoints=PINPOINTS
        ),
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template("<image>\\n"),
    )
    return transformers.LlavaNextForConditionalGeneration(config), processor


def _llava_next_video() -> tuple[Any, Any]:
    tokenizer = make_tokenizer("<image>", "<video>")
    config = transformers.LlavaNextVideoConfig(
        vision_config=CLIP,
        text_config=text_shape(tokenizer, "llama"),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=PINPOINTS,
        image_seq_length=16,
        video_seq_length=4,
    )
    processor = transformers.LlavaNextVideoProcessor(
        image_processor=transformers.LlavaNextImageProcessor(
            size={"shortest_edge": 32}, crop_size=SQUARE, image_grid_pinpoints=PINPOINTS
        ),
        video_processor=transformers.LlavaNextVideoVideoProcessor(size={"shortest_edge": 32}, crop_size=SQUARE),
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template("<image>\\n", "<video>\\n"),
    )
    return transformers.LlavaNextVideoForConditionalGeneration(config), processor


def _llava_onevision() -> tuple[Any, Any]:
    tokenizer = make_tokenizer("<image>", "<video>", bos=False)
    # more tiles than the two whose rows a picture may have: some are scaled down
    pinpoints = [*PINPOINTS, [128, 64], [64, 128]]
    config = transformers.LlavaOnevisionConfig(
        vision_config=SIGLIP,
        text_config=text_shape(tokenizer, "qwen2"),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=pinpoints,
        vision_aspect_ratio="anyres_max_2",
    )
    processor = transformers.LlavaOnevisionProcessor(
        image_processor=transformers.LlavaOnevisionImageProcessor(size=SQUARE, image_grid_pinpoints=pinpoints),
        video_processor=transformers.LlavaOnevisionVideoProcessor(size=SQUARE),
        tokenizer=tokenizer,
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_2",
        chat_template=template("<image>\\n", "<video>\\n"),
    )
    return transformers.LlavaOnevisionForConditionalGeneration(config), processor


def onevision_inputs(processor: Any, text: str, media: Mapping[str, list[Any]]) -> Mapping[str, Any]:
    """Pictures as those of one prompt, as ``apply_chat_template(tokenize=True)`` gives them; a flat list is a batch."""
    arguments: dict[str, Any] = {}
    if "image" in media:
        arguments["images"] = [[image.pixels for image in media["image"]]]
    if "video" in media:
        arguments["videos"] = [video.frames for video in media["video"]]
        arguments["videos_kwargs"] = {"do_sample_frames": False}
    return dict(processor(text=[text], return_tensors="pt", **arguments))


def _pixtral() -> tuple[Any, Any]:
    tokenizer = make_tokenizer("[IMG]", "[IMG_BREAK]", "[IMG_END]")
    config = transformers.LlavaConfig(
        vision_config=_PIXTRAL,
        text_config=text_shape(tokenizer, "mistral", sliding_window=None),
        image_token_index=tokenizer.convert_tokens_to_ids("[IMG]"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_seq_length=1,
    )
    processor = transformers.PixtralProcessor(
        image_processor=transformers.PixtralImageProcessor(size={"longest_edge": 64}, patch_size=8),
        tokenizer=tokenizer,
        patch_size=8,
        chat_template=template("[IMG]"),
    )
    return transformers.LlavaForConditionalGeneration(config), processor


def _mistral3() -> tuple[Any, Any]:
    tokenizer = make_tokenizer("[IMG]", "[IMG_BREAK]", "[IMG_END]")
    config = transformers.Mistral3Config(
        vision_config=_PIXTRAL,
        text_config=text_shape(tokenizer, "mistral", sliding_window=None),
        image_token_index=tokenizer.convert_tokens_to_ids("[IMG]"),
        spatial_merge_size=2,
        tie_word_embeddings=False,
    )
    processor = transformers.PixtralProcessor(
        image_processor=transformers.PixtralImageProcessor(size={"longest_edge": 64}, patch_size=8),
        tokenizer=tokenizer,
        patch_size=8,
        spatial_merge_size=2,
        chat_template=template("[IMG]"),
    )
    return transformers.Mistral3ForConditionalGeneration(config), processor


def _lighton_ocr() -> tuple[Any, Any]:
    named = {
        "image_token": "<|image_pad|>",
        "image_break_token": "<|vision_pad|>",
        "image_end_token": "<|vision_end|>",
    }
    tokenizer = make_tokenizer(named=named, bos=False)
    config = transformers.LightOnOcrConfig(
        vision_config=_PIXTRAL,
        text_config=text_shape(tokenizer, "qwen3"),
        image_token_id=tokenizer.image_token_id,
        spatial_merge_size=2,
        tie_word_embeddings=False,
    )
    processor = transformers.LightOnOcrProcessor(
        image_processor=transformers.PixtralImageProcessor(size={"longest_edge": 64}, patch_size=16),
        tokenizer=tokenizer,
        patch_size=8,
        spatial_merge_size=2,
        chat_template=template("<|image_pad|>"),
    )
    return transformers.LightOnOcrForConditionalGeneration(config), processor


FAMILIES = {
    "llava": Tiny(_llava, ("image",)),
    "llava_next": Tiny(_llava_next, ("image",)),
    "llava_next_video": Tiny(_llava_next_video, ("image", "video")),
    "llava_onevision": Tiny(_llava_onevision, ("image", "video"), inputs=onevision_inputs),
    "pixtral": Tiny(_pixtral, ("image",)),
    "mistral3": Tiny(_mistral3, ("image",)),
    "lighton_ocr": Tiny(_lighton_ocr, ("image",)),
}
