"""Answers as a Python caller gets them."""

from __future__ import annotations

from dataclasses import dataclass, field

from triptych.python_models.contract.delta import Delta, TokenLogprob, Usage
from triptych.python_models.contract.timings import Timings


@dataclass(frozen=True)
class Choice:
    """One answer.

    Attributes:
        index: its number, below ``n``.
        text: the answer; a stop string that ended it is not part of it.
        token_ids: the tokens, with the one that ended it.
        finish_reason: "stop" (end of sequence, stop string or stop token) or "length".
        matched_stop: the stop string or token id that ended it, or None.
        logprobs: one per token where ``logprobs=True`` asked for them, else empty.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    matched_stop: str | int | None
    logprobs: tuple[TokenLogprob, ...]


@dataclass(frozen=True)
class Result:
    """The whole answer to one request. ``text`` and its like are those of the first choice.

    Attributes:
        request_id: the id under which every stage knew the request.
        choices: ``n`` answers, by index.
        usage: token counts of all of them together.
        timings: where the request's time went, or None where the engine did not say.
    """

    request_id: str
    choices: tuple[Choice, ...]
    usage: Usage
    timings: Timings | None = None

    @property
    def text(self) -> str:
        """The text of the first choice."""
        return self.choices[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The tokens of the first choice."""
        return self.choices[0].token_ids

    @property
    def finish_reason(self) -> str:
        """Why the first choice ended."""
        return self.choices[0].finish_reason

    @property
    def logprobs(self) -> tuple[TokenLogprob, ...]:
        """The log probabilities of the first choice."""
        return self.choices[0].logprobs


@dataclass
class _Parts:
    text: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str = ""
    matched_stop: str | int | None = None


class Collector:
    """Joins the deltas of one request."""

    def __init__(self) -> None:
        self._parts: dict[int, _Parts] = {}
        self._usage = Usage()
        self._timings: Timings | None = None

    def add(self, delta: Delta) -> None:
        """Take the next delta."""
        parts = self._parts.setdefault(delta.index, _Parts())
        parts.text.append(delta.text)
        parts.token_ids += delta.token_ids
        parts.logprobs += delta.logprobs
        if delta.finish_reason:
            parts.finish_reason, parts.matched_stop = delta.finish_reason, delta.matched_stop
        self._usage = delta.usage or self._usage
        self._timings = delta.timings or self._timings

    def result(self, request_id: str) -> Result:
        """What was collected."""
        choices = tuple(
            Choice(i, "".join(p.text), tuple(p.token_ids), p.finish_reason, p.matched_stop, tuple(p.logprobs))
            for i, p in sorted(self._parts.items())
        )
        return Result(request_id, choices, self._usage, self._timings)
