"""Qwen3-VL, dense and with mixtures of experts (Qwen team 2025, arXiv:2511.21631): image, video.

A video is a row of pictures with the time of each as text before it, so one video has a run of tokens for every pair
of frames. The tower gives, beside the rows that become embeddings, rows that the first layers of the language model
add to their own results ("deepstack", Meng et al. 2024, arXiv:2406.04334).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from .qwen_vision import QwenVisionEncoder, QwenVisionPreprocessor
from .transformers_encoder import TransformersEncoder
from .transformers_family import TransformersFamily
from .transformers_preprocessor import TransformersPreprocessor


class Qwen3VisionEncoder(QwenVisionEncoder):
    """A row holds its embedding, then those of deepstack."""

    def __init__(self, model: Any, device: str, dtype: torch.dtype) -> None:
        super().__init__(model, device, dtype)
        self.width *= 1 + len(self.config.vision_config.deepstack_visual_indexes)

    def join(self, output: Any) -> torch.Tensor:
        """Rows [n, hidden size * (1 + deepstack layers)]."""
        return torch.cat([torch.cat(list(part)) for part in (output.pooler_output, *output.deepstack_features)], -1)


class Qwen3VL(TransformersFamily):
    """Qwen3-VL."""

    model_class = "Qwen3VLForConditionalGeneration"
    towers: ClassVar[Mapping[str, tuple[str, ...]]] = {"vision": ("visual",)}
    packs_sequences = True
    modality_encoders: ClassVar[Mapping[str, str]] = {"image": "vision", "video": "vision"}
    preprocessor_class: ClassVar[type[TransformersPreprocessor]] = QwenVisionPreprocessor
    encoder_classes: ClassVar[Mapping[str, type[TransformersEncoder]]] = {"vision": Qwen3VisionEncoder}


class Qwen3VLMoe(Qwen3VL):
    """Qwen3-VL with mixtures of experts."""

    model_class = "Qwen3VLMoeForConditionalGeneration"
