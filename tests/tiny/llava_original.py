"""The LLaVA line in its published formats, and the same models in that of transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file

from triptych.python_models.families.templates import TEMPLATES

from .common import Tiny, draw_weights
from .llava import CLIP, PINPOINTS, SIGLIP, SQUARE, make_tokenizer, onevision_inputs, text_shape

_NAMES = (
    ("model.language_model.", "model."),
    ("model.multi_modal_projector.linear_1.", "model.mm_projector.0."),
    ("model.multi_modal_projector.linear_2.", "model.mm_projector.2."),
    ("model.vision_tower.", "model.vision_tower.vision_tower.vision_model."),
)
_TOWER = "model.vision_tower.vision_tower."
# Of the text model, under the names of its own config.json.
_TEXT = (
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "hidden_size",
    "intermediate_size",
    "max_position_embeddings",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "rms_norm_eps",
    "vocab_size",
)


def published_name(name: str) -> str:
    """Of a weight of transformers' model."""
    for own, published in _NAMES:
        if name.startswith(own):
            return published + name.removeprefix(own)
    return name


def _write(
    folder: Path,
    model: Any,
    processor: Any,
    published: dict[str, Any],
    tower: dict[str, Any],
    *,
    older: bool = False,
    apart: bool = False,
) -> None:
    """Write both formats.

    Args:
        folder: of the published one; the other goes into ``whole``.
        model, processor: of transformers.
        published: config.json beside what describes the text model.
        tower: its config.json, written into ``tower``.
        older: weights as files of ``torch.save``.
        apart: the tower's weights are not among the checkpoint's own.
    """
    draw_weights(model)
    eos = processor.tokenizer.eos_token_id
    # an answer ends with the template's own tokens too
    (template,) = {t.ends: t for t in TEMPLATES.values() if t.text == processor.chat_template}.values()
    ends = sorted({eos, *template.end_ids(processor.tokenizer)})
    model.generation_config = transformers.GenerationConfig(eos_token_id=ends)
    model.save_pretrained(folder / "whole")
    processor.save_pretrained(folder / "whole")
    tokenizer = make_tokenizer(bos=processor.tokenizer("a")["input_ids"][0] == processor.tokenizer.bos_token_id)
    tokenizer.save_pretrained(folder)

    text = model.config.text_config.to_dict()
    config = {name: text[name] for name in _TEXT} | {
        "freeze_mm_mlp_adapter": False,
        "hidden_act": "silu",
        "mm_hidden_size": 32,
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": "tower",
        "rope_scaling": None,
        "rope_theta": text["rope_parameters"]["rope_theta"],
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "use_cache": True,
        **published,
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 0, "eos_token_id": eos}))
    weights = {published_name(name): value.clone() for name, value in model.state_dict().items()}
    (folder / "tower").mkdir()
    (folder / "tower" / "config.json").write_text(json.dumps(tower))
    if apart:
        own = {name.removeprefix(_TOWER): weights.pop(name) for name in list(weights) if name.startswith(_TOWER)}
        _save(own, folder / "tower", older)
    _save(weights, folder, older)


def _save(weights: dict[str, torch.Tensor], folder: Path, older: bool) -> None:
    if not older:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names = sorted(weights)
    parts = names[: len(names) // 2], names[len(names) // 2 :]
    index = {}
    for k, part in enumerate(parts):
        file = f"pytorch_model-0000{k + 1}-of-00002.bin"
        torch.save({name: weights[name] for name in part}, folder / file)
        index |= dict.fromkeys(part, file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def _ids(tokenizer: Any, *modalities: str) -> dict[str, int]:
    return {f"{m}_token_index": tokenizer.convert_tokens_to_ids(f"<{m}>") for m in modalities}


def _v1_5(folder: Path) -> None:
    """As liuhaotian/llava-v1.5: files of torch.save, the tower elsewhere, pictures padded to squares."""
    # the tokens that the server adds come after all others
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<image>", "<video>"], special_tokens=True)
    config = transformers.LlavaConfig(
        vision_config=CLIP, text_config=text_shape(tokenizer, "llama"), image_seq_length=16, **_ids(tokenizer, "image")
    )
    processor = transformers.LlavaProcessor(
        image_processor=transformers.LlavaImageProcessor(size={"shortest_edge": 32}, crop_size=SQUARE, do_pad=True),
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATES["vicuna_v1.1"].text,
    )
    published = {"architectures": ["LlavaLlamaForCausalLM"], "model_type": "llava", "image_aspect_ratio": "pad"}
    tower = {"model_type": "clip", "vision_config": CLIP}
    model = transformers.LlavaForConditionalGeneration(config)
    _write(folder, model, processor, published, tower, older=True, apart=True)


def _next(folder: Path, text: str, architecture: str, model_type: str, template: str) -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<image>", "<video>"], special_tokens=True)
    config = transformers.LlavaNextConfig(
        vision_config=CLIP,
        text_config=text_shape(tokenizer, text, **({"sliding_window": None} if text == "mistral" else {})),
        image_seq_length=16,
        image_grid_pinpoints=PINPOINTS,
        **_ids(tokenizer, "image"),
    )
    processor = transformers.LlavaNextProcessor(
        image_processor=transformers.LlavaNextImageProcessor(
            size={"shortest_edge": 32}, crop_size=SQUARE, image_grid_pinpoints=PINPOINTS
        ),
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATES[template].text,
    )
    published = {
        "architectures": [architecture],
        "model_type": model_type,
        "image_aspect_ratio": "anyres",
        "image_crop_resolution": 224,
        "image_grid_pinpoints": [[width, height] for height, width in PINPOINTS],
        "mm_patch_merge_type": "spatial_unpad",
        **({"sliding_window": None} if text == "mistral" else {}),
    }
    _write(folder, transformers.LlavaNextForConditionalGeneration(config), processor, published, CLIP)


def _v1_6_mistral(folder: Path) -> None:
    """As liuhaotian/llava-v1.6-mistral."""
    _next(folder, "mistral", "LlavaMistralForCausalLM", "llava_mistral", "llava_mistral_instruct")


def _next_qwen(folder: Path) -> None:
    """As lmms-lab/llava-next-72b."""
    _next(folder, "qwen2", "LlavaQwenForCausalLM", "llava_qwen", "chatml-llava")


def _next_video(folder: Path) -> None:
    """As lmms-lab/LLaVA-NeXT-Video: positions scaled."""
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<image>", "<video>"], special_tokens=True)
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    config = transformers.LlavaNextVideoConfig(
        vision_config=CLIP,
        text_config=text_shape(tokenizer, "llama", rope_parameters=rope),
        image_grid_pinpoints=PINPOINTS,
        image_seq_length=16,
        video_seq_length=4,
        **_ids(tokenizer, "image", "video"),
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
        chat_template=TEMPLATES["vicuna_v1.1"].text,
    )
    published = {
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava",
        "image_aspect_ratio": "anyres",
        "image_grid_pinpoints": [[width, height] for height, width in PINPOINTS],
        "mm_patch_merge_type": "spatial_unpad",
        "mm_resampler_type": "spatial_pool",
        "mm_spatial_pool_mode": "average",
        "mm_spatial_pool_stride": 2,
        "rope_scaling": {"factor": 2.0, "type": "linear"},
    }
    _write(folder, transformers.LlavaNextVideoForConditionalGeneration(config), processor, published, CLIP)


def _onevision(folder: Path) -> None:
    """As lmms-lab/llava-onevision-qwen2: SigLIP without its last layer."""
    tokenizer = make_tokenizer(bos=False)
    tokenizer.add_tokens(["<image>", "<video>"], special_tokens=True)
    pinpoints = [[32 * y, 32 * x] for x in (1, 2, 3) for y in (1, 2, 3)]
    config = transformers.LlavaOnevisionConfig(
        vision_config=SIGLIP,
        text_config=text_shape(tokenizer, "qwen2"),
        image_grid_pinpoints=pinpoints,
        vision_aspect_ratio="anyres_max_2",
        **_ids(tokenizer, "image", "video"),
    )
    half = [0.5, 0.5, 0.5]
    processor = transformers.LlavaOnevisionProcessor(
        image_processor=transformers.LlavaOnevisionImageProcessor(
            size=SQUARE, image_grid_pinpoints=pinpoints, image_mean=half, image_std=half
        ),
        video_processor=transformers.LlavaOnevisionVideoProcessor(size=SQUARE, image_mean=half, image_std=half),
        tokenizer=tokenizer,
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_2",
        chat_template=TEMPLATES["chatml-llava"].text,
    )
    published = {
        "architectures": ["LlavaQwenForCausalLM"],
        "model_type": "llava_qwen",
        "image_aspect_ratio": "anyres_max_2",
        "image_grid_pinpoints": "(1x1),...,(3x3)",
        "mm_patch_merge_type": "spatial_unpad",
        "mm_spatial_pool_mode": "bilinear",
    }
    tower = SIGLIP | {"num_hidden_layers": SIGLIP["num_hidden_layers"] + 1}
    del tower["vision_use_head"]
    _write(folder, transformers.LlavaOnevisionForConditionalGeneration(config), processor, published, tower)


def _tiny(make: Callable[[Path], None], *modalities: str, **options: Any) -> Tiny:
    return Tiny(make, modalities, **options)


FAMILIES = {
    "llava_v1_5": _tiny(_v1_5, "image"),
    "llava_v1_6_mistral": _tiny(_v1_6_mistral, "image"),
    "llava_next_qwen": _tiny(_next_qwen, "image"),
    "llava_next_video_published": _tiny(_next_video, "image", "video"),
    "llava_onevision_published": _tiny(_onevision, "image", "video", inputs=onevision_inputs),
}
