"""DeepSeek-OCR and DeepSeek-OCR-2 (Wei et al. 2025, arXiv:2510.18234; 2026, arXiv:2601.20552): image.

A picture is seen whole, padded to a square, and if it is larger than a tile also in two to six tiles. Squares and
tiles travel as uint8; the encoder normalises them, bit for bit as the processor would.

OCR-2 in transformers' format is ``model_type`` "deepseek_ocr2". The published checkpoints, both "deepseek_vl_v2", load
as they are: OCR through the classes of Unlimited-OCR, which is the same network but for its attention, here full in
every layer. Compared with github.com/deepseek-ai/DeepSeek-OCR and the files beside the published weights: names of the
weights, shapes of the towers, tokens of a picture, modes, prompts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from ..contract.errors import ErrorKind, TriptychError
from ..contract.features import EncoderItem
from ..contract.settings import Settings
from ..media.types import Image, Medium
from . import composite
from .checkpoint import Checkpoint
from .deepseek_published import CONTROL_TOKENS, dense_text_config, load_tokenizer, processor_options
from .loading import model_class
from .pixels import RAW, check_bytes, normalisation
from .squares import SquareEncoder
from .templates import TEMPLATES
from .transformers_encoder import TransformersEncoder
from .transformers_family import TransformersFamily
from .transformers_preprocessor import Tensors, TransformersPreprocessor

# Of the tower that makes OCR-2's tokens, Qwen2 0.5B, the published configuration gives the width alone.
_QWEN2 = {
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "intermediate_size": 4864,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
}


class OcrPreprocessor(TransformersPreprocessor):
    """A square of the whole picture, and tiles."""

    control_tokens = CONTROL_TOKENS

    def __init__(self, checkpoint: Checkpoint, settings: Settings, model: Any, encoders: Mapping[str, str]) -> None:
        super().__init__(checkpoint, settings, model, encoders)
        check_bytes(self.processor.image_processor)
        self._mean, self._std = normalisation(self.processor.image_processor, "image")

    def processor_arguments(self, media: Mapping[str, Sequence[Medium]]) -> dict[str, Any]:
        """Pixels stay uint8."""
        images = [m.data.pixels for m in media["image"] if isinstance(m.data, Image)]
        return {"images": images, "images_kwargs": dict(RAW)}

    def split_features(
        self, batch: Mapping[str, Any], media: Mapping[str, Sequence[Medium]]
    ) -> dict[str, list[Tensors]]:
        """Per picture: ``pixels`` uint8 [channels, side, side], ``grid`` int64 [2] (columns, rows of tiles), ``mean``,
        ``std``, and where there are tiles ``tiles`` uint8 [n, channels, side, side].
        """
        counts = [int(count) for count in batch["num_local_patches"]]
        # of OCR-2, whose tiles have no grid, one row
        grids = batch["patches_grid"] if "patches_grid" in batch else [(count, 1) for count in counts]
        tiles = iter(batch["pixel_values_local"] if any(counts) else ())
        out: list[Tensors] = []
        for square, count, grid in zip(batch["pixel_values"], counts, grids, strict=True):
            tensors: Tensors = {"pixels": square.numpy(), "mean": self._mean, "std": self._std}
            tensors["grid"] = np.array([int(side) for side in grid])
            if count:
                tensors["tiles"] = torch.stack([next(tiles) for _ in range(count)]).numpy()
            out.append(tensors)
        return {"image": out}

    def num_rows(self, modality: str, tensors: Tensors) -> int:
        """As many as the processor writes placeholders."""
        sizes = {"num_local_patches": [len(tensors.get("tiles", ()))], "patches_grid": [tensors["grid"].tolist()]}
        text: str = self.processor.replace_image_token(sizes, 0)
        return text.count(self.processor.image_token)


class Ocr2Encoder(SquareEncoder):
    """SAM and Qwen2: squares and tiles are as many learned queries each."""

    def features(self, modality: str, items: Sequence[EncoderItem]) -> Any:
        """All squares in one run of the tower, all tiles in another."""
        squares = torch.cat([self._pixels(item) for item in items])
        tiles = [self.normalised(item, "tiles", "mean", "std") for item in items if "tiles" in item.tensors]
        return self.base.get_image_features(
            squares,
            pixel_values_local=torch.cat(tiles) if tiles else None,
            num_local_patches=[len(item.tensors.get("tiles", ())) for item in items],
            return_dict=True,
            **self.layout(items),
        ).pooler_output

    def layout(self, items: Sequence[EncoderItem]) -> dict[str, Any]:
        """How the tiles of each picture lie."""
        return {}


class OcrEncoder(Ocr2Encoder):
    """SAM and CLIP: rows of tokens that end in a learned one, over all tiles of a picture."""

    def layout(self, items: Sequence[EncoderItem]) -> dict[str, Any]:
        """Columns and rows."""
        return {"patches_grid": [item.tensors["grid"].tolist() for item in items]}


class DeepseekOcr2(TransformersFamily):
    """DeepSeek-OCR-2 in transformers' format."""

    model_class = "DeepseekOcr2ForConditionalGeneration"
    towers: ClassVar[Mapping[str, tuple[str, ...]]] = {"vision": ("vision_tower", "multi_modal_projector")}
    modality_encoders: ClassVar[Mapping[str, str]] = {"image": "vision"}
    preprocessor_class: ClassVar[type[TransformersPreprocessor]] = OcrPreprocessor
    encoder_classes: ClassVar[Mapping[str, type[TransformersEncoder]]] = {"vision": Ocr2Encoder}


class PublishedPreprocessor(OcrPreprocessor):
    """The published checkpoints bring no processor that transformers knows."""

    processor_class: ClassVar[str] = "UnlimitedOcrProcessor"
    image_processor_class: ClassVar[str] = "UnlimitedOcrImageProcessor"
    tile: ClassVar[int] = 640

    def load_processor(self, folder: Path, settings: Settings) -> Any:
        """transformers' own, in the published mode with tiles ("Gundam"), or in the one that processor_config.json
        names by ``base_size``, ``image_size`` and ``crop_mode``.
        """
        options = processor_options(folder)
        base, tile = int(options.get("base_size", 1024)), int(options.get("image_size", self.tile))
        images = model_class(self.image_processor_class)(
            size={"height": base, "width": base},
            tile_size=tile,
            crop_to_patches=bool(options.get("crop_mode", True)),
            min_patches=2,
            max_patches=6,
            image_mean=list(options.get("image_mean", (0.5, 0.5, 0.5))),
            image_std=list(options.get("image_std", (0.5, 0.5, 0.5))),
        )
        tokenizer = load_tokenizer(folder)
        return model_class(self.processor_class)(
            image_processor=images,
            tokenizer=tokenizer,
            chat_template=composite.chat_template(folder, tokenizer) or TEMPLATES["deepseek-ocr"].text,
        )


class PublishedPreprocessor2(PublishedPreprocessor):
    """Of OCR-2."""

    processor_class = "DeepseekOcr2Processor"
    image_processor_class = "DeepseekOcr2ImageProcessor"
    tile = 768


class DeepseekOcr(TransformersFamily):
    """DeepSeek-OCR as it is published."""

    model_class = "UnlimitedOcrForConditionalGeneration"
    towers: ClassVar[Mapping[str, tuple[str, ...]]] = {"vision": ("vision_tower", "multi_modal_projector")}
    modality_encoders: ClassVar[Mapping[str, str]] = {"image": "vision"}
    preprocessor_class: ClassVar[type[TransformersPreprocessor]] = PublishedPreprocessor
    encoder_classes: ClassVar[Mapping[str, type[TransformersEncoder]]] = {"vision": OcrEncoder}

    def load_config(self) -> Any:
        """SAM-B and CLIP-L by the values of ``vision_config.width``."""
        raw = self.checkpoint.config
        text = dense_text_config(raw["language_config"])
        layers = ["full_attention"] * text["num_hidden_layers"]
        clip = raw["vision_config"]["width"]["clip-l-14-224"]
        width = int(clip["width"])
        return self.load_class().config_class(
            text_config=text | {"layer_types": layers},
            vision_config={
                "sam_config": _sam(raw) | {"mlp_dim": 4 * _sam(raw)["hidden_size"]},
                "encoder_config": {
                    "hidden_size": width,
                    "intermediate_size": 4 * width,
                    "num_hidden_layers": clip["layers"],
                    "num_attention_heads": clip["heads"],
                    "image_size": clip["image_size"],
                    "patch_size": clip["patch_size"],
                },
            },
            image_token_id=load_tokenizer(self.checkpoint.folder).convert_tokens_to_ids("<image>"),
        )

    def load_tokenizer(self) -> Any:
        """That of tokenizer.json."""
        return load_tokenizer(self.checkpoint.folder)


class PublishedDeepseekOcr2(DeepseekOcr):
    """DeepSeek-OCR-2 as it is published."""

    model_class = "DeepseekOcr2ForConditionalGeneration"
    preprocessor_class = PublishedPreprocessor2
    encoder_classes: ClassVar[Mapping[str, type[TransformersEncoder]]] = {"vision": Ocr2Encoder}

    def load_config(self) -> Any:
        """SAM-B by the values of ``vision_config.width``, Qwen2 0.5B by its name."""
        raw = self.checkpoint.config
        qwen2 = raw["vision_config"]["width"]["qwen2-0-5b"]
        width = int(qwen2["dim"])
        sam = _sam(raw)
        # the published value is that of OCR; the weights fit the tower behind it
        sam["downsample_channels"] = [*sam["downsample_channels"][:-1], width]
        if raw["projector_config"]["input_dim"] != width:
            raise TriptychError(
                ErrorKind.UNSUPPORTED,
                f"config.json has a projector of {raw['projector_config']['input_dim']} inputs behind a tower of width "
                f"{width}",
                "settings.model",
            )
        return self.load_class().config_class(
            text_config=dense_text_config(raw["language_config"]),
            vision_config={
                "sam_config": sam,
                # it has no table of tokens
                "encoder_config": _QWEN2 | {k: v for k, v in qwen2.items() if k in _QWEN2} | {"hidden_size": width},
            },
            image_token_id=load_tokenizer(self.checkpoint.folder).convert_tokens_to_ids("<image>"),
        )


def _sam(raw: Mapping[str, Any]) -> dict[str, Any]:
    vision = raw["vision_config"]
    sam = vision["width"]["sam_vit_b"]
    return {
        "hidden_size": sam["width"],
        "num_hidden_layers": sam["layers"],
        "num_attention_heads": sam["heads"],
        "global_attn_indexes": list(sam["global_attn_indexes"]),
        "downsample_channels": list(sam["downsample_channels"]),
        "image_size": vision["image_size"],
    }
