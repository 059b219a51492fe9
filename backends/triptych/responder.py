"""How answers leave a stub: one thread sends everything, and every request ends exactly once."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import triton_python_backend_utils as pb_utils

from triptych.python_models.contract import logs
from triptych.python_models.contract.delta import Delta, put
from triptych.python_models.contract.errors import ErrorKind, TriptychError
from triptych.python_models.contract.tensors import StageSpec

from .io import make_outputs

# Responses per second at which deltas begin to be merged. Each takes about 50 us of the interpreter lock, which the
# engine's thread needs too, and about as much again of whoever reads it.
MERGE_ABOVE = 4000
# longest time that an answer waits for the stage's worker to pause
_PATIENCE_S = 0.02
# of the server, not of the request
_FAULTS = (ErrorKind.STAGE_FAILED, ErrorKind.STAGE_DEAD, ErrorKind.TIMEOUT)
_FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
_LOG = logging.getLogger(__name__)
_Content = Mapping[str, Any] | TriptychError
# why the thread sleeps: nothing to send, or nothing that could not wait a little
_BUSY, _PACED, _IDLE = range(3)


class Sender:
    """The one thread of a stub that talks to response senders.

    Deltas that wait for it are merged, one for each choice of a request. The thread goes over all requests in rounds
    and pauses between them, so that it never sends more than :data:`MERGE_ABOVE` responses a second. A request's
    first token, its last answer and whatever is no delta do not wait for a round.
    """

    def __init__(self, spec: StageSpec, dtypes: Mapping[str, str], pauses: threading.Event) -> None:
        """Args: as :func:`~.io.make_outputs`; the stage's pauses, in which answers are sent."""
        self._pauses = pauses
        self._spec = spec
        self._dtypes = dtypes
        self._lock = threading.Lock()
        self._open: set[TritonResponder] = set()
        self._urgent: deque[TritonResponder] = deque()
        self._others: deque[TritonResponder] = deque()
        self._next_round = 0.0
        self._state = _BUSY
        self._closing = False
        self._wake: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="triptych-sender", daemon=True)
        self._thread.start()

    def responder(self, wire: Any, request_id: str = "") -> TritonResponder:
        """A responder for one request; ``wire`` is the request's InferenceResponseSender."""
        responder = TritonResponder(self, wire, self._spec.decoupled, request_id)
        with self._lock:
            self._open.add(responder)
        return responder

    def put(self, responder: TritonResponder, content: _Content | Delta, final: bool) -> None:
        """Send one response after all of this responder that were put before; after the final one, nothing.

        Deltas that wait are merged, so it is not always a response of its own.
        """
        with self._lock:
            # nothing may be queued behind the final response
            if responder.final:
                return
            responder.add(content)
            responder.final = final
            urgent = final or not isinstance(content, Delta) or not responder.has_spoken
            if isinstance(content, Delta) and content.token_ids:
                responder.has_spoken = True
            # it may stand in both lines; whoever comes to it second finds nothing
            if urgent and not responder.is_urgent:
                responder.is_urgent = True
                self._urgent.append(responder)
            elif not urgent and not responder.is_waiting:
                responder.is_waiting = True
                self._others.append(responder)
            wake = self._state == _IDLE or (urgent and self._state == _PACED)
            if wake:
                self._state = _BUSY
        if wake:
            self._wake.put(None)

    def close(self, timeout_s: float) -> None:
        """End what is still open with an error, send what waits, stop the thread."""
        with self._lock:
            left = list(self._open)
        for responder in left:
            responder.fail(TriptychError(ErrorKind.STAGE_FAILED, "the stage was stopped while it worked on this"))
        with self._lock:
            self._closing = True
        self._wake.put(None)
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            _LOG.error("answers were still being sent %g s after the stage was stopped; they are lost", timeout_s)

    def _run(self) -> None:
        while True:
            pause: float | None = None
            with self._lock:
                batch, urgent = self._urgent, True
                if not batch and self._others:
                    pause = 0.0 if self._closing else self._next_round - time.monotonic()
                    if pause <= 0:
                        batch, urgent = self._others, False
                if batch:
                    due = list(batch)
                    batch.clear()
                elif self._closing:
                    return
                else:
                    due = []
                    self._state = _IDLE if pause is None else _PACED
            if due:
                began = time.monotonic()
                count = sum([self._send_all(responder, urgent) for responder in due])
                if not urgent:
                    self._next_round = began + count / MERGE_ABOVE
                continue
            try:
                self._wake.get(timeout=pause)
            except queue.Empty:
                with self._lock:
                    self._state = _BUSY

    def _send_all(self, responder: TritonResponder, urgent: bool) -> int:
        """Send what a request has to say; how many responses that took."""
        with self._lock:
            if urgent:
                responder.is_urgent = False
            else:
                responder.is_waiting = False
            waiting, responder.waiting = responder.waiting, []
            final = responder.final
        contents: list[_Content | Delta] = []
        for item in waiting:
            contents += item.values() if isinstance(item, _Deltas) else [item]
        for number, content in enumerate(contents, 1):
            self._pauses.wait(_PATIENCE_S)
            self._send(responder, content, final and number == len(contents))
        return len(contents)

    def _send(self, responder: TritonResponder, content: _Content | Delta, final: bool) -> None:
        if responder.ended:
            return
        response = None
        if not isinstance(content, TriptychError):
            try:
                tensors: Mapping[str, Any] | None
                if not isinstance(content, Delta):
                    tensors = content
                elif (renderer := responder.renderer) is not None:
                    tensors = renderer(content)
                    if tensors is None and not final:
                        return
                else:
                    tensors = content.to_tensors()
                if tensors is not None and responder.outputs is not None:
                    tensors = {name: value for name, value in tensors.items() if name in responder.outputs}
                if tensors is not None:
                    response = pb_utils.InferenceResponse(make_outputs(tensors, self._spec, self._dtypes))
            except TriptychError as error:
                content = error
            except Exception as error:  # noqa: BLE001 - one bad tensor must not end the thread all answers go through
                _LOG.exception("an answer could not be made into tensors")
                content = TriptychError(ErrorKind.STAGE_FAILED, f"an answer could not be sent: {error}")
        if isinstance(content, TriptychError):
            response = self._error(content, responder)
            final = True
        try:
            # an error that is not final at once leaks the ensemble's request
            if response is None:
                responder.wire.send(flags=_FINAL)
            else:
                responder.wire.send(response, flags=_FINAL if final else 0)
        except Exception:  # noqa: BLE001 - nor may a broken connection
            _LOG.exception("an answer could not be handed to the server")
            final = True
        finally:
            if final:
                responder.ended = True
                with self._lock:
                    self._open.discard(responder)

    def _error(self, error: TriptychError, responder: TritonResponder) -> Any:
        error.stage = error.stage or self._spec.name
        # a failure that arrived from another stage was told there
        if error.kind in _FAULTS and error.stage == self._spec.name:
            _LOG.error("%s", logs.failure(error, self._spec.name), extra=logs.about(responder.request_id))
        name, wanted = self._spec.error_output, responder.outputs
        if name and (wanted is None or (name in wanted and self._spec.alone not in wanted)):
            return pb_utils.InferenceResponse(make_outputs({name: [error.to_wire()]}, self._spec, self._dtypes))
        code = getattr(pb_utils.TritonError, error.kind.triton_code)
        return pb_utils.InferenceResponse(error=pb_utils.TritonError(error.to_wire(), code))


class _Deltas(dict[int, Delta]):
    """Deltas in a row, merged: one for each choice."""


class TritonResponder:
    """The :class:`~triptych.python_models.stage.Responder` of one request.

    Attributes:
        wire: the request's InferenceResponseSender; only the sender thread uses it.
        request_id: for what the log tells of it.
        ended: whether the final response has left; only the sender thread uses it.
        renderer: what makes tensors of deltas, where it is not their own way.
        outputs: those asked for, where that makes a difference (``StageSpec.alone``); None: all that is sent.
        waiting: what is to be sent, in order; as all that follows, guarded by the sender's lock.
        final: the final response has been put; it is the last of ``waiting``, or has left.
        has_spoken: it has put a token.
        is_urgent, is_waiting: it stands in the sender's line of those who do not wait for a round, in that of those
            who do.
    """

    def __init__(self, sender: Sender, wire: Any, decoupled: bool, request_id: str = "") -> None:
        """Args: the thread to send by, the request's sender, whether several responses are allowed, its id."""
        self.wire = wire
        self.request_id = request_id
        self.ended = False
        self.outputs: frozenset[str] | None = None
        self.renderer: Callable[[Delta], Mapping[str, Any] | None] | None = None
        self.waiting: list[_Content | _Deltas] = []
        self.final = False
        self.has_spoken = False
        self.is_urgent = False
        self.is_waiting = False
        self._sender = sender
        self._decoupled = decoupled

    def send(self, answer: Mapping[str, Any] | Delta, *, final: bool) -> None:
        """Queue one response. The arrays must not change afterwards."""
        if not final and not self._decoupled:
            self.fail(TriptychError(ErrorKind.STAGE_FAILED, "the stage sent more than one answer; it must send one"))
            return
        self._sender.put(self, answer, final)

    def fail(self, error: TriptychError) -> None:
        """Queue an error as the final response."""
        self._sender.put(self, error, True)

    def render(self, renderer: Callable[[Delta], Mapping[str, Any] | None]) -> None:
        """See :class:`~triptych.python_models.stage.Responder`."""
        self.renderer = renderer

    def add(self, content: _Content | Delta) -> None:
        """Put something behind what waits. Only the sender calls it, under its lock."""
        if not isinstance(content, Delta):
            self.waiting.append(content)
            return
        last = self.waiting[-1] if self.waiting else None
        if not isinstance(last, _Deltas):
            last = _Deltas()
            self.waiting.append(last)
        put(last, content)
