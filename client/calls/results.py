"""Answers as a Python caller gets them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from triptych.python_models.contract.answer import Syntax
from triptych.python_models.contract.delta import Delta, TokenLogprob, Usage
from triptych.python_models.contract.timings import Timings
from triptych.python_models.contract.tools import Tool, ToolCall


@dataclass(frozen=True)
class Choice:
    """One answer.

    Attributes:
        index: its number, below ``n``.
        text: the answer, without reasoning and tool calls; a stop string that ended it is not part of it.
        token_ids: the tokens, with the one that ended it.
        finish_reason: "stop" (end of sequence, stop string or stop token), "length" or "tool_calls".
        matched_stop: the stop string or token id that ended it, or None.
        logprobs: one per token where ``logprobs=True`` asked for them, else empty.
        reasoning: what the model thought before, where it is a model that writes that down.
        tool_calls: what it wants called.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    matched_stop: str | int | None
    logprobs: tuple[TokenLogprob, ...]
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()


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
    def tool_calls(self) -> tuple[ToolCall, ...]:
        """The tool calls of the first choice."""
        return self.choices[0].tool_calls

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
    """Joins the deltas of one request.

    Args:
        tools: what the model may call.
    """

    def __init__(self, tools: Sequence[Tool] = ()) -> None:
        self._tools = tools
        self._syntax: Syntax | None = None
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
        self._syntax = delta.syntax or self._syntax

    def result(self, request_id: str) -> Result:
        """What was collected."""
        choices = tuple(self._choice(index, parts) for index, parts in sorted(self._parts.items()))
        return Result(request_id, choices, self._usage, self._timings)

    def _choice(self, index: int, parts: _Parts) -> Choice:
        text, reason = "".join(parts.text), parts.finish_reason
        reasoning, calls = "", tuple[ToolCall, ...]()
        if self._syntax is not None:
            # the endpoint's parsers, which few answers need
            from triptych.client.openai_api.answers import Answers

            answers = Answers(self._tools)
            answers.syntax = self._syntax
            delta = Delta(text, finish_reason=reason, index=index)
            message = answers.message(delta)
            text, reasoning = message["content"] or "", message.get("reasoning_content") or ""
            calls = tuple(ToolCall(call["id"], **call["function"]) for call in message.get("tool_calls", ()))
            reason = answers.finish_reason(delta)
        return Choice(
            index,
            text,
            tuple(parts.token_ids),
            reason,
            parts.matched_stop,
            tuple(parts.logprobs),
            reasoning,
            calls,
        )
