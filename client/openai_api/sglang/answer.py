"""Deltas as SGLang's answers to POST /generate, streamed or whole."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from triptych.python_models.contract.delta import Delta, TokenLogprob, Usage
from triptych.python_models.contract.errors import TriptychError

from .. import sse
from ..generation import ABORTED
from ..text_completion import finite
from .request import LogprobOptions


@dataclass
class _Choice:
    """An answer so far."""

    prompt: int
    pieces: list[str] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    last: Delta | None = None

    def add(self, delta: Delta) -> None:
        self.pieces.append(delta.text)
        self.ids += delta.token_ids
        self.logprobs += delta.logprobs
        if delta.finish_reason:
            self.last = delta


class Answers:
    """Writes the choices of one or several prompts.

    Every event of a stream has the text, tokens and log probabilities of its choice so far, as SGLang's have.
    """

    def __init__(
        self,
        rids: Sequence[str],
        choices: Sequence[int],
        logprobs: Sequence[LogprobOptions],
        batch: bool,
        arrival: float,
    ) -> None:
        """Args: id of each prompt; its choices; what is told of its tokens; the answer is a list; when the request
        came, by ``time.perf_counter``.
        """
        self.n = sum(choices)
        self._rids = tuple(rids)
        self._options = tuple(logprobs)
        self._arrival = arrival
        self._choices = [_Choice(prompt) for prompt, count in enumerate(choices) for _ in range(count)]
        self._usage: dict[int, Usage] = {}
        self._many = batch or self.n > 1

    def first_chunks(self) -> bytes:
        """Nothing: SGLang's streams begin with the first tokens."""
        return b""

    def chunks(self, delta: Delta) -> bytes:
        """An event of what there is so far."""
        self._take(delta)
        if delta.is_heartbeat:
            return b""
        body = self._body(delta.index)
        return sse.event(body | {"index": delta.index} if self._many else body)

    def end(self, deltas: Iterable[Delta]) -> bytes:
        """The end of the stream."""
        return sse.DONE

    def whole(self, deltas: Iterable[Delta]) -> Any:
        """One object, or a list of them."""
        for delta in deltas:
            self._take(delta)
        bodies = [self._body(index) for index in range(self.n)]
        return bodies if self._many else bodies[0]

    def _take(self, delta: Delta) -> None:
        choice = self._choices[delta.index]
        choice.add(delta)
        if delta.usage is not None:
            self._usage[choice.prompt] = delta.usage

    def _body(self, index: int) -> dict[str, Any]:
        choice = self._choices[index]
        usage = self._usage.get(choice.prompt, Usage())
        meta: dict[str, Any] = {
            "id": self._rids[choice.prompt],
            "finish_reason": _finish_reason(choice),
            "prompt_tokens": usage.prompt_tokens,
            "weight_version": "default",
            "completion_tokens": len(choice.ids),
            "cached_tokens": usage.cached_tokens,
            "e2e_latency": time.perf_counter() - self._arrival,
        }
        options = self._options[choice.prompt]
        if options.wanted:
            meta |= _logprobs(choice.logprobs, options.text)
        return {"text": "".join(choice.pieces), "output_ids": list(choice.ids), "meta_info": meta}


def failed(error: TriptychError) -> bytes:
    """The events of a failure after the stream began."""
    return sse.error_event(error) + sse.DONE


def _finish_reason(choice: _Choice) -> dict[str, Any] | None:
    if choice.last is None:
        return None
    reason = choice.last.finish_reason
    if reason == "length":
        return {"type": "length", "length": len(choice.ids)}
    if reason == ABORTED:
        return {"type": ABORTED, "message": "the request was aborted"}
    return {"type": reason, "matched": choice.last.matched_stop}


def _logprobs(items: Sequence[TokenLogprob], text: bool) -> dict[str, Any]:
    """[log probability, token id, text or null] of each token, and of the likeliest in its place."""

    def entry(value: float, token: int, word: str) -> list[Any]:
        return [finite(value), token, word if text else None]

    return {
        "input_token_logprobs": [],
        "output_token_logprobs": [entry(item.logprob, item.token_id, item.text) for item in items],
        "input_top_logprobs": [],
        "output_top_logprobs": [
            [entry(value, token, word) for token, word, value, _ in item.top] or None for item in items
        ],
    }
