"""Finds dead stages and loads them again.

The server neither restarts the process of a model that died nor ends the requests that ran in it, and its own health
stays green. So every stage is probed with an empty control request, which a living one answers at once.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from triptych.python_models.contract.errors import ErrorKind, TriptychError

from .metrics import ShimMetrics
from .triton import Triton

log = logging.getLogger("triptych.monitor")

# probes in a row that the server refused: the process is gone
_MAX_MISSES = 2
# ... that nobody answered: it is stuck, or this machine is very busy, and loading a model would only add to that
_MAX_SILENT = 6
_MAX_BACKOFF_S = 30.0


@dataclass
class StageState:
    """What is known of a stage.

    Attributes:
        up: it answered its last probe.
        reason: why not, or "".
    """

    up: bool = True
    reason: str = ""


class Monitor:
    """One probing task per stage.

    Args:
        triton: the server.
        stages: names of the models to watch.
        on_death: called with the stage's name and the error for its requests, before the model is loaded again.
        metrics: where restarts are counted.
        interval_s: pause between probes.
        timeout_s: a probe without an answer for so long failed.
    """

    def __init__(
        self,
        triton: Triton,
        stages: Iterable[str],
        on_death: Callable[[str, TriptychError], None],
        metrics: ShimMetrics,
        interval_s: float,
        timeout_s: float,
    ) -> None:
        self.states = {stage: StageState() for stage in stages}
        self._triton = triton
        self._on_death = on_death
        self._metrics = metrics
        self._interval_s = interval_s
        self._timeout_s = timeout_s
        self._nudges = {stage: asyncio.Event() for stage in self.states}
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Begin probing."""
        for stage in self.states:
            self._metrics.stage_up.labels(stage).set(1)
            self._tasks.append(asyncio.create_task(self._watch(stage), name=f"monitor-{stage}"))

    def halt(self) -> None:
        """Begin no probe any more: a server that is being stopped has no dead stages."""
        for task in self._tasks:
            task.cancel()

    async def stop(self) -> None:
        """End probing; returns when it has ended."""
        self.halt()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def nudge(self) -> None:
        """Probe every stage now: a request met a dead one."""
        for event in self._nudges.values():
            event.set()

    def why_down(self, needed: Iterable[str]) -> TriptychError | None:
        """The error for a request that needs these stages while one of them is down, else None."""
        for stage in needed:
            state = self.states.get(stage)
            if state is None:
                there = ", ".join(self.states)
                return TriptychError(ErrorKind.UNSUPPORTED, f"{stage} does not run on this server, which has {there}")
            if not state.up:
                return TriptychError(ErrorKind.STAGE_DEAD, f"{stage} is being restarted: {state.reason}", stage=stage)
        return None

    async def _watch(self, stage: str) -> None:
        state, nudge = self.states[stage], self._nudges[stage]
        misses = 0
        while True:
            if (error := await self._probe(stage)) is None:
                misses = 0
            else:
                # A busy machine can make a living process look dead once, and a reload costs all its requests.
                misses += 1
                if misses < (_MAX_SILENT if error.kind is ErrorKind.TIMEOUT else _MAX_MISSES):
                    continue
                await self._revive(stage, state, error)
                misses = 0
            nudge.clear()
            try:
                await asyncio.wait_for(nudge.wait(), self._interval_s)
            except asyncio.TimeoutError:
                continue

    async def _probe(self, stage: str) -> TriptychError | None:
        try:
            await self._triton.control(stage, timeout_s=self._timeout_s)
        except TriptychError as error:
            return error
        except Exception as error:
            log.exception("%s cannot be probed", stage)
            return TriptychError(ErrorKind.STAGE_FAILED, f"{type(error).__name__}: {error}", stage=stage)
        return None

    async def _revive(self, stage: str, state: StageState, error: TriptychError) -> None:
        state.up, state.reason = False, error.message
        self._metrics.stage_up.labels(stage).set(0)
        log.error("%s died (%s); loading it again", stage, error.message)
        self._on_death(
            stage,
            TriptychError(
                ErrorKind.STAGE_DEAD, f"{stage} died while it worked on this request; try again", stage=stage
            ),
        )
        pause, began = self._interval_s, time.monotonic()
        while True:
            failure: TriptychError | None = None
            try:
                await self._triton.reload(stage)
            except TriptychError as refused:
                failure = refused
            # who may not load it still sees when somebody else has
            answer = await self._probe(stage)
            if answer is None:
                break
            failure = failure or answer
            state.reason = failure.message
            log.error("%s could not be loaded: %s; next try in %.0f s", stage, failure.message, pause)
            await asyncio.sleep(pause)
            pause = min(2 * pause, _MAX_BACKOFF_S)
        state.up, state.reason = True, ""
        self._metrics.stage_restarts.labels(stage).inc()
        self._metrics.stage_up.labels(stage).set(1)
        log.warning("%s is back after %.1f s", stage, time.monotonic() - began)
