"""The text of one choice, piece by piece, as content, reasoning and calls."""

from __future__ import annotations

from collections.abc import Sequence

from triptych.python_models.contract.answer import Syntax
from triptych.python_models.contract.tools import Tool

from .cursor import Cursor, Event, Reasoning, Steps
from .objects import Tools
from .registry import TOOL_PARSERS


class AnswerParser:
    """Parses one choice.

    Whatever way the text is cut into pieces, the events say the same; joined, they hold all of it but the marks around
    calls and reasoning, and white space beside those.
    """

    def __init__(self, syntax: Syntax, tools: Tools, stream_reasoning: bool = True) -> None:
        """Args: what the answer is written in; the functions; False gives reasoning as one event at its end."""
        self._cursor = Cursor()
        self._steps: Steps[None] | None = self._run(syntax, tools)
        self._held: list[str] | None = None if stream_reasoning else []

    def feed(self, text: str) -> list[Event]:
        """Take the next piece; what it brought to light."""
        self._cursor.put(text)
        return self._go()

    def finish(self) -> list[Event]:
        """The answer is over: what is left."""
        self._cursor.ended = True
        events = self._go()
        self._cursor.close()
        events += self._take()
        if self._held:
            events.insert(0, Reasoning("".join(self._held)))
            self._held = None
        return events

    def _go(self) -> list[Event]:
        if self._steps is not None:
            try:
                next(self._steps)
            except StopIteration:
                self._steps = None
        return self._take()

    def _take(self) -> list[Event]:
        events, self._cursor.events = self._cursor.events, []
        if self._held is None:
            return events
        out: list[Event] = []
        for event in events:
            if isinstance(event, Reasoning):
                self._held.append(event.text)
                continue
            if self._held:
                out.append(Reasoning("".join(self._held)))
                self._held = []
            out.append(event)
        return out

    def _run(self, syntax: Syntax, tools: Tools) -> Steps[None]:
        cursor = self._cursor
        if (marks := syntax.marks) is not None:
            start = cursor.at
            yield from cursor.space()
            # models that were given the mark may write it once more
            if (yield from cursor.has(marks.start)) or syntax.reasons:
                if (yield from cursor.reason(marks.end)):
                    yield from cursor.space()
            else:
                cursor.back(start)
        yield from (TOOL_PARSERS[syntax.tools](cursor, tools) if syntax.tools else cursor.until())


def schemas(tools: Sequence[Tool]) -> Tools:
    """Field ``tools`` of a request as the parsers want it."""
    return {tool["function"]["name"]: tool["function"].get("parameters") or {} for tool in tools}
