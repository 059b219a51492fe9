"""Formats of FunctionGemma and Gemma 4: ``call:name{key:value, ...}`` with strings between marks of their own."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from .cursor import Cursor, Steps
from .objects import Tools, tried


@dataclass(frozen=True)
class _Marks:
    begin: str
    end: str
    quote: str


_FUNCTION_GEMMA = _Marks("<start_function_call>", "<end_function_call>", "<escape>")
_GEMMA4 = _Marks("<|tool_call>", "<tool_call|>", '<|"|>')


def functiongemma(cursor: Cursor, tools: Tools) -> Steps[None]:
    """``<start_function_call>call:name{key:<escape>text<escape>}<end_function_call>``."""
    yield from _calls(cursor, tools, _FUNCTION_GEMMA)


def gemma4(cursor: Cursor, tools: Tools) -> Steps[None]:
    """``<|tool_call>call:name{key:<|"|>text<|"|>}<tool_call|>``."""
    yield from _calls(cursor, tools, _GEMMA4)


def _calls(cursor: Cursor, tools: Tools, marks: _Marks) -> Steps[None]:
    def one(cursor: Cursor, tools: Tools) -> Steps[bool]:
        name = (yield from cursor.name()) if (yield from cursor.has("call:")) else None
        if name is None or name not in tools:
            return False
        text = yield from cursor.within(marks.end)
        arguments = None if text is None else _Reader(text.strip(), marks.quote).whole()
        if arguments is None:
            return False
        cursor.call(name)
        cursor.arguments(json.dumps(arguments, ensure_ascii=False))
        return True

    while mark := (yield from cursor.until(marks.begin)):
        yield from tried(cursor, tools, mark, one)


class _Reader:
    """Reads the arguments of one call, which are all there."""

    def __init__(self, text: str, quote: str) -> None:
        self._text = text
        self._quote = quote
        self._at = 0

    def whole(self) -> Any:
        """The object; None where it is none."""
        try:
            found = self._value()
        except (ValueError, IndexError, RecursionError):
            return None
        return found if isinstance(found, dict) and self._at == len(self._text) else None

    def _value(self) -> Any:
        if self._has(self._quote):
            return self._before(self._quote)
        if self._has("{"):
            out = {}
            while not self._has("}"):
                key = self._before(self._quote) if self._has(self._quote) else None
                key = self._before(":").strip() if key is None else key + self._before(":").strip()
                out[key] = self._value()
                self._comma("}")
            return out
        if self._has("["):
            items = []
            while not self._has("]"):
                items.append(self._value())
                self._comma("]")
            return items
        start = self._at
        while self._text[self._at] not in ",}]":
            self._at += 1
        return json.loads(self._text[start : self._at])

    def _has(self, literal: str) -> bool:
        while self._text[self._at] in " \n\t":
            self._at += 1
        if self._text.startswith(literal, self._at):
            self._at += len(literal)
            return True
        return False

    def _before(self, mark: str) -> str:
        end = self._text.index(mark, self._at)
        found = self._text[self._at : end]
        self._at = end + len(mark)
        return found

    def _comma(self, end: str) -> None:
        if not self._has(",") and self._text[self._at] != end:
            raise ValueError("no comma")
