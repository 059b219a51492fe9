"""The ensembles in one process, without a server: the same stage classes, joined by the same ensemble specs.

The offline path, the reference of the overhead benchmark and a handy way to debug a stage.
"""

from __future__ import annotations

import queue
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from .contract.delta import Delta
from .contract.errors import TriptychError
from .contract.request import ChatRequest
from .contract.settings import Settings
from .contract.tensors import CHAT, GENERATE, STAGES, EnsembleSpec, Step
from .stage import NoTelemetry, Stage, Telemetry
from .stages import stage_class

Sink = Callable[[Any], None]
"""Takes a :class:`Delta` (or the tensors of a response, where the request has a form of its own), the error that ended
a request, or None at its end."""


class LocalEnsemble:
    """Every stage of a deployment, loaded into this process."""

    def __init__(self, settings: Settings, device: str = "cpu", telemetry: Telemetry | None = None) -> None:
        """Load all stages.

        Args:
            settings: options of the deployment.
            device: torch device of the stages that use one.
            telemetry: where measurements go; None: nowhere.

        Raises:
            TriptychError: what a stage says when it cannot load.
        """
        self._telemetry = telemetry or NoTelemetry()
        self.stages: dict[str, Stage] = {}
        try:
            for name, spec in STAGES.items():
                self.stages[name] = stage_class(name)(settings, self._telemetry, device if spec.uses_gpu else "cpu")
        except BaseException:
            self.close()
            raise

    def start(
        self,
        request: ChatRequest,
        media: Sequence[bytes],
        sink: Sink,
        request_id: str | None = None,
        ensemble: EnsembleSpec = CHAT,
    ) -> LocalRun:
        """Begin a request and return at once.

        Args:
            request: what to answer.
            media: encoded media that its parts name by index.
            sink: called with each delta, then with None; or, at any point, with the error that ended the request. From
                the stages' threads, so it must not block.
            request_id: unique among running requests; None makes one.
            ensemble: which stages it goes through.
        """
        run = LocalRun(self.stages, ensemble, request_id or uuid.uuid4().hex, sink)
        inputs: dict[str, Any] = {"request": [request.to_json().encode()]}
        if media:
            inputs["media"] = list(media)
        run.start(inputs)
        return run

    def chat(
        self,
        request: ChatRequest,
        media: Sequence[bytes] = (),
        request_id: str | None = None,
        ensemble: EnsembleSpec = CHAT,
    ) -> Iterator[Delta]:
        """Run one request; yields every delta, heartbeats left out.

        Raises:
            TriptychError: what the failing stage says.
        """
        results: queue.SimpleQueue[Delta | TriptychError | None] = queue.SimpleQueue()
        run = self.start(request, media, results.put, request_id, ensemble)
        done = False
        try:
            while (item := results.get()) is not None:
                if isinstance(item, TriptychError):
                    raise item
                if not item.is_heartbeat:
                    yield item
            done = True
        finally:
            if not done:
                run.cancel()

    def generate(self, inputs: Mapping[str, Any], request_id: str | None = None) -> Iterator[Mapping[str, Any]]:
        """Run one request of the ensemble ``generate``.

        Args:
            inputs: its input tensors; STRING tensors are sequences of bytes.
            request_id: unique among running requests; None makes one.

        Yields:
            The output tensors of each response.

        Raises:
            TriptychError: what the failing stage says.
        """
        results: queue.SimpleQueue[Any] = queue.SimpleQueue()
        run = LocalRun(self.stages, GENERATE, request_id or uuid.uuid4().hex, results.put)
        run.start(inputs)
        done = False
        try:
            while (item := results.get()) is not None:
                if isinstance(item, TriptychError):
                    raise item
                if isinstance(item, Mapping):
                    yield item
            done = True
        finally:
            if not done:
                run.cancel()

    def cancel(self, request_ids: Sequence[str]) -> None:
        """End these requests wherever they are."""
        for stage in self.stages.values():
            stage.cancel(request_ids)

    def close(self) -> None:
        """Stop all stages."""
        for stage in self.stages.values():
            stage.close()

    def __enter__(self) -> LocalEnsemble:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class LocalRun:
    """One request on its way: a step starts as soon as all its inputs are there (or known to be absent).

    Attributes:
        request_id: the id under which every stage knows it.
    """

    def __init__(self, stages: Mapping[str, Stage], spec: EnsembleSpec, request_id: str, sink: Sink) -> None:
        self.request_id = request_id
        self.sink = sink
        self._stages = stages
        self._spec = spec
        self._lock = threading.Lock()
        self._cancelled = False
        self._tensors: dict[str, Any] = {}
        self._waiting = list(spec.steps)

    def start(self, inputs: Mapping[str, Any]) -> None:
        """Give the ensemble's inputs."""
        self.arrived({spec.name: inputs.get(spec.name) for spec in self._spec.inputs})

    def arrived(self, tensors: Mapping[str, Any]) -> None:
        """Take tensors (None: the step left it out) and start the steps that now can run."""
        with self._lock:
            self._tensors.update(tensors)
            ready = [s for s in self._waiting if all(name in self._tensors for name in s.inputs.values())]
            self._waiting = [s for s in self._waiting if s not in ready]
            if self._cancelled:
                ready = []
        for step in ready:
            given = {inner: self._tensors[outer] for inner, outer in step.inputs.items()}
            present = {name: value for name, value in given.items() if value is not None}
            self._stages[step.stage].submit(self.request_id, present, _StepResponder(self, step))
        if ready and self._cancelled:
            # the cancel came before the stage knew of the request
            self._cancel_in(step.stage for step in ready)

    def cancel(self) -> None:
        """End it wherever it is; returns at once, any number of times."""
        with self._lock:
            self._cancelled = True
        self._cancel_in(self._stages)

    def _cancel_in(self, stages: Iterable[str]) -> None:
        for stage in stages:
            self._stages[stage].cancel([self.request_id])


class _StepResponder:
    def __init__(self, run: LocalRun, step: Step) -> None:
        self._run = run
        self._step = step
        self._last = STAGES[step.stage].decoupled
        self._renderer: Callable[[Delta], Mapping[str, Any] | None] | None = None

    def render(self, renderer: Callable[[Delta], Mapping[str, Any] | None]) -> None:
        self._renderer = renderer

    def send(self, answer: Mapping[str, Any] | Delta, *, final: bool) -> None:
        if not self._last:
            assert not isinstance(answer, Delta)
            self._run.arrived({outer: answer.get(inner) for inner, outer in self._step.outputs.items()})
            return
        if answer:
            delta = answer if isinstance(answer, Delta) else Delta.from_tensors(answer)
            if self._renderer is None:
                self._run.sink(delta)
            elif (tensors := self._renderer(delta)) is not None:
                self._run.sink(
                    {outer: tensors[inner] for inner, outer in self._step.outputs.items() if inner in tensors}
                )
        if final:
            self._run.sink(None)

    def fail(self, error: TriptychError) -> None:
        error.stage = error.stage or self._step.stage
        self._run.sink(error)
