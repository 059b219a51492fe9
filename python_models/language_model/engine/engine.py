"""The engine: one thread that plans steps, has them computed, and hands out what came of them.

Other threads only append to an inbox: `submit`, `cancel`, `renew` and `close` return at once. All state of requests
belongs to the engine's thread.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

import torch

from ...contract.delta import Delta
from ...contract.errors import ErrorKind, TriptychError
from ...contract.logs import about
from ...stage import Responder, Telemetry
from ..runner.step import Runner
from .admission import Admission, Submission
from .batch_log import BatchLog
from .config import EngineConfig
from .delivery import Answer, Choice, Delivery
from .detokenizer import Tokenizer
from .grammar import Compiled, GrammarCompiler, GrammarState
from .pipeline import Pipeline, device_lost
from .request import Request, Work
from .sampler import Sampled, Sampler
from .scheduler import Scheduler

logger = logging.getLogger(__name__)

_STAGE = "language_model"
_CHECK_S = 0.05
_CLOSE_S = 30.0

__all__ = ["Engine", "Submission"]


class Engine:
    """Continuous batching over a paged KV cache.

    Each request is answered with a first delta on acceptance (usage of the prompt), then with deltas or heartbeats,
    then with exactly one final delta or error. A step that raises is computed again request by request, and only
    those that fail alone end with an error. An error that no later step in this process can survive ends every
    request with STAGE_DEAD, and then the engine.
    """

    def __init__(
        self,
        runner: Runner,
        tokenizer: Tokenizer,
        config: EngineConfig,
        telemetry: Telemetry,
        clock: Callable[[], float] = time.monotonic,
        device: str = "cpu",
        on_fatal: Callable[[], None] | None = None,
        pauses: threading.Event | None = None,
    ) -> None:
        """Start the thread.

        Args:
            runner: computes the steps.
            tokenizer: turns tokens into text.
            config: the limits; as many pools and windows as the runner has groups of layers.
            telemetry: for measurements.
            clock: in seconds.
            device: the thread makes it its current one.
            on_fatal: called last, by the thread, after an error that this process cannot survive.
            pauses: kept set while the thread waits and clear while it works (see ``Stage.pauses``).
        """
        if tuple(group.window for group in runner.kv_groups) != config.windows:
            raise ValueError(f"the runner's groups are {runner.kv_groups}, but the windows given are {config.windows}")
        if runner.last_tokens.shape[0] < config.max_running:
            raise ValueError(f"{runner.last_tokens.shape[0]} slots are too few for {config.max_running} requests")
        self.config = config
        self._runner = runner
        self._telemetry = telemetry
        self._clock = clock
        self._device = torch.device(device)
        self._on_fatal = on_fatal
        self._delivery = Delivery(tokenizer, config.eos_token_ids, telemetry)
        self._admission = Admission(config, runner.vocab_size, self._delivery)
        self._grammars = GrammarCompiler(tokenizer, runner.vocab_size, config.eos_token_ids, telemetry)
        self._scheduler = Scheduler(config)
        sampler = Sampler(runner.vocab_size, self._device)
        self._pauses = pauses or threading.Event()
        self._pipeline = Pipeline(runner, sampler, config.overlap, clock, self._took, self._fail_alone, self._pauses)
        self._log = BatchLog(config.log_s, clock())
        self._answers: dict[Answer, None] = {}
        self._inbox: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._in_flight = 0
        self._media_bytes = 0
        self._closing = False
        self._stopped = False
        self._next_check = 0.0
        logger.info("engine: %s", config)
        telemetry.set("triptych_kv_cache_tokens", min(config.num_blocks) * config.block_size)
        self._thread = threading.Thread(target=self._loop, name="triptych-engine", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """False once closed, or after an error that no later step in this process can survive."""
        return self._thread.is_alive() and not self._closing

    def submit(self, submission: Submission) -> None:
        """Take a request; every outcome goes to its responder."""
        try:
            answer = self._admission.answer(submission, self._clock())
            self._enter(answer)
        except TriptychError as error:
            self._telemetry.add("triptych_requests_total", outcome=error.kind.value)
            submission.responder.fail(error)
            return
        grammar = submission.sampling.grammar
        if grammar is None:
            # the caller learns at once that the request is here, before anything else it hears
            answer.deliver(Delta(usage=answer.usage(), syntax=answer.syntax))
        if not self._post(lambda: self._register(answer)):
            answer.done = True
            self._count_out(answer, ErrorKind.STAGE_DEAD.value)
            answer.deliver(_stopped())
        elif grammar is not None:
            self._grammars.compile(grammar, lambda outcome: self._compiled(answer, outcome))

    def cancel(self, request_ids: Sequence[str]) -> None:
        """End these requests with CANCELLED within a step."""
        wanted = frozenset(request_ids) - {""}
        self._post(lambda: self._cancel(wanted))

    def flush(self, responder: Responder) -> None:
        """Forget every prompt; the responder learns that it was done, or that requests are in the way."""
        if not self._post(lambda: self._flush(responder)):
            responder.fail(_stopped())

    def renew(self, request_ids: Sequence[str]) -> None:
        """Restart the leases of these requests."""
        wanted = frozenset(request_ids) - {""}
        self._post(lambda: self._renew(wanted))

    def close(self) -> None:
        """End every request with an error and stop the thread; returns when it has stopped."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._grammars.close()
        self._thread.join(_CLOSE_S)
        if self._thread.is_alive():
            raise TriptychError(
                ErrorKind.STAGE_FAILED, f"the engine's thread is still in a step after {_CLOSE_S:g} s", None, _STAGE
            )

    def abandon(self, error: TriptychError) -> None:
        """End every request from any thread, where the engine's own may wait for its device for ever."""
        with self._wake:
            self._closing = True
        # those that nobody has looked at yet too
        self._run_commands(last=True)
        for answer in list(self._answers):
            if not answer.done:
                answer.deliver(error)

    def check(self) -> None:
        """Verify the invariants of queues and blocks; only while nothing runs, or after `close`."""
        self._scheduler.check()

    def _enter(self, answer: Answer) -> None:
        """Count a request in.

        Raises:
            TriptychError: OVERLOADED, or STAGE_DEAD after `close`.
        """
        count, size = len(answer.choices), answer.prompt.media_bytes
        with self._wake:
            if self._closing:
                raise _stopped()
            room = self.config.max_running + self.config.max_queued
            if self._in_flight + count > room:
                raise TriptychError(
                    ErrorKind.OVERLOADED,
                    f"the language model is full: {self.config.max_running} requests may run and "
                    f"{self.config.max_queued} wait; try again later",
                    None,
                    _STAGE,
                )
            if self._media_bytes + size > self.config.max_media_bytes:
                raise TriptychError(
                    ErrorKind.OVERLOADED,
                    f"the requests in flight hold {self._media_bytes / 2**20:.1f} MiB of media embeddings, and "
                    f"{size / 2**20:.1f} more would exceed max_media_mb "
                    f"{self.config.max_media_bytes / 2**20:g}; try again later",
                    None,
                    _STAGE,
                )
            self._in_flight += count
            self._media_bytes += size

    def _post(self, command: Callable[[], None]) -> bool:
        """Have the engine's thread run a command; False where it has taken its last."""
        with self._wake:
            if self._stopped:
                return False
            self._inbox.append(command)
            self._wake.notify()
            return True

    def _compiled(self, answer: Answer, outcome: Compiled | TriptychError) -> None:
        """Go on with a request whose grammar is there; on a thread of the compiler."""
        if isinstance(outcome, TriptychError):
            error = outcome
            self._post(lambda: self._fail(answer, error))
            return
        stop_ids = self._admission.stop_ids(answer.sampling)
        try:
            for request in answer.choices:
                state = request.sampler
                state.grammar = GrammarState(outcome, stop_ids, self._runner.vocab_size)
                state.needs_history, state.plain = True, False
        except Exception as failure:
            logger.exception("a grammar cannot be used", extra=about(answer.request_id))
            error = _stage_failed(failure)
            self._post(lambda: self._fail(answer, error))
            return
        # accepted only now: until then the request can turn out to be invalid
        answer.deliver(Delta(usage=answer.usage(), syntax=answer.syntax))
        self._post(lambda: self._start(answer))

    # what follows runs on the engine's thread

    def _loop(self) -> None:
        if self._device.index is not None and self._device.type == "cuda":
            torch.cuda.set_device(self._device)
        fatal = False
        with torch.inference_mode():
            while self._wait():
                try:
                    self._iterate()
                except Exception as error:
                    # a fault of the engine itself: nothing is known about anybody's state
                    logger.exception("the engine failed outside of a request")
                    fatal = device_lost(error)
                    self._fail_all(_dead(error) if fatal else _stage_failed(error))
                    if fatal:
                        with self._wake:
                            self._closing = True
            self._run_commands(last=True)
            self._fail_all(_stopped())
        self._pauses.set()
        if fatal and self._on_fatal is not None:
            self._on_fatal()

    def _wait(self) -> bool:
        """Sleep while there is nothing to do; False when closing."""
        scheduler = self._scheduler
        with self._wake:
            idle = not (self._inbox or scheduler.running or scheduler.waiting or self._pipeline.flight)
            if idle and not self._closing:
                self._telemetry.set("triptych_heartbeat_timestamp_seconds", time.time())
                self._pauses.set()
                # requests that wait for their grammar still have timeouts
                self._wake.wait(_CHECK_S if self._answers else self.config.heartbeat_s)
                self._pauses.clear()
            return not self._closing

    def _iterate(self) -> None:
        busy = bool(self._answers)
        self._run_commands()
        now = self._clock()
        if now >= self._next_check or not busy:
            self._next_check = now + _CHECK_S
            self._look_after(now)
        plan = self._pipeline.advance(self._scheduler)
        if plan.preempted:
            self._telemetry.add("triptych_preemptions_total", len(plan.preempted))
        if plan.work:
            self._telemetry.observe("triptych_batch_size", len(plan.work))
            self._telemetry.observe("triptych_batch_tokens", sum([work.count for work in plan.work]))
            if self._pipeline.last_s:
                self._telemetry.observe("triptych_engine_step_seconds", self._pipeline.last_s)
            self._log.add(plan.work)
        self._delivery.flush()
        self._log.write(now, self._scheduler)
        if busy and not self._answers:
            self._look_after(now)
            if not self._scheduler.idle:
                # raises, naming the blocks
                self._scheduler.check()

    def _run_commands(self, last: bool = False) -> None:
        if not (last or self._inbox):
            return
        with self._wake:
            self._stopped = last
            commands = list(self._inbox)
            self._inbox.clear()
        for command in commands:
            command()

    def _fail_all(self, error: TriptychError) -> None:
        """End every request and start from an empty cache."""
        answers = list(self._answers)
        self._answers.clear()
        self._pipeline.flight = None
        self._scheduler = Scheduler(self.config)
        for answer in answers:
            answer.done = True
            for request in answer.choices:
                request.done = True
                request.sampler.release()
            self._count_out(answer, error.kind.value)
            answer.deliver(error)

    def _register(self, answer: Answer) -> None:
        self._answers[answer] = None
        if answer.sampling.grammar is None:
            self._start(answer)

    def _start(self, answer: Answer) -> None:
        # the other choices follow when the prompt they share is computed
        if not answer.done:
            self._scheduler.add(answer.choices[0])

    def _cancel(self, request_ids: frozenset[str]) -> None:
        for answer in [a for a in self._answers if a.request_id in request_ids]:
            self._fail(answer, TriptychError(ErrorKind.CANCELLED, "the request was cancelled"))

    def _flush(self, responder: Responder) -> None:
        if self._answers or self._pipeline.flight is not None:
            responder.fail(
                TriptychError(
                    ErrorKind.OVERLOADED,
                    f"the prefix cache cannot be emptied while {len(self._answers)} requests run or wait",
                    stage="language_model",
                )
            )
            return
        # blocks without content, and no saved state
        self._scheduler = Scheduler(self.config)
        responder.send({}, final=True)

    def _renew(self, request_ids: frozenset[str]) -> None:
        now = self._clock()
        for answer in self._answers:
            if answer.request_id in request_ids:
                answer.renewed = now

    def _look_after(self, now: float) -> None:
        """Timeouts, leases, heartbeats and gauges."""
        for answer in list(self._answers):
            if now - answer.arrival >= answer.timeout_s:
                message = f"the request was not finished within {answer.timeout_s:g} s"
                self._fail(answer, TriptychError(ErrorKind.TIMEOUT, message))
            elif answer.lease_s is not None and now - answer.renewed >= answer.lease_s:
                message = f"the request's lease of {answer.lease_s:g} s was not renewed"
                self._fail(answer, TriptychError(ErrorKind.CANCELLED, message))
            elif now - answer.last_sent >= self.config.heartbeat_s and answer.choices[0].number:
                self._send(answer, Delta(), now)
        self._telemetry.set("triptych_requests_running", len(self._scheduler.running))
        self._telemetry.set("triptych_requests_waiting", len(self._scheduler.waiting))
        self._telemetry.set("triptych_kv_cache_usage_ratio", self._scheduler.usage)
        self._telemetry.set("triptych_prefix_cache_usage_ratio", self._scheduler.kept)
        self._telemetry.set("triptych_heartbeat_timestamp_seconds", time.time())

    def _took(self, work: Work, sampled: Sequence[Sampled]) -> None:
        """A request's part of a step was read: keep what is right of it, say what is new."""
        request = work.request
        if not sampled:
            self._scheduler.commit(work, work.count)
            return
        right = 1
        for draft, one in zip(work.drafts, sampled, strict=False):
            if one.token_id != draft:
                break
            right += 1
        new = sampled[:right]
        if new[-1].token_id < 0:
            raise ValueError("the model gave no usable logits (NaN or infinite)")
        for one in new:
            request.append(one.token_id)
        request.num_tokens += right - 1
        self._scheduler.commit(work, work.count - work.num_logits + right)
        if work.drafts and request.speculation is not None:
            request.speculation.report(len(work.drafts), right - 1)
            self._telemetry.add("triptych_draft_tokens_total", len(work.drafts))
            self._telemetry.add("triptych_accepted_draft_tokens_total", right - 1)
        choice = request.choice
        assert choice is not None
        answer = choice.answer
        if request.index == 0 and not choice.num_output:
            for other in answer.choices[1:]:
                self._scheduler.add(other, request.number)
        delta = self._delivery.take(request, choice, new, self._pipeline.read_at)
        if choice.ended:
            self._end(request, choice, delta)
        elif delta is not None:
            self._send(answer, delta, self._pipeline.read_at)

    def _end(self, request: Request, choice: Choice, delta: Delta | None) -> None:
        answer = choice.answer
        answer.num_open -= 1
        self._free(request)
        if not answer.num_open:
            self._leave(answer, "ok")
        if delta is not None:
            answer.last_sent = self._pipeline.read_at
            if not answer.deliver(delta, final=not answer.num_open) and answer.num_open:
                self._fail(answer, _undelivered())

    def _send(self, answer: Answer, delta: Delta, now: float) -> None:
        answer.last_sent = now
        if not answer.deliver(delta):
            # nobody can hear it any more
            self._fail(answer, _undelivered())

    def _fail_alone(self, request: Request, error: Exception) -> None:
        """End a request, with all its choices, for what happened to one of them."""
        if request.choice is None or request.done:
            return
        # whatever went wrong may have left NaN in its blocks
        for group, blocks in enumerate(self._scheduler.poison(request)):
            if blocks:
                self._runner.scrub(group, blocks)
        self._fail(request.choice.answer, _stage_failed(error))

    def _fail(self, answer: Answer, error: TriptychError) -> None:
        """End a request with an error, once."""
        if answer.done:
            return
        for request in answer.choices:
            if not request.done:
                self._free(request)
        self._leave(answer, error.kind.value)
        answer.deliver(error)

    def _free(self, request: Request) -> None:
        """Take one choice out of the engine."""
        request.done = True
        self._scheduler.remove(request)
        request.sampler.release()

    def _leave(self, answer: Answer, outcome: str) -> None:
        answer.done = True
        del self._answers[answer]
        self._count_out(answer, outcome)

    def _count_out(self, answer: Answer, outcome: str) -> None:
        with self._wake:
            self._in_flight -= len(answer.choices)
            self._media_bytes -= answer.prompt.media_bytes
        self._telemetry.add("triptych_requests_total", outcome=outcome)
        self._telemetry.observe("triptych_stage_seconds", self._clock() - answer.arrival)


def _stopped() -> TriptychError:
    return TriptychError(ErrorKind.STAGE_DEAD, "the language model has stopped", None, _STAGE)


def _undelivered() -> TriptychError:
    return TriptychError(ErrorKind.CANCELLED, "the answer could not be delivered")


def _dead(error: Exception) -> TriptychError:
    if isinstance(error, TriptychError):
        return error
    message = f"the language model lost its device and is restarted: {type(error).__name__}: {error}"
    return TriptychError(ErrorKind.STAGE_DEAD, message, None, _STAGE)


def _stage_failed(error: Exception) -> TriptychError:
    if isinstance(error, TriptychError):
        return error
    return TriptychError(
        ErrorKind.STAGE_FAILED,
        f"the language model failed on this request: {type(error).__name__}: {error}",
        None,
        _STAGE,
    )
