"""Everything of the shim that outlives one HTTP request: the connection, what runs, leases and the monitor."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import logging
import time
import uuid
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from typing import Any

from triptych.client.sdk import wire
from triptych.python_models.contract.errors import ErrorKind, TriptychError
from triptych.python_models.contract.request import ChatRequest
from triptych.python_models.contract.settings import Settings
from triptych.python_models.contract.tensors import ENSEMBLES, LANGUAGE_MODEL, STAGES

from .admission import Admission
from .drain import Traffic
from .generation import Generation, Generations
from .metrics import ShimMetrics
from .monitor import Monitor
from .observation import part_of
from .options import ShimOptions
from .triton import Triton

log = logging.getLogger("triptych.shim")

_TICK_S = 0.5


class Service:
    """The shim's state. Until :meth:`connect` it refuses requests and says that it is loading.

    Args:
        options: options of the shim.
    """

    def __init__(self, options: ShimOptions) -> None:
        self.options = options
        self.metrics = ShimMetrics()
        self.admission = Admission(options.max_inflight_requests, options.max_inflight_bytes)
        self.traffic = Traffic()
        self.settings: Settings | None = None
        # the Triton server's
        self.triton_version: str | None = None
        self.metrics_url = ""
        # "system_fingerprint" of answers: changes with the model and its settings.
        self.fingerprint = ""
        self.monitor: Monitor | None = None
        self.created = int(time.time())
        self._triton: Triton | None = None
        self._why_not = "the model is loading"
        self._running: dict[str, Generation] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._background: set[asyncio.Task[None]] = set()

    async def connect(self, grpc_url: str, metrics_url: str, management_key: str = "") -> None:
        """Attach to a Triton server whose stages are ready.

        Args:
            grpc_url: ``host:port``.
            metrics_url: where its Prometheus text is.
            management_key: to load a stage that died; "" where the server wants none.

        Raises:
            TriptychError: where the server cannot be reached or is not ready.
        """
        triton = Triton(grpc_url, management_key)
        try:
            self.triton_version = await triton.version()
            stages = await triton.stages()
            if not stages:
                names = ", ".join(STAGES)
                raise TriptychError(ErrorKind.UNSUPPORTED, f"the Triton server has none of {names} loaded")
            self.settings = await triton.settings(stages[0])
            for stage in stages:
                await triton.control(stage, timeout_s=30.0)
        except BaseException:
            await triton.close()
            raise
        self.metrics_url = metrics_url
        text = f"{self.options.served_model_name}\n{self.settings.to_json()}"
        self.fingerprint = f"fp_{hashlib.sha256(text.encode()).hexdigest()[:12]}"
        self._triton = triton
        options = self.options
        self.monitor = Monitor(
            triton, stages, self._stage_died, self.metrics, options.probe_interval_s, options.probe_timeout_s
        )
        self.monitor.start()
        self._tasks = [
            asyncio.create_task(_repeat(self._renew_leases, options.lease_s / 3), name="leases"),
            asyncio.create_task(_repeat(self._watch_silence, _TICK_S), name="silence"),
        ]
        self._why_not = ""

    def unavailable(self, needed: Iterable[str] | None = None) -> TriptychError | None:
        """Why requests that need these stages (all that the server has) cannot be served now, or None."""
        if self._why_not:
            return TriptychError(ErrorKind.OVERLOADED, f"{self._why_not}; try again in a moment")
        assert self.monitor is not None
        return self.monitor.why_down(self.monitor.states if needed is None else needed)

    def begin(
        self, asks: Sequence[tuple[ChatRequest, tuple[bytes, ...]]], prefix: str = "chatcmpl"
    ) -> Generation | Generations:
        """Send requests to their ensembles.

        Args:
            asks: requests and their media, at least one.
            prefix: of the id.

        Raises:
            TriptychError: OVERLOADED or STAGE_DEAD while they cannot be served; then none of them is sent.
        """
        for request, _ in asks:
            steps = ENSEMBLES[wire.ensemble_for(request)].steps
            if error := self.unavailable(step.stage for step in steps):
                raise error
        first_id = f"{prefix}-{uuid.uuid4().hex}"
        if len(asks) == 1:
            return self._begin(first_id, *asks[0], None)
        news = asyncio.Event()
        offsets = [0, *itertools.accumulate(request.sampling.n for request, _ in asks)][:-1]
        ids = [first_id, *(f"{first_id}-{k}" for k in range(1, len(asks)))]
        members = [self._begin(own, *ask, news) for own, ask in zip(ids, asks, strict=True)]
        return Generations(members, offsets, news)

    def _begin(
        self, request_id: str, request: ChatRequest, media: tuple[bytes, ...], news: asyncio.Event | None
    ) -> Generation:
        assert self._triton is not None
        assert self.settings is not None
        generation = Generation(
            self._triton,
            part_of(request_id, request),
            wire.chat_message(request_id, request, media),
            request.sampling.n,
            start_limit_s=self.settings.mm_per_request_timeout + self.options.queue_allowance_s,
            silence_limit_s=max(10.0, 4 * self.settings.heartbeat_s),
            on_end=self._forget,
            news=news,
        )
        self._running[request_id] = generation
        return generation

    @property
    def generations(self) -> tuple[Generation, ...]:
        """Those that run."""
        return tuple(self._running.values())

    @property
    def loaded_stages(self) -> frozenset[str]:
        """The stages that the server has."""
        return frozenset(self.monitor.states if self.monitor is not None else ())

    def triton(self, needed: Iterable[str]) -> Triton:
        """The server, for what is asked of stages themselves.

        Args:
            needed: those stages.

        Raises:
            TriptychError: OVERLOADED or STAGE_DEAD where they cannot be asked now.
        """
        if error := self.unavailable(needed):
            raise error
        assert self._triton is not None
        return self._triton

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Do something in the background; failures of stages are left to the monitor."""

        async def quietly() -> None:
            with contextlib.suppress(TriptychError):
                await work

        self._spawn(quietly())

    def cancel(self, generation: Generation | Generations) -> None:
        """End a generation in the background, if it still runs: its client is gone."""
        self._spawn(generation.cancel())

    def note(self, error: TriptychError) -> None:
        """Tell the monitor of a request that met a dead stage."""
        if error.kind is ErrorKind.STAGE_DEAD and self.monitor is not None:
            self.monitor.nudge()

    def refresh_gauges(self) -> None:
        """Bring the gauges up to date before a scrape."""
        self.metrics.running.set(len(self._running))
        self.metrics.body_bytes.set(self.admission.bytes)

    def drain(self, reason: str = "the server is shutting down") -> None:
        """Refuse new requests, end those in flight with an error and revive no stage any more."""
        self._why_not = reason
        if self.monitor is not None:
            self.monitor.halt()
        for generation in list(self._running.values()):
            self._spawn(generation.cancel(TriptychError(ErrorKind.OVERLOADED, reason)))

    async def disconnect(self, reason: str) -> None:
        """Let go of the Triton server; requests are refused until the next :meth:`connect`.

        Args:
            reason: for those that run and those to come.
        """
        self.drain(reason)
        if self._background:
            await asyncio.wait(list(self._background), timeout=2.0)
        for task in (*self._tasks, *self._background):
            task.cancel()
        await asyncio.gather(*self._tasks, *self._background, return_exceptions=True)
        self._tasks = []
        if self.monitor is not None:
            await self.monitor.stop()
        if self._triton is not None:
            await self._triton.close()
            self._triton = None

    async def close(self) -> None:
        """End every request and task, and the connection."""
        await self.disconnect("the server is shutting down")

    def _forget(self, generation: Generation) -> None:
        self._running.pop(generation.id, None)

    def _stage_died(self, stage: str, error: TriptychError) -> None:
        for generation in list(self._running.values()):
            # Whatever was in the process is lost and nobody will say so: the engine holds what it accepted, and
            # may hold more; the other stages hold only what it has not accepted yet.
            if stage == LANGUAGE_MODEL.name or (not generation.accepted and stage in generation.stages):
                self._spawn(generation.cancel(error))

    async def _renew_leases(self) -> None:
        assert self._triton is not None
        if self._running:
            limit = self.options.lease_s / 3
            await self._triton.control(LANGUAGE_MODEL.name, renew=list(self._running), timeout_s=limit)

    async def _watch_silence(self) -> None:
        now = time.monotonic()
        for generation in list(self._running.values()):
            if error := generation.overdue(now):
                log.error("%s", error, extra={"ids": [generation.id]})
                self._spawn(generation.cancel(error))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)


async def _repeat(step: Callable[[], Awaitable[None]], pause_s: float) -> None:
    """Do something for ever; every request depends on it, so no failure ends it."""
    while True:
        await asyncio.sleep(pause_s)
        try:
            await step()
        except TriptychError as error:
            log.warning("%s: %s", getattr(step, "__name__", step), error)
        except Exception:
            log.exception("%s failed", getattr(step, "__name__", step))
