"""Janus and Janus-Pro (Wu et al. 2024, arXiv:2410.13848; Chen et al. 2025, arXiv:2501.17811): image.

Answers in text about pictures. The half that draws pictures (``vqmodel``, ``generation_*``) is loaded by no stage.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from .deepseek_vl import SquareEncoder, SquarePreprocessor
from .transformers_family import TransformersEncoder, TransformersFamily, TransformersPreprocessor


class Janus(TransformersFamily):
    """Janus in transformers' format."""

    model_class = "JanusForConditionalGeneration"
    towers: ClassVar[Mapping[str, tuple[str, ...]]] = {"vision": ("vision_model", "aligner")}
    modality_encoders: ClassVar[Mapping[str, str]] = {"image": "vision"}
    preprocessor_class: ClassVar[type[TransformersPreprocessor]] = SquarePreprocessor
    encoder_classes: ClassVar[Mapping[str, type[TransformersEncoder]]] = {"vision": SquareEncoder}
