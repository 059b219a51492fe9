"""Text that comes in pieces, read by parsers that are written as if all of it were there.

A parser is a generator that yields whenever it needs more text than has come. What it gives depends on the text alone,
never on how it was cut: it looks at characters in order, and waits only for those that decide what the others are.
"""

from __future__ import annotations

import json
from collections.abc import Generator
from dataclasses import dataclass
from typing import TypeVar

_T = TypeVar("_T")
Steps = Generator[None, None, _T]
"""A parser's run; each yield waits for more text."""

_SPACE = " \t\r\n"
# what JSON is made of outside of strings; NaN and Infinity are Python's
_JSON = frozenset('{}[],:+-.0123456789"truefalsenulNaInfityE' + _SPACE)
_ESCAPES = {"\n": "\\n", "\r": "\\r", "\t": "\\t", "\b": "\\b", "\f": "\\f"}


@dataclass(frozen=True)
class Text:
    """Content of the answer."""

    text: str


@dataclass(frozen=True)
class Reasoning:
    """Reasoning of the answer."""

    text: str


@dataclass(frozen=True)
class Call:
    """A call begins; its arguments follow in pieces."""

    name: str


@dataclass(frozen=True)
class Arguments:
    """A piece of the JSON text of the arguments of the last call."""

    text: str


Event = Text | Reasoning | Call | Arguments


class _Scan:
    """Finds the end of a JSON value, character by character; what stands in its brackets is not checked.

    Attributes:
        done: the value is complete.
        plain: it is a number or a word, which ends where something else begins.
    """

    def __init__(self) -> None:
        self.done = self.plain = False
        self._depth = 0
        self._inside = self._escaped = False

    def take(self, char: str) -> str | None:
        """The character as JSON has it; None where it cannot be part of the value."""
        if self._inside:
            if self._escaped:
                self._escaped = False
            elif char == "\\":
                self._escaped = True
            elif char == '"':
                self._inside = False
                self.done = not self._depth
            elif char < " ":
                return _ESCAPES.get(char, f"\\u{ord(char):04x}")
            return char
        if char not in _JSON or (not self._depth and char in ",:}]" + _SPACE) or (self.plain and char in '"{['):
            return None
        if char == '"':
            self._inside = True
        elif char in "{[":
            self._depth += 1
        elif char in "}]":
            self._depth -= 1
            self.done = not self._depth
        elif not self._depth:
            self.plain = True
        return char


class Cursor:
    """The text of one answer, read from the front.

    Attributes:
        ended: no more will come.
        events: what parsers found and nobody has taken yet.
    """

    def __init__(self) -> None:
        self.ended = False
        self.events: list[Event] = []
        self._text = ""
        self._at = 0
        self._blank = ""
        self._called = False

    def put(self, text: str) -> None:
        """Add text at the end."""
        self._text += text

    @property
    def at(self) -> int:
        """The place; one that :meth:`back` takes, as long as nothing is given on."""
        return self._at

    def back(self, at: int) -> None:
        """Return to an earlier place."""
        self._at = at

    def unread(self, literal: str) -> None:
        """Put back what was taken last."""
        self._at -= len(literal)

    def take(self, text: str) -> None:
        """Go past text that was looked at."""
        self._at += len(text)

    def skip(self, literal: str) -> Steps[None]:
        """Take what is known to come next as content."""
        yield from self.has(literal)
        self.text(literal)

    # what was found

    def text(self, text: str) -> None:
        """Content; white space at its end waits, since it is left out before a call."""
        if not text:
            return
        whole = self._blank + text
        kept = whole.rstrip(_SPACE)
        self._blank = whole[len(kept) :]
        if kept:
            self.events.append(Text(kept))

    def reasoning(self, text: str) -> None:
        """Reasoning."""
        if text:
            self.events.append(Reasoning(text))

    def call(self, name: str) -> None:
        """A call begins."""
        self._blank = ""
        self._called = True
        self.events.append(Call(name))

    def arguments(self, text: str) -> None:
        """A piece of its arguments."""
        if text:
            self.events.append(Arguments(text))

    def close(self) -> None:
        """No more text and no parser: what is left is content."""
        self.text(self._rest())
        if self._blank and not self._called:
            self.events.append(Text(self._blank))
        self._blank = ""

    # reading

    def look(self, count: int) -> Steps[str]:
        """The next characters, fewer only at the end."""
        while len(self._text) - self._at < count and not self.ended:
            yield
        return self._text[self._at : self._at + count]

    def has(self, literal: str) -> Steps[bool]:
        """Whether this comes next; it is taken then. Waits only while it may."""
        for size in range(1, len(literal) + 1):
            if (yield from self.look(size)) != literal[:size]:
                return False
        self._at += len(literal)
        return True

    def space(self) -> Steps[str]:
        """Take white space."""
        start = self._at
        while (char := (yield from self.look(1))) and char in _SPACE:
            self._at += 1
        return self._text[start : self._at]

    def name(self, also: str = "_-.") -> Steps[str]:
        """Take letters, digits and these."""
        start = self._at
        while (char := (yield from self.look(1))) and (char.isalnum() or char in also):
            self._at += 1
        return self._text[start : self._at]

    def within(self, end: str, stops: str = "") -> Steps[str | None]:
        """Take what stands before ``end``, and it; None (and nothing taken) where one of ``stops`` or the end of the
        text comes first."""
        start, seen = self._at, self._at
        while True:
            found = self._text.find(end, seen)
            rest = self._text[start : found if found >= 0 else len(self._text) - _begun(self._text, end)]
            if stops and any(char in rest for char in stops):
                return None
            if found >= 0:
                self._at = found + len(end)
                return rest
            if self.ended:
                return None
            seen = max(start, len(self._text) - len(end) + 1)
            yield

    def until(self, *marks: str) -> Steps[str | None]:
        """Take content up to the first of these marks, and that; None at the end of the text."""
        while True:
            found = [(at, mark) for mark in marks if (at := self._text.find(mark, self._at)) >= 0]
            if found:
                at, mark = min(found)
                self.text(self._text[self._at : at])
                self._at = at + len(mark)
                return mark
            if self.ended:
                self.text(self._rest())
                return None
            self.text(self._all_but(*marks))
            yield

    def reason(self, end: str) -> Steps[bool]:
        """Take reasoning up to its end mark, and that; white space around it is left out. False without a mark."""
        blank, begun = "", False
        while True:
            at = self._text.find(end, self._at)
            piece = self._text[self._at : at] if at >= 0 else self._rest() if self.ended else self._all_but(end)
            if at >= 0:
                self._at = at + len(end)
            whole = blank + piece if begun else piece.lstrip(_SPACE)
            kept = whole.rstrip(_SPACE)
            blank = whole[len(kept) :]
            begun = begun or bool(kept)
            self.reasoning(kept)
            if at >= 0 or self.ended:
                return at >= 0
            yield

    def string(self) -> Steps[str | None]:
        """Take a JSON string; None where there is none (what was read of it is taken)."""
        start = self._at
        if (yield from self.look(1)) != '"':
            return None
        self._at += 1
        while char := (yield from self.look(1)):
            self._at += 1
            if char == "\\":
                self._at += len((yield from self.look(1)))
            elif char == '"':
                try:
                    return str(json.loads(self._text[start : self._at], strict=False))
                except ValueError:
                    return None
        return None

    def value(self) -> Steps[str | None]:
        """Take a JSON value by its brackets and strings; None where it breaks off."""
        scan, start = _Scan(), self._at
        while not scan.done:
            char = yield from self.look(1)
            if not char or scan.take(char) is None:
                break
            self._at += 1
        return self._text[start : self._at] if scan.done or scan.plain else None

    def pass_object(self) -> Steps[bool]:
        """Give a JSON object on as arguments while it comes, control characters in its strings written as JSON has
        them; False where it breaks off."""
        scan = _Scan()
        while not scan.done:
            out: list[str] = []
            while self._at < len(self._text) and not scan.done:
                piece = scan.take(self._text[self._at])
                if piece is None:
                    self.arguments("".join(out))
                    return False
                out.append(piece)
                self._at += 1
            self.arguments("".join(out))
            if scan.done:
                break
            self._rest()
            if self.ended:
                return False
            yield
        return True

    def pass_string(self, end: str, trim: bool = False) -> Steps[bool]:
        """Give text up to ``end`` on as a JSON string while it comes, and take ``end``.

        Args:
            end: what comes behind.
            trim: one line end at either side is no part of it.

        False, with the string left open, where the text ends before.
        """
        self.arguments('"')
        held, begun = "", not trim
        while True:
            at = self._text.find(end, self._at)
            piece = self._text[self._at : at] if at >= 0 else self._rest() if self.ended else self._all_but(end)
            if at >= 0:
                self._at = at + len(end)
            if piece and not begun:
                begun, piece = True, piece.removeprefix("\n")
            piece, held = held + piece, ""
            if trim and piece.endswith("\n"):
                piece, held = piece[:-1], "\n"
            self.arguments(json.dumps(piece, ensure_ascii=False)[1:-1])
            if at >= 0:
                self.arguments('"')
            if at >= 0 or self.ended:
                return at >= 0
            yield

    def pass_rest(self) -> None:
        """Give on what is left of arguments that the end of the text cut off."""
        self.arguments(self._rest())

    def _rest(self) -> str:
        rest = self._text[self._at :]
        self._text, self._at = "", 0
        return rest

    def _all_but(self, *marks: str) -> str:
        """Take everything but what may be the beginning of a mark."""
        rest = self._text[self._at :]
        held = _begun(rest, *marks)
        self._text, self._at = rest[len(rest) - held :], 0
        return rest[: len(rest) - held]


def _begun(text: str, *marks: str) -> int:
    """Characters at the end of a text that may be the beginning of a mark."""
    held = 0
    for mark in marks:
        if mark[0] not in text[-len(mark) :]:
            continue
        for size in range(min(len(mark) - 1, len(text)), held, -1):
            if text.endswith(mark[:size]):
                held = size
                break
    return held
