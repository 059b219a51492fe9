"""The ensembles in one process, without a server: the same stage classes, joined by the same ensemble specs.

The offline path, the reference of the overhead benchmark and a handy way to debug a stage.
"""

from __future__ import annotations

import queue
import threading
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .contract.delta import Delta
from .contract.errors import TriptychError
from .contract.request import ChatRequest
from .contract.settings import Settings
from .contract.tensors import CHAT, STAGES, EnsembleSpec, Step
from .stage import NoTelemetry, Stage, Telemetry
from .stages import stage_class


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
        self.stages: dict[str, Stage] = {
            name: stage_class(name)(settings, self._telemetry, device if spec.uses_gpu else "cpu")
            for name, spec in STAGES.items()
        }

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
        run = _Run(self.stages, ensemble, request_id or uuid.uuid4().hex)
        inputs: dict[str, Any] = {"request": [request.to_json().encode()]}
        if media:
            inputs["media"] = list(media)
        run.start(inputs)
        try:
            while (item := run.results.get()) is not None:
                if isinstance(item, TriptychError):
                    raise item
                if not item.is_heartbeat:
                    yield item
            run.done = True
        finally:
            if not run.done:
                self.cancel([run.request_id])

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


class _Run:
    """One request on its way: a step starts as soon as all its inputs are there (or known to be absent)."""

    def __init__(self, stages: Mapping[str, Stage], spec: EnsembleSpec, request_id: str) -> None:
        self.stages = stages
        self.spec = spec
        self.request_id = request_id
        self.results: queue.SimpleQueue[Delta | TriptychError | None] = queue.SimpleQueue()
        self.done = False
        self._lock = threading.Lock()
        self._tensors: dict[str, Any] = {}
        self._waiting = list(spec.steps)

    def start(self, inputs: Mapping[str, Any]) -> None:
        self.arrived({spec.name: inputs.get(spec.name) for spec in self.spec.inputs})

    def arrived(self, tensors: Mapping[str, Any]) -> None:
        """Take tensors (None: the step left it out) and start the steps that now can run."""
        with self._lock:
            self._tensors.update(tensors)
            ready = [s for s in self._waiting if all(name in self._tensors for name in s.inputs.values())]
            self._waiting = [s for s in self._waiting if s not in ready]
        for step in ready:
            given = {inner: self._tensors[outer] for inner, outer in step.inputs.items()}
            present = {name: value for name, value in given.items() if value is not None}
            self.stages[step.stage].submit(self.request_id, present, _StepResponder(self, step))


class _StepResponder:
    def __init__(self, run: _Run, step: Step) -> None:
        self._run = run
        self._step = step
        self._last = STAGES[step.stage].decoupled

    def send(self, answer: Mapping[str, Any] | Delta, *, final: bool) -> None:
        if not self._last:
            assert not isinstance(answer, Delta)
            self._run.arrived({outer: answer.get(inner) for inner, outer in self._step.outputs.items()})
            return
        if answer:
            self._run.results.put(answer if isinstance(answer, Delta) else Delta.from_tensors(answer))
        if final:
            self._run.results.put(None)

    def fail(self, error: TriptychError) -> None:
        error.stage = error.stage or self._step.stage
        self._run.results.put(error)
