"""Gemma 3 (Gemma Team 2025, arXiv:2503.19786): image; the smallest ones text alone.

A picture is resized to the tower's square and becomes a fixed number of tokens, which attend to each other in both
directions. The square travels as uint8 and the encoder normalises it, bit for bit as the processor would.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from ..contract.errors import ErrorKind, TriptychError
from ..contract.settings import Settings
from .squares import SquareEncoder, SquarePreprocessor
from .text_only import TextPreprocessor
from .transformers_encoder import TransformersEncoder
from .transformers_family import TransformersFamily


class Gemma3Preprocessor(SquarePreprocessor):
    """Pictures through Gemma3ImageProcessor."""

    # what Gemma3Processor tells its image processor in every call
    settled = (
        "do_convert_rgb",
        "do_pan_and_scan",
        "pan_and_scan_min_crop_size",
        "pan_and_scan_max_num_crops",
        "pan_and_scan_min_ratio_to_activate",
    )

    def load_processor(self, folder: Path, settings: Settings) -> Any:
        """The checkpoint's processor, refused where it cuts pictures."""
        processor = super().load_processor(folder, settings)
        if processor.image_processor.do_pan_and_scan:
            raise TriptychError(
                ErrorKind.UNSUPPORTED,
                "do_pan_and_scan, crops of a picture beside the whole of it, is not supported: turn it off in the "
                "checkpoint's preprocessor_config.json",
                "settings.model",
            )
        return processor

    def tokens_per_picture(self) -> int:
        """As the processor says it."""
        return int(self.processor.image_seq_length)

    def _placeholder(self, modality: str) -> str:
        return str(self.processor.boi_token)


class Gemma3(TransformersFamily):
    """Gemma 3 with its vision tower."""

    model_class = "Gemma3ForConditionalGeneration"
    towers: ClassVar[Mapping[str, tuple[str, ...]]] = {"vision": ("vision_tower", "multi_modal_projector")}
    bidirectional = frozenset({"image"})
    modality_encoders: ClassVar[Mapping[str, str]] = {"image": "vision"}
    preprocessor_class = Gemma3Preprocessor
    encoder_classes: ClassVar[Mapping[str, type[TransformersEncoder]]] = {"vision": SquareEncoder}


class Gemma3Text(TransformersFamily):
    """Gemma 3 without a vision tower."""

    model_class = "Gemma3ForCausalLM"
    towers: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    modality_encoders: ClassVar[Mapping[str, str]] = {}
    preprocessor_class = TextPreprocessor
    encoder_classes: ClassVar[Mapping[str, type[TransformersEncoder]]] = {}
