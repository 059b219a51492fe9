"""Counts the tokens of an answer's reasoning while its text is made."""

from __future__ import annotations

from ...contract.answer import Marks


class ReasoningCount:
    """Counts one choice's tokens up to the mark that ends its reasoning, that included.

    Attributes:
        tokens: of reasoning so far.
    """

    def __init__(self, marks: Marks, begun: bool) -> None:
        """Args: around reasoning; whether the prompt ends inside it: else it begins with its mark, or not at all."""
        self._marks = marks
        self._open = begun
        self._over = False
        self._text = ""
        self._seen = 0

    @property
    def tokens(self) -> int:
        """Of reasoning so far."""
        return self._seen if self._open else 0

    def add(self, text: str) -> None:
        """Take the text that one token brought."""
        if self._over:
            return
        self._seen += 1
        self._text += text
        if not self._open:
            begin = self._text.lstrip()
            self._open = begin.startswith(self._marks.start)
            self._over = not self._open and not self._marks.start.startswith(begin)
        if self._open:
            self._over = self._marks.end in self._text
            self._text = self._text[-len(self._marks.end) + 1 :]
