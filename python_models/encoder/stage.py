"""The encoder stages: pictures and videos, or sounds, to embedding rows.

One worker thread packs the media of many requests into one run of the tower. Requests without media never see it:
they are answered in :meth:`EncoderStage.submit`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import torch

from ..contract.errors import ErrorKind, TriptychError, invalid
from ..contract.features import EncoderItem, unpack
from ..contract.logs import about
from ..contract.settings import Settings
from ..families.base import Encoder, PrunedRows
from ..families.checkpoint import find_checkpoint
from ..families.loading import stage_dtype
from ..families.registry import load_family
from ..stage import Responder, Stage, Telemetry
from .cache import EmbeddingCache

_log = logging.getLogger(__name__)

Rows = torch.Tensor | PrunedRows


@dataclass(eq=False)
class _Job:
    """A request with media."""

    request_id: str
    features: Any
    responder: Responder
    arrived: float
    items: list[EncoderItem] = field(default_factory=list)
    done: bool = False


class EncoderStage(Stage):
    """Hosts one encoder of the checkpoint, or stands in for one it does not have."""

    encoder_name: ClassVar[str]
    """ "vision" or "audio"."""

    def __init__(self, settings: Settings, telemetry: Telemetry, device: str, encoder: Encoder | None = None) -> None:
        """Load the encoder's weights alone.

        Args:
            settings, telemetry, device: see :class:`~triptych.python_models.stage.Stage`.
            encoder: instead of the one of ``settings.model``.

        Raises:
            TriptychError: what :func:`~triptych.python_models.families.registry.load_family` and the family say.
        """
        super().__init__(settings, telemetry, device)
        if settings.torch_threads:
            torch.set_num_threads(settings.torch_threads)
        self.name = f"{self.encoder_name}_encoder"
        self._input, self._output = f"{self.encoder_name}_features", f"{self.encoder_name}_embeddings"
        self._encoder = encoder or self._load()
        on_gpu = torch.device(device).type == "cuda"
        if settings.mm_feature_transport == "cuda_ipc" and not on_gpu:
            raise invalid("mm_feature_transport cuda_ipc needs a GPU", "settings.mm_feature_transport")
        self._through_host = settings.mm_feature_transport == "cpu"
        self._cache = EmbeddingCache(
            settings.mm_cache_size_mb * 2**20, None if settings.keep_mm_feature_on_device else "cpu"
        )
        self._num_evicted = 0
        telemetry.set("triptych_encoder_cache_limit_bytes", self._cache.budget_bytes)
        self._changed = threading.Condition()
        self._waiting: deque[_Job] = deque()
        self._running: list[_Job] = []
        self._flushes: list[Responder] = []
        self._closing = False
        self._worker = threading.Thread(target=self._work, name=self.name, daemon=True)
        self._worker.start()

    def _load(self) -> Encoder | None:
        """The checkpoint's encoder, or None where it has none or is to take text alone."""
        if self.settings.enable_multimodal == "off":
            return None
        family = load_family(self.settings)
        if self.encoder_name not in family.encoders:
            return None
        dtype = stage_dtype(find_checkpoint(self.settings), self.settings, self.device)
        return family.load_encoder(self.encoder_name, self.device, dtype)

    def submit(self, request_id: str, inputs: Mapping[str, Any], responder: Responder) -> None:
        """See :meth:`Stage.submit`. Without features the answer has no tensors and is sent at once."""
        cancel = inputs.get("cancel")
        if cancel is not None:
            self.cancel([i.decode() if isinstance(i, bytes) else str(i) for i in cancel])
        features = inputs.get(self._input)
        if features is None or len(features) == 0:
            responder.send({}, final=True)
            return
        job = _Job(request_id, features, responder, time.monotonic())
        with self._changed:
            closing, absent = self._closing, self._encoder is None
            if not closing and not absent:
                self._waiting.append(job)
                self._gauges()
                self._changed.notify()
                return
        if closing:
            self._fail(job, self._stopped())
        else:
            self._fail(job, TriptychError(ErrorKind.UNSUPPORTED, f"this model has no {self.encoder_name} encoder"))

    def flush(self, responder: Responder) -> None:
        """See :meth:`Stage.flush`; the worker does it between two batches."""
        with self._changed:
            if not self._closing:
                self._flushes.append(responder)
                self._changed.notify()
                return
        responder.fail(self._stopped())

    def cancel(self, request_ids: Sequence[str]) -> None:
        """See :meth:`Stage.cancel`."""
        ids = set(request_ids) - {""}
        with self._changed:
            hit = [job for job in (*self._waiting, *self._running) if job.request_id in ids and not job.done]
            self._waiting = deque(job for job in self._waiting if job.request_id not in ids)
            self._gauges()
        for job in hit:
            self._fail(job, TriptychError(ErrorKind.CANCELLED, "the request was cancelled", stage=self.name))

    def close(self) -> None:
        """See :meth:`Stage.close`. Waits for the run of the tower that is under way."""
        with self._changed:
            self._closing = True
            left = [*self._waiting, *self._running]
            self._waiting.clear()
            self._changed.notify()
        for job in left:
            self._fail(job, self._stopped())
        self._worker.join()
        self._cache.clear()
        self._encoder = None

    def _stopped(self) -> TriptychError:
        return TriptychError(ErrorKind.STAGE_DEAD, f"{self.name} is shutting down", stage=self.name)

    def _work(self) -> None:
        while self._step():
            pass

    def _step(self) -> bool:
        """Wait for requests and encode one batch; False when the stage closes."""
        with self._changed:
            self._running = [job for job in self._running if not job.done]
            self._gauges()
            self._changed.wait_for(lambda: self._waiting or self._running or self._flushes or self._closing)
            flushes, self._flushes = self._flushes, []
            if self._closing:
                for responder in flushes:
                    responder.fail(self._stopped())
                return False
            taken = list(self._waiting)
            self._running += taken
            self._waiting.clear()
            self._gauges()
        if flushes:
            self._cache.clear()
            self.telemetry.set("triptych_encoder_cache_bytes", 0)
            for responder in flushes:
                responder.send({}, final=True)
        for job in taken:
            self._unpack(job)
        jobs = self._batch()
        if not jobs:
            return True
        self.telemetry.observe("triptych_batch_size", len(jobs))
        now = time.monotonic()
        for job in jobs:
            self.telemetry.observe("triptych_queue_seconds", now - job.arrived)
        try:
            self._encode_jobs(jobs)
        except Exception as error:  # noqa: BLE001 - whatever happens, the stage goes on and the requests end
            for job in jobs:
                self._fail(job, self._blame(job, error))
        return True

    def _unpack(self, job: _Job) -> None:
        try:
            job.items = unpack(job.features)
            if not job.items:
                raise invalid("the packed features hold no item", self._input)
        except TriptychError as error:
            self._fail(job, replace(error, message=f"{self._input}: {error.message}", param=self._input))
        job.features = None

    def _batch(self) -> list[_Job]:
        """The oldest requests whose media, each counted once, fit into one batch; always at least one request."""
        jobs: list[_Job] = []
        rows: dict[str, int] = {}
        for job in self._running:
            if job.done:
                continue
            own = {item.digest: item.num_rows for item in job.items}
            if jobs and sum((rows | own).values()) > self.settings.max_batch_rows:
                break
            rows |= own
            jobs.append(job)
        return jobs

    def _encode_jobs(self, jobs: Sequence[_Job]) -> None:
        known: dict[str, Rows] = {}
        new: dict[str, EncoderItem] = {}
        for job in jobs:
            for item in job.items:
                if item.digest in known or item.digest in new:
                    continue
                if (cached := self._cache.get(item.digest)) is not None:
                    known[item.digest] = cached
                else:
                    new[item.digest] = item
        self.telemetry.add("triptych_encoder_cache_misses_total", len(new))
        self.telemetry.add("triptych_encoder_cache_hits_total", sum(len(job.items) for job in jobs) - len(new))
        self._answer(jobs, known)
        for part in self._parts(list(new.values())):
            wanted = {item.digest for job in jobs if not job.done for item in job.items}
            items = [item for item in part if item.digest in wanted]
            if not items:
                continue
            began = time.monotonic()
            try:
                self._encode(items, known)
            except Exception as error:  # noqa: BLE001 - any failure of the model must end only the request at fault
                self._encode_each(jobs, items, known, error)
            self._answer(jobs, known)
            # on a GPU it is computed only now
            self.telemetry.observe("triptych_encode_seconds", time.monotonic() - began)
            self.telemetry.observe("triptych_batch_tokens", sum(item.num_rows for item in items))
        self.telemetry.set("triptych_encoder_cache_bytes", self._cache.used_bytes)
        self.telemetry.add("triptych_encoder_cache_evictions_total", self._cache.num_evicted - self._num_evicted)
        self._num_evicted = self._cache.num_evicted

    def _parts(self, items: Sequence[EncoderItem]) -> list[list[EncoderItem]]:
        """Cut so that no part has more than ``max_batch_rows`` rows, but for single items that have more."""
        parts: list[list[EncoderItem]] = []
        rows = 0
        for item in items:
            if not parts or rows + item.num_rows > self.settings.max_batch_rows:
                parts.append([])
                rows = 0
            parts[-1].append(item)
            rows += item.num_rows
        return parts

    def _encode(self, items: Sequence[EncoderItem], known: dict[str, Rows]) -> None:
        assert self._encoder is not None
        results = self._encoder.encode(items)
        for item, rows in zip(items, results, strict=True):
            shape = tuple(PrunedRows.tensor(rows).shape)
            if shape != (item.num_rows, self._encoder.width):
                raise TriptychError(
                    ErrorKind.STAGE_FAILED,
                    f"the {item.modality} encoder gave embeddings {shape} where "
                    f"({item.num_rows}, {self._encoder.width}) were expected",
                )
        for item, rows in zip(items, results, strict=True):
            known[item.digest] = rows
            self._cache.put(item.digest, rows)

    def _encode_each(
        self, jobs: Sequence[_Job], items: Sequence[EncoderItem], known: dict[str, Rows], cause: Exception
    ) -> None:
        """After a batch has failed: one request at a time, so that the others do not pay for the bad one."""
        digests = {item.digest for item in items}
        concerned = [job for job in jobs if not job.done and any(i.digest in digests for i in job.items)]
        for job in concerned:
            own = {i.digest: i for i in job.items if i.digest in digests and i.digest not in known}
            error: Exception | None = cause
            if len(concerned) > 1:
                try:
                    self._encode(list(own.values()), known)
                    error = None
                except Exception as own_error:  # noqa: BLE001 - as above
                    error = own_error
            if error is not None:
                self._fail(job, self._blame(job, error))

    def _answer(self, jobs: Sequence[_Job], known: Mapping[str, Rows]) -> None:
        """Send the embeddings of every request that has them all."""
        ready = [job for job in jobs if not job.done and all(item.digest in known for item in job.items)]
        if not ready:
            return
        outputs = [torch.cat([PrunedRows.tensor(known[item.digest]) for item in job.items]) for job in ready]
        if torch.device(self.device).type == "cuda":
            # The receiver reads the memory from another process, outside this stream's order.
            torch.cuda.current_stream(torch.device(self.device)).synchronize()
        else:
            outputs = [rows.float() for rows in outputs]
        if self._through_host:
            outputs = [rows.cpu() for rows in outputs]
        for job, rows in zip(ready, outputs, strict=True):
            if self._finish(job, "ok"):
                each = np.array([item.num_rows for item in job.items], np.int32)
                answer: dict[str, Any] = {self._output: rows.contiguous(), f"{self.encoder_name}_rows": each}
                pruned = [found.runs for item in job.items if isinstance(found := known[item.digest], PrunedRows)]
                if pruned:
                    answer[f"{self.encoder_name}_runs"] = np.concatenate(pruned).astype(np.int32)
                job.responder.send(answer, final=True)

    def _blame(self, job: _Job, error: Exception) -> TriptychError:
        if not isinstance(error, TriptychError):
            _log.error("the encoder failed", exc_info=error, extra=about(job.request_id))
        kind = error.kind if isinstance(error, TriptychError) else ErrorKind.STAGE_FAILED
        cause = str(error) if isinstance(error, TriptychError) else f"{type(error).__name__}: {error}"
        request = f"request {job.request_id}" if job.request_id else "a request"
        return TriptychError(kind, f"{self.name} could not encode the media of {request}: {cause}", stage=self.name)

    def _fail(self, job: _Job, error: TriptychError) -> None:
        if self._finish(job, error.kind.value):
            job.responder.fail(error)

    def _finish(self, job: _Job, outcome: str) -> bool:
        """True for the first caller, who then answers the request."""
        with self._changed:
            if job.done:
                return False
            job.done = True
        self.telemetry.add("triptych_requests_total", 1, outcome=outcome)
        self.telemetry.observe("triptych_stage_seconds", time.monotonic() - job.arrived)
        return True

    def _gauges(self) -> None:
        self.telemetry.set("triptych_requests_waiting", len(self._waiting))
        self.telemetry.set("triptych_requests_running", sum(not job.done for job in self._running))


class VisionEncoderStage(EncoderStage):
    """Pictures and videos."""

    encoder_name = "vision"


class AudioEncoderStage(EncoderStage):
    """Sounds."""

    encoder_name = "audio"
