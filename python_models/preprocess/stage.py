"""The preprocess stage: a chat request with raw media in, token ids and packed features out.

One thread runs an asyncio loop; every request is a task on it. What takes CPU time runs in threads (videos in worker
processes), so the loop is always free to take, cancel and time out requests. Requests without media have threads of
their own and never wait for those with media.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import numpy as np

from ..contract.errors import ErrorKind, TriptychError, invalid
from ..contract.features import pack
from ..contract.generate import Form, in_caller_words
from ..contract.generate import read as read_generate
from ..contract.logs import about
from ..contract.plan import Plan
from ..contract.request import ChatRequest
from ..contract.settings import Settings
from ..contract.tensors import GENERATE_INPUTS, PREPROCESS
from ..contract.timings import MediumTimes, PreprocessTimes
from ..families.base import Prepared, Preprocessor, refuse_modality
from ..media.fetch import Fetcher
from ..media.pool import DecodePool
from ..media.types import Medium
from ..stage import Responder, Stage, Telemetry
from .loader import Loading, MediaLoader

_T = TypeVar("_T")

NAME = "preprocess"
CLOSE_TIMEOUT_S = 10.0
_TEXT_THREADS = 4
_MAX_VIDEO_WORKERS = 4

_log = logging.getLogger(__name__)


@dataclass(eq=False)
class _Job:
    """A request on its way. ``reason`` is the error it ends with when its task is cancelled."""

    request_id: str
    responder: Responder
    arrived: float
    task: asyncio.Task[dict[str, Any]] | None = None
    reason: TriptychError | None = None


class PreprocessStage(Stage):
    """Hosts a family's preprocessor; see :class:`~triptych.python_models.stage.Stage`."""

    def __init__(
        self,
        settings: Settings,
        telemetry: Telemetry,
        device: str,
        preprocessor: Preprocessor | None = None,
        fetcher: Fetcher | None = None,
    ) -> None:
        """Load the preprocessor and start loop, threads and a first decode worker.

        Args:
            settings: of the deployment.
            telemetry: where measurements go.
            device: unused, preprocessing runs on the CPU.
            preprocessor: None: that of ``settings.model``.
            fetcher: None: one with the limits of ``settings``.

        Raises:
            TriptychError: where the checkpoint or a decode worker cannot be started.
        """
        super().__init__(settings, telemetry, device)
        if preprocessor is None:
            from ..families.registry import load_family

            preprocessor = load_family(settings).load_preprocessor()
        self._preprocessor = preprocessor
        self._modalities = preprocessor.modalities if settings.enable_multimodal != "off" else frozenset[str]()
        if settings.enable_multimodal == "on" and not self._modalities:
            raise TriptychError(
                ErrorKind.UNSUPPORTED,
                f"enable_multimodal is on, but {preprocessor.name} takes text alone",
                "settings.enable_multimodal",
            )
        self._context_length = min(settings.context_length or preprocessor.context_length, preprocessor.context_length)
        cpus = os.cpu_count() or 1
        self._text_threads = ThreadPoolExecutor(_TEXT_THREADS, "triptych-text")
        self._media_threads = ThreadPoolExecutor(max(2, cpus), "triptych-media")
        self._jobs: set[_Job] = set()
        self._warm_up: asyncio.Future[None] | None = None
        self._waiting = 0
        self._closed = False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="triptych-preprocess", daemon=True)
        self._thread.start()
        try:
            self._wait(self._open(fetcher, min(_MAX_VIDEO_WORKERS, cpus)))
        except BaseException:
            self._stop()
            raise

    def submit(self, request_id: str, inputs: Mapping[str, Any], responder: Responder) -> None:
        """Take a request, or act on a control request (one with nothing to answer) and answer it with no tensors."""
        if self._closed:
            responder.fail(_shut_down())
            return
        self._post(responder, self._take, request_id, dict(inputs), responder)

    def cancel(self, request_ids: Sequence[str]) -> None:
        """End these requests with CANCELLED."""
        self._post(None, self._cancel, list(request_ids))

    def close(self) -> None:
        """End every request with an error, stop threads and workers."""
        if self._closed:
            return
        self._closed = True
        self._wait(self._shut())
        self._stop()

    async def _open(self, fetcher: Fetcher | None, workers: int) -> None:
        settings = self.settings
        self._slots = asyncio.Semaphore(settings.mm_max_concurrent_calls)
        self._fetcher = fetcher or Fetcher(settings.max_media_bytes, settings.allowed_media_hosts)
        self._pool = DecodePool(workers)
        self._loader = MediaLoader(
            settings, self._preprocessor, self.telemetry, self._fetcher, self._pool, self._media_threads
        )
        if "video" in self._modalities:
            try:
                await self._pool.start()
            except BaseException:
                await self._pool.close()
                raise
        if "audio" in self._modalities:
            # the resampler takes seconds to import, which neither start-up nor the first request should wait for
            self._warm_up = self._loop.run_in_executor(self._media_threads, _warm_up_audio)
            self._warm_up.add_done_callback(_report)
        self._heart = self._loop.create_task(self._beat())

    async def _shut(self) -> None:
        self._heart.cancel()
        if self._warm_up is not None:
            self._warm_up.cancel()
        tasks = []
        for job in self._jobs:
            job.reason = _shut_down()
            if job.task is not None:
                job.task.cancel()
                tasks.append(job.task)
        await asyncio.gather(self._heart, *tasks, return_exceptions=True)
        await self._pool.close()
        await self._fetcher.close()

    def _stop(self) -> None:
        """End the loop's thread and the thread pools; work that a thread has begun is let go."""
        for threads in (self._text_threads, self._media_threads):
            threads.shutdown(wait=False, cancel_futures=True)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(CLOSE_TIMEOUT_S)
        if not self._thread.is_alive():
            # requests that came in at the last moment get their answer too
            self._loop.run_until_complete(self._loop.shutdown_default_executor())
            self._loop.close()

    def _wait(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def _post(self, responder: Responder | None, function: Any, *args: Any) -> None:
        try:
            self._loop.call_soon_threadsafe(function, *args)
        except RuntimeError:
            # the loop has closed
            if responder is not None:
                responder.fail(_shut_down())

    async def _beat(self) -> None:
        while True:
            self.telemetry.set("triptych_heartbeat_timestamp_seconds", time.time())
            await asyncio.sleep(self.settings.heartbeat_s)

    def _take(self, request_id: str, inputs: dict[str, Any], responder: Responder) -> None:
        """On the loop: begin a request."""
        if inputs.get("cancel") is not None:
            self._cancel([_text(item) for item in inputs["cancel"]])
        if all(inputs.get(name) is None for name in PREPROCESS.needs):
            responder.send({}, final=True)
            return
        if self._closed:
            responder.fail(_shut_down())
            return
        job = _Job(request_id, responder, time.monotonic())
        self._jobs.add(job)
        self.telemetry.add("triptych_requests_running", 1)
        job.task = self._loop.create_task(self._outputs(inputs))
        # a callback, because a task cancelled before its first step never runs a line of its own
        job.task.add_done_callback(lambda task: self._finish(job, task))

    def _cancel(self, request_ids: Sequence[str]) -> None:
        """On the loop: end requests by id."""
        wanted = {request_id for request_id in request_ids if request_id}
        for job in self._jobs:
            if job.request_id in wanted and job.task is not None and job.reason is None:
                job.reason = TriptychError(ErrorKind.CANCELLED, "the request was cancelled")
                job.task.cancel()

    def _finish(self, job: _Job, task: asyncio.Task[dict[str, Any]]) -> None:
        """On the loop, when a request's task has ended in whatever way: give its one answer."""
        self._jobs.discard(job)
        error: TriptychError | None = None
        if task.cancelled():
            error = job.reason or TriptychError(ErrorKind.CANCELLED, "the request was cancelled")
        elif isinstance(problem := task.exception(), TriptychError):
            error = problem
        elif problem is not None:
            _log.error("preprocess failed", exc_info=problem, extra=about(job.request_id))
            error = TriptychError(
                ErrorKind.STAGE_FAILED,
                f"preprocess failed on request {job.request_id!r}; the server's log has the details",
                stage=NAME,
            )
        self.telemetry.add("triptych_requests_running", -1)
        self.telemetry.add("triptych_requests_total", 1, outcome=error.kind.value if error else "ok")
        self.telemetry.observe("triptych_stage_seconds", time.monotonic() - job.arrived)
        if error is not None:
            job.responder.fail(error)
        else:
            job.responder.send(task.result(), final=True)

    async def _outputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        try:
            return await self._answer(inputs, time.time())
        except TriptychError as error:
            if inputs.get("text_input") is not None:
                in_caller_words(error)
            raise

    async def _answer(self, inputs: dict[str, Any], arrival: float) -> dict[str, Any]:
        if inputs.get("detokenize") is not None:
            return await self._in(self._text_threads, lambda: self._spell(inputs["detokenize"].tolist()))
        request, blobs, form = await self._in(self._text_threads, lambda: _read(inputs))
        tokens_only = inputs.get("tokens_only") is not None and bool(inputs["tokens_only"][0])
        prepare = partial(self._prepare, request, form, arrival, tokens_only)
        parts = list(request.media())
        self._check(request, blobs)
        if not parts:
            return await self._in(self._text_threads, lambda: prepare([]))
        if self._waiting >= self.settings.max_queued_requests:
            raise TriptychError(
                ErrorKind.OVERLOADED,
                f"{self._waiting} requests with media are waiting already; at most "
                f"{self.settings.max_queued_requests} may, try again later",
            )
        await self._admit()
        loading = Loading()
        try:
            # prepare() and decoders cannot be interrupted: what they give after the deadline is dropped
            limit = self.settings.mm_per_request_timeout
            return await asyncio.wait_for(self._with_media(request, blobs, loading, prepare), limit)
        except asyncio.TimeoutError:
            late = TriptychError(
                ErrorKind.TIMEOUT,
                f"{', '.join(sorted(loading.pending)) or 'the media of the request'}: not fetched and processed within "
                f"{limit:g} s (mm_per_request_timeout)",
                min(loading.pending, default=None),
            )
        finally:
            self._loader.release(loading)
            self._slots.release()
        # not above, where its context would keep the media in memory as long as somebody has the error
        raise late

    async def _admit(self) -> None:
        """Wait for one of the places for requests with media."""
        self._waiting += 1
        self.telemetry.add("triptych_requests_waiting", 1)
        began = time.monotonic()
        try:
            await self._slots.acquire()
            self.telemetry.observe("triptych_queue_seconds", time.monotonic() - began)
        finally:
            self._waiting -= 1
            self.telemetry.add("triptych_requests_waiting", -1)

    async def _with_media(
        self, request: ChatRequest, blobs: Sequence[bytes], loading: Loading, prepare: Callable[..., dict[str, Any]]
    ) -> dict[str, Any]:
        media = await self._loader.load(list(request.media()), blobs, loading)
        return await self._in(self._media_threads, lambda: prepare(media, loading.times))

    def _check(self, request: ChatRequest, blobs: Sequence[bytes]) -> None:
        """Everything that can be known before any medium is touched."""
        parts = list(request.media())
        if len(parts) > self.settings.max_media_items:
            raise TriptychError(
                ErrorKind.TOO_LARGE,
                f"the request has {len(parts)} pictures, videos and sounds; at most {self.settings.max_media_items} "
                "are allowed",
                request.content_field,
            )
        allowed = self._modalities
        for modality, limit in self.settings.media_limits.items():
            count = sum(part.modality == modality for _, part in parts)
            if count > limit and modality in allowed:
                raise invalid(
                    f"the request has {count} media of type {modality}; at most {limit} are allowed "
                    "(limit_mm_data_per_request)",
                    request.content_field,
                )
        for where, part in parts:
            if part.modality not in allowed:
                if self.settings.enable_multimodal == "off" and part.modality in self._preprocessor.modalities:
                    message = f"{where}: this server takes text alone (enable_multimodal is off)"
                    raise TriptychError(ErrorKind.UNSUPPORTED, message, where)
                raise refuse_modality(where, part.modality, self._preprocessor.name, allowed)
            for name in ("num_frames", "max_frames"):
                frames = getattr(part.options, name)
                if frames is not None and frames > self.settings.max_video_frames:
                    raise invalid(
                        f"{where}.{name} must be at most {self.settings.max_video_frames}, got {frames}",
                        f"{where}.{name}",
                    )
            if part.blob is not None and len(blobs[part.blob]) > self.settings.max_media_bytes:
                raise TriptychError(
                    ErrorKind.TOO_LARGE,
                    f"{where}: the {part.modality} has {len(blobs[part.blob])} bytes; at most "
                    f"{self.settings.max_media_bytes} are allowed",
                    where,
                )
        if unused := set(range(len(blobs))) - {part.blob for _, part in parts}:
            raise invalid(
                f"media blob {min(unused)} is named by no part of the request; every blob must be used",
                f"media[{min(unused)}]",
            )

    def _prepare(
        self,
        request: ChatRequest,
        form: Form | None,
        arrival: float,
        tokens_only: bool,
        media: Sequence[Medium],
        times: Sequence[MediumTimes] = (),
    ) -> dict[str, Any]:
        """Template, processor and packing, in a thread: the stage's output tensors."""
        begin = time.time()
        prepared = self._preprocessor.prepare(request.content, media, request.template)
        if tokens_only:
            return {"input_ids": np.ascontiguousarray(prepared.input_ids, dtype=np.int32)}
        length = int(prepared.input_ids.shape[0])
        if length >= self._context_length:
            raise TriptychError(
                ErrorKind.CONTEXT_LENGTH_EXCEEDED,
                f"the prompt has {length} tokens, media included; the context length is {self._context_length} and "
                "the answer needs at least one",
                request.content_field,
            )
        found = PreprocessTimes(arrival, tuple(times), begin, time.time())
        self.telemetry.observe("triptych_process_seconds", found.end - begin)
        return _tensors(request, form, prepared, found)

    def _spell(self, ids: Sequence[int]) -> dict[str, Any]:
        """Text of token ids, in a thread, and what there is to know of the checkpoint."""
        text, strings = self._preprocessor.spell(ids)
        about = {
            "context_length": self._context_length,
            "model_type": self._preprocessor.name,
            "architectures": list(self._preprocessor.architectures),
            "modalities": sorted(self._modalities),
        }
        return {"text": [text], "token_strings": strings, "about": [json.dumps(about)]}

    async def _in(self, threads: Executor, work: Callable[[], _T]) -> _T:
        return await self._loop.run_in_executor(threads, work)


def _read(inputs: Mapping[str, Any]) -> tuple[ChatRequest, Sequence[bytes], Form | None]:
    """What is asked, by the tensors of ``chat`` or of ``generate``; the form of the answer only in the latter."""
    if inputs.get("text_input") is not None:
        if inputs.get("media") is not None:
            raise invalid("media is not allowed beside text_input, whose pictures are in image", "media")
        found = read_generate(inputs)
        return found.request, found.blobs, found.form
    for spec in GENERATE_INPUTS:
        if inputs.get(spec.name) is not None:
            raise invalid(f"{spec.name} is only allowed beside text_input", spec.name)
    blobs = [item if isinstance(item, bytes) else bytes(item) for item in inputs.get("media") or ()]
    return ChatRequest.from_json(inputs["request"][0], len(blobs)), blobs, None


def _tensors(request: ChatRequest, form: Form | None, prepared: Prepared, times: PreprocessTimes) -> dict[str, Any]:
    """The output tensors of contract/tensors.py; an encoder with nothing to do gets none."""
    sampling, syntax = request.sampling, None
    if (written := prepared.written) is not None:
        sampling = replace(sampling, grammar=written.constrain(request.template, sampling.grammar))
        syntax = written.syntax if written.syntax.tools or written.syntax.reasoning else None
    plan = Plan(
        items=prepared.items,
        sampling=sampling,
        rope_delta=prepared.rope_delta,
        stream=request.stream,
        lease_s=request.lease_s,
        timeout_s=request.timeout_s,
        priority=request.priority,
        cache_salt=request.cache_salt,
        heartbeats=request.heartbeats,
        embed=request.embed,
        extras=prepared.extras,
        stop=prepared.stop,
        times=times,
        form=form,
        syntax=syntax,
    )
    tensors: dict[str, Any] = {
        "input_ids": np.ascontiguousarray(prepared.input_ids, dtype=np.int32),
        "position_ids": np.ascontiguousarray(prepared.position_ids, dtype=np.int32),
        "plan": [plan.to_json()],
    }
    for encoder, items in prepared.features.items():
        if items:
            tensors[f"{encoder}_features"] = pack(items)
    return tensors


def _shut_down() -> TriptychError:
    return TriptychError(ErrorKind.STAGE_DEAD, "preprocess is shutting down; send the request again", stage=NAME)


def _warm_up_audio() -> None:
    from ..media.audio import to_audio

    to_audio(np.ones(160, np.float32), 8000, 16000)


def _report(warm_up: asyncio.Future[None]) -> None:
    if not warm_up.cancelled() and (problem := warm_up.exception()) is not None:
        _log.error("sounds cannot be resampled", exc_info=problem)


def _text(item: Any) -> str:
    return item.decode("utf-8", "replace") if isinstance(item, bytes) else str(item)
