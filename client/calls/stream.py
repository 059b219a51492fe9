"""The deltas of one answer, as they come."""

from __future__ import annotations

import asyncio
import contextlib
import queue
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Protocol

from triptych.python_models.contract.delta import Delta
from triptych.python_models.contract.errors import TriptychError
from triptych.python_models.contract.tools import Tool

from .results import Collector, Result

Item = Delta | TriptychError | None
"""A delta, the error that ended a request, or None at its end."""
Sink = Callable[[Item], None]
"""Takes items in order, from any thread."""


class Handle(Protocol):
    """A request that runs."""

    @property
    def request_id(self) -> str:
        """The id under which every stage knows it."""

    def cancel(self) -> None:
        """End it wherever it is; returns at once, any number of times."""


Start = Callable[[Sink], Handle]


class Stream(Iterator[Delta]):
    """The deltas of one answer. Leaving its ``with`` block, closing or dropping it ends the generation.

    Deltas of several choices (``n``) come mixed, each says which choice it belongs to (``index``). Their text is as the
    model writes it; :meth:`result` sets reasoning and tool calls apart.
    """

    def __init__(self, start: Start, owner: object, tools: Sequence[Tool] = ()) -> None:
        # an engine or client that is collected ends what runs
        self._owner = owner
        self._done = False
        self._error: TriptychError | None = None
        self._collected = Collector(tools)
        self._items: queue.SimpleQueue[Item] = queue.SimpleQueue()
        self._handle = start(self._items.put)

    @property
    def request_id(self) -> str:
        """The id under which every stage knows the request."""
        return self._handle.request_id

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Delta:
        while not self._done:
            item = self._items.get()
            if isinstance(item, TriptychError):
                self._done, self._error = True, item
                raise item
            if item is None:
                self._done = True
            else:
                self._collected.add(item)
                if not item.is_heartbeat:
                    return item
        raise StopIteration

    def result(self) -> Result:
        """Wait for the rest; the whole answer, with what was iterated over before.

        Raises:
            TriptychError: how the request failed.
        """
        for _ in self:
            pass
        if self._error is not None:
            raise self._error
        return self._collected.result(self.request_id)

    def close(self) -> None:
        """End the generation if it still runs; deltas that wait are dropped."""
        if not self._done:
            self._done = True
            self._handle.cancel()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __del__(self) -> None:
        # where start() failed there is nothing to end
        if hasattr(self, "_handle"):
            self.close()


class AsyncStream(AsyncIterator[Delta]):
    """As :class:`Stream`, for ``async for``. Cancelling the task that waits for it ends the generation too."""

    def __init__(self, start: Start, owner: object, tools: Sequence[Tool] = ()) -> None:
        self._owner = owner
        self._done = False
        self._error: TriptychError | None = None
        self._collected = Collector(tools)
        items: asyncio.Queue[Item] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def deliver(item: Item) -> None:
            # after the end of its loop nobody is left to take it
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(items.put_nowait, item)

        self._items = items
        self._handle = start(deliver)

    @property
    def request_id(self) -> str:
        """The id under which every stage knows the request."""
        return self._handle.request_id

    def __aiter__(self) -> AsyncStream:
        return self

    async def __anext__(self) -> Delta:
        while not self._done:
            try:
                item = await self._items.get()
            except asyncio.CancelledError:
                self.close()
                raise
            if isinstance(item, TriptychError):
                self._done, self._error = True, item
                raise item
            if item is None:
                self._done = True
            else:
                self._collected.add(item)
                if not item.is_heartbeat:
                    return item
        raise StopAsyncIteration

    async def result(self) -> Result:
        """Wait for the rest; the whole answer, with what was iterated over before.

        Raises:
            TriptychError: how the request failed.
        """
        async for _ in self:
            pass
        if self._error is not None:
            raise self._error
        return self._collected.result(self.request_id)

    def close(self) -> None:
        """End the generation if it still runs; deltas that wait are dropped."""
        if not self._done:
            self._done = True
            self._handle.cancel()

    async def aclose(self) -> None:
        """As :meth:`close`, for ``contextlib.aclosing``."""
        self.close()

    async def __aenter__(self) -> AsyncStream:
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_handle"):
            self.close()
