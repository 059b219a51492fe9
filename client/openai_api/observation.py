"""What is told of each HTTP request when it is over: metrics, a log line, a trace.

An :class:`Observation` follows a request from the middleware to whatever it generates, by a context variable: nobody in
between has to pass it on. It is looked at once, at the end; while tokens stream nothing is done for it.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Mapping, MutableMapping
from contextvars import ContextVar, Token
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from triptych.python_models.contract import logs
from triptych.python_models.contract.delta import Delta, Usage
from triptych.python_models.contract.errors import ErrorKind, TriptychError
from triptych.python_models.contract.request import ChatRequest
from triptych.python_models.contract.timings import Timings

from .metrics import ShimMetrics

if TYPE_CHECKING:
    from .options import ShimOptions
    from .tracing import Tracing

log = logging.getLogger("triptych.requests")

# version 00 of W3C's trace context, and whatever later versions begin with
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}(-.*)?")
# Of the server, not of the request. Refusals for too much work come by the thousand, and are counted.
_FAULTS = (ErrorKind.STAGE_FAILED, ErrorKind.STAGE_DEAD, ErrorKind.TIMEOUT)
_MAX_CONTENT = 20_000
"""Characters of a prompt, and of an answer, that a log line holds."""


@dataclass(eq=False)
class Part:
    """One request to the Triton server, as the endpoint saw it.

    Attributes:
        id: by which every stage knows it.
        request: what was asked.
        began: Unix time when it was sent.
        headers: that say which trace it belongs to.
        text: of its answer, piece by piece, where it is to be told; else None.
        finish_reasons: of its choices, in the order in which they ended.
        usage, timings: the last ones.
        error: how it failed.
    """

    id: str
    request: ChatRequest
    began: float
    headers: Mapping[str, str] = field(default_factory=dict)
    text: list[str] | None = None
    finish_reasons: list[str] = field(default_factory=list)
    usage: Usage = field(default_factory=Usage)
    timings: Timings | None = None
    error: TriptychError | None = None

    def end_choice(self, delta: Delta) -> None:
        """See a delta that ends a choice."""
        self.finish_reasons.append(delta.finish_reason)
        self.usage = delta.usage or self.usage
        self.timings = delta.timings or self.timings


@dataclass(eq=False)
class Observation:
    """One HTTP request.

    Attributes:
        request_id: of ``X-Request-Id``.
        method, path: of the request.
        began: Unix time of its arrival.
        headers: that say which trace it belongs to, to be passed on.
        parts: what was asked of the Triton server for it.
        span: of the trace, where there is one.
        with_text: whether texts of answers are to be kept.
    """

    request_id: str
    method: str
    path: str
    began: float
    headers: dict[str, str]
    parts: list[Part] = field(default_factory=list)
    span: Any = None
    with_text: bool = False


_current: ContextVar[Observation | None] = ContextVar("observation", default=None)


def current() -> Observation | None:
    """Of the HTTP request that this code runs for, if it runs for one."""
    return _current.get()


def route_of(scope: Mapping[str, Any]) -> str:
    """The route's path as it was declared, so that there are few of them, whatever is asked for."""
    return getattr(scope.get("route"), "path", "unknown")


def part_of(request_id: str, request: ChatRequest) -> Part:
    """The part that a request to the Triton server plays in the HTTP request that this code runs for."""
    observation = _current.get()
    part = Part(request_id, request, time.time())
    if observation is not None:
        observation.parts.append(part)
        part.headers = observation.headers
        if observation.with_text:
            part.text = []
    return part


class RequestIdFilter(logging.Filter):
    """Gives every line that is said while a request is worked on its id."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Always True."""
        observation = _current.get()
        if observation is not None and not hasattr(record, "request_id"):
            record.request_id = observation.request_id
        return True


class Observer:
    """Begins and ends observations.

    Args:
        metrics: of the shim.
        options: of the shim.
        tracing: where traces go, or None.
    """

    def __init__(self, metrics: ShimMetrics, options: ShimOptions, tracing: Tracing | None) -> None:
        self._metrics = metrics
        self._log_requests = options.log_requests
        self._tracing = tracing

    def begin(self, method: str, path: str, request_id: str, headers: Mapping[str, str]) -> Token[Observation | None]:
        """From now on this code runs for a request; give the token to :meth:`end`."""
        given = {name: headers[name] for name in ("traceparent", "tracestate") if name in headers}
        if not _TRACEPARENT.fullmatch(given.get("traceparent", "")):
            given = {}
        observation = Observation(request_id, method, path, time.time(), given)
        observation.with_text = self._log_requests == "contents"
        # probes and scrapes would drown what is asked
        if self._tracing is not None and method == "POST":
            self._tracing.begin(observation)
        return _current.set(observation)

    def end(self, token: Token[Observation | None], status: int, state: MutableMapping[str, Any], route: str) -> None:
        """The request is over. Never raises: what is told of a request must not harm it.

        Args:
            token: of :meth:`begin`.
            status: of the answer, 499 where the client went away.
            state: of the request; ``error`` is the one that it was answered with.
            route: path of its route.
        """
        observation = _current.get()
        _current.reset(token)
        if observation is None:
            return
        try:
            self._tell(observation, status, state.get("error") or _error_of(observation), route)
        except Exception:
            log.exception("what is to be told of a request could not be told", extra=logs.about(observation.request_id))

    def _tell(self, seen: Observation, status: int, error: TriptychError | None, route: str) -> None:
        now = time.time()
        self._metrics.requests.labels(route, str(status)).inc()
        if error is not None:
            self._metrics.errors.labels(route, error.kind.value).inc()
        if error is not None and error.kind in _FAULTS:
            log.error("%s", logs.failure(error, "the endpoint"), extra=self._facts(seen, status, route, now))
        elif self._log_requests != "off" and (seen.parts or status >= 400):
            log.info("%s %s %d", seen.method, seen.path, status, extra=self._facts(seen, status, route, now))
        if self._tracing is not None and seen.span is not None:
            self._tracing.end(seen, status, error, route, now)

    def _facts(self, seen: Observation, status: int, route: str, now: float) -> dict[str, Any]:
        facts: dict[str, Any] = logs.about(
            seen.request_id, route=route, status=status, seconds=round(now - seen.began, 6)
        )
        if not seen.parts:
            return facts
        # the ids by which the stages speak of it
        facts["ids"] = [part.id for part in seen.parts]
        for name in ("prompt_tokens", "cached_tokens", "completion_tokens"):
            facts[name] = sum(getattr(part.usage, name) for part in seen.parts)
        facts["media"] = sum(1 for part in seen.parts for _ in part.request.media())
        facts["finish_reasons"] = [reason for part in seen.parts for reason in part.finish_reasons]
        if (timings := seen.parts[0].timings) is not None:
            facts |= {f"{name}_ms": round(1000 * value, 3) for name, value in timings.seconds().items()}
        if self._log_requests == "contents":
            facts["prompts"] = [part.request.to_json()[:_MAX_CONTENT] for part in seen.parts]
            facts["answers"] = ["".join(part.text or ())[:_MAX_CONTENT] for part in seen.parts]
        return facts


def _error_of(seen: Observation) -> TriptychError | None:
    """How a stream failed whose status was sent already."""
    errors = [part.error for part in seen.parts if part.error is not None]
    return next((error for error in errors if error.kind is not ErrorKind.CANCELLED), None)
