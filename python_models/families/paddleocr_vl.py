"""PaddleOCR-VL (Cui et al. 2025, arXiv:2510.14528): image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch

from ..contract.features import EncoderItem
from .qwen_vision import FrameVisionEncoder, QwenVisionPreprocessor
from .transformers_encoder import TransformersEncoder
from .transformers_family import TransformersFamily
from .transformers_preprocessor import TransformersPreprocessor


class PaddleOCRVisionEncoder(FrameVisionEncoder):
    """The tower takes patches as little pictures; the projector merges them in squares."""

    def _pixels(self, item: EncoderItem) -> torch.Tensor:
        """[patches, channels, side, side] in the tower's dtype."""
        side = self.config.vision_config.patch_size
        flat = super()._pixels(item)
        return flat.view(len(flat), -1, side, side)


class PaddleOCRVL(TransformersFamily):
    """PaddleOCR-VL."""

    model_class = "PaddleOCRVLForConditionalGeneration"
    towers: ClassVar[Mapping[str, tuple[str, ...]]] = {"vision": ("visual", "projector")}
    packs_sequences = True
    modality_encoders: ClassVar[Mapping[str, str]] = {"image": "vision"}
    preprocessor_class: ClassVar[type[TransformersPreprocessor]] = QwenVisionPreprocessor
    encoder_classes: ClassVar[Mapping[str, type[TransformersEncoder]]] = {"vision": PaddleOCRVisionEncoder}
