"""InternVL 2 and 3 (Chen et al. 2024, arXiv:2412.05271; Zhu et al. 2025, arXiv:2504.10479): image, video.

A picture is cut into tiles of the tower's size, beside the whole of it; a frame of a video is one tile. In the prompt
both are runs of the same token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from ..contract.features import EncoderItem
from . import evs
from .base import FrameSampling
from .llava import Llava, LlavaEncoder, LlavaPreprocessor
from .transformers_encoder import TransformersEncoder
from .transformers_preprocessor import Tensors, TransformersPreprocessor


class InternVLPreprocessor(LlavaPreprocessor):
    """Tiles and frames."""

    default_sampling = FrameSampling(multiple=1, num_frames=32)
    needs_text = True

    def token_id(self, modality: str) -> int:
        """Pictures and frames alike."""
        return int(self.config.image_token_id)

    def row_token(self, modality: str) -> str:
        """Pictures and frames alike."""
        return str(self.processor.image_token)

    def tensors(self, modality: str, batch: Mapping[str, Any], index: int) -> Tensors:
        """``pixels`` uint8 [tiles or frames, channels, height, width], ``mean``, ``std``."""
        # the processor has merged pictures and videos, and there is but one of them
        mean, std = self._normalisation[modality]
        return {"pixels": batch["pixel_values"].contiguous().numpy(), "mean": mean, "std": std}

    def video_grid(self, tensors: Tensors) -> evs.Grid:
        """Frames are squares."""
        return evs.square(len(tensors["pixels"]), self.num_rows("video", tensors))

    def _image_expansion(self, tensors: Tensors) -> str:
        text: str = self.processor.replace_image_token({"num_patches": [len(tensors["pixels"])]}, 0)
        return text


class InternVLEncoder(LlavaEncoder):
    """InternViT and its projector."""

    def features(self, modality: str, items: Sequence[EncoderItem]) -> Any:
        """All tiles or frames in one run of the tower."""
        pixels = torch.cat([self._pixels(item) for item in items])
        return self.base.get_image_features(pixels).pooler_output


class InternVL(Llava):
    """InternVL in transformers' format."""

    model_class = "InternVLForConditionalGeneration"
    modality_encoders: ClassVar[Mapping[str, str]] = {"image": "vision", "video": "vision"}
    preprocessor_class: ClassVar[type[TransformersPreprocessor]] = InternVLPreprocessor
    encoder_classes: ClassVar[Mapping[str, type[TransformersEncoder]]] = {"vision": InternVLEncoder}
