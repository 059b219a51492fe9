"""DeepSeek-VL (Lu et al. 2024, arXiv:2403.05525): pictures, seen by SigLIP and in the larger models by SAM as well.

The longer side of a picture is resized to the tower's square and the rest is filled with a plain colour. Every picture
is the same number of tokens. Squares travel as uint8; the encoder normalises them, bit for bit as the processor would.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from ..contract.features import EncoderItem
from ..contract.settings import Settings
from ..media.types import Medium
from .checkpoint import Checkpoint
from .squares import SquareEncoder, SquarePreprocessor
from .transformers_encoder import TransformersEncoder
from .transformers_family import TransformersFamily
from .transformers_preprocessor import Tensors


class DeepseekVL(TransformersFamily):
    """DeepSeek-VL with one tower (1.3B)."""

    model_class = "DeepseekVLForConditionalGeneration"
    towers: ClassVar[Mapping[str, tuple[str, ...]]] = {"vision": ("vision_model", "aligner")}
    modality_encoders: ClassVar[Mapping[str, str]] = {"image": "vision"}
    preprocessor_class = SquarePreprocessor
    encoder_classes: ClassVar[Mapping[str, type[TransformersEncoder]]] = {"vision": SquareEncoder}


class HybridPreprocessor(SquarePreprocessor):
    """Two squares of each picture, a small and a large one."""

    def __init__(self, checkpoint: Checkpoint, settings: Settings, model: Any, encoders: Mapping[str, str]) -> None:
        super().__init__(checkpoint, settings, model, encoders)
        processor = self.processor.image_processor
        factor = 1.0 / processor.rescale_factor
        self._large = {
            "large_mean": (torch.tensor(processor.high_res_image_mean) * factor).numpy(),
            "large_std": (torch.tensor(processor.high_res_image_std) * factor).numpy(),
        }

    def split_features(
        self, batch: Mapping[str, Any], media: Mapping[str, Sequence[Medium]]
    ) -> dict[str, list[Tensors]]:
        """The large square too: ``large`` uint8 [channels, side, side], ``large_mean``, ``large_std``."""
        squares = super().split_features(batch, media)["image"]
        larges = batch["high_res_pixel_values"]
        return {
            "image": [
                {**small, "large": large.numpy(), **self._large} for small, large in zip(squares, larges, strict=True)
            ]
        }


class HybridEncoder(SquareEncoder):
    """SigLIP over the small square and SAM over the large one."""

    def features(self, modality: str, items: Sequence[EncoderItem]) -> Any:
        """All pictures in one run of both towers."""
        small = torch.cat([self._pixels(item) for item in items])
        large = torch.stack([self.normalised(item, "large", "large_mean", "large_std") for item in items])
        return self.base.get_image_features(small, large, return_dict=True).pooler_output


class DeepseekVLHybrid(DeepseekVL):
    """DeepSeek-VL with two towers (7B)."""

    model_class = "DeepseekVLHybridForConditionalGeneration"
    towers: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "vision": (
            "vision_model",
            "high_res_vision_model",
            "high_res_vision_neck",
            "high_res_vision_proj",
            "aligner",
        )
    }
    preprocessor_class = HybridPreprocessor
    encoder_classes: ClassVar[Mapping[str, type[TransformersEncoder]]] = {"vision": HybridEncoder}
