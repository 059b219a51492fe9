"""The engine: one thread that plans a step, computes it, and hands out what came of it.

Other threads only append to an inbox: `submit`, `cancel`, `renew` and `close` return at once. All state of requests
belongs to the engine's thread.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from ...contract.delta import Delta, TokenLogprob
from ...contract.errors import ErrorKind, TriptychError
from ...contract.sampling import SamplingParams
from ...stage import Responder, Telemetry
from ..runner.step import Runner
from .blocks import BlockPool
from .config import EngineConfig
from .detokenizer import Detokenizer, Tokenizer, Vocabulary
from .request import Limits, Prompt, Request, draw_seed
from .sampler import Sampled, Sampler, SamplerState
from .scheduler import Scheduler

logger = logging.getLogger(__name__)

_STAGE = "language_model"
_CHECK_S = 0.05
_CLOSE_S = 30.0


@dataclass(frozen=True)
class Submission:
    """A request as it enters the engine."""

    request_id: str
    prompt: Prompt
    sampling: SamplingParams
    responder: Responder
    stream: bool = True
    lease_s: float | None = None
    timeout_s: float | None = None


class Engine:
    """Continuous batching over a paged KV cache.

    Each request is answered with a first delta on acceptance (usage of the prompt), then with deltas or heartbeats,
    then with exactly one final delta or error. A step that raises is computed again request by request, and only
    those that fail alone end with an error.
    """

    def __init__(
        self,
        runner: Runner,
        tokenizer: Tokenizer,
        config: EngineConfig,
        telemetry: Telemetry,
        clock: Callable[[], float] = time.monotonic,
        device: str = "cpu",
    ) -> None:
        """Start the thread. Args: ``clock`` in seconds; ``device`` the thread makes its current one."""
        self.config = config
        self._runner = runner
        self._tokenizer = tokenizer
        self._vocabulary = Vocabulary(tokenizer)
        self._telemetry = telemetry
        self._clock = clock
        self._device = torch.device(device)
        self._pool = BlockPool(config.num_blocks, config.block_size)
        self._scheduler = Scheduler(self._pool, config.max_running, config.max_step_tokens)
        self._sampler = Sampler()
        self._requests: dict[Request, None] = {}
        self._inbox: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._in_flight = 0
        self._closing = False
        self._stopped = False
        self._next_check = 0.0
        logger.info("engine: %s", config)
        self._thread = threading.Thread(target=self._loop, name="triptych-engine", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """False once closed, or after an error that no later step in this process can survive."""
        return self._thread.is_alive() and not self._closing

    def submit(self, submission: Submission) -> None:
        """Take a request; every outcome goes to its responder."""
        try:
            request = self._new_request(submission)
            self._enter()
        except TriptychError as error:
            self._telemetry.add("triptych_requests_total", outcome=error.kind.value)
            submission.responder.fail(error)
            return
        # the caller learns at once that the request is here, before anything else it hears
        self._deliver(request, Delta(usage=request.usage()))
        if not self._post(lambda: self._take(request)):
            request.done = True
            self._count_out(request, ErrorKind.STAGE_DEAD.value)
            self._deliver(request, _stopped())

    def cancel(self, request_ids: Sequence[str]) -> None:
        """End these requests with CANCELLED within a step."""
        wanted = frozenset(request_ids) - {""}
        self._post(lambda: self._cancel(wanted))

    def renew(self, request_ids: Sequence[str]) -> None:
        """Restart the leases of these requests."""
        wanted = frozenset(request_ids) - {""}
        self._post(lambda: self._renew(wanted))

    def close(self) -> None:
        """End every request with an error and stop the thread; returns when it has stopped."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join(_CLOSE_S)
        if self._thread.is_alive():
            raise TriptychError(
                ErrorKind.STAGE_FAILED, f"the engine's thread is still in a step after {_CLOSE_S:g} s", None, _STAGE
            )

    def check(self) -> None:
        """Verify the invariants of queues and blocks; only while nothing runs, or after `close`."""
        self._scheduler.check()

    def _new_request(self, submission: Submission) -> Request:
        """Check against the limits.

        Raises:
            TriptychError: CONTEXT_LENGTH_EXCEEDED or INVALID_REQUEST.
        """
        config, params, prompt = self.config, submission.sampling, submission.prompt
        max_tokens = config.max_tokens(len(prompt), params.max_tokens)
        vocab_size = self._runner.vocab_size
        for name, ids in (("logit_bias", params.logit_bias), ("stop_token_ids", params.stop_token_ids)):
            for token_id in ids:
                if token_id >= vocab_size:
                    raise TriptychError(
                        ErrorKind.INVALID_REQUEST,
                        f"{name} names token {token_id}, but the vocabulary has {vocab_size} tokens",
                        name,
                    )
        now = self._clock()
        stop_ids = frozenset(params.stop_token_ids) | config.eos_token_ids
        seed = draw_seed() if params.seed is None else params.seed
        return Request(
            request_id=submission.request_id,
            prompt=prompt,
            sampling=params,
            limits=Limits(
                max_tokens, submission.lease_s, min(config.timeout_s, submission.timeout_s or config.timeout_s)
            ),
            responder=submission.responder,
            detokenizer=Detokenizer(self._tokenizer, params),
            sampler=SamplerState(params, prompt.token_ids, seed, stop_ids, vocab_size),
            block_size=config.block_size,
            stream=submission.stream,
            arrival=now,
            renewed=now,
            last_sent=now,
        )

    def _enter(self) -> None:
        """Count a request in.

        Raises:
            TriptychError: OVERLOADED, or STAGE_DEAD after `close`.
        """
        with self._wake:
            if self._closing:
                raise _stopped()
            room = self.config.max_running + self.config.max_queued
            if self._in_flight >= room:
                raise TriptychError(
                    ErrorKind.OVERLOADED,
                    f"the language model is full: {self.config.max_running} requests may run and "
                    f"{self.config.max_queued} wait; try again later",
                    None,
                    _STAGE,
                )
            self._in_flight += 1

    def _post(self, command: Callable[[], None]) -> bool:
        """Have the engine's thread run a command; False where it has taken its last."""
        with self._wake:
            if self._stopped:
                return False
            self._inbox.append(command)
            self._wake.notify()
            return True

    # what follows runs on the engine's thread

    def _loop(self) -> None:
        if self._device.index is not None and self._device.type == "cuda":
            torch.cuda.set_device(self._device)
        with torch.inference_mode():
            while self._wait():
                try:
                    self._iterate()
                except Exception as error:
                    # a fault of the engine itself: nothing is known about anybody's state
                    logger.exception("the engine failed outside of a request")
                    self._fail_all(_stage_failed(error))
                    if _device_lost(error):
                        with self._wake:
                            self._closing = True
            self._run_commands(last=True)
            self._fail_all(_stopped())

    def _wait(self) -> bool:
        """Sleep while there is nothing to do; False when closing."""
        with self._wake:
            if not (self._inbox or self._closing or self._requests):
                self._telemetry.set("triptych_heartbeat_timestamp_seconds", time.time())
                self._wake.wait(self.config.heartbeat_s)
            return not self._closing

    def _iterate(self) -> None:
        busy = bool(self._requests)
        self._run_commands()
        now = self._clock()
        if now >= self._next_check or not busy:
            self._next_check = now + _CHECK_S
            self._look_after(now)
        self._step()
        if busy and not self._requests:
            self._look_after(now)
            if self._pool.num_free != self._pool.num_blocks:
                # raises, naming the blocks
                self._scheduler.check()

    def _run_commands(self, last: bool = False) -> None:
        with self._wake:
            self._stopped = last
            commands = list(self._inbox)
            self._inbox.clear()
        for command in commands:
            command()

    def _fail_all(self, error: TriptychError) -> None:
        """End every request and start from an empty cache."""
        for request in self._requests:
            request.done = True
            self._count_out(request, error.kind.value)
            self._deliver(request, error)
        self._requests.clear()
        self._pool = BlockPool(self.config.num_blocks, self.config.block_size)
        self._scheduler = Scheduler(self._pool, self.config.max_running, self.config.max_step_tokens)

    def _take(self, request: Request) -> None:
        self._requests[request] = None
        self._scheduler.add(request)

    def _cancel(self, request_ids: frozenset[str]) -> None:
        for request in [r for r in self._requests if r.request_id in request_ids]:
            self._fail(request, TriptychError(ErrorKind.CANCELLED, "the request was cancelled"))

    def _renew(self, request_ids: frozenset[str]) -> None:
        now = self._clock()
        for request in self._requests:
            if request.request_id in request_ids:
                request.renewed = now

    def _look_after(self, now: float) -> None:
        """Timeouts, leases, heartbeats and gauges."""
        for request in list(self._requests):
            limits = request.limits
            if now - request.arrival >= limits.timeout_s:
                message = f"the request was not finished within {limits.timeout_s:g} s"
                self._fail(request, TriptychError(ErrorKind.TIMEOUT, message))
            elif limits.lease_s is not None and now - request.renewed >= limits.lease_s:
                message = f"the request's lease of {limits.lease_s:g} s was not renewed"
                self._fail(request, TriptychError(ErrorKind.CANCELLED, message))
            elif now - request.last_sent >= self.config.heartbeat_s:
                self._send(request, Delta(), now)
        self._telemetry.set("triptych_requests_running", len(self._scheduler.running))
        self._telemetry.set("triptych_requests_waiting", len(self._scheduler.waiting))
        self._telemetry.set("triptych_kv_cache_usage_ratio", self._pool.usage)
        self._telemetry.set("triptych_heartbeat_timestamp_seconds", time.time())

    def _step(self) -> None:
        plan = self._scheduler.plan()
        if plan.preempted:
            self._telemetry.add("triptych_preemptions_total", len(plan.preempted))
        if not plan.tokens:
            return
        self._telemetry.observe("triptych_batch_size", len(plan.tokens))
        try:
            outcome = self._compute(plan.tokens)
        except Exception as error:
            if _device_lost(error):
                raise
            logger.exception("a step of %d requests failed; computing them one by one", len(plan.tokens))
            outcome = self._compute_each(plan.tokens)
        now = self._clock()
        for request, sampled in outcome.items():
            try:
                self._scheduler.advance(request, plan.tokens[request])
                if sampled is not None:
                    self._accept(request, sampled, now)
            except Exception as error:
                logger.exception("request %r failed", request.request_id)
                self._fail(request, _stage_failed(error))

    def _compute(self, tokens: Mapping[Request, int]) -> dict[Request, Sampled | None]:
        """Run one step; requests whose prompt is not complete yet have no sampled token."""
        slices = {request: request.slice(count) for request, count in tokens.items()}
        logits = self._runner.forward(list(slices.values()))
        wanting = [request for request, part in slices.items() if part.num_logits]
        sampled = self._sampler.sample(logits, [r.sampler for r in wanting]) if wanting else []
        chosen = dict(zip(wanting, sampled, strict=True))
        return {request: chosen.get(request) for request in tokens}

    def _compute_each(self, tokens: Mapping[Request, int]) -> dict[Request, Sampled | None]:
        """As `_compute`, but a request that raises is failed and harms no other.

        Computing a slice twice is harmless: it writes the same values into the same slots.
        """
        outcome: dict[Request, Sampled | None] = {}
        for request, count in tokens.items():
            try:
                outcome |= self._compute({request: count})
            except Exception as error:
                if _device_lost(error):
                    raise
                logger.exception("request %r fails by itself", request.request_id)
                self._fail(request, _stage_failed(error))
        return outcome

    def _accept(self, request: Request, sampled: Sampled, now: float) -> None:
        """Take a new token: text, end, delta."""
        token_id = sampled.token_id
        if token_id < 0:
            raise ValueError("the model gave no usable logits (NaN or infinite)")
        request.output_ids.append(token_id)
        request.sampler.accept(token_id)
        self._measure(request, now)
        finish, matched, text = self._advance_text(request, token_id)
        logprobs: tuple[TokenLogprob, ...] = ()
        if sampled.logprob is not None:
            logprobs = (self._token_logprob(sampled, sampled.logprob),)
        if request.stream:
            delta = Delta(text, (token_id,), logprobs, finish, matched, request.usage() if finish else None)
            if finish:
                self._finish(request, delta)
            else:
                self._send(request, delta, now)
            return
        request.text.append(text)
        request.logprobs.extend(logprobs)
        if finish:
            answer = "".join(request.text)
            ids, known = tuple(request.output_ids), tuple(request.logprobs)
            self._finish(request, Delta(answer, ids, known, finish, matched, request.usage()))

    def _advance_text(self, request: Request, token_id: int) -> tuple[str, str | int | None, str]:
        """Finish reason, what matched, and new text after a token; that of a token that ends the answer is left out."""
        params = request.sampling
        count = len(request.output_ids)
        ends = token_id in params.stop_token_ids or (token_id in self.config.eos_token_ids and not params.ignore_eos)
        # before min_tokens the sampler does not choose such a token
        if ends:
            return "stop", token_id, request.detokenizer.finish()
        piece = request.detokenizer.add(token_id)
        if piece.matched_stop is not None:
            return "stop", piece.matched_stop, piece.text
        if count >= request.limits.max_tokens:
            return "length", None, piece.text + request.detokenizer.finish()
        return "", None, piece.text

    def _token_logprob(self, sampled: Sampled, logprob: float) -> TokenLogprob:
        names = self._vocabulary
        top = tuple((i, names.text(i), value, names.data(i)) for i, value in sampled.top)
        token_id = sampled.token_id
        return TokenLogprob(token_id, names.text(token_id), logprob, names.data(token_id), top)

    def _measure(self, request: Request, now: float) -> None:
        if request.last_token is None:
            self._telemetry.add("triptych_prompt_tokens_total", len(request.prompt))
            if request.num_cached:
                self._telemetry.add("triptych_cached_tokens_total", request.num_cached)
            self._telemetry.observe("triptych_time_to_first_token_seconds", now - request.arrival)
        else:
            self._telemetry.observe("triptych_inter_token_seconds", now - request.last_token)
        self._telemetry.add("triptych_generation_tokens_total")
        request.last_token = now

    def _send(self, request: Request, delta: Delta, now: float) -> None:
        request.last_sent = now
        if not self._deliver(request, delta):
            # nobody can hear it any more
            self._fail(request, TriptychError(ErrorKind.CANCELLED, "the answer could not be delivered"))

    def _finish(self, request: Request, delta: Delta) -> None:
        if self._leave(request, "ok"):
            self._deliver(request, delta, final=True)

    def _fail(self, request: Request, error: TriptychError) -> None:
        """End a request with an error, once."""
        if error.kind is ErrorKind.STAGE_FAILED and request.block_table:
            # whatever went wrong may have left NaN in its blocks
            self._runner.scrub(0, self._pool.unpublish(request.block_table))
        if self._leave(request, error.kind.value):
            self._deliver(request, error)

    def _leave(self, request: Request, outcome: str) -> bool:
        """Free everything a request holds; False where it had left before."""
        if request.done:
            return False
        request.done = True
        self._scheduler.remove(request)
        del self._requests[request]
        self._count_out(request, outcome)
        return True

    def _count_out(self, request: Request, outcome: str) -> None:
        with self._wake:
            self._in_flight -= 1
        self._telemetry.add("triptych_requests_total", outcome=outcome)
        self._telemetry.observe("triptych_stage_seconds", self._clock() - request.arrival)

    def _deliver(self, request: Request, answer: Delta | TriptychError, final: bool = False) -> bool:
        """Hand an answer to the responder; False where that raised."""
        try:
            if isinstance(answer, TriptychError):
                request.responder.fail(answer)
            else:
                request.responder.send(answer, final=final)
        except Exception:
            logger.exception("the responder of request %r failed", request.request_id)
            return False
        return True


def _device_lost(error: Exception) -> bool:
    """After such an error every further call of CUDA in this process fails; running out of memory is none."""
    return isinstance(error, RuntimeError) and "CUDA error" in str(error)


def _stopped() -> TriptychError:
    return TriptychError(ErrorKind.STAGE_DEAD, "the language model has stopped", None, _STAGE)


def _stage_failed(error: Exception) -> TriptychError:
    if isinstance(error, TriptychError):
        return error
    return TriptychError(
        ErrorKind.STAGE_FAILED,
        f"the language model failed on this request: {type(error).__name__}: {error}",
        None,
        _STAGE,
    )
