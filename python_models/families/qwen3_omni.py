"""Qwen3-Omni's thinker (Qwen team 2025, arXiv:2509.17765): image, video and audio in, text out.

A second of video is 13 positions long, whatever its frame rate, so positions are fractions; they are counted here in
4096ths, which changes no bit of whole ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from ..contract.features import EncoderItem
from ..contract.settings import Settings
from ..media.types import Medium
from .base import Decoder
from .checkpoint import Checkpoint
from .qwen2_5_omni import Qwen25Omni, Qwen25OmniAudioEncoder, Qwen25OmniPreprocessor
from .qwen3_vl import Qwen3VisionEncoder
from .transformers_encoder import TransformersEncoder
from .transformers_preprocessor import Tensors

_PARTS = 4096


class Qwen3OmniPreprocessor(Qwen25OmniPreprocessor):
    """Pictures and videos as Qwen3-VL, but videos without times between their frames; sounds as Qwen2.5-Omni."""

    def __init__(self, checkpoint: Checkpoint, settings: Settings, model: Any, encoders: Mapping[str, str]) -> None:
        super().__init__(checkpoint, settings, model, encoders)
        # the tower takes pieces of so many mel frames, 13 tokens of each
        self._piece = 2 * int(self.config.audio_config.n_window)
        extractor = self.processor.feature_extractor
        # sounds are not cut off; one frame gives a token, and a transform needs half a window
        self._most = None
        self._fewest = max(int(extractor.hop_length), int(extractor.n_fft) // 2 + 1)

    def split_features(
        self, batch: Mapping[str, Any], media: Mapping[str, Sequence[Medium]]
    ) -> dict[str, list[Tensors]]:
        """Of sounds also ``piece`` int64 [1], mel frames of the longest piece of the request.

        The tower fills all pieces up to the longest, which its convolutions see.
        """
        out = super().split_features(batch, media)
        longest = max((tensors["mel"].shape[1] for tensors in out.get("audio", ())), default=0)
        for tensors in out.get("audio", ()):
            tensors["piece"] = np.array([min(longest, self._piece)])
        return out

    def variant(self, modality: str, tensors: Tensors) -> str:
        """The piece of sounds."""
        return str(int(tensors["piece"][0])) if modality == "audio" else ""

    def num_rows(self, modality: str, tensors: Tensors) -> int:
        """As for Qwen2.5-VL; a sound gives an eighth of its frames, each piece by itself."""
        if modality != "audio":
            return super().num_rows(modality, tensors)
        whole, rest = divmod(tensors["mel"].shape[1], self._piece)
        return whole * _after_convolutions(self._piece) + _after_convolutions(rest)

    def _positions(
        self, ids: NDArray[np.int32], types: NDArray[np.int32], arguments: Mapping[str, Any]
    ) -> tuple[NDArray[np.int32], int]:
        position_ids, delta = self._rope_index(ids, types, arguments)
        return (position_ids.double() * _PARTS).round().numpy().astype(np.int32), round(delta * _PARTS)


class Qwen3OmniAudioEncoder(Qwen25OmniAudioEncoder):
    """The audio tower."""

    def features(self, modality: str, items: Sequence[EncoderItem]) -> Any:
        """Sounds whose pieces are filled up to the same length in one run."""
        rows: list[torch.Tensor | None] = [None] * len(items)
        pieces = [int(item.tensors["piece"][0]) for item in items]
        for piece in sorted(set(pieces)):
            chosen = [k for k, own in enumerate(pieces) if own == piece]
            group = [items[k] for k in chosen]
            if max(item.tensors["mel"].shape[1] for item in group) < piece:
                # one that is as long as the one they were together with
                bins = group[0].tensors["mel"].shape[0]
                silence: Tensors = {"mel": np.zeros((bins, piece), np.float32)}
                group.append(EncoderItem("audio", "", _after_convolutions(piece), silence))
            parts = super().features(modality, group).split([item.num_rows for item in group])
            for k, part in zip(chosen, parts, strict=False):
                rows[k] = part
        return rows


class Qwen3Omni(Qwen25Omni):
    """Qwen3-Omni: a whole checkpoint or its thinker alone."""

    model_class = "Qwen3OmniMoeThinkerForConditionalGeneration"
    position_step = _PARTS
    preprocessor_class = Qwen3OmniPreprocessor
    encoder_classes: ClassVar[Mapping[str, type[TransformersEncoder]]] = {
        "vision": Qwen3VisionEncoder,
        "audio": Qwen3OmniAudioEncoder,
    }

    def _decoder(self, model: Any, embed: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Decoder:
        model.get_decoder().rotary_emb.inv_freq.div_(_PARTS)
        return super()._decoder(model, embed)


def _after_convolutions(frames: int) -> int:
    """Three strided convolutions."""
    for _ in range(3):
        frames = (frames + 1) // 2
    return frames
