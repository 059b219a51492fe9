"""Responses that later requests continue or fetch: in memory, within a limit of bytes."""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# What an entry takes beside its JSON, roughly.
_OVERHEAD = 2048


@dataclass(eq=False)
class _Turn:
    """The items of one response, in a chain with those it continued.

    Attributes:
        items: its input, then its output.
        before: the turn that it continued.
        size: bytes that it accounts for.
        users: the stored response itself and turns that continue it; without any it is let go of.
    """

    items: tuple[Mapping[str, Any], ...]
    before: _Turn | None
    size: int
    users: int = 0


@dataclass(frozen=True)
class Stored:
    """One response.

    Attributes:
        response: the object that was sent.
        num_input: how many items of its turn were input.
        turn: its items.
    """

    response: Mapping[str, Any]
    num_input: int
    turn: _Turn

    @property
    def input_items(self) -> tuple[Mapping[str, Any], ...]:
        """What the request gave, without what it continued."""
        return self.turn.items[: self.num_input]

    def conversation(self) -> list[Mapping[str, Any]]:
        """All items from the first turn to its own output."""
        turns = []
        turn: _Turn | None = self.turn
        while turn is not None:
            turns.append(turn)
            turn = turn.before
        return [item for found in reversed(turns) for item in found.items]


class Store:
    """The responses used last, within a limit.

    A conversation whose earlier responses were dropped goes on all the same: its turns live as long as a stored
    response needs them.

    Args:
        max_bytes: of JSON, media in ``data:`` URLs included; 0 stores nothing.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.bytes = 0
        self._found: OrderedDict[str, Stored] = OrderedDict()
        # large bodies are read in a thread of their own
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._found)

    def get(self, response_id: str) -> Stored | None:
        """A response, which is used last now; None where there is none."""
        with self._lock:
            found = self._found.get(response_id)
            if found is not None:
                self._found.move_to_end(response_id)
            return found

    def put(
        self,
        response: Mapping[str, Any],
        input_items: Sequence[Mapping[str, Any]],
        before: Stored | None,
        num_bytes: int,
    ) -> bool:
        """Store a response; False where it alone, or with what it continued, is larger than the limit.

        Args:
            response: the object that was sent, with its output.
            input_items: what the request gave.
            before: what it continued.
            num_bytes: of the request's body, which its items take.
        """
        items = (*input_items, *response["output"])
        size = _OVERHEAD + num_bytes + len(json.dumps(response))
        if size > self.max_bytes:
            return False
        turn = _Turn(items, before.turn if before is not None else None, size)
        name: str = response["id"]
        with self._lock:
            self._hold(turn)
            self._found[name] = Stored(response, len(input_items), turn)
            while self.bytes > self.max_bytes:
                self._drop(next(iter(self._found)))
            return name in self._found

    def delete(self, response_id: str) -> bool:
        """Drop a response; False where there is none."""
        with self._lock:
            if response_id not in self._found:
                return False
            self._drop(response_id)
            return True

    def _hold(self, turn: _Turn | None) -> None:
        """One more needs a turn, which may have been let go of while an answer that continues it was made."""
        while turn is not None:
            turn.users += 1
            if turn.users > 1:
                return
            self.bytes += turn.size
            turn = turn.before

    def _drop(self, response_id: str) -> None:
        turn: _Turn | None = self._found.pop(response_id).turn
        while turn is not None:
            turn.users -= 1
            if turn.users:
                return
            self.bytes -= turn.size
            turn = turn.before
