"""LLaVA 1.5 (Liu et al. 2023, arXiv:2310.03744) and Pixtral 12B in the same classes (arXiv:2410.07073): image.

A picture becomes one square of the tower, or with Pixtral's tower a rectangle of its own size. Pixels travel as uint8
and the encoder normalises them, bit for bit as the processor would. The other families of this lineage cut a picture
into tiles, and build on the classes here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch

from ...kernels.image import normalise_patches
from ..contract.features import EncoderItem
from ..contract.settings import Settings
from .checkpoint import Checkpoint
from .itemwise import ItemwisePreprocessor
from .pixels import check_bytes, normalisation, take_videos_in_place
from .transformers_encoder import TransformersEncoder
from .transformers_family import TransformersFamily
from .transformers_preprocessor import Tensors, TransformersPreprocessor

_PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}


class LlavaPreprocessor(ItemwisePreprocessor):
    """Squares, tiles or frames of any number for a medium."""

    def __init__(self, checkpoint: Checkpoint, settings: Settings, model: Any, encoders: Mapping[str, str]) -> None:
        super().__init__(checkpoint, settings, model, encoders)
        check_bytes(self.processor.image_processor)
        if "video" in encoders:
            take_videos_in_place(self.processor.video_processor)
        processors = {
            "image": self.processor.image_processor,
            "video": getattr(self.processor, "video_processor", None),
        }
        self._normalisation = {modality: normalisation(processors[modality], modality) for modality in encoders}

    def tensors(self, modality: str, batch: Mapping[str, Any], index: int) -> Tensors:
        """``pixels`` uint8 [tiles or frames, channels, height, width], ``mean``, ``std``.

        A picture's ``size`` is int64 [2], its height and width: with tiles those it came with.
        """
        pixels = batch[_PIXELS[modality]][index]
        if pixels.dim() == 3:
            pixels = pixels[None]
        mean, std = self._normalisation[modality]
        tensors: Tensors = {"pixels": pixels.contiguous().numpy(), "mean": mean, "std": std}
        if modality == "image" and "image_sizes" in batch:
            tensors["size"] = batch["image_sizes"][index].numpy().astype(np.int64)
        return tensors

    def expansion(self, modality: str, tensors: Tensors) -> str:
        """The processor's own."""
        if modality == "video":
            frames: str = self.processor.replace_video_token({"pixel_values_videos": [tensors["pixels"]]}, 0)
            return frames
        return self._image_expansion(tensors)

    def _image_expansion(self, tensors: Tensors) -> str:
        inputs: dict[str, Any] = {"pixel_values": tensors["pixels"]}
        if "size" in tensors:
            inputs["image_sizes"] = [tensors["size"].tolist()]
        text: str = self.processor.replace_image_token(inputs, 0)
        return text


class LlavaEncoder(TransformersEncoder):
    """Tower and projector."""

    def features(self, modality: str, items: Sequence[EncoderItem]) -> Any:
        """All pictures in one run of the tower; with Pixtral's, of sizes of their own in the corner of the largest."""
        pixels = [self._pixels(item) for item in items]
        if "size" not in items[0].tensors:
            return self.base.get_image_features(torch.cat(pixels), return_dict=True).pooler_output
        height, width = (max(part.shape[side] for part in pixels) for side in (2, 3))
        padded = [
            torch.nn.functional.pad(part, (0, width - part.shape[3], 0, height - part.shape[2])) for part in pixels
        ]
        sizes = sizes_of(items)
        return self.base.get_image_features(torch.cat(padded), image_sizes=sizes, return_dict=True).pooler_output

    def _pixels(self, item: EncoderItem) -> torch.Tensor:
        """[tiles or frames, channels, height, width] in the tower's dtype."""
        tiles = self.to_device(item.tensors["pixels"])
        mean, std = self.to_device(item.tensors["mean"]), self.to_device(item.tensors["std"])
        # to the kernel each is one patch of one frame
        return normalise_patches(tiles.flatten(2)[:, :, None], mean, std, 1, self.dtype).view(tiles.shape)


class Llava(TransformersFamily):
    """LLaVA 1.5, BakLLaVA, Pixtral."""

    model_class = "LlavaForConditionalGeneration"
    towers: ClassVar[Mapping[str, tuple[str, ...]]] = {"vision": ("vision_tower", "multi_modal_projector")}
    modality_encoders: ClassVar[Mapping[str, str]] = {"image": "vision"}
    preprocessor_class: ClassVar[type[TransformersPreprocessor]] = LlavaPreprocessor
    encoder_classes: ClassVar[Mapping[str, type[TransformersEncoder]]] = {"vision": LlavaEncoder}


def sizes_of(items: Sequence[EncoderItem]) -> torch.Tensor:
    """int64 [items, 2], height and width, on the CPU: towers read them number by number."""
    return torch.from_numpy(np.stack([item.tensors["size"] for item in items]))
