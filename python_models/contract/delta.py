"""What ``language_model`` streams back: one :class:`Delta` per response."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Usage:
    """Token counts of one request.

    Attributes:
        prompt_tokens: prompt length with media expanded.
        cached_tokens: of those, served from the prefix cache.
        completion_tokens: generated tokens.
        image_tokens, video_tokens, audio_tokens: prompt tokens that media took.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    image_tokens: int = 0
    video_tokens: int = 0
    audio_tokens: int = 0


@dataclass(frozen=True)
class TokenLogprob:
    """Log probability (natural, of the distribution before temperature and filters) of a chosen token.

    ``text`` is the token decoded alone, ``data`` its bytes where the tokenizer can tell; ``top`` holds the most
    likely alternatives (id, text, logprob, bytes), best first.
    """

    token_id: int
    text: str
    logprob: float
    data: tuple[int, ...] | None = None
    top: tuple[tuple[int, str, float, tuple[int, ...] | None], ...] = ()


@dataclass(frozen=True)
class Delta:
    """A piece of an answer. One with no tokens, no text and no finish reason is a heartbeat.

    Attributes:
        text: text since the last delta (complete characters only).
        token_ids: tokens since the last delta.
        logprobs: one per token id where asked for, else empty.
        finish_reason: "stop", "length", or "" while running.
        matched_stop: the stop string or token id that ended it, or None.
        usage: on the first and the last delta.
        index: choice number.
    """

    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: str = ""
    matched_stop: str | int | None = None
    usage: Usage | None = None
    index: int = 0

    @property
    def is_heartbeat(self) -> bool:
        """True for a delta that only says the engine is alive."""
        return not (self.text or self.token_ids or self.finish_reason)

    def to_tensors(self) -> dict[str, Any]:
        """Output tensors of ``language_model`` (see :mod:`~triptych.python_models.contract.tensors`)."""
        info: dict[str, Any] = {}
        if self.usage is not None:
            info["usage"] = asdict(self.usage)
        if self.matched_stop is not None:
            info["matched_stop"] = self.matched_stop
        if self.logprobs:
            info["logprobs"] = [asdict(item) for item in self.logprobs]
        return {
            "text": [self.text],
            "token_ids": np.asarray(self.token_ids, dtype=np.int32),
            "finish_reason": [self.finish_reason],
            "index": np.asarray([self.index], dtype=np.int32),
            "info": [json.dumps(info) if info else ""],
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Any]) -> Delta:
        """Inverse of :meth:`to_tensors`; STRING tensors are sequences of bytes or str."""
        raw = _text(tensors["info"])
        info = json.loads(raw) if raw else {}
        return cls(
            text=_text(tensors["text"]),
            token_ids=tuple(int(i) for i in tensors["token_ids"]),
            logprobs=tuple(
                TokenLogprob(
                    item["token_id"],
                    item["text"],
                    item["logprob"],
                    None if item["data"] is None else tuple(item["data"]),
                    tuple((i, t, lp, None if d is None else tuple(d)) for i, t, lp, d in item["top"]),
                )
                for item in info.get("logprobs", ())
            ),
            finish_reason=_text(tensors["finish_reason"]),
            matched_stop=info.get("matched_stop"),
            usage=Usage(**info["usage"]) if "usage" in info else None,
            index=int(tensors["index"][0]),
        )


def _text(value: Any) -> str:
    item = value[0]
    return item.decode("utf-8", "replace") if isinstance(item, bytes) else str(item)
