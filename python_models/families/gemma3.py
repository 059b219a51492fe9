"""Gemma 3 (Gemma Team 2025, arXiv:2503.19786): image; the smallest ones text alone.

A picture is resized to the tower's square and becomes a fixed number of tokens, which attend to each other in both
directions. The square travels as uint8 and the encoder normalises it, bit for bit as the processor would.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from ...kernels.image import normalise_patches
from ..contract.errors import ErrorKind, TriptychError
from ..contract.features import EncoderItem
from ..contract.settings import Settings
from ..media.types import Image, Medium
from .checkpoint import Checkpoint
from .pixels import RAW, check_bytes, normalisation
from .squares import SquarePictures, square_features, square_of
from .text_only import TextPreprocessor
from .transformers_encoder import TransformersEncoder
from .transformers_family import TransformersFamily
from .transformers_preprocessor import Tensors, TransformersPreprocessor

_SETTLED = (
    "do_convert_rgb",
    "do_pan_and_scan",
    "pan_and_scan_min_crop_size",
    "pan_and_scan_max_num_crops",
    "pan_and_scan_min_ratio_to_activate",
)
"""What Gemma3Processor tells its image processor in every call."""


class Gemma3Preprocessor(TransformersPreprocessor):
    """Pictures through Gemma3ImageProcessor."""

    def __init__(self, checkpoint: Checkpoint, settings: Settings, model: Any, encoders: Mapping[str, str]) -> None:
        super().__init__(checkpoint, settings, model, encoders)
        processor = self.processor.image_processor
        if processor.do_pan_and_scan:
            raise TriptychError(
                ErrorKind.UNSUPPORTED,
                "do_pan_and_scan, crops of a picture beside the whole of it, is not supported: turn it off in the "
                "checkpoint's preprocessor_config.json",
                "settings.model",
            )
        check_bytes(processor)
        self._mean, self._std = normalisation(processor, "image")
        if settings.gpu_preprocessing == "on":
            self.processor.image_processor = SquarePictures.before(processor, _SETTLED)
        self._rows = int(self.processor.image_seq_length)

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

    def _placeholder(self, modality: str) -> str:
        return str(self.processor.boi_token)


class Gemma3VisionEncoder(TransformersEncoder):
    """SigLIP and the pooling projector."""

    def features(self, modality: str, items: Sequence[EncoderItem]) -> Any:
        """All pictures in one run of the tower."""
        pixels = torch.cat([self._pixels(item) for item in items])
        return self.base.get_image_features(pixels, return_dict=True).pooler_output

    def _pixels(self, item: EncoderItem) -> torch.Tensor:
        """[1, channels, side, side] in the tower's dtype."""
        square = square_of(item, self.to_device)
        mean, std = self.to_device(item.tensors["mean"]), self.to_device(item.tensors["std"])
        # to the kernel the picture is one patch of one frame
        return normalise_patches(square.flatten(1)[None, :, None], mean, std, 1, self.dtype).view(1, *square.shape)


class Gemma3(TransformersFamily):
    """Gemma 3 with its vision tower."""

    model_class = "Gemma3ForConditionalGeneration"
    towers: ClassVar[Mapping[str, tuple[str, ...]]] = {"vision": ("vision_tower", "multi_modal_projector")}
    bidirectional = frozenset({"image"})
    modality_encoders: ClassVar[Mapping[str, str]] = {"image": "vision"}
    preprocessor_class = Gemma3Preprocessor
    encoder_classes: ClassVar[Mapping[str, type[TransformersEncoder]]] = {"vision": Gemma3VisionEncoder}


class Gemma3Text(TransformersFamily):
    """Gemma 3 without a vision tower."""

    model_class = "Gemma3ForCausalLM"
    towers: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    modality_encoders: ClassVar[Mapping[str, str]] = {}
    preprocessor_class = TextPreprocessor
    encoder_classes: ClassVar[Mapping[str, type[TransformersEncoder]]] = {}
