"""Voxtral (Mistral AI 2025, arXiv:2507.13264): audio.

Its checkpoints have neither a chat template nor a processor that makes prompts with sounds: both live in Mistral's own
package, with the tokenizer. What it writes is written here by a template (version 7 of its instruction format: sounds
and texts of a turn in their order; no system message beside a sound), compared with its documentation and tests.

A sound is filled up with silence to pieces of 30 s, which the tower sees one by one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from ..contract.features import EncoderItem
from ..contract.settings import Settings
from ..media.types import Audio, Medium
from .checkpoint import Checkpoint
from .reading import load_auto
from .sounds import check_sound, without_tail
from .tekken import FILE, tekken_tokenizer
from .transformers_encoder import TransformersEncoder
from .transformers_family import TransformersFamily
from .transformers_preprocessor import Tensors, TransformersPreprocessor

TEMPLATE = """\
{%- macro write(content) -%}
{%- if content is string -%}{{ content }}{%- else -%}{%- for part in content -%}
{%- if part['type'] == 'audio' -%}[BEGIN_AUDIO][AUDIO]{%- else -%}{{ part['text'] }}{%- endif -%}
{%- endfor -%}{%- endif -%}
{%- endmacro -%}
{{- bos_token -}}
{%- set turns = messages -%}
{%- if messages[0]['role'] == 'system' -%}
{%- set turns = messages[1:] -%}
{%- for message in turns if message['content'] is not string -%}{%- for part in message['content'] -%}
{%- if part['type'] == 'audio' -%}
{{- raise_exception('a system message beside a sound is not possible') -}}
{%- endif -%}{%- endfor -%}{%- endfor -%}
{{- '[SYSTEM_PROMPT]' + write(messages[0]['content']) + '[/SYSTEM_PROMPT]' -}}
{%- endif -%}
{%- for message in turns -%}
{%- if message['role'] != ('user' if loop.index0 % 2 == 0 else 'assistant') -%}
{{- raise_exception('after the system message roles must alternate user/assistant/user/assistant/...') -}}
{%- endif -%}
{%- if message['role'] == 'user' -%}
{{- '[INST]' + write(message['content']) + '[/INST]' -}}
{%- else -%}
{{- write(message['content']).rstrip(' ') + eos_token -}}
{%- endif -%}
{%- endfor -%}
"""


def load_tokenizer(folder: Path, settings: Settings) -> Any:
    """Of ``tekken.json``, else of the files that transformers writes."""
    if (folder / FILE).is_file():
        tokenizer = tekken_tokenizer(folder)
    else:
        tokenizer = load_auto("AutoTokenizer", "tokenizer", folder, settings)
    if not tokenizer.chat_template:
        tokenizer.chat_template = TEMPLATE
    return tokenizer


class VoxtralPreprocessor(TransformersPreprocessor):
    """Sounds as log-mel frames (100 a second)."""

    def load_processor(self, folder: Path, settings: Settings) -> Any:
        """One of our own."""
        extractor = load_auto("AutoFeatureExtractor", "feature extractor", folder, settings)
        return _Processor(extractor, load_tokenizer(folder, settings))

    def __init__(self, checkpoint: Checkpoint, settings: Settings, model: Any, encoders: Mapping[str, str]) -> None:
        super().__init__(checkpoint, settings, model, encoders)
        audio = self.config.audio_config
        self._frames = int(self.processor.feature_extractor.nb_max_frames)
        # the projector takes rows of the tower in groups
        rows = int(audio.max_source_positions) * int(audio.hidden_size) // int(audio.intermediate_size)
        self.processor.rows_of_piece = rows
        self.processor.audio_token = self._placeholder("audio")

    def _placeholder(self, modality: str) -> str:
        return str(self.processor.tokenizer.convert_ids_to_tokens(self.token_id(modality)))

    def check_medium(self, medium: Medium) -> None:
        """Refuse an empty sound."""
        super().check_medium(medium)
        check_sound(medium, self.sampling_rate, None, 1)

    def processor_arguments(self, media: Mapping[str, Sequence[Medium]]) -> dict[str, Any]:
        """Sounds go in at the model's own rate."""
        return {"audio": [m.data.samples for m in media["audio"] if isinstance(m.data, Audio)]}

    def split_features(
        self, batch: Mapping[str, Any], media: Mapping[str, Sequence[Medium]]
    ) -> dict[str, list[Tensors]]:
        """Per sound: ``mel`` float32 [bins, frames], whose last one goes on; ``pieces`` int64 [1]."""
        return {
            "audio": [
                {"mel": without_tail(mel), "pieces": np.array([mel.shape[1] // self._frames])} for mel in batch["mels"]
            ]
        }

    def num_rows(self, modality: str, tensors: Tensors) -> int:
        """The same for every piece."""
        return int(tensors["pieces"][0]) * int(self.processor.rows_of_piece)


class _Processor:
    """Called like a processor of transformers."""

    def __init__(self, feature_extractor: Any, tokenizer: Any) -> None:
        self.feature_extractor = feature_extractor
        self.tokenizer = tokenizer
        self.audio_token = ""
        self.rows_of_piece = 0

    def __call__(
        self, text: Sequence[str], audio: Sequence[NDArray[np.float32]] = (), **options: Any
    ) -> dict[str, Any]:
        """Token ids of one text, whose marks of sounds are repeated; ``mels`` float32 [bins, frames] of each sound."""
        extractor = self.feature_extractor
        mels = [
            extractor(
                samples,
                sampling_rate=extractor.sampling_rate,
                padding=True,
                truncation=False,
                pad_to_multiple_of=extractor.n_samples,
                return_tensors="np",
            )["input_features"][0]
            for samples in audio
        ]
        parts = text[0].split(self.audio_token) if mels else [text[0]]
        if len(parts) != len(mels) + 1:
            raise ValueError(f"the text has {len(parts) - 1} marks of sounds, but there are {len(mels)}")
        counts = [mel.shape[1] // extractor.nb_max_frames * self.rows_of_piece for mel in mels]
        full = parts[0] + "".join(
            self.audio_token * count + rest for count, rest in zip(counts, parts[1:], strict=True)
        )
        return {**self.tokenizer([full], **options), "mels": mels}


class VoxtralAudioEncoder(TransformersEncoder):
    """The tower and its projector."""

    def features(self, modality: str, items: Sequence[EncoderItem]) -> Any:
        """The pieces of all sounds in one run."""
        config = self.config.audio_config
        tower = self.base.audio_tower
        frames = int(config.max_source_positions) * tower.conv1.stride[0] * tower.conv2.stride[0]
        pieces: list[torch.Tensor] = []
        for item in items:
            mel, count = self.to_device(item.tensors["mel"]), int(item.tensors["pieces"][0])
            full = torch.cat([mel, mel[:, -1:].expand(-1, count * frames - mel.shape[1])], 1)
            pieces += torch.split(full, frames, dim=1)
        return self.base.get_audio_features(torch.stack(pieces), return_dict=True).pooler_output


class Voxtral(TransformersFamily):
    """Voxtral Mini and Small."""

    model_class = "VoxtralForConditionalGeneration"
    towers: ClassVar[Mapping[str, tuple[str, ...]]] = {"audio": ("audio_tower", "multi_modal_projector")}
    modality_encoders: ClassVar[Mapping[str, str]] = {"audio": "audio"}
    preprocessor_class = VoxtralPreprocessor
    encoder_classes: ClassVar[Mapping[str, type[TransformersEncoder]]] = {"audio": VoxtralAudioEncoder}

    def load_tokenizer(self) -> Any:
        """See :func:`load_tokenizer`."""
        return load_tokenizer(self.checkpoint.folder, self.settings)
