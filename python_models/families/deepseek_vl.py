"""DeepSeek-VL (Lu et al. 2024, arXiv:2403.05525): pictures, seen by SigLIP and in the larger models by SAM as well.

The longer side of a picture is resized to the tower's square and the rest is filled with a plain colour. Every picture
is the same number of tokens. Squares travel as uint8; the encoder normalises them, bit for bit as the processor would.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from ...kernels.image import normalise_patches
from ..contract.features import EncoderItem
from ..contract.settings import Settings
from ..media.types import Image, Medium
from .checkpoint import Checkpoint
from .pixels import RAW, check_bytes, normalisation
from .squares import SquarePictures, square_features, square_of
from .transformers_encoder import TransformersEncoder
from .transformers_family import TransformersFamily
from .transformers_preprocessor import Tensors, TransformersPreprocessor


class SquarePreprocessor(TransformersPreprocessor):
    """Pictures that are one square each, through JanusImageProcessor and its kin."""

    def __init__(self, checkpoint: Checkpoint, settings: Settings, model: Any, encoders: Mapping[str, str]) -> None:
        super().__init__(checkpoint, settings, model, encoders)
        check_bytes(self.processor.image_processor)
        self._mean, self._std = normalisation(self.processor.image_processor, "image")
        self._rows = int(self.processor.num_image_tokens)
        if settings.gpu_preprocessing == "on":
            self.processor.image_processor = SquarePictures.before(self.processor.image_processor)

    def processor_arguments(self, media: Mapping[str, Sequence[Medium]]) -> dict[str, Any]:
        """Pixels stay uint8."""
        images = [m.data.pixels for m in media["image"] if isinstance(m.data, Image)]
        return {"images": images, "images_kwargs": dict(RAW)}

    def split_features(
        self, batch: Mapping[str, Any], media: Mapping[str, Sequence[Medium]]
    ) -> dict[str, list[Tensors]]:
        """Per picture: ``pixels`` uint8 [channels, side, side], ``mean``, ``std``.

        A picture that the encoder resizes has the tensors of :meth:`.squares.SquarePictures.tensors` for its pixels.
        """
        return {"image": square_features(batch["pixel_values"], media["image"], self.processor, self._mean, self._std)}

    def num_rows(self, modality: str, tensors: Tensors) -> int:
        """The same for every picture."""
        return self._rows


class SquareEncoder(TransformersEncoder):
    """A tower over squares, and its projector."""

    def features(self, modality: str, items: Sequence[EncoderItem]) -> Any:
        """All pictures in one run of the tower."""
        pixels = torch.cat([self._pixels(item) for item in items])
        return self.base.get_image_features(pixels, return_dict=True).pooler_output

    def _pixels(self, item: EncoderItem) -> torch.Tensor:
        """[1, channels, side, side] in the tower's dtype."""
        return self._normalise(item, square_of(item, self.to_device), "mean", "std")[None]

    def normalised(self, item: EncoderItem, pixels: str, mean: str, std: str) -> torch.Tensor:
        """A tensor of an item, uint8 [..., channels, height, width], in the tower's dtype."""
        return self._normalise(item, self.to_device(item.tensors[pixels]), mean, std)

    def _normalise(self, item: EncoderItem, square: torch.Tensor, mean: str, std: str) -> torch.Tensor:
        # to the kernel a picture is one patch of one frame
        patches = square.reshape(-1, square.shape[-3], 1, square.shape[-2] * square.shape[-1])
        values, deviations = self.to_device(item.tensors[mean]), self.to_device(item.tensors[std])
        return normalise_patches(patches, values, deviations, 1, self.dtype).view(square.shape)


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
