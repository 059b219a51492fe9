"""Many requests at once: as many in flight as are good for throughput, results in the order of the input."""

from __future__ import annotations

import queue
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tqdm import tqdm

from triptych.python_models.contract.errors import ErrorKind, TriptychError

from .request import Call
from .results import Collector, Result
from .stream import Handle, Item, Sink

Open = Callable[[Call, Sink], Handle]
Make = Callable[[], Call]


@dataclass
class ItemError(TriptychError):
    """How one item of a batch failed.

    Attributes:
        index: its place in the batch, from 0.
    """

    index: int = 0


@dataclass
class BatchError(TriptychError):
    """Some items of a batch failed, all others have their results.

    Attributes:
        errors: place in the batch -> how it failed.
        results: in the order of the batch, None where there is an error.
    """

    errors: dict[int, ItemError] = field(default_factory=dict)
    results: list[Result | None] = field(default_factory=list)


def whole_batch(results: Sequence[Result | ItemError]) -> list[Result]:
    """The results of a batch in which nothing failed.

    Raises:
        BatchError: something did.
    """
    errors = {item.index: item for item in results if isinstance(item, ItemError)}
    if not errors:
        return [item for item in results if isinstance(item, Result)]
    index, first = next(iter(errors.items()))
    raise BatchError(
        first.kind,
        f"{len(errors)} of {len(results)} items failed; item {index}: {first.message}",
        first.param,
        first.stage,
        errors,
        [item if isinstance(item, Result) else None for item in results],
    )


class Batch:
    """One batch.

    Args:
        start: begins a request.
        makers: of the items; called when it is an item's turn, so that only the media of what runs are in memory.
        window: items in flight at most.
        progress: a bar on standard error; None: where that is a terminal.
    """

    def __init__(self, start: Open, makers: Sequence[Make], window: int, progress: bool | None) -> None:
        self._start = start
        self._makers = makers
        self._window = window
        self._progress = progress
        self._events: queue.SimpleQueue[tuple[int, Item] | None] = queue.SimpleQueue()
        self._pending = deque(range(len(makers)))
        self._running: dict[int, tuple[Handle, Collector]] = {}
        self._results: dict[int, Result | ItemError] = {}

    def run(self) -> list[Result | ItemError]:
        """Run all of it; what is left is cancelled where this is interrupted."""
        hidden = None if self._progress is None else not self._progress
        with tqdm(total=len(self._makers), disable=hidden, unit="answer", dynamic_ncols=True) as bar:
            try:
                while self._pending or self._running:
                    self._fill()
                    bar.update(len(self._results) - bar.n)
                    if self._running:
                        if (event := self._events.get()) is None:
                            break
                        self._take(*event)
                bar.update(len(self._results) - bar.n)
            finally:
                for handle, _ in self._running.values():
                    handle.cancel()
        return [self._results[index] for index in range(len(self._makers)) if index in self._results]

    def stop(self) -> None:
        """End it from another thread."""
        self._events.put(None)

    def _fill(self) -> None:
        while self._pending and len(self._running) < self._window:
            index = self._pending.popleft()
            try:
                call = self._makers[index]()
                handle = self._start(call, self._sink(index))
            except TriptychError as error:
                self._fail(index, error)
            else:
                self._running[index] = handle, Collector(call.request.template.tools)

    def _sink(self, index: int) -> Sink:
        return lambda item: self._events.put((index, item))

    def _take(self, index: int, item: Item) -> None:
        handle, collected = self._running[index]
        if isinstance(item, TriptychError):
            del self._running[index]
            if item.kind is ErrorKind.OVERLOADED and self._running:
                # too many at once for the memory there is: again, when another one is done
                self._window = len(self._running)
                self._pending.appendleft(index)
            else:
                self._fail(index, item)
        elif item is None:
            del self._running[index]
            self._results[index] = collected.result(handle.request_id)
        else:
            collected.add(item)

    def _fail(self, index: int, error: TriptychError) -> None:
        self._results[index] = ItemError(error.kind, error.message, error.param, error.stage, index)
