"""NVILA and NVILA-Lite as first published (Efficient-Large-Model/NVILA-8B): a folder for each part.

``llm`` is a checkpoint of Qwen2 with its tokenizer, ``vision_tower`` one of SigLIP with its image processor,
``mm_projector`` holds the projector; config.json describes all three. Compared with the code that saves and loads
such folders (NVlabs/VILA) and with its config.json.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch

from ..contract.errors import ErrorKind, TriptychError
from ..contract.settings import Settings
from .base import Decoder, WeightSource
from .checkpoint import Checkpoint
from .composite import required
from .nvila import NVILA, NVILALiteModel, NVILALitePreprocessor, NVILAModel, NVILAPreprocessor
from .transformers_encoder import TransformersEncoder
from .transformers_preprocessor import TransformersPreprocessor

_RULES = (
    # names in the folders; no two of them begin alike
    (r"^layers\.", "mm_projector.layers."),
    (r"^vision_model\.", "vision_tower."),
    (r"^model\.", "language_model."),
)
_PARTS = {"llm_cfg": "llm", "vision_tower_cfg": "vision_tower", "mm_projector_cfg": "mm_projector"}


class OriginalNVILAModel(NVILAModel):
    """Other names of weights."""

    published = _RULES


class OriginalNVILALiteModel(NVILALiteModel):
    """Other names of weights."""

    published = _RULES


class OriginalNVILAPreprocessor(NVILAPreprocessor):
    """Its parts from their folders, messages as VILA's code writes them."""

    tokenizer_folder = "llm"
    image_processor_folder = "vision_tower"
    strips = True


class OriginalNVILALitePreprocessor(NVILALitePreprocessor):
    """Its parts from their folders, messages as VILA's code writes them."""

    tokenizer_folder = "llm"
    image_processor_folder = "vision_tower"
    strips = True


class OriginalNVILA(NVILA):
    """NVILA in three folders."""

    composite = OriginalNVILAModel
    preprocessor_class: ClassVar[type[TransformersPreprocessor]] = OriginalNVILAPreprocessor

    def __init__(self, checkpoint: Checkpoint, settings: Settings) -> None:
        super().__init__(checkpoint, settings)
        self._whole = checkpoint

    def load_config(self) -> Any:
        """Of its parts."""
        return self._config(part_config(self._whole, "llm_cfg"), part_config(self._whole, "vision_tower_cfg"))

    def load_encoder(self, encoder: str, device: str, dtype: torch.dtype) -> TransformersEncoder:
        """Tower and projector, each from its folder."""
        if encoder not in self.towers:
            raise TriptychError(ErrorKind.UNSUPPORTED, f"{self.checkpoint.model_type} has no {encoder} encoder")
        model = self._in("mm_projector")._load(lambda _: ["mm_projector"], "projector", device, dtype)
        tower = self._in("vision_tower")._load(lambda _: ["vision_tower"], "vision tower", device, dtype)
        model.vision_tower = tower.vision_tower
        return self.encoder_classes[encoder](model, device, dtype)

    def load_decoder(self, device: str, dtype: torch.dtype) -> Decoder:
        """The text model's folder."""
        return super(OriginalNVILA, self._in("llm")).load_decoder(device, dtype)

    def open_decoder(self, device: str, dtype: torch.dtype, *, progress: bool) -> tuple[Decoder, WeightSource]:
        """The text model's folder."""
        return super(OriginalNVILA, self._in("llm")).open_decoder(device, dtype, progress=progress)

    def _in(self, part: str) -> OriginalNVILA:
        """The same family, reading files from the folder of a part."""
        family = copy.copy(self)
        family.checkpoint = replace(self.checkpoint, folder=self.checkpoint.folder / part)
        return family


class OriginalNVILALite(OriginalNVILA):
    """NVILA-Lite in three folders."""

    composite = OriginalNVILALiteModel
    preprocessor_class = OriginalNVILALitePreprocessor


_KINDS: dict[tuple[str, str], type[OriginalNVILA]] = {
    ("dynamic_s2", "mlp_downsample"): OriginalNVILA,
    ("dynamic_s2", "mlp_downsample_2x2_fix"): OriginalNVILA,
    ("dynamic", "mlp_downsample_3x3_fix"): OriginalNVILALite,
}


def published(checkpoint: Checkpoint, settings: Settings) -> OriginalNVILA:
    """The family of a checkpoint of VILA's.

    Raises:
        TriptychError: UNSUPPORTED for other tiles, projectors and text models than NVILA's.
    """
    raw = checkpoint.config
    projector = str(part_config(checkpoint, "mm_projector_cfg").get("mm_projector_type"))
    kind = str(raw.get("image_aspect_ratio")), projector
    scales = raw.get("s2_scales")
    sizes = [int(n) for n in scales.split(",")] if isinstance(scales, str) else list(scales or ())
    text = part_config(checkpoint, "llm_cfg").get("model_type", "qwen2")
    strange = kind[0] == "dynamic_s2" and [size * (k + 1) for k, size in enumerate(sizes[:1] * 3)] != sizes
    if kind not in _KINDS or strange or text != "qwen2":
        known = " or ".join(f"{tiles} with {name}" for tiles, name in _KINDS)
        raise TriptychError(
            ErrorKind.UNSUPPORTED,
            f"{checkpoint.folder} has image_aspect_ratio {kind[0]!r}, mm_projector_type {kind[1]!r}, s2_scales {sizes} "
            f"and a text model of type {text!r}; supported are {known}, scales of 1, 2 and 3 tiles, and 'qwen2'",
            "settings.model",
        )
    return _KINDS[kind](checkpoint, settings)


def part_config(checkpoint: Checkpoint, key: str) -> Mapping[str, Any]:
    """What config.json says of a part; where it names a folder only, what the config.json there says."""
    found = required(checkpoint.config, key)
    if isinstance(found, Mapping):
        return found
    path = checkpoint.folder / _PARTS[key] / "config.json"
    if not path.is_file():
        raise TriptychError(ErrorKind.MODEL_NOT_FOUND, f"there is no {path}", "settings.model")
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return values
