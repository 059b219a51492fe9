"""The Family protocol: what differs from one model architecture to the next, and nothing else.

A family is one small file. Everything that transformers already does (model code, processors, templates) is used
from there; the truth for every family is transformers' own ``generate`` on the same checkpoint. One family object
lives in each stage process and is asked only for that stage's part, so no process loads weights it does not use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..contract.errors import ErrorKind, TriptychError
from ..contract.features import EncoderItem
from ..contract.plan import MediaItem
from ..contract.request import NO_INPUTS, Message, RawPrompt, TemplateInputs
from ..media.types import Medium
from .answers import Written

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True)
class FrameSampling:
    """How a family samples a video: n = clamp(round(duration * fps), min_frames, max_frames), then rounded down to a
    multiple of ``multiple`` (never below it), at evenly spaced indices (linspace) over the file's frames.

    ``num_frames`` fixes n where it is set; ``fps_until`` gives videos up to so many seconds another fps, as pairs
    (seconds, fps) in ascending order.
    """

    fps: float = 2.0
    min_frames: int = 4
    max_frames: int = 768
    multiple: int = 2
    num_frames: int | None = None
    fps_until: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True)
class Prepared:
    """A request ready for the encoders and the language model.

    Attributes:
        input_ids: int32 [L], media expanded.
        position_ids: int32 [axes, L].
        rope_delta: see ``Plan.rope_delta``.
        items: media in prompt order, with their token spans.
        features: for each encoder ("vision", "audio") its items in the same order.
        extras: see ``Plan.extras``.
        stop: strings that end the answer, beside those the caller names.
        written: what the answer is written in; None where it is plain text.
    """

    input_ids: NDArray[np.int32]
    position_ids: NDArray[np.int32]
    rope_delta: int
    items: tuple[MediaItem, ...]
    features: dict[str, list[EncoderItem]]
    extras: dict[str, Any] = field(default_factory=dict)
    stop: tuple[str, ...] = ()
    written: Written | None = None


@dataclass(frozen=True)
class Decoder:
    """The language model half of a checkpoint, loaded on its device.

    Attributes:
        text_model: transformers' decoder stack; called with ``inputs_embeds`` [1, T, H], ``position_ids``
            [axes, 1, T] (or [1, T] for one axis), ``attention_mask=None``; gives ``last_hidden_state`` [1, T, H].
        lm_head: [N, H] -> logits [N, V].
        embed: (ids int64 [T], is_media bool [T]) -> [T, H]; media positions hold any value.
        config: transformers' text config.
        tokenizer: transformers' tokenizer (for detokenising).
        eos_token_ids: ids that end an answer (generation_config, else config).
        context_length: positions the checkpoint was made for.
        num_axes: axes of position ids (3 for mrope, else 1).
        bidirectional: modalities whose tokens see all of their own medium, also what comes after them (Gemma 3:
            "image"); such a run of tokens is always computed in one step.
        token_extras: what the decoder needs to know of each token beside its position, name -> value for generated
            tokens, or None where they take that of the last prompt token. ``Plan.extras`` gives an integer for each
            prompt token, or one for all; ``text_model`` gets each as a keyword argument, int64 [1, T]. They decide
            what keys and values hold, so prefixes are shared only where they are equal.
        position_step: from one token of text to the next; more than 1 where positions are fractions.
        token_arguments: (ids int64 [T]) -> keyword arguments of ``text_model`` made of them alone, each [1, T, ...].
    """

    text_model: nn.Module
    lm_head: nn.Module
    embed: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    config: Any
    tokenizer: Any
    eos_token_ids: frozenset[int]
    context_length: int
    num_axes: int
    bidirectional: frozenset[str] = frozenset()
    token_extras: Mapping[str, int | None] = field(default_factory=dict)
    position_step: int = 1
    token_arguments: Callable[[torch.Tensor], Mapping[str, torch.Tensor]] | None = None


class WeightSource(Protocol):
    """Weights by their names in transformers' modules, which the runner's fused decoders take from it.

    Names are relative to the decoder stack, such as ``layers.0.self_attn.q_proj.weight``, ``norm.weight`` and
    ``embed_tokens.weight``; the head is ``lm_head.weight``.
    """

    def get(self, name: str, dim: int | None = None, start: int | None = None, stop: int | None = None) -> torch.Tensor:
        """A weight on its device, or [start, stop) of one of its dimensions; KeyError where there is none."""

    def close(self) -> None:
        """Everything that is wanted has been taken."""


@dataclass(frozen=True)
class PrunedRows:
    """What is left of an item's rows.

    Attributes:
        rows: [n, width], as many as the prompt has tokens for the item.
        runs: how many of them belong to each of ``MediaItem.runs``.
    """

    rows: torch.Tensor
    runs: tuple[int, ...]

    @staticmethod
    def tensor(rows: torch.Tensor | PrunedRows) -> torch.Tensor:
        """The rows alone, whatever is left of them."""
        return rows.rows if isinstance(rows, PrunedRows) else rows


def refuse_modality(where: str, modality: str, name: str, allowed: Iterable[str]) -> TriptychError:
    """The error for a medium that a family cannot take at all.

    Args:
        where: field that names the medium.
        modality: of it.
        name: of the family, as config.json says it.
        allowed: modalities that it takes beside text.
    """
    takes = " and ".join(_PLURAL[own] for own in sorted(allowed)) or "text"
    message = f"{where}: {name} takes {takes}, not {_PLURAL[modality]}"
    return TriptychError(ErrorKind.UNSUPPORTED, message, where)


_PLURAL = {"image": "images", "video": "videos", "audio": "audio"}


class Preprocessor(Protocol):
    """A family's part of the preprocess stage. Thread-safe: many requests are prepared at once."""

    name: str
    """The ``model_type`` of config.json, for messages."""
    modalities: frozenset[str]
    """Of "image", "video", "audio": what this checkpoint takes."""
    frame_sampling: FrameSampling
    sampling_rate: int
    """Of sounds, in Hz."""
    context_length: int

    @property
    def architectures(self) -> tuple[str, ...]:
        """As config.json says them."""

    def spell(self, ids: Sequence[int]) -> tuple[str, list[str]]:
        """(text of token ids, special ones included, the vocabulary's spelling of each).

        Raises:
            TriptychError: INVALID_REQUEST for an id that there is not.
        """

    def prepare(
        self, content: Sequence[Message] | RawPrompt, media: Sequence[Medium], template: TemplateInputs = NO_INPUTS
    ) -> Prepared:
        """Apply template, processor and position rule.

        Args:
            content: validated messages, whose text is literal (special tokens in it are plain characters), or a prompt
                that needs no template.
            media: the decoded media of all MediaParts, in prompt order.
            template: what the chat template gets beside the messages.

        Raises:
            TriptychError: INVALID_REQUEST or UNSUPPORTED, naming the field.
        """


class Encoder(Protocol):
    """A family's encoder ("vision" or "audio"), loaded on its device without the rest of the checkpoint."""

    width: int
    """Columns of an embedding row: hidden size * (1 + deepstack layers)."""

    def encode(self, items: Sequence[EncoderItem]) -> list[torch.Tensor | PrunedRows]:
        """Run the tower and projector over a packed batch; per item [num_rows, width] on the encoder's device.

        :class:`PrunedRows` are for items whose plan has runs.
        """


class Family(Protocol):
    """One model architecture (one or several ``model_type`` values of config.json)."""

    encoders: frozenset[str]
    """Of "vision", "audio": the encoders the checkpoint has."""

    def load_preprocessor(self) -> Preprocessor:
        """Processor, tokenizer, template and position rule; no weights."""

    def load_encoder(self, encoder: str, device: str, dtype: torch.dtype) -> Encoder:
        """Only the weights of this encoder."""

    def load_decoder(self, device: str, dtype: torch.dtype) -> Decoder:
        """Only the weights of the language model."""

    def open_decoder(self, device: str, dtype: torch.dtype, *, progress: bool) -> tuple[Decoder, WeightSource]:
        """The language model without its weights, on the meta device, and where slices of them are read from.

        Args:
            device, dtype: of the slices.
            progress: show a bar while they are read.
        """
