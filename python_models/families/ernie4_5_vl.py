"""ERNIE 4.5 VL (Baidu ERNIE team 2025, ERNIE 4.5 technical report): image, video.

Its mixtures of experts are two, for text and for what is seen, so the decoder must know of each token which it is; the
marks before and behind a picture belong to the picture. Frames of a video are patches of one frame each, and the
resampler joins them in pairs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ..contract.settings import Settings
from ..media.types import Medium, Video
from .base import FrameSampling
from .checkpoint import Checkpoint
from .qwen_vision import FrameVisionEncoder, QwenVisionPreprocessor
from .transformers_encoder import TransformersEncoder
from .transformers_family import TransformersFamily
from .transformers_preprocessor import Tensors, TransformersPreprocessor


class Ernie45VLPreprocessor(QwenVisionPreprocessor):
    """Pictures and videos through the processors of ERNIE 4.5 VL, which draw its time on each frame."""

    # as the published inference code samples videos; the processor has numbers of frames alone
    default_sampling = FrameSampling(fps=2.0, min_frames=16, max_frames=180)

    def __init__(self, checkpoint: Checkpoint, settings: Settings, model: Any, encoders: Mapping[str, str]) -> None:
        super().__init__(checkpoint, settings, model, encoders)
        self._merged_frames = int(self.config.vision_config.temporal_merge_size)
        self._marks = [
            int(getattr(self.config, f"{modality}_{mark}_token_id"))
            for modality in ("image", "video")
            for mark in ("start", "end")
        ]

    def split_features(
        self, batch: Mapping[str, Any], media: Mapping[str, Sequence[Medium]]
    ) -> dict[str, list[Tensors]]:
        """As for Qwen-VL; of videos also ``times`` float64 [frames] in seconds, which are drawn on them."""
        out = super().split_features(batch, media)
        for tensors, medium in zip(out.get("video", ()), media.get("video", ()), strict=True):
            if isinstance(medium.data, Video):
                tensors["times"] = np.array(medium.data.indices) / medium.data.source_fps
        return out

    def variant(self, modality: str, tensors: Tensors) -> str:
        """The times drawn on frames."""
        return str(tensors["times"].tolist()) if modality == "video" else ""

    def num_rows(self, modality: str, tensors: Tensors) -> int:
        """As for Qwen-VL; frames of a video are joined in pairs."""
        rows = super().num_rows(modality, tensors)
        return rows // self._merged_frames if modality == "video" else rows

    def token_extras(
        self, ids: NDArray[np.int32], batch: Mapping[str, Any], types: NDArray[np.int32]
    ) -> dict[str, int | list[int]]:
        """Which tokens go to the experts for what is seen."""
        if not types.any():
            return {}
        seen = (types > 0) | np.isin(ids, self._marks)
        return {"moe_mm_token_type_ids": seen.astype(int).tolist()}


class Ernie45VLMoe(TransformersFamily):
    """ERNIE 4.5 VL with mixtures of experts."""

    model_class = "Ernie4_5_VLMoeForConditionalGeneration"
    towers: ClassVar[Mapping[str, tuple[str, ...]]] = {"vision": ("vision_tower", "resampler_model")}
    packs_sequences = True
    token_extras: ClassVar[Mapping[str, int | None]] = {"moe_mm_token_type_ids": 0}
    modality_encoders: ClassVar[Mapping[str, str]] = {"image": "vision", "video": "vision"}
    preprocessor_class: ClassVar[type[TransformersPreprocessor]] = Ernie45VLPreprocessor
    encoder_classes: ClassVar[Mapping[str, type[TransformersEncoder]]] = {"vision": FrameVisionEncoder}
