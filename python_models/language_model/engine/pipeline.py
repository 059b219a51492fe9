"""Steps on their way through the device: planned, queued, read; one of them may be ahead of the host.

The plain way is: plan a step, compute it, sample, read the tokens, hand them out. With ``overlap`` a step is planned
and queued before the tokens of the one before are read, on the assumption that every request goes on::

    plan k+1 | queue forward k+1 | queue sampling k+1 | read tokens k, hand them out | plan k+2 | ...

A request that turns out to have ended at step k has a row in step k+1 that nobody looks at. Its blocks are free at
once: whatever writes to them next is queued behind that row.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ...contract.errors import ErrorKind, TriptychError
from ...contract.logs import about
from ..runner.step import Runner
from .request import Request, Work
from .sampler import Pending, Sampled, Sampler, SampleRow
from .scheduler import Scheduler, StepPlan

logger = logging.getLogger(__name__)

_LOST = (
    "CUDA error",
    "cudaError",
    "CUDA driver error",
    "CUBLAS_STATUS",
    "cuDNN",
    "CUDNN_STATUS",
    "NCCL",
    "Error [CUDA]",
)


@dataclass(slots=True)
class Step:
    """A step that is queued.

    Attributes:
        work: what it computes.
        began: when it was planned.
        pending: the tokens of all rows with logits, in order; None where there are none.
        fence: the end of such a step on a GPU, so that the host does not run ahead by several chunks of a prompt.
    """

    work: Sequence[Work]
    began: float
    pending: Pending | None = None
    fence: torch.cuda.Event | None = None


class Pipeline:
    """Runs steps. A step that raises is computed again request by request, and only those that fail alone fail."""

    def __init__(
        self,
        runner: Runner,
        sampler: Sampler,
        overlap: bool,
        clock: Callable[[], float],
        take: Callable[[Work, Sequence[Sampled]], None],
        fail: Callable[[Request, Exception], None],
        pauses: threading.Event,
    ) -> None:
        """Make an empty one.

        Args:
            runner, sampler: of the engine.
            overlap: see the module.
            clock: in seconds.
            take: called with each work of a step that was read and the outcomes of its logits.
            fail: called with a request that fails alone, and why.
            pauses: set while a step is waited for.
        """
        self._runner = runner
        self._sampler = sampler
        self._overlap = overlap
        self._clock = clock
        self._take = take
        self._fail = fail
        self._pauses = pauses
        self.flight: Step | None = None
        self.read_at = 0.0
        """When the tokens that are handed out were read."""
        self.last_s = 0.0
        """From planning the step read last to having its tokens, in seconds."""

    def advance(self, scheduler: Scheduler) -> StepPlan:
        """Plan and queue a step, and read one: the same, or with overlap the one before.

        Raises:
            Exception: what leaves the device or another rank unusable (:func:`device_lost`), or a fault of the engine.
        """
        previous, self.flight = self.flight, None
        if previous is not None and _mostly_guessing(scheduler.running):
            # guesses begin with a token that is known
            self._finish(scheduler, previous)
            previous = None
        began = self._clock()
        plan = scheduler.plan()
        for request in plan.admitted:
            if request.admitted is None:
                request.admitted = began
        if not plan.work:
            if previous is not None:
                self._finish(scheduler, previous)
            return plan
        step = Step(plan.work, began)
        try:
            logits = self._forward(step.work)
            live = step.work
            if previous is not None and any(w.num_logits and w.request.sampler.needs_history for w in step.work):
                finished, previous = previous, None
                self._finish(scheduler, finished, step)
                live = [work for work in step.work if not work.request.done]
                if len(live) < len(step.work):
                    logits = logits[_rows_of(step.work)]
                    step.work = live
            step.pending = self._sample(step.work, logits)
            if step.pending is None and logits.is_cuda:
                step.fence = torch.cuda.Event()  # type: ignore[no-untyped-call]
                step.fence.record()
        except Exception as error:
            if device_lost(error):
                raise
            logger.exception("a step of %d requests failed; computing them one by one", len(plan.work))
            _undo(plan.work)
            if previous is not None:
                self._finish(scheduler, previous)
            self._each_alone(scheduler, plan.work)
            return plan
        if previous is not None:
            self._finish(scheduler, previous, step)
        elif not self._overlap:
            self._finish(scheduler, step)
            return plan
        if step.pending is not None or any(not work.request.done for work in step.work):
            self.flight = step
        return plan

    def _forward(self, works: Sequence[Work]) -> torch.Tensor:
        logits = self._runner.forward([work.slice() for work in works])
        if embedding := [work.request for work in works if work.embeds]:
            for request, hidden in zip(embedding, self._runner.hidden, strict=True):
                request.hidden = hidden
        return logits

    def _sample(self, works: Sequence[Work], logits: torch.Tensor) -> Pending | None:
        rows = []
        for work in works:
            if work.num_logits == 1:
                rows.append(SampleRow(work.request.sampler, work.request.slot, work.number))
            else:
                state, number = work.request.sampler, work.number
                # the next slice of a request with guesses begins with a token that the host knows
                rows.extend(SampleRow(state, -1, number + k) for k in range(work.num_logits))
        return self._sampler.launch(logits, rows, self._runner.last_tokens) if rows else None

    def _finish(self, scheduler: Scheduler, step: Step, later: Step | None = None) -> None:
        """Read a step; where that raises, compute it again without ``later``, which was queued on top of it."""
        try:
            self._pauses.set()
            try:
                if step.fence is not None:
                    step.fence.synchronize()
                sampled = step.pending.result() if step.pending is not None else []
            finally:
                self._pauses.clear()
        except Exception as error:
            if device_lost(error):
                raise
            logger.exception("reading a step of %d requests failed; computing them one by one", len(step.work))
            if later is not None:
                _undo(later.work)
                again = {work.request for work in step.work}
                scheduler.restart([work for work in later.work if work.request not in again])
                later.work, later.pending = (), None
            _undo(step.work)
            self._each_alone(scheduler, step.work)
            return
        self.read_at = self._clock()
        self.last_s = self.read_at - step.began
        at = 0
        for work in step.work:
            count = work.num_logits
            if not work.request.done:
                self._give(work, sampled[at : at + count])
            at += count

    def _each_alone(self, scheduler: Scheduler, works: Sequence[Work]) -> None:
        """Compute undone works one by one; computing twice is harmless, it writes the same into the same places.

        Recurrent layers are the exception, see :meth:`Scheduler.replay`.
        """
        for old in works:
            request = old.request
            if request.done or not old.current:
                continue
            work = scheduler.again(old)
            try:
                for part in scheduler.replay(work):
                    self._runner.forward([part])
                pending = self._sample([work], self._forward([work]))
                sampled = pending.result() if pending is not None else []
            except Exception as error:
                if device_lost(error):
                    raise
                logger.exception("a request fails by itself", extra=about(request.request_id))
                self._fail(request, error)
                continue
            self.read_at = self._clock()
            self._give(work, sampled)

    def _give(self, work: Work, sampled: Sequence[Sampled]) -> None:
        try:
            self._take(work, sampled)
        except Exception as error:
            if device_lost(error):
                raise
            logger.exception("a request failed", extra=about(work.request.request_id))
            self._fail(work.request, error)


def device_lost(error: Exception) -> bool:
    """Whether nothing more can be computed in this process: a broken CUDA context, or a rank that is gone.

    Running out of memory is no such thing.
    """
    if isinstance(error, TriptychError):
        return error.kind is ErrorKind.STAGE_DEAD
    if not isinstance(error, RuntimeError):
        return False
    text = str(error)
    return any(mark in text for mark in _LOST) and "out of memory" not in text and "ALLOC_FAILED" not in text


def _undo(works: Sequence[Work]) -> None:
    for work in works:
        if not work.request.done:
            work.undo()


def _mostly_guessing(running: Sequence[Request]) -> bool:
    """Whether waiting for known tokens is worth it: else those who guess sit out every second step."""
    guessing = sum(r.speculation is not None and r.speculation.active for r in running)
    return 2 * guessing > len(running)


def _rows_of(works: Sequence[Work]) -> list[int]:
    """Rows of logits whose requests have not ended."""
    rows: list[int] = []
    at = 0
    for work in works:
        if not work.request.done:
            rows.extend(range(at, at + work.num_logits))
        at += work.num_logits
    return rows
