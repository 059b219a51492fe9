"""ERNIE 4.5 VL as Baidu publishes it (model_type ``ernie4_5_moe_vl``).

The names of weights are those that transformers knows. Another format have config.json, which describes text and both
kinds of experts in one object, the processor, which is code, and marks of media in the template. Compared with
transformers' own conversion script for these checkpoints.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from ..contract.errors import ErrorKind, TriptychError
from ..contract.settings import Settings
from ..media.types import Medium
from .ernie4_5_vl import Ernie45VLMoe, Ernie45VLPreprocessor
from .loading import model_class
from .reading import load_auto
from .transformers_preprocessor import TransformersPreprocessor

FONT = "Roboto-Regular.ttf"
_MARKS = {
    f"{modality}_{name}": f"<|{modality.upper()}_{word}|>"
    for modality in ("image", "video")
    for name, word in (("token", "PLACEHOLDER"), ("start_token", "START"), ("end_token", "END"))
}
_TEXT = (
    "hidden_size",
    "intermediate_size",
    "max_position_embeddings",
    "moe_intermediate_size",
    "moe_k",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "rms_norm_eps",
    "vocab_size",
    "tie_word_embeddings",
    "use_bias",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
_VISION = ("depth", "hidden_size", "hidden_act", "num_heads", "in_channels", "patch_size", "spatial_merge_size")
_IMAGES = ("patch_size", "merge_size", "image_mean", "image_std")


def translate(raw: Mapping[str, Any], ids: Mapping[str, int]) -> dict[str, Any]:
    """Published config.json -> transformers' configuration.

    Args:
        raw: as published.
        ids: of the marks of media.

    Raises:
        TriptychError: UNSUPPORTED, naming what this architecture of transformers has no option for.
    """
    experts = raw["moe_num_experts"]
    if len(set(experts)) != 1:
        raise TriptychError(
            ErrorKind.UNSUPPORTED,
            f"config.json has moe_num_experts {experts}: as many experts for text as for pictures are needed",
            "settings.model",
        )
    first, last = min(raw["moe_layer_start_index"]), max(raw["moe_layer_end_index"])
    every = raw.get("moe_layer_interval", 1)
    layers = range(raw["num_hidden_layers"])
    half = raw["hidden_size"] // raw["num_attention_heads"] // 2
    # the rest of the frequencies belongs to time
    space = (half - raw.get("freq_allocation", 20)) // 2
    text = {name: raw[name] for name in _TEXT if name in raw} | {
        "moe_num_experts": experts[0],
        "moe_num_shared_experts": raw.get("moe_num_shared_experts") or 0,
        "mlp_layer_types": [
            "sparse" if first <= layer <= last and (layer + 1) % every == 0 else "dense" for layer in layers
        ],
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": raw.get("rope_theta", 500_000.0),
            "mrope_section": [space, space, half - 2 * space],
        },
    }
    tower = raw["vision_config"]
    vision = {name: tower[name] for name in _VISION if name in tower} | {
        "intermediate_size": tower["hidden_size"] * tower["mlp_ratio"],
        "spatial_merge_size": raw["spatial_conv_size"],
        "temporal_merge_size": raw["temporal_conv_size"],
    }
    return {
        "text_config": text,
        "vision_config": vision,
        "tie_word_embeddings": raw.get("tie_word_embeddings", True),
        **{f"{name}_id": ids[token] for name, token in _MARKS.items()},
        "image_token_id": raw["im_patch_id"],
    }


def load_tokenizer(folder: Path, settings: Settings) -> Any:
    """The published tokenizer; its marks of media are tokens with names."""
    options: dict[str, Any] = {"model_specific_special_tokens": _MARKS, "extra_special_tokens": list(_MARKS.values())}
    if (folder / "tokenizer.json").is_file():
        return load_auto("PreTrainedTokenizerFast", "tokenizer", folder, settings, **options)
    # of a model of sentencepiece, whose package transformers needs to read it
    options |= {"pad_token": "<unk>", "add_bos_token": False, "add_prefix_space": False}
    return load_auto("LlamaTokenizer", "tokenizer", folder, settings, **options)


class PublishedPreprocessor(Ernie45VLPreprocessor):
    """transformers' processor with the options that are published."""

    def load_processor(self, folder: Path, settings: Settings) -> Any:
        """Made of its parts; the template gets the marks that it knows."""
        path = folder / "preprocessor_config.json"
        raw = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        tokenizer = load_tokenizer(folder, settings)
        images = {name: raw[name] for name in _IMAGES if name in raw}
        videos = dict(images)
        for options, prefix in ((images, ""), (videos, "video_")):
            if f"{prefix}min_pixels" in raw and f"{prefix}max_pixels" in raw:
                least, most = raw[f"{prefix}min_pixels"], raw[f"{prefix}max_pixels"]
                options["size"] = {"shortest_edge": least, "longest_edge": most}
        font = folder / FONT
        videos |= {"font": str(font)} if font.is_file() else {"draw_on_frames": False}
        return model_class("Ernie4_5_VLMoeProcessor")(
            image_processor=model_class("Ernie4_5_VLMoeImageProcessor")(**images),
            video_processor=model_class("Ernie4_5_VLMoeVideoProcessor")(**videos),
            tokenizer=tokenizer,
            chat_template=_template(folder, tokenizer),
        )

    def check_medium(self, medium: Medium) -> None:
        """Refuse videos where the font is missing with which their times are drawn on them."""
        super().check_medium(medium)
        if medium.modality == "video" and not self.processor.video_processor.draw_on_frames:
            raise TriptychError(
                ErrorKind.UNSUPPORTED,
                f"{medium.param}: the time is drawn on each frame of a video, and this checkpoint lacks the font for "
                f"it; put {FONT} into its folder",
                medium.param,
            )


def _template(folder: Path, tokenizer: Any) -> str | None:
    path = folder / "chat_template.json"
    text = json.loads(path.read_text(encoding="utf-8"))["chat_template"] if path.is_file() else tokenizer.chat_template
    for modality in ("image", "video"):
        text = text and text.replace(f"<|{modality}@placeholder|>", _MARKS[f"{modality}_token"])
    return text or None


class PublishedErnie45VL(Ernie45VLMoe):
    """ERNIE 4.5 VL with mixtures of experts."""

    preprocessor_class: ClassVar[type[TransformersPreprocessor]] = PublishedPreprocessor

    def load_config(self) -> Any:
        """Translated, see :func:`translate`."""
        ids = self.load_tokenizer().get_vocab()
        return model_class("Ernie4_5_VLMoeConfig")(**translate(self.checkpoint.config, ids))

    def load_tokenizer(self) -> Any:
        """See :func:`load_tokenizer`."""
        return load_tokenizer(self.checkpoint.folder, self.settings)
