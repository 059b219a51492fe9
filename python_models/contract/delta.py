"""What ``language_model`` streams back: one :class:`Delta` per response."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from .answer import Syntax
from .timings import Timings


@dataclass(frozen=True)
class Usage:
    """Token counts of one request.

    Attributes:
        prompt_tokens: prompt length with media expanded.
        cached_tokens: of those, served from the prefix cache.
        completion_tokens: generated tokens.
        image_tokens, video_tokens, audio_tokens: prompt tokens that media took.
        reasoning_tokens: generated tokens of reasoning, its marks included, where the caller sets it apart.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    image_tokens: int = 0
    video_tokens: int = 0
    audio_tokens: int = 0
    reasoning_tokens: int = 0


@dataclass(frozen=True)
class TokenLogprob:
    """Log probability (natural, of the distribution before temperature and filters) of a chosen token.

    ``text`` is the token decoded alone, ``data`` its bytes where the tokenizer can tell; ``top`` holds the most
    likely alternatives (id, text, logprob, bytes), best first. ``rank``: tokens that are at least as likely.
    """

    token_id: int
    text: str
    logprob: float
    data: tuple[int, ...] | None = None
    top: tuple[tuple[int, str, float, tuple[int, ...] | None], ...] = ()
    rank: int | None = None


# not frozen: that would treble the time to make one, and the engine makes one per token
@dataclass(slots=True)
class Delta:
    """A piece of an answer, never changed once made. One with no tokens, no text and no finish reason is a heartbeat.

    Attributes:
        text: text since the last delta (complete characters only).
        token_ids: tokens since the last delta.
        logprobs: one per token id where asked for, else empty.
        finish_reason: "stop", "length", or "" while the choice runs; every choice of a request has its own.
        matched_stop: the stop string or token id that ended it, or None.
        usage: on the first delta, and on the one that ends a choice: counts of all choices of the request so far, so
            that the last delta of a request holds the final ones.
        index: choice number, below ``n`` of the sampling parameters.
        timings: on the last delta of a request.
        syntax: on the first delta, of all choices, where they may hold calls or reasoning.
        embedding: on the only delta but heartbeats of a request for one: float32 [H], little-endian, of length 1.
    """

    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: str = ""
    matched_stop: str | int | None = None
    usage: Usage | None = None
    index: int = 0
    timings: Timings | None = None
    syntax: Syntax | None = None
    embedding: bytes = b""

    @property
    def is_heartbeat(self) -> bool:
        """True for a delta that only says the engine is alive."""
        return not (self.text or self.token_ids or self.finish_reason)

    def to_tensors(self) -> dict[str, Any]:
        """Output tensors of ``language_model`` (see :mod:`~triptych.python_models.contract.tensors`)."""
        return {
            "text": [self.text],
            "token_ids": np.array(self.token_ids, dtype=np.int32),
            "finish_reason": [self.finish_reason],
            "index": np.array((self.index,), dtype=np.int32),
            "info": [self._info()],
        }

    def _info(self) -> str:
        # the syntax is never without usage
        if self.usage is None and self.matched_stop is None and not self.logprobs and self.timings is None:
            return ""
        info: dict[str, Any] = {}
        if self.syntax is not None:
            info["syntax"] = vars(self.syntax)
        if self.usage is not None:
            info["usage"] = vars(self.usage)
        if self.matched_stop is not None:
            info["matched_stop"] = self.matched_stop
        if self.logprobs:
            info["logprobs"] = [vars(item) for item in self.logprobs]
        if self.timings is not None:
            info["timings"] = self.timings.to_json()
        if self.embedding:
            info["embedding"] = base64.b64encode(self.embedding).decode()
        return json.dumps(info)

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Any]) -> Delta:
        """Inverse of :meth:`to_tensors`; STRING tensors are sequences of bytes or str."""
        ids = tensors["token_ids"]
        raw = _text(tensors["info"])
        info: dict[str, Any] = json.loads(raw) if raw else {}
        return cls(
            text=_text(tensors["text"]),
            token_ids=tuple(ids.tolist() if isinstance(ids, np.ndarray) else ids),
            logprobs=tuple(
                TokenLogprob(
                    item["token_id"],
                    item["text"],
                    item["logprob"],
                    None if item["data"] is None else tuple(item["data"]),
                    tuple((i, t, lp, None if d is None else tuple(d)) for i, t, lp, d in item["top"]),
                    item["rank"],
                )
                for item in info.get("logprobs", ())
            ),
            finish_reason=_text(tensors["finish_reason"]),
            matched_stop=info.get("matched_stop"),
            usage=Usage(**info["usage"]) if "usage" in info else None,
            index=int(tensors["index"][0]),
            timings=Timings.from_json(info["timings"]) if "timings" in info else None,
            syntax=Syntax(**info["syntax"]) if "syntax" in info else None,
            embedding=base64.b64decode(info.get("embedding", "")),
        )


def merge(first: Delta, second: Delta) -> Delta:
    """One delta that says what two in a row of one choice say.

    Text, tokens and log probabilities are joined; of finish reason, what matched and usage the later wins.

    Raises:
        ValueError: they are of different choices, or the first one ended its choice.
    """
    if first.index != second.index or first.finish_reason:
        raise ValueError(f"delta of choice {second.index} cannot follow {first} in one piece")
    return Delta(
        first.text + second.text,
        first.token_ids + second.token_ids,
        first.logprobs + second.logprobs,
        second.finish_reason,
        second.matched_stop,
        second.usage if second.usage is not None else first.usage,
        first.index,
        second.timings,
        first.syntax,
        second.embedding,
    )


def put(waiting: dict[int, Delta], delta: Delta) -> None:
    """Add to the deltas of one request that wait to be sent, by choice: to the one of its choice where there is one.

    The newest stands last, so that the request's last delta is the last to leave.
    """
    earlier = waiting.pop(delta.index, None)
    waiting[delta.index] = delta if earlier is None else merge(earlier, delta)


def _text(value: Any) -> str:
    item = value[0]
    return item.decode("utf-8", "replace") if isinstance(item, bytes) else str(item)
