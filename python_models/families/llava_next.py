"""LLaVA-NeXT, or LLaVA 1.6 (Liu et al. 2024), image; LLaVA-NeXT-Video (Zhang et al. 2024), image and video.

A picture is scaled to the best fitting of a few resolutions and cut into tiles of the tower's size, beside the whole
of it; padding is cut off again behind the tower, and a learned row ends each line. A video's frames go through the
tower one by one and are pooled.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from ..contract.features import EncoderItem
from . import evs
from .base import FrameSampling
from .llava import Llava, LlavaEncoder, LlavaPreprocessor, sizes_of
from .transformers_encoder import TransformersEncoder
from .transformers_preprocessor import Tensors, TransformersPreprocessor


class LlavaNextPreprocessor(LlavaPreprocessor):
    """Tiles."""

    def _image_expansion(self, tensors: Tensors) -> str:
        inputs = {"pixel_values": tensors["pixels"][None], "image_sizes": [tensors["size"].tolist()]}
        text: str = self.processor.replace_image_token(inputs, 0)
        return text


class LlavaNextEncoder(LlavaEncoder):
    """Tiles of all pictures in one run of the tower; each video in its own."""

    def features(self, modality: str, items: Sequence[EncoderItem]) -> Any:
        """Rows of each item."""
        if modality == "video":
            return [self.base.get_video_features(self._pixels(item)[None]).pooler_output[0] for item in items]
        pixels = torch.cat([self._pixels(item) for item in items])
        return self.base.get_image_features(pixels, sizes_of(items)).pooler_output


class LlavaNext(Llava):
    """LLaVA-NeXT."""

    model_class = "LlavaNextForConditionalGeneration"
    preprocessor_class: ClassVar[type[TransformersPreprocessor]] = LlavaNextPreprocessor
    encoder_classes: ClassVar[Mapping[str, type[TransformersEncoder]]] = {"vision": LlavaNextEncoder}


class LlavaNextVideoPreprocessor(LlavaNextPreprocessor):
    """Tiles and frames."""

    default_sampling = FrameSampling(multiple=1, num_frames=8)

    def video_grid(self, tensors: Tensors) -> evs.Grid:
        """Frames are squares."""
        return evs.square(len(tensors["pixels"]), self.num_rows("video", tensors))


class LlavaNextVideo(LlavaNext):
    """LLaVA-NeXT-Video."""

    model_class = "LlavaNextVideoForConditionalGeneration"
    modality_encoders: ClassVar[Mapping[str, str]] = {"image": "vision", "video": "vision"}
    preprocessor_class: ClassVar[type[TransformersPreprocessor]] = LlavaNextVideoPreprocessor
