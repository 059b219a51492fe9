"""Qwen2.5-VL and Qwen2-VL (Bai et al. 2025, arXiv:2502.13923; Wang et al. 2024, arXiv:2409.12191): image, video."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from ..media.types import Medium
from .qwen_vision import QwenVisionEncoder, QwenVisionPreprocessor
from .transformers_family import Tensors, TransformersEncoder, TransformersFamily, TransformersPreprocessor


class Qwen25VLPreprocessor(QwenVisionPreprocessor):
    """Qwen2.5-VL: positions on the time axis follow real time."""

    def position_arguments(
        self, batch: Mapping[str, Any], features: Mapping[str, Sequence[Tensors]], media: Mapping[str, Sequence[Medium]]
    ) -> dict[str, Any]:
        """Grids and the seconds of a grid step."""
        arguments = super().position_arguments(batch, features, media)
        if "video" in media:
            arguments["second_per_grid_ts"] = batch["second_per_grid_ts"]
        return arguments


class Qwen2VL(TransformersFamily):
    """Qwen2-VL."""

    model_class = "Qwen2VLForConditionalGeneration"
    towers: ClassVar[Mapping[str, tuple[str, ...]]] = {"vision": ("visual",)}
    packs_sequences = True
    modality_encoders: ClassVar[Mapping[str, str]] = {"image": "vision", "video": "vision"}
    preprocessor_class: ClassVar[type[TransformersPreprocessor]] = QwenVisionPreprocessor
    encoder_classes: ClassVar[Mapping[str, type[TransformersEncoder]]] = {"vision": QwenVisionEncoder}


class Qwen25VL(Qwen2VL):
    """Qwen2.5-VL."""

    model_class = "Qwen2_5_VLForConditionalGeneration"
    preprocessor_class = Qwen25VLPreprocessor
