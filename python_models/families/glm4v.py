"""GLM-4.1V, GLM-4.5V, GLM-4.6V (GLM-V team 2025, arXiv:2507.01006) and GLM-OCR: image, video.

A video is written as pictures, each with its time as text behind it, between marks of begin and end: its tokens are
those of pictures, in a run for every pair of frames.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from ..contract.settings import Settings
from .checkpoint import Checkpoint
from .qwen_vision import QwenVisionEncoder, QwenVisionPreprocessor
from .transformers_encoder import TransformersEncoder
from .transformers_family import TransformersFamily
from .transformers_preprocessor import TransformersPreprocessor

# Glm46VVideoProcessor takes pairs of frames: three a second up to 30 s, one up to 5 min, then one every two seconds.
_GLM46V_FPS = ((30.0, 6.0), (300.0, 2.0))
_GLM46V_LAST_FPS = 1.0
_GLM46V_MAX_FRAMES = 640


class GlmVisionPreprocessor(QwenVisionPreprocessor):
    """Pictures and videos through the processors of GLM-4.1V and GLM-4.6V."""

    def __init__(self, checkpoint: Checkpoint, settings: Settings, model: Any, encoders: Mapping[str, str]) -> None:
        super().__init__(checkpoint, settings, model, encoders)
        processor = self.processor.video_processor
        # Their num_frames is not used; what they do is in sample_frames().
        if type(processor).__name__.startswith("Glm46V"):
            sampling = replace(self.frame_sampling, fps=_GLM46V_LAST_FPS, fps_until=_GLM46V_FPS)
            most = _GLM46V_MAX_FRAMES
        else:
            sampling = self.frame_sampling
            most = int(processor.max_duration * processor.fps)
        self.frame_sampling = replace(
            sampling,
            min_frames=sampling.multiple,
            max_frames=max(min(most, settings.max_video_frames), sampling.multiple),
            num_frames=None,
        )

    def token_id(self, modality: str) -> int:
        """Videos have the token of pictures."""
        return super().token_id("image")


class Glm4v(TransformersFamily):
    """GLM-4.1V."""

    model_class = "Glm4vForConditionalGeneration"
    towers: ClassVar[Mapping[str, tuple[str, ...]]] = {"vision": ("visual",)}
    packs_sequences = True
    modality_encoders: ClassVar[Mapping[str, str]] = {"image": "vision", "video": "vision"}
    preprocessor_class: ClassVar[type[TransformersPreprocessor]] = GlmVisionPreprocessor
    encoder_classes: ClassVar[Mapping[str, type[TransformersEncoder]]] = {"vision": QwenVisionEncoder}


class Glm4vMoe(Glm4v):
    """GLM-4.5V and GLM-4.6V, with mixtures of experts."""

    model_class = "Glm4vMoeForConditionalGeneration"


class Glm46V(Glm4v):
    """GLM-4.6V, whose configuration names its tower and text model."""

    model_class = "Glm46VForConditionalGeneration"


class GlmOcr(Glm4v):
    """GLM-OCR."""

    model_class = "GlmOcrForConditionalGeneration"
