"""Qwen2.5-Omni's thinker (Xu et al. 2025, arXiv:2503.20215): image, video and audio in, text out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from ..contract.features import EncoderItem
from ..contract.settings import Settings
from ..media.types import Audio, Medium, Video
from .checkpoint import Checkpoint
from .qwen_vision import QwenVisionEncoder, QwenVisionPreprocessor
from .sounds import check_sound
from .transformers_encoder import TransformersEncoder
from .transformers_family import TransformersFamily
from .transformers_preprocessor import Tensors


class Qwen25OmniPreprocessor(QwenVisionPreprocessor):
    """Pictures and videos as Qwen2.5-VL, sounds as log-mel frames (100 a second)."""

    def __init__(self, checkpoint: Checkpoint, settings: Settings, model: Any, encoders: Mapping[str, str]) -> None:
        super().__init__(checkpoint, settings, model, encoders)
        self._video_size = _own_video_size(checkpoint, self.processor.video_processor)
        extractor = self.processor.feature_extractor
        self._most: int | None = int(extractor.n_samples)
        # three frames give the first token
        self._fewest = 2 * int(extractor.hop_length) + 1

    def check_medium(self, medium: Medium) -> None:
        """Refuse sounds the feature extractor would cut off, and those too short for one token."""
        super().check_medium(medium)
        check_sound(medium, self.sampling_rate, self._most, self._fewest)

    def processor_arguments(self, media: Mapping[str, Sequence[Medium]]) -> dict[str, Any]:
        """Sounds go in at the model's own rate."""
        arguments = super().processor_arguments(media)
        if "videos_kwargs" in arguments and self._video_size is not None:
            arguments["videos_kwargs"]["size"] = dict(self._video_size)
        if sounds := [m.data.samples for m in media.get("audio", ()) if isinstance(m.data, Audio)]:
            arguments["audio"] = sounds
            arguments["audio_kwargs"] = {"sampling_rate": self.sampling_rate}
        return arguments

    def split_features(
        self, batch: Mapping[str, Any], media: Mapping[str, Sequence[Medium]]
    ) -> dict[str, list[Tensors]]:
        """Sounds: ``mel`` float32 [bins, frames], without the padding."""
        out = super().split_features(batch, media)
        if "audio" in media:
            lengths = batch["feature_attention_mask"].sum(-1).tolist()
            out["audio"] = [
                {"mel": mel[:, :length].contiguous().numpy()}
                for mel, length in zip(batch["input_features"], lengths, strict=True)
            ]
        return out

    def num_rows(self, modality: str, tensors: Tensors) -> int:
        """As for Qwen2.5-VL; a sound gives a quarter of its frames."""
        if modality == "audio":
            return audio_rows(tensors["mel"].shape[1])
        return super().num_rows(modality, tensors)

    def position_arguments(
        self, batch: Mapping[str, Any], features: Mapping[str, Sequence[Tensors]], media: Mapping[str, Sequence[Medium]]
    ) -> dict[str, Any]:
        """Grids, seconds of a grid step, frames of each sound."""
        arguments = super().position_arguments(batch, features, media)
        if "video" in media:
            # The processor would assume 2 frames per second whatever the sampling was.
            arguments["second_per_grids"] = self._seconds_per_grid(media["video"])
        if "audio" in media:
            arguments["audio_seqlens"] = torch.tensor([t["mel"].shape[1] for t in features["audio"]])
        return arguments

    def _seconds_per_grid(self, videos: Sequence[Medium]) -> torch.Tensor:
        frames = self.processor.video_processor.temporal_patch_size
        return torch.tensor([frames / m.data.sampled_fps for m in videos if isinstance(m.data, Video)])


class Qwen25OmniAudioEncoder(TransformersEncoder):
    """The audio tower."""

    def features(self, modality: str, items: Sequence[EncoderItem]) -> Any:
        """All sounds in one run; the tower itself packs windows of all of them."""
        mels = [self.to_device(item.tensors["mel"]) for item in items]
        lengths = torch.tensor([mel.shape[1] for mel in mels], device=self.device)
        padded = torch.nn.utils.rnn.pad_sequence([mel.T for mel in mels], batch_first=True).transpose(1, 2)
        mask = torch.arange(padded.shape[2], device=self.device) < lengths[:, None]
        return self.base.get_audio_features(padded, mask.long(), return_dict=True).last_hidden_state


class Qwen25Omni(TransformersFamily):
    """Qwen2.5-Omni: a whole checkpoint or its thinker alone."""

    model_class = "Qwen2_5OmniThinkerForConditionalGeneration"
    towers: ClassVar[Mapping[str, tuple[str, ...]]] = {"vision": ("visual",), "audio": ("audio_tower",)}
    packs_sequences = True
    modality_encoders: ClassVar[Mapping[str, str]] = {
        "image": "vision",
        "video": "vision",
        "audio": "audio",
    }
    preprocessor_class = Qwen25OmniPreprocessor
    encoder_classes: ClassVar[Mapping[str, type[TransformersEncoder]]] = {
        "vision": QwenVisionEncoder,
        "audio": Qwen25OmniAudioEncoder,
    }


def audio_rows(frames: int) -> int:
    """Embedding rows of a sound: a strided convolution, then pooling in pairs."""
    return ((frames - 1) // 2 + 1 - 2) // 2 + 1


def _own_video_size(checkpoint: Checkpoint, video_processor: Any) -> dict[str, int] | None:
    """The frame size a checkpoint states for videos, or None where it states one for pictures alone.

    The Omni processor class overrides its video processor's size with defaults of its own. They are meant for
    checkpoints whose only size is that of pictures (preprocessor_config.json); one that says its own must be heard.
    """
    for name, section in (("processor_config.json", "video_processor"), ("video_preprocessor_config.json", None)):
        path = checkpoint.folder / name
        if not path.is_file():
            continue
        data = json.loads(path.read_text(encoding="utf-8"))
        if "size" in (data.get(section) or {} if section else data):
            size = video_processor.size
            return {key: int(size[key]) for key in ("shortest_edge", "longest_edge")}
    return None
