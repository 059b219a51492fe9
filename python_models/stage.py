"""What a stage is, without any server: the Triton backend, the offline engine and the tests all host this.

A stage owns its threads and its batching. ``submit`` and ``cancel`` return at once; answers go through the
:class:`Responder` from whatever thread the stage likes.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from .contract.delta import Delta
from .contract.errors import TriptychError
from .contract.settings import Settings


class Responder(Protocol):
    """Where the answers to one request go. Thread-safe; calls after the final one are ignored."""

    def send(self, answer: Mapping[str, Any] | Delta, *, final: bool) -> None:
        """Send one response: STRING tensors as lists of str or bytes, others as numpy arrays or torch tensors.

        A decoupled stage may send many, with ``final`` on the last; others send exactly one, final. It may send a
        :class:`Delta` instead of its tensors: deltas of one choice that come faster than they can be sent leave
        merged into one.
        """

    def fail(self, error: TriptychError) -> None:
        """End the request with an error."""

    def render(self, renderer: Callable[[Delta], Mapping[str, Any] | None]) -> None:
        """Deltas, merged or not, leave as the tensors that this makes of them; None is not sent.

        To be called before the first one is sent. The renderer is called by one thread at a time.
        """


class Telemetry(Protocol):
    """Where a stage's measurements go (names: contract/metrics.py). Thread-safe, never blocks."""

    def add(self, name: str, value: float = 1.0, **labels: str) -> None:
        """Increase a counter, or a gauge by a signed amount."""

    def set(self, name: str, value: float, **labels: str) -> None:
        """Set a gauge."""

    def observe(self, name: str, value: float, **labels: str) -> None:
        """Record one observation of a histogram."""


class NoTelemetry:
    """A Telemetry that forgets everything."""

    def add(self, name: str, value: float = 1.0, **labels: str) -> None:
        """Do nothing."""

    def set(self, name: str, value: float, **labels: str) -> None:
        """Do nothing."""

    def observe(self, name: str, value: float, **labels: str) -> None:
        """Do nothing."""


class Stage(ABC):
    """One model of the ensemble. The constructor loads everything and raises a TriptychError that says what to do.

    Attributes:
        on_fatal: set by a host; called when nothing more can be computed in this process (a broken CUDA context),
            after the last error was handed to its responder.
        pauses: set while the stage's worker leaves the interpreter to others, because it waits for its device or for
            work. A stage that feeds a GPU clears it in between: every call into torch lets go of the interpreter lock,
            and taking it back from a busy thread costs the time to wake up, dozens of times a step.
    """

    on_fatal: Callable[[], None] | None = None

    def __init__(self, settings: Settings, telemetry: Telemetry, device: str) -> None:
        """Args: settings of the deployment; telemetry; ``device``, a torch device string such as "cuda:0"."""
        self.pauses = threading.Event()
        self.pauses.set()
        self.settings = settings
        self.telemetry = telemetry
        self.device = device

    @abstractmethod
    def submit(self, request_id: str, inputs: Mapping[str, Any], responder: Responder) -> None:
        """Take a request; never blocks, never raises: every outcome goes through ``responder``.

        Args:
            request_id: unique among running requests ("" where the caller gave none).
            inputs: the stage's input tensors that are present: STRING as list[bytes], others as numpy arrays, or
                torch tensors where the spec says ``device_ok``. None at all asks for a sign of life: a stage that can
                work answers at once with no tensors.
        """

    @abstractmethod
    def cancel(self, request_ids: Sequence[str]) -> None:
        """End these requests with CANCELLED; ids it does not know are ignored. Never blocks."""

    def renew(self, request_ids: Sequence[str]) -> None:  # noqa: B027 - most stages keep no leases
        """Restart the lease of these requests (language_model only)."""

    def flush(self, responder: Responder) -> None:
        """Empty the stage's caches, then answer with no tensors; fails where they cannot be emptied now."""
        responder.send({}, final=True)

    @abstractmethod
    def close(self) -> None:
        """End every request with an error, stop all threads, free memory."""
