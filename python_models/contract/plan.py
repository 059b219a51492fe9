"""What ``preprocess`` tells ``language_model`` about a request beside the tensors: tensor ``plan``, a JSON string."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from .answer import Syntax
from .generate import Form
from .sampling import SamplingParams
from .timings import PreprocessTimes


@dataclass(frozen=True)
class CrossRows:
    """Embedding rows that no token takes: the decoder's cross-attention layers read them (Llama 3.2 Vision).

    Attributes:
        rows: that the encoder gives.
        visible: so many of them, the first ones, belong to the medium; the others are padding.
        tokens: [start, end) of the tokens that see the medium; where the end is that of the prompt, generated tokens
            see it too. A token that sees no medium of its prompt attends to all rows of all of them.
    """

    rows: int
    visible: int
    tokens: tuple[int, int]


@dataclass(frozen=True)
class MediaItem:
    """One picture, video or sound of a prompt.

    Attributes:
        modality: "image", "video" or "audio".
        digest: hex digest over the medium's file and everything that decides its features; equal digests mean
            equal embeddings, so caches are keyed by it.
        spans: half-open token ranges [start, end) of ``input_ids`` that its embedding rows replace, in row order.
        encoder: the stage that computes its rows ("vision" or "audio"). Rows of all items of one encoder arrive
            concatenated in the order of ``Plan.items``.
        cross: where its rows are read by cross-attention: then the tokens of ``spans`` only stand for it, and have
            embeddings of their own.
        runs: where only the encoder knows how its rows are spread over parts of the medium (frames of a pruned video):
            a range for each part, some of them empty, in order. ``spans`` are those that are not empty, until the
            encoder's ``vision_runs`` say how long each one is; all together they are as long as before.
    """

    modality: str
    digest: str
    spans: tuple[tuple[int, int], ...]
    encoder: str
    cross: CrossRows | None = None
    runs: tuple[tuple[int, int], ...] = ()

    @property
    def num_tokens(self) -> int:
        """Tokens that it takes in the prompt."""
        return sum(end - start for start, end in self.spans)

    @property
    def num_rows(self) -> int:
        """Embedding rows of this item."""
        return self.num_tokens if self.cross is None else self.cross.rows


@dataclass(frozen=True)
class Plan:
    """Everything the language model needs to know of a request that is not a tensor.

    Attributes:
        items: the media in prompt order.
        sampling: validated sampling parameters.
        rope_delta: position of generated token number k is ``len(input_ids) + rope_delta + k`` (mrope; 0 otherwise);
            see ``Decoder.position_step`` for positions that are fractions.
        stream, lease_s, timeout_s, priority, cache_salt, heartbeats, embed: see
            :class:`~triptych.python_models.contract.request.ChatRequest`.
        extras: what single families need to know of tokens beside: name -> an integer for each prompt token, or one
            for all (see ``Decoder.token_extras``).
        stop: strings that end the answer, beside those of ``sampling``.
        times: what ``preprocess`` took, and when.
        form: of the answer, where the request came through the ensemble ``generate``.
        syntax: what the answer is written in, where it may hold calls or reasoning.
    """

    items: tuple[MediaItem, ...] = ()
    sampling: SamplingParams = field(default_factory=SamplingParams)
    rope_delta: int = 0
    stream: bool = True
    lease_s: float | None = None
    timeout_s: float | None = None
    priority: int = 0
    cache_salt: str = ""
    heartbeats: bool = True
    embed: bool = False
    extras: dict[str, Any] = field(default_factory=dict)
    stop: tuple[str, ...] = ()
    times: PreprocessTimes | None = None
    form: Form | None = None
    syntax: Syntax | None = None

    def to_json(self) -> str:
        """The ``plan`` tensor's text."""
        data = asdict(self) | {"sampling": self.sampling.to_json()}
        return json.dumps(data)

    @classmethod
    def from_json(cls, text: str | bytes) -> Plan:
        """Inverse of :meth:`to_json`; the sender is our own ``preprocess``, so only sampling is validated again."""
        data = json.loads(text)
        data["items"] = tuple(
            MediaItem(
                i["modality"],
                i["digest"],
                tuple((s, e) for s, e in i["spans"]),
                i["encoder"],
                _cross(i["cross"]),
                tuple((s, e) for s, e in i["runs"]),
            )
            for i in data["items"]
        )
        data["sampling"] = SamplingParams.from_json(data["sampling"])
        data["stop"] = tuple(data.get("stop", ()))
        if data.get("times") is not None:
            data["times"] = PreprocessTimes.from_json(data["times"])
        if data.get("form") is not None:
            data["form"] = Form(**data["form"])
        if data.get("syntax") is not None:
            data["syntax"] = Syntax(**data["syntax"])
        return cls(**data)


def _cross(data: dict[str, Any] | None) -> CrossRows | None:
    return None if data is None else CrossRows(data["rows"], data["visible"], tuple(data["tokens"]))
