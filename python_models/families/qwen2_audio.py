"""Qwen2-Audio (Chu et al. 2024, arXiv:2407.10759): audio.

The tower always sees the extractor's full length (30 s). What was padded is silence, one and the same frame again and
again, so only the first of them travels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch

from ..contract.features import EncoderItem
from ..contract.settings import Settings
from ..media.types import Audio, Medium
from .checkpoint import Checkpoint
from .sounds import check_sound, without_tail
from .transformers_encoder import TransformersEncoder
from .transformers_family import TransformersFamily
from .transformers_preprocessor import Tensors, TransformersPreprocessor


class Qwen2AudioPreprocessor(TransformersPreprocessor):
    """Sounds as log-mel frames (100 a second)."""

    def __init__(self, checkpoint: Checkpoint, settings: Settings, model: Any, encoders: Mapping[str, str]) -> None:
        super().__init__(checkpoint, settings, model, encoders)
        extractor = self.processor.feature_extractor
        self._most = int(extractor.n_samples)
        # three frames give the first token
        self._fewest = 2 * int(extractor.hop_length) + 1

    def check_medium(self, medium: Medium) -> None:
        """Refuse sounds the feature extractor would cut off, and those too short for one token."""
        super().check_medium(medium)
        check_sound(medium, self.sampling_rate, self._most, self._fewest)

    def processor_arguments(self, media: Mapping[str, Sequence[Medium]]) -> dict[str, Any]:
        """Sounds go in at the model's own rate."""
        sounds = [m.data.samples for m in media["audio"] if isinstance(m.data, Audio)]
        return {"audio": sounds, "audio_kwargs": {"sampling_rate": self.sampling_rate}}

    def split_features(
        self, batch: Mapping[str, Any], media: Mapping[str, Sequence[Medium]]
    ) -> dict[str, list[Tensors]]:
        """Per sound: ``mel`` float32 [bins, frames], whose last one goes on; ``length`` int64 [1], frames of sound."""
        lengths = batch["feature_attention_mask"].sum(-1).tolist()
        return {
            "audio": [
                {"mel": without_tail(mel.numpy()), "length": np.array([length])}
                for mel, length in zip(batch["input_features"], lengths, strict=True)
            ]
        }

    def num_rows(self, modality: str, tensors: Tensors) -> int:
        """A quarter of its frames: a strided convolution, then pooling in pairs."""
        return ((int(tensors["length"][0]) - 1) // 2 - 1) // 2 + 1


class Qwen2AudioEncoder(TransformersEncoder):
    """The audio tower and its projector."""

    def features(self, modality: str, items: Sequence[EncoderItem]) -> Any:
        """All sounds in one run; frames behind the end of a sound are hidden from it."""
        from transformers.masking_utils import create_bidirectional_mask

        tower = self.base.audio_tower
        positions = int(tower.config.max_source_positions)
        total = positions * tower.conv1.stride[0] * tower.conv2.stride[0]
        mels = [self.to_device(item.tensors["mel"]) for item in items]
        full = [torch.cat([mel, mel[:, -1:].expand(-1, total - mel.shape[1])], 1) for mel in mels]
        lengths = torch.tensor([int(item.tensors["length"][0]) for item in items], device=self.device)
        heard, rows = tower._get_feat_extract_output_lengths(lengths)
        mask = create_bidirectional_mask(
            config=tower.config,
            inputs_embeds=torch.zeros(len(items), positions, 1, dtype=self.dtype, device=self.device),
            attention_mask=(torch.arange(positions, device=self.device) < heard[:, None]).long(),
        )
        out = self.base.multi_modal_projector(tower(torch.stack(full), attention_mask=mask).last_hidden_state)
        return [part[:count] for part, count in zip(out, rows.tolist(), strict=True)]


class Qwen2Audio(TransformersFamily):
    """Qwen2-Audio."""

    model_class = "Qwen2AudioForConditionalGeneration"
    towers: ClassVar[Mapping[str, tuple[str, ...]]] = {"audio": ("audio_tower", "multi_modal_projector")}
    modality_encoders: ClassVar[Mapping[str, str]] = {"audio": "audio"}
    preprocessor_class = Qwen2AudioPreprocessor
    encoder_classes: ClassVar[Mapping[str, type[TransformersEncoder]]] = {"audio": Qwen2AudioEncoder}
