"""Items of a response's output while they are written, with the events that tell of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar

Event = tuple[str, dict[str, Any]]
"""Kind, without ``response.``, and fields."""


class Item(ABC):
    """One item.

    Args:
        mark: of the response, part of the item's id.
        index: its place in the output.
    """

    prefix: ClassVar[str]
    delta_event: ClassVar[str]

    def __init__(self, mark: str, index: int) -> None:
        self.index = index
        self.id = f"{self.prefix}_{mark}_{index}"
        self.pieces: list[str] = []

    @property
    def place(self) -> dict[str, Any]:
        """What its events say of where it is."""
        return {"item_id": self.id, "output_index": self.index}

    @property
    def text(self) -> str:
        """All that was written."""
        return "".join(self.pieces)

    def begin(self) -> Iterator[Event]:
        """What tells that it is there."""
        yield "output_item.added", {"output_index": self.index, "item": self._empty()}

    def add(self, text: str, **more: Any) -> Event:
        """Write on; ``more`` are further fields of the event."""
        self.pieces.append(text)
        return self.delta_event, {**self.place, "delta": text, **more}

    def end(self, status: str) -> Iterator[Event]:
        """What tells that it is over."""
        yield "output_item.done", {"output_index": self.index, "item": self.whole(status)}

    @abstractmethod
    def whole(self, status: str) -> dict[str, Any]:
        """As the output has it."""

    @abstractmethod
    def _empty(self) -> dict[str, Any]:
        """As the event of its beginning has it."""


class _OfParts(Item):
    """An item whose content is a part."""

    done_event: ClassVar[str]

    @property
    def place(self) -> dict[str, Any]:
        """Beside the item's, that of its part."""
        return super().place | {"content_index": 0}

    def begin(self) -> Iterator[Event]:
        """The item, then its part."""
        yield from super().begin()
        yield "content_part.added", {**self.place, "part": self._part()}

    def end(self, status: str) -> Iterator[Event]:
        """What was written, then all around it."""
        part = self._part()
        yield self.done_event, {**self.place, **{name: value for name, value in part.items() if name in _TOLD}}
        yield "content_part.done", {**self.place, "part": part}
        yield from super().end(status)

    @abstractmethod
    def _part(self) -> dict[str, Any]:
        """Its content."""


_TOLD = ("text", "logprobs")


class MessageItem(_OfParts):
    """The answer's text."""

    prefix = "msg"
    delta_event = "output_text.delta"
    done_event = "output_text.done"

    def __init__(self, mark: str, index: int) -> None:
        super().__init__(mark, index)
        self.logprobs: list[dict[str, Any]] = []

    def whole(self, status: str) -> dict[str, Any]:
        """As the output has it."""
        return self._empty() | {"status": status, "content": [self._part()]}

    def _empty(self) -> dict[str, Any]:
        return {"id": self.id, "type": "message", "status": "in_progress", "role": "assistant", "content": []}

    def _part(self) -> dict[str, Any]:
        return {"type": "output_text", "text": self.text, "annotations": [], "logprobs": list(self.logprobs)}


class ReasoningItem(_OfParts):
    """What the model thought before it answered."""

    prefix = "rs"
    delta_event = "reasoning_text.delta"
    done_event = "reasoning_text.done"

    def whole(self, status: str) -> dict[str, Any]:
        """As the output has it."""
        return self._empty() | {"status": status, "content": [self._part()]}

    def _empty(self) -> dict[str, Any]:
        return {"id": self.id, "type": "reasoning", "status": "in_progress", "summary": [], "content": []}

    def _part(self) -> dict[str, Any]:
        return {"type": "reasoning_text", "text": self.text}


class CallItem(Item):
    """A call of a function, whose arguments are written.

    Args:
        mark, index: of every item.
        name: of the function.
        call_id: that what it gave will name.
    """

    prefix = "fc"
    delta_event = "function_call_arguments.delta"

    def __init__(self, mark: str, index: int, name: str, call_id: str) -> None:
        super().__init__(mark, index)
        self.name = name
        self.call_id = call_id

    def end(self, status: str) -> Iterator[Event]:
        """What was written, then all around it."""
        yield "function_call_arguments.done", {**self.place, "arguments": self.text}
        yield from super().end(status)

    def whole(self, status: str) -> dict[str, Any]:
        """As the output has it."""
        return self._empty() | {"status": status, "arguments": self.text}

    def _empty(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "type": "function_call",
            "status": "in_progress",
            "arguments": "",
            "call_id": self.call_id,
            "name": self.name,
        }
