"""Answers with calls or reasoning in them: one parser for each choice, made where the engine says there is one."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Sequence
from typing import Any

from triptych.python_models.contract.answer import Syntax
from triptych.python_models.contract.delta import Delta
from triptych.python_models.contract.tools import Tool

from .tool_parsers import AnswerParser, Arguments, Call, Event, Reasoning, Text
from .tool_parsers.answer import schemas

# Mistral's templates take ids of nine letters and digits, and no others.
_ID_LENGTHS = {"mistral": 9}


class Answers:
    """The parsers of one request's choices."""

    def __init__(self, tools: Sequence[Tool] = (), stream_reasoning: bool = True) -> None:
        """Args: what may be called; False gives reasoning in one piece."""
        self._tools = schemas(tools)
        self._stream_reasoning = stream_reasoning
        self._parsers: dict[int, AnswerParser] = {}
        self._calls: dict[int, int] = {}
        self.syntax: Syntax | None = None
        """What they are written in, once it is known; None where they are plain text."""

    def read(self, delta: Delta) -> list[Event]:
        """What a delta brings to light, once there is a :attr:`syntax`."""
        assert self.syntax is not None
        parser = self._parsers.get(delta.index)
        if parser is None:
            parser = self._parsers[delta.index] = AnswerParser(self.syntax, self._tools, self._stream_reasoning)
        events = parser.feed(delta.text) if delta.text else []
        if delta.finish_reason:
            events += parser.finish()
        for event in events:
            if type(event) is Call:
                self._calls[delta.index] = self._calls.get(delta.index, 0) + 1
        return joined(events) if len(events) > 1 else events

    def calls(self, index: int) -> int:
        """How many calls a choice has made so far."""
        return self._calls.get(index, 0)

    def finish_reason(self, delta: Delta) -> str:
        """Of a choice: OpenAI's "tool_calls" where it ended by itself and made calls."""
        return "tool_calls" if delta.finish_reason == "stop" and self.calls(delta.index) else delta.finish_reason

    def new_id(self) -> str:
        """An id for a call."""
        length = _ID_LENGTHS.get("" if self.syntax is None else self.syntax.tools)
        return secrets.token_hex(length)[:length] if length else f"call_{secrets.token_hex(12)}"

    def deltas(self, delta: Delta) -> list[dict[str, Any]]:
        """What a delta says, as OpenAI's ``delta`` objects."""
        before = self.calls(delta.index)
        out: list[dict[str, Any]] = []
        number = before - 1
        for event in self.read(delta):
            if isinstance(event, Text):
                out.append({"content": event.text})
            elif isinstance(event, Reasoning):
                out.append({"reasoning_content": event.text})
            elif isinstance(event, Call):
                number += 1
                function = {"name": event.name, "arguments": ""}
                call = {"index": number, "id": self.new_id(), "type": "function", "function": function}
                out.append({"tool_calls": [call]})
            else:
                out.append({"tool_calls": [{"index": number, "function": {"arguments": event.text}}]})
        return out

    def message(self, delta: Delta) -> dict[str, Any]:
        """What a whole choice says, as fields of OpenAI's ``message``."""
        assert self.syntax is not None
        text, reasoning, calls = "", "", list[dict[str, Any]]()
        for event in self.read(delta):
            if isinstance(event, Text):
                text += event.text
            elif isinstance(event, Reasoning):
                reasoning += event.text
            elif isinstance(event, Call):
                function = {"name": event.name, "arguments": ""}
                calls.append({"id": self.new_id(), "type": "function", "function": function})
            else:
                calls[-1]["function"]["arguments"] += event.text
        found: dict[str, Any] = {"content": text or (None if calls or reasoning else "")}
        if self.syntax.reasoning:
            found["reasoning_content"] = reasoning or None
        return found | {"tool_calls": calls} if calls else found


def joined(events: Iterable[Event]) -> list[Event]:
    """The same with neighbours of one kind in one piece."""
    out: list[Event] = []
    for event in events:
        last = out[-1] if out else None
        if last is not None and type(last) is type(event) and not isinstance(event, Call):
            assert isinstance(last, Text | Reasoning | Arguments)
            out[-1] = type(last)(last.text + event.text)
        else:
            out.append(event)
    return out
