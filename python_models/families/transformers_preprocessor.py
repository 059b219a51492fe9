"""Template, processor and positions of a checkpoint, by transformers' own processor."""

from __future__ import annotations

import hashlib
import inspect
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image as PILImage

from ..contract.errors import ErrorKind, TriptychError, invalid
from ..contract.features import EncoderItem
from ..contract.plan import MediaItem
from ..contract.request import NO_INPUTS, Message, RawPrompt, TemplateInputs
from ..contract.settings import Settings
from ..media.types import Audio, Image, Medium, Video
from . import evs, media_options, templates
from .base import FrameSampling, Prepared, refuse_modality
from .checkpoint import Checkpoint
from .process_config import ProcessConfig
from .prompt import PromptWriter
from .reading import context_length, frame_sampling, load_auto
from .token_runs import shorten_runs

# The values of transformers' mm_token_type_ids.
TOKEN_TYPES = {"image": 1, "video": 2, "audio": 3}
Tensors = dict[str, NDArray[np.generic]]
# What processors raise at media and texts that they cannot take.
_REFUSALS = (ValueError, TypeError, RuntimeError, IndexError, ZeroDivisionError, StopIteration)


class TransformersPreprocessor(ABC):
    """Template, processor and positions of a checkpoint. Thread-safe (see :class:`.base.Preprocessor`)."""

    default_sampling: ClassVar[FrameSampling] = FrameSampling()
    """Of videos, where the checkpoint's processor does not say."""
    shortens_runs: ClassVar[bool] = True
    """Runs of placeholders are tokenised as one: the processor asks nothing of its tokenizer but ids."""
    cuts_tiles = False
    """Callers may say how many tiles a picture is cut into (see ``MediaOptions``)."""
    control_tokens: ClassVar[frozenset[str]] = frozenset()
    """Special tokens that callers may write in their texts (see :mod:`.prompt`)."""

    def __init__(self, checkpoint: Checkpoint, settings: Settings, model: Any, encoders: Mapping[str, str]) -> None:
        """Args: the checkpoint; options; its model on the meta device; modality -> encoder that takes it."""
        self.name = checkpoint.model_type
        self.folder = checkpoint.folder
        self.processor = self.load_processor(checkpoint.folder, settings)
        self.process = ProcessConfig.of(settings)
        self.process.apply(self.processor, self.name, encoders)
        self._bounds = self.process.bounds(getattr(self.processor, "image_processor", None))
        self._frame_pixels = self.process.frame_pixels(getattr(self.processor, "video_processor", None))
        self._follow: dict[str, bool] = {}
        self.encoders = encoders
        self.modalities = frozenset(encoders)
        # Positions come from the configuration alone: no weights are needed.
        self.model = model
        self.base = self.model.base_model
        self.config = self.model.config
        self.prompt = PromptWriter(
            self.processor,
            str(checkpoint.folder),
            self.control_tokens,
            templates.chosen(settings),
            {modality: self._placeholder(modality) for modality in encoders},
            (settings.tool_call_parser, settings.reasoning_parser),
        )
        self.frame_sampling = frame_sampling(
            getattr(self.processor, "video_processor", None), settings, self.default_sampling
        )
        self.sampling_rate = int(getattr(getattr(self.processor, "feature_extractor", None), "sampling_rate", 16000))
        self.context_length = context_length(self.config)
        self._max_pixels = settings.max_image_pixels
        self._tokens = {modality: self.token_id(modality) for modality in encoders}
        if self.shortens_runs:
            shorten_runs(self.processor.tokenizer, list(self._tokens.values()))
        self._fingerprints = {m: self._fingerprint(m) + self.process.key(m) for m in encoders}
        can_prune = "video" in encoders and not hasattr(self.base, "get_rope_index")
        can_prune = can_prune and type(self).video_grid is not TransformersPreprocessor.video_grid
        self._pruning = evs.pruning_rate(settings, self.config, possible=can_prune)
        self.first_call()

    def ready(self) -> TransformersPreprocessor:
        """Itself, once what the operator asks of pictures is known to have an effect.

        Raises:
            TriptychError: UNSUPPORTED where it has none.
        """
        for modality, given in (("image", any(self._bounds)), ("video", self._frame_pixels)):
            if given and not self._follows_size(modality):
                what = "picture" if modality == "image" else "frame of a video"
                message = (
                    f"{modality}: bounds of pixels would have no effect: {self.name} gives every {what} the same size"
                )
                raise TriptychError(ErrorKind.UNSUPPORTED, message, "settings.mm_process_config")
        return self

    @property
    def frame_sampling(self) -> FrameSampling:
        """The family's, as the operator has changed it."""
        return self.process.sampling(self._frame_sampling)

    @frame_sampling.setter
    def frame_sampling(self, own: FrameSampling) -> None:
        self._frame_sampling = own

    def first_call(self) -> None:
        """Fixes the tokenizer's padding and truncation, so that later calls, from several threads, never change it."""
        self.processor(text=["a"], return_tensors=None)

    def load_processor(self, folder: Path, settings: Settings) -> Any:
        """The checkpoint's processor."""
        return load_auto("AutoProcessor", "processor", folder, settings)

    def token_id(self, modality: str) -> int:
        """Id of the token that marks the embedding rows of a modality."""
        return int(getattr(self.config, f"{modality}_token_id"))

    @abstractmethod
    def processor_arguments(self, media: Mapping[str, Sequence[Medium]]) -> dict[str, Any]:
        """Keyword arguments of the processor for these media (non-empty lists by modality)."""

    @abstractmethod
    def split_features(
        self, batch: Mapping[str, Any], media: Mapping[str, Sequence[Medium]]
    ) -> dict[str, list[Tensors]]:
        """The processor's outputs, item by item: modality -> per medium the tensors its encoder takes."""

    @abstractmethod
    def num_rows(self, modality: str, tensors: Tensors) -> int:
        """Embedding rows of one item."""

    def num_tokens(self, modality: str, tensors: Tensors) -> int:
        """Tokens of the prompt that stand for it: one for each row, but where rows are no tokens' embeddings."""
        return self.num_rows(modality, tensors)

    def video_grid(self, tensors: Tensors) -> evs.Grid:
        """Frames of a video, rows and columns of the tokens of each, where a video's rows are just these.

        Families that say so can leave out tokens of videos, see :mod:`.evs`.
        """
        raise NotImplementedError

    def variant(self, modality: str, tensors: Tensors) -> str:
        """What an item's embeddings depend on beside its medium and the processor's options."""
        return ""

    def check_medium(self, medium: Medium) -> None:
        """Refuse a medium that the processor cannot take, naming its field and the limit."""
        if medium.modality not in self.modalities:
            raise refuse_modality(medium.param, medium.modality, self.name, self.modalities)

    def with_options(self, medium: Medium) -> Medium:
        """The medium as the request asks for it; one that the processor cannot take is refused.

        Raises:
            TriptychError: UNSUPPORTED for an option without effect here, INVALID_REQUEST for a value that cannot be.
        """
        options, data = medium.options, medium.data
        if isinstance(data, Audio) and self.process.max_seconds is not None:
            samples = data.samples[: max(round(self.process.max_seconds * data.sampling_rate), 1)]
            medium = replace(medium, data=replace(data, samples=samples))
        if isinstance(data, Video) and self._frame_pixels is not None:
            frames = media_options.smaller_frames(data.frames, self._frame_pixels)
            medium = replace(medium, data=replace(data, frames=frames))
        self.check_medium(medium)
        if not isinstance(data, Image) or not (options or any(self._bounds)):
            return medium
        for name in ("min_dynamic_patch", "max_dynamic_patch"):
            if getattr(options, name) is not None and not self.cuts_tiles:
                raise _no_effect(f"{medium.param}.{name}", f"{self.name} cuts no tiles by their number")
        for name in ("min_pixels", "max_pixels"):
            if getattr(options, name) is not None and not self._follows_size("image"):
                raise _no_effect(f"{medium.param}.{name}", f"{self.name} gives every picture the same size")
        least = max(options.min_pixels or 0, self._bounds[0] or 0) or None
        most = min((n for n in (options.max_pixels, self._bounds[1]) if n is not None), default=None)
        if least is not None and least > self._max_pixels:
            where = f"{medium.param}.min_pixels"
            raise invalid(f"{where} must be at most {self._max_pixels} (max_image_pixels), got {least}", where)
        processor = getattr(self.processor, "image_processor", None)
        if options.detail == "low":
            low = media_options.low_detail(processor)
            most = low if most is None else min(low, most)
        if least is None and most is None:
            return medium
        return replace(medium, data=Image(media_options.fit(processor, data.pixels, least, most, medium.param)))

    def _follows_size(self, modality: str) -> bool:
        """Whether what the encoder sees of pictures or videos depends on their size."""

        def seen(width: int, height: int) -> Any:
            data: Image | Video = Image(PILImage.new("RGB", (width, height)))
            if modality == "video":
                frames = np.zeros((4, height, width, 3), dtype=np.uint8)
                data = Video(frames, 2.0, 2.0, 2.0, (0, 1, 2, 3), 4)
            media = {modality: [Medium(modality, data, "", "")]}
            batch = self._call(self._placeholder(modality), media)
            (tensors,) = self.split_features(batch, media)[modality]
            return {name: tensor.shape for name, tensor in tensors.items()}

        if modality not in self._follow:
            own = media_options.pixel_rule(getattr(self.processor, f"{modality}_processor", None)) is not None
            sizes = ((28, 21), (64, 48))
            self._follow[modality] = own or any(seen(*size) != seen(2048, 1536) for size in sizes)
        return self._follow[modality]

    def position_arguments(
        self, batch: Mapping[str, Any], features: Mapping[str, Sequence[Tensors]], media: Mapping[str, Sequence[Medium]]
    ) -> dict[str, Any]:
        """What ``get_rope_index`` needs beside token ids and types; names it does not take are ignored."""
        return {}

    def token_extras(
        self, ids: NDArray[np.int32], batch: Mapping[str, Any], types: NDArray[np.int32]
    ) -> dict[str, int | list[int]]:
        """What the family's decoder needs to know of the prompt's tokens, see ``Plan.extras``.

        Args:
            ids: int32 [L], of the prompt.
            batch: the processor's outputs; its token ids are those before special tokens typed by a user are written
                out, so there may be fewer.
            types: int32 [L], `TOKEN_TYPES` of each token, 0 for text.
        """
        return {}

    @property
    def architectures(self) -> tuple[str, ...]:
        """See :class:`.base.Preprocessor`."""
        return tuple(self.config.architectures or ())

    def spell(self, ids: Sequence[int]) -> tuple[str, list[str]]:
        """See :meth:`.base.Preprocessor.spell`."""
        return self.prompt.spell(ids)

    def prepare(
        self, content: Sequence[Message] | RawPrompt, media: Sequence[Medium], template: TemplateInputs = NO_INPUTS
    ) -> Prepared:
        """See :meth:`.base.Preprocessor.prepare`."""
        grouped: dict[str, list[Medium]] = {}
        media = [self.with_options(medium) for medium in media]
        for medium in media:
            grouped.setdefault(medium.modality, []).append(medium)
        stop: tuple[str, ...]
        if isinstance(content, RawPrompt):
            # strings that end an answer are the chat template's
            where, stop, prompt = "prompt", (), self.prompt.read(content, grouped)
        else:
            where, stop, prompt = "messages", self.prompt.stop, self.prompt.write(content, template)
        batch = self._process(prompt.text, media, grouped, where)
        ids = np.asarray(prompt.fill(_first_row(batch["input_ids"])), dtype=np.int32)
        if not len(ids):
            raise invalid(f"{where}: there are no tokens to begin with", where)
        features = self.split_features(batch, grouped) if grouped else {}
        items, encoder_items = self._items(ids, media, features, where)
        if self._pruning and "video" in grouped:
            ids, items, encoder_items = evs.shorten(
                ids, items, encoder_items, lambda item: self.video_grid(item.tensors), self._pruning
            )
        types = np.zeros(len(ids), dtype=np.int32)
        for item in items:
            for start, end in item.spans:
                types[start:end] = TOKEN_TYPES[item.modality]
        position_ids, delta = self._positions(ids, types, self.position_arguments(batch, features, grouped))
        extras = self.token_extras(ids, batch, types)
        return Prepared(ids, position_ids, delta, items, encoder_items, extras, stop, prompt.written)

    def _process(
        self, text: str, media: Sequence[Medium], grouped: Mapping[str, Sequence[Medium]], where: str
    ) -> Mapping[str, Any]:
        try:
            return self._call(text, grouped)
        except _REFUSALS as error:
            for medium in media:
                # One of several media is to blame: name it.
                try:
                    self._call(self._placeholder(medium.modality), {medium.modality: [medium]})
                except _REFUSALS as own:
                    raise TriptychError(
                        ErrorKind.INVALID_MEDIA,
                        f"{medium.param}: the checkpoint's processor refuses this {medium.modality}: {own}",
                        medium.param,
                    ) from None
            what = "this prompt" if where == "prompt" else "these messages"
            raise invalid(f"the checkpoint's processor refuses {what}: {error}", where) from None

    def _call(self, text: str, grouped: Mapping[str, Sequence[Medium]]) -> Mapping[str, Any]:
        arguments = self.processor_arguments(grouped) if grouped else {}
        bos = self.processor.tokenizer.bos_token
        if bos is not None and text.startswith(bos):
            # as apply_chat_template does it: the template has begun the prompt already
            arguments["add_special_tokens"] = False
        result: Mapping[str, Any] = self.processor(text=[text], return_tensors="pt", **arguments)
        return result

    def _placeholder(self, modality: str) -> str:
        return str(getattr(self.processor, f"{modality}_token"))

    def _items(
        self,
        ids: NDArray[np.int32],
        media: Sequence[Medium],
        features: Mapping[str, Sequence[Tensors]],
        where: str = "messages",
    ) -> tuple[tuple[MediaItem, ...], dict[str, list[EncoderItem]]]:
        """Give every medium its placeholder tokens: prompt order is row order.

        Two modalities may share one token: some families write a video as pictures.
        """
        places = {token: np.flatnonzero(ids == token) for token in self._tokens.values()}
        used = dict.fromkeys(places, 0)
        index = dict.fromkeys(self.modalities, 0)
        found: list[tuple[MediaItem, EncoderItem]] = []
        for medium in media:
            modality = medium.modality
            tensors = features[modality][index[modality]]
            rows, count = self.num_rows(modality, tensors), self.num_tokens(modality, tensors)
            token = self._tokens[modality]
            own = places[token][used[token] : used[token] + count]
            if count < 1 or len(own) != count:
                raise TriptychError(
                    ErrorKind.INVALID_MEDIA,
                    f"{medium.param}: this {modality} gives {count} tokens but the prompt has {len(own)} for it",
                    medium.param,
                )
            index[modality] += 1
            used[token] += count
            # A video's frame rate decides its positions, and what was computed under this digest with them.
            rate = f"{medium.data.sampled_fps:.9g}" if isinstance(medium.data, Video) else ""
            variant = self.variant(modality, tensors) + medium.options.key
            digest = hashlib.blake2b(
                f"{modality}:{medium.digest}:{self._fingerprints[modality]}:{rate}:{variant}".encode(), digest_size=32
            ).hexdigest()
            encoder = self.encoders[modality]
            item = MediaItem(modality, digest, _spans(own), encoder)
            found.append((item, EncoderItem(modality, digest, rows, tensors)))
        for token, count in used.items():
            if count != len(places[token]):
                kinds = " or ".join(modality for modality, own in self._tokens.items() if own == token)
                raise invalid(f"the prompt has {len(places[token])} {kinds} tokens but its media give {count}", where)
        # media of several modalities beside a raw prompt may come in any order
        found.sort(key=lambda pair: pair[0].spans[0])
        encoder_items: dict[str, list[EncoderItem]] = {}
        for item, features_of in found:
            encoder_items.setdefault(item.encoder, []).append(features_of)
        return tuple(item for item, _ in found), encoder_items

    def _positions(
        self, ids: NDArray[np.int32], types: NDArray[np.int32], arguments: Mapping[str, Any]
    ) -> tuple[NDArray[np.int32], int]:
        if not hasattr(self.base, "get_rope_index"):
            return np.arange(len(ids), dtype=np.int32)[None], 0
        position_ids, delta = self._rope_index(ids, types, arguments)
        return position_ids.numpy().astype(np.int32), int(delta)

    def _rope_index(
        self, ids: NDArray[np.int32], types: NDArray[np.int32], arguments: Mapping[str, Any]
    ) -> tuple[torch.Tensor, float]:
        """What the model's own rule gives: position ids [axes, L], whole numbers or fractions, and the delta.

        Not the rule's own delta, which goes on after the highest position of all: ``generate`` goes on after that of
        the last token, and a slow video may reach further than the text behind it.
        """
        input_ids = torch.from_numpy(ids.astype(np.int64))[None]
        known = {
            "input_ids": input_ids,
            "mm_token_type_ids": torch.from_numpy(types)[None],
            "attention_mask": torch.ones_like(input_ids),
            **arguments,
        }
        rule = self.base.get_rope_index
        names = inspect.signature(rule).parameters
        position_ids, _ = rule(**{name: value for name, value in known.items() if name in names})
        return position_ids[:, 0], position_ids[0, 0, -1].item() + 1 - len(ids)

    def _fingerprint(self, modality: str) -> str:
        """Changes whenever the processor's options for this modality do."""
        part = {"image": "image_processor", "video": "video_processor", "audio": "feature_extractor"}[modality]
        options = json.dumps(getattr(self.processor, part).to_dict(), sort_keys=True, default=str)
        return hashlib.blake2b(options.encode(), digest_size=16).hexdigest()


def _no_effect(where: str, why: str) -> TriptychError:
    return TriptychError(ErrorKind.UNSUPPORTED, f"{where} would have no effect: {why}", where)


def _first_row(ids: Any) -> list[int]:
    row: list[int] = (ids[0].tolist()) if isinstance(ids, torch.Tensor) else list(ids[0])
    return row


def _spans(places: NDArray[np.int64]) -> tuple[tuple[int, int], ...]:
    """Ascending token indices -> half-open runs."""
    cuts = np.flatnonzero(np.diff(places) != 1) + 1
    return tuple((int(run[0]), int(run[-1]) + 1) for run in np.split(places, cuts))
