"""How answers leave a stub: one thread sends everything, and every request ends exactly once."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Mapping
from typing import Any

import triton_python_backend_utils as pb_utils

from triptych.python_models.contract.delta import Delta
from triptych.python_models.contract.errors import ErrorKind, TriptychError
from triptych.python_models.contract.tensors import StageSpec

from .io import make_outputs

_FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
_LOG = logging.getLogger(__name__)


class Sender:
    """The one thread of a stub that talks to response senders."""

    def __init__(self, spec: StageSpec, dtypes: Mapping[str, str]) -> None:
        """Args: as :func:`~.io.make_outputs`."""
        self._spec = spec
        self._dtypes = dtypes
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._open: set[TritonResponder] = set()
        self._thread = threading.Thread(target=self._run, name="triptych-sender", daemon=True)
        self._thread.start()

    def responder(self, wire: Any) -> TritonResponder:
        """A responder for one request; ``wire`` is the request's InferenceResponseSender."""
        responder = TritonResponder(self, wire, self._spec.decoupled)
        with self._lock:
            self._open.add(responder)
        return responder

    def put(self, responder: TritonResponder, content: Mapping[str, Any] | TriptychError, final: bool) -> None:
        """Send one response after all that were put before; an error is always the final one."""
        self._queue.put(lambda: self._send(responder, content, final))

    def close(self, timeout_s: float) -> None:
        """End what is still open with an error, send what waits, stop the thread."""
        with self._lock:
            left = list(self._open)
        for responder in left:
            responder.fail(TriptychError(ErrorKind.STAGE_FAILED, "the stage was stopped while it worked on this"))
        self._queue.put(None)
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            _LOG.error("answers were still being sent %g s after the stage was stopped; they are lost", timeout_s)

    def _run(self) -> None:
        while (action := self._queue.get()) is not None:
            action()

    def _send(self, responder: TritonResponder, content: Mapping[str, Any] | TriptychError, final: bool) -> None:
        if responder.ended:
            return
        response = None
        if not isinstance(content, TriptychError):
            try:
                response = pb_utils.InferenceResponse(make_outputs(content, self._spec, self._dtypes))
            except TriptychError as error:
                content = error
            except Exception as error:  # noqa: BLE001 - one bad tensor must not end the thread all answers go through
                _LOG.exception("an answer could not be made into tensors")
                content = TriptychError(ErrorKind.STAGE_FAILED, f"an answer could not be sent: {error}")
        if isinstance(content, TriptychError):
            response = self._error(content)
            final = True
        try:
            # an error that is not final at once leaks the ensemble's request
            responder.wire.send(response, flags=_FINAL if final else 0)
        except Exception:  # noqa: BLE001 - nor may a broken connection
            _LOG.exception("an answer could not be handed to the server")
            final = True
        finally:
            if final:
                responder.ended = True
                with self._lock:
                    self._open.discard(responder)

    def _error(self, error: TriptychError) -> Any:
        error.stage = error.stage or self._spec.name
        if name := self._spec.error_output:
            return pb_utils.InferenceResponse(make_outputs({name: [error.to_wire()]}, self._spec, self._dtypes))
        code = getattr(pb_utils.TritonError, error.kind.triton_code)
        return pb_utils.InferenceResponse(error=pb_utils.TritonError(error.to_wire(), code))


class TritonResponder:
    """The :class:`~triptych.python_models.stage.Responder` of one request.

    Attributes:
        wire: the request's InferenceResponseSender; only the sender thread uses it.
        ended: whether the final response has left; only the sender thread uses it.
    """

    def __init__(self, sender: Sender, wire: Any, decoupled: bool) -> None:
        """Args: the thread to send by, the request's sender, whether several responses are allowed."""
        self.wire = wire
        self.ended = False
        self._sender = sender
        self._decoupled = decoupled
        self._lock = threading.Lock()
        self._done = False

    def send(self, answer: Mapping[str, Any] | Delta, *, final: bool) -> None:
        """Queue one response. The arrays must not change afterwards."""
        if not final and not self._decoupled:
            self.fail(TriptychError(ErrorKind.STAGE_FAILED, "the stage sent more than one answer; it must send one"))
            return
        self._put(answer.to_tensors() if isinstance(answer, Delta) else answer, final)

    def fail(self, error: TriptychError) -> None:
        """Queue an error as the final response."""
        self._put(error, True)

    def _put(self, content: Mapping[str, Any] | TriptychError, final: bool) -> None:
        # the lock also keeps the order: nothing may be queued behind the final response
        with self._lock:
            if self._done:
                return
            self._done = final
            self._sender.put(self, content, final)
