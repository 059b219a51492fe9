"""Gemma 3n (Google DeepMind 2025, ai.google.dev/gemma/docs/gemma-3n): image and audio.

Beside its embedding each token has one for every layer, looked up by id in the language model's stage. Ids behind the
text vocabulary, such as those that end a picture or a sound, have tables of their own in the projectors of the towers.
Its vision tower is timm's MobileNet-V5: without that package the checkpoint is served for text and sounds alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from ...kernels.image import normalise_patches
from ..contract.errors import ErrorKind, TriptychError
from ..contract.features import EncoderItem
from ..contract.settings import Settings
from ..media.types import Audio, Image, Medium
from .base import Decoder
from .checkpoint import Checkpoint
from .loading import meta_model, model_class
from .pixels import RAW, check_bytes, normalisation
from .sounds import check_sound
from .transformers_encoder import TransformersEncoder
from .transformers_family import TransformersFamily
from .transformers_preprocessor import Tensors, TransformersPreprocessor

_LONGEST_S = 30


class Gemma3nPreprocessor(TransformersPreprocessor):
    """Pictures through SiglipImageProcessor, sounds through Gemma3nAudioFeatureExtractor."""

    def __init__(self, checkpoint: Checkpoint, settings: Settings, model: Any, encoders: Mapping[str, str]) -> None:
        super().__init__(checkpoint, settings, model, encoders)
        pictures = self.processor.image_processor
        self._scaling: Tensors = {"factor": np.array([pictures.rescale_factor], dtype=np.float64)}
        if "image" in encoders:
            check_bytes(pictures)
            if pictures.do_normalize:
                mean, std = normalisation(pictures, "image")
                self._scaling = {"mean": mean, "std": std}

    def check_medium(self, medium: Medium) -> None:
        """Sounds of at most 30 s, what the processor would cut off; pictures where there is a tower for them."""
        if medium.modality == "image" and "image" not in self.modalities:
            raise TriptychError(
                ErrorKind.UNSUPPORTED,
                f"{medium.param}: the vision tower of Gemma 3n is part of the package timm, which is not installed: "
                "install timm to send pictures; without it the model takes audio, text",
                medium.param,
            )
        super().check_medium(medium)
        extractor = self.processor.feature_extractor
        check_sound(medium, self.sampling_rate, _LONGEST_S * self.sampling_rate, int(extractor.frame_length) + 1)

    def processor_arguments(self, media: Mapping[str, Sequence[Medium]]) -> dict[str, Any]:
        """Pixels stay uint8."""
        arguments: dict[str, Any] = {}
        if images := [m.data.pixels for m in media.get("image", ()) if isinstance(m.data, Image)]:
            arguments |= {"images": images, "images_kwargs": dict(RAW)}
        if sounds := [m.data.samples for m in media.get("audio", ()) if isinstance(m.data, Audio)]:
            arguments["audio"] = sounds
        return arguments

    def split_features(
        self, batch: Mapping[str, Any], media: Mapping[str, Sequence[Medium]]
    ) -> dict[str, list[Tensors]]:
        """Per picture: ``pixels`` uint8 [channels, side, side] with ``mean`` and ``std``, or with ``factor`` where the
        checkpoint does not normalise. Per sound: ``mel`` float32 [frames, bins], ``mask`` bool [frames], both with the
        padding of this request, whose last frames an unpadded sound would not have."""
        out: dict[str, list[Tensors]] = {}
        if "image" in media:
            out["image"] = [{"pixels": square.numpy(), **self._scaling} for square in batch["pixel_values"]]
        if "audio" in media:
            masks = batch["input_features_mask"]
            pairs = zip(batch["input_features"], masks, strict=True)
            out["audio"] = [{"mel": mel.numpy(), "mask": mask.bool().numpy()} for mel, mask in pairs]
        return out

    def num_rows(self, modality: str, tensors: Tensors) -> int:
        """The same for every picture, and for every sound."""
        length = self.processor.image_seq_length if modality == "image" else self.processor.audio_seq_length
        return int(length)

    def variant(self, modality: str, tensors: Tensors) -> str:
        """A sound depends a little on the padding that it has in its request."""
        return str(len(tensors["mel"])) if modality == "audio" else ""


class Gemma3nVisionEncoder(TransformersEncoder):
    """MobileNet-V5 and the projector."""

    def features(self, modality: str, items: Sequence[EncoderItem]) -> Any:
        """All pictures in one run of the tower."""
        pixels = torch.cat([self._pixels(item) for item in items])
        return self.base.get_image_features(pixels, return_dict=True).pooler_output

    def _pixels(self, item: EncoderItem) -> torch.Tensor:
        """[1, channels, side, side] in the tower's dtype."""
        square = self.to_device(item.tensors["pixels"])
        if "factor" in item.tensors:
            return (square.float() * float(item.tensors["factor"][0])).to(self.dtype)[None]
        mean, std = self.to_device(item.tensors["mean"]), self.to_device(item.tensors["std"])
        # to the kernel the picture is one patch of one frame
        return normalise_patches(square.flatten(1)[None, :, None], mean, std, 1, self.dtype).view(1, *square.shape)


class Gemma3nAudioEncoder(TransformersEncoder):
    """The conformer and the projector."""

    def features(self, modality: str, items: Sequence[EncoderItem]) -> Any:
        """Sounds that are padded alike go through the tower together. What is left of the rows is filled up with the
        last embedding of the projector's table."""
        filler = self.base.embed_audio(
            input_ids=torch.tensor([[self.config.text_config.vocab_size - 1]], device=self.device)
        )
        out: list[torch.Tensor] = [torch.empty(0)] * len(items)
        frames = [len(item.tensors["mel"]) for item in items]
        for count in dict.fromkeys(frames):
            group = [k for k, own in enumerate(frames) if own == count]
            mels = torch.stack([self.to_device(items[k].tensors["mel"]) for k in group]).to(self.dtype)
            masks = torch.stack([self.to_device(items[k].tensors["mask"]) for k in group])
            found = self.base.get_audio_features(mels, ~masks, return_dict=True)
            rows = torch.where(found.audio_mel_mask[..., None], filler, found.pooler_output)
            missing = int(self.config.audio_soft_tokens_per_image) - rows.shape[1]
            rows = torch.cat([rows, filler.expand(len(group), missing, -1)], dim=1)
            for k, own in zip(group, rows, strict=True):
                out[k] = own
        return out


class CappedHead(nn.Module):
    """A head whose logits are squashed to (-cap, cap)."""

    def __init__(self, head: nn.Module, cap: float) -> None:
        super().__init__()
        self.head = head
        self.cap = cap

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[N, H] -> [N, V]."""
        return torch.tanh(self.head(hidden) / self.cap) * self.cap


class Gemma3n(TransformersFamily):
    """Gemma 3n, E2B and E4B."""

    model_class = "Gemma3nForConditionalGeneration"
    towers: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "vision": ("vision_tower", "embed_vision"),
        "audio": ("audio_tower", "embed_audio"),
    }
    modality_encoders: ClassVar[Mapping[str, str]] = {"image": "vision", "audio": "audio"}
    preprocessor_class = Gemma3nPreprocessor
    encoder_classes: ClassVar[Mapping[str, type[TransformersEncoder]]] = {
        "vision": Gemma3nVisionEncoder,
        "audio": Gemma3nAudioEncoder,
    }

    def __init__(self, checkpoint: Checkpoint, settings: Settings) -> None:
        super().__init__(checkpoint, settings)
        if find_spec("timm") is None:
            self.encoders = frozenset({"audio"})

    def load_config(self) -> Any:
        """The checkpoint's; without timm nothing stands in the place of the vision tower, which could not be made."""
        config = super().load_config()
        if "vision" not in self.encoders:
            options = config.vision_config.to_dict()
            options.pop("model_type")
            config.vision_config = _no_tower()(**options)
        return config

    def load_preprocessor(self) -> TransformersPreprocessor:
        """See :meth:`.base.Family.load_preprocessor`; of what there is an encoder for."""
        model = meta_model(self.load_class(), self.config())
        encoders = {m: encoder for m, encoder in self.modality_encoders.items() if encoder in self.encoders}
        return self.preprocessor_class(self.checkpoint, self.settings, model, encoders).ready()

    def decoder_parts(self, model: Any) -> list[str]:
        """Also the projectors, for their tables."""
        return [*super().decoder_parts(model), "model.embed_vision", "model.embed_audio"]

    def head(self, model: Any) -> Any:
        """With the cap on logits."""
        cap = model.config.get_text_config().final_logit_softcapping
        return model.lm_head if cap is None else CappedHead(model.lm_head, float(cap))

    def _decoder(self, model: Any, embed: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Decoder:
        base = model.model
        tables = [_hard_table(embedder) for embedder in (base.embed_vision, base.embed_audio)]

        def embed_all(ids: torch.Tensor, is_media: torch.Tensor) -> torch.Tensor:
            ids = ids.masked_fill(is_media, 0)
            rows = embed(ids, is_media)
            for first, table in tables:
                own = (ids >= first) & (ids < first + len(table))
                rows = torch.where(own[:, None], table[(ids - first).clamp(0, len(table) - 1)], rows)
            return rows

        def per_layer(ids: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"per_layer_inputs": base.language_model.get_per_layer_inputs(ids)[None]}

        return replace(super()._decoder(model, embed), embed=embed_all, token_arguments=per_layer)


@torch.no_grad()
def _hard_table(embedder: Any) -> tuple[int, torch.Tensor]:
    """First id of a projector's table, and its rows [ids, H] as the language model takes them."""
    first, count = int(embedder.vocab_offset), int(embedder.vocab_size)
    ids = torch.arange(first, first + count, device=embedder.embedding.weight.device)
    rows: torch.Tensor = embedder(input_ids=ids)
    return first, rows


@cache
def _no_tower() -> Any:
    """A configuration of a vision tower without anything in it."""
    config, model, auto = (model_class(name) for name in ("Gemma3nVisionConfig", "PreTrainedModel", "AutoModel"))

    class NoTowerConfig(config):  # type: ignore[valid-type,misc]
        model_type = "gemma3n_no_vision"

    class NoTower(model):  # type: ignore[valid-type,misc]
        config_class = NoTowerConfig

    auto.register(NoTowerConfig, NoTower)
    return NoTowerConfig
