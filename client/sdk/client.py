"""The synchronous client: one gRPC stream per request, cancelled in the engine when its iterator is dropped."""

from __future__ import annotations

import contextlib
import json
import queue
import threading
import uuid
import weakref
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

import grpc
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc as rpc

from triptych.python_models.contract.delta import Delta
from triptych.python_models.contract.errors import ErrorKind, TriptychError
from triptych.python_models.contract.request import ChatRequest
from triptych.python_models.contract.settings import Settings
from triptych.python_models.contract.tensors import STAGES

from . import wire

_CONTROL_TIMEOUT_S = 5.0


class Client:
    """Talks to the ensembles of a Triton server, without the OpenAI shim.

    Args:
        url: gRPC address, ``host:port``.
        timeout_s: longest silence of a running request. The engine sends heartbeats, so this is not the length of
            an answer but the time after which a dead server is noticed.
        lease_s: the engine ends a request that this client has not renewed for so long (a background thread
            renews), so a killed client does not leave generations running.

    Thread-safe: any number of requests may run at once.
    """

    def __init__(self, url: str = "127.0.0.1:8001", *, timeout_s: float = 120.0, lease_s: float = 10.0) -> None:
        self._channel = grpc.insecure_channel(wire.target(url), options=wire.CHANNEL_OPTIONS)
        self._stub = rpc.GRPCInferenceServiceStub(self._channel)
        self._timeout_s = timeout_s
        self._lease_s = lease_s
        self._lock = threading.Lock()
        # Weak, so that an iterator which the caller dropped is collected, and so cancelled.
        self._running: weakref.WeakValueDictionary[str, ChatStream] = weakref.WeakValueDictionary()
        self._closed = threading.Event()
        self._renewer = threading.Thread(target=self._renew, name="triptych-leases", daemon=True)
        self._renewer.start()

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        media: Sequence[bytes] = (),
        *,
        stream: bool = True,
        timeout_s: float | None = None,
        priority: int = 0,
        cache_salt: str = "",
        tools: Sequence[Mapping[str, Any]] = (),
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **sampling: Any,
    ) -> ChatStream:
        """Ask for an answer.

        Args:
            messages: as in :mod:`triptych.python_models.contract.request`: ``{"role", "content"}`` where content is
                a string or a list of ``{"type": "text", "text"}`` and ``{"type": "image", "blob": 0}`` parts.
            media: encoded media (PNG, MP4, WAV ...) that the parts name by index.
            stream: deltas as they come; else one with the whole answer (and heartbeats before it).
            timeout_s: end the request after this long in any case.
            priority, cache_salt: see :class:`~triptych.python_models.contract.request.ChatRequest`.
            tools: functions in OpenAI's schema, for the chat template.
            chat_template_kwargs: other values that the template reads, such as ``{"enable_thinking": False}``.
            sampling: fields of :class:`~triptych.python_models.contract.sampling.SamplingParams` as JSON values, for
                example ``grammar={"type": "regex", "value": "yes|no"}``.

        Returns:
            An iterator of deltas, each of the choice that its ``index`` names; closing or dropping it cancels the
            generation.

        Raises:
            TriptychError: a field that is not allowed; from the iterator, whatever the server reports.
        """
        data = {"messages": list(messages), "sampling": sampling, "stream": stream, "lease_s": self._lease_s}
        data |= {"priority": priority, "cache_salt": cache_salt, "tools": list(tools)}
        data["chat_template_kwargs"] = dict(chat_template_kwargs or {})
        if timeout_s is not None:
            data["timeout_s"] = timeout_s
        request = ChatRequest.from_json(json.dumps(data), len(media))
        answer = ChatStream(self, self._stub, uuid.uuid4().hex, request, media, self._timeout_s)
        with self._lock:
            self._running[answer.request_id] = answer
        return answer

    def control(self, stage: str, *, cancel: Sequence[str] = (), renew: Sequence[str] = ()) -> None:
        """Cancel or renew requests in one stage; with neither, probe it.

        Raises:
            TriptychError: STAGE_DEAD or TIMEOUT where the stage does not answer.
        """
        try:
            messages = iter([wire.control_message(stage, cancel=cancel, renew=renew)])
            for answer in self._stub.ModelStreamInfer(messages, timeout=_CONTROL_TIMEOUT_S):
                wire.response_of(answer)
        except grpc.RpcError as error:
            raise rpc_error(error) from None

    def settings(self) -> Settings:
        """The deployment's settings."""
        try:
            answer = self._stub.ModelConfig(pb.ModelConfigRequest(name="language_model"), timeout=_CONTROL_TIMEOUT_S)
        except grpc.RpcError as error:
            raise rpc_error(error) from None
        return wire.settings_of(answer)

    def close(self) -> None:
        """Cancel what runs and close the connection."""
        if self._closed.is_set():
            return
        self._closed.set()
        with self._lock:
            running = list(self._running.values())
        for answer in running:
            answer.close()
        self._renewer.join()
        self._channel.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _forget(self, request_id: str) -> None:
        with self._lock:
            self._running.pop(request_id, None)

    def _cancel(self, request_id: str) -> None:
        # The last stage first: there a generation costs most.
        for stage in reversed(STAGES):
            with contextlib.suppress(TriptychError):
                self.control(stage, cancel=[request_id])

    def _renew(self) -> None:
        while not self._closed.wait(self._lease_s / 3):
            with self._lock:
                ids = list(self._running)
            if ids:
                # A server that does not answer shows in the requests themselves.
                with contextlib.suppress(TriptychError):
                    self.control("language_model", renew=ids)


class ChatStream:
    """The deltas of one answer. Iterate, or use as a context manager; :meth:`close` ends the generation.

    Attributes:
        request_id: the id under which every stage knows the request.
    """

    def __init__(
        self,
        client: Client,
        stub: Any,
        request_id: str,
        request: ChatRequest,
        media: Sequence[bytes],
        timeout_s: float,
    ) -> None:
        self.request_id = request_id
        self._client = client
        self._timeout_s = timeout_s
        self._done = False
        self._finished = threading.Event()
        self._answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._call = stub.ModelStreamInfer(iter([wire.chat_message(request_id, request, media)]))
        # The thread holds no reference to this object, so that dropping it ends the generation.
        self._reader = threading.Thread(
            target=_read,
            args=(self._call, self._answers, self._finished, request.sampling.n),
            name=f"triptych-{request_id[:8]}",
            daemon=True,
        )
        self._reader.start()

    def __iter__(self) -> Iterator[Delta]:
        return self

    def __next__(self) -> Delta:
        while not self._done:
            try:
                item = self._answers.get(timeout=self._timeout_s)
            except queue.Empty:
                self.close()
                raise TriptychError(
                    ErrorKind.TIMEOUT, f"no sign of life from the server within {self._timeout_s:g} s"
                ) from None
            if isinstance(item, TriptychError):
                self._end()
                raise item
            if item is None:
                self._end()
                break
            return item  # type: ignore[no-any-return]
        raise StopIteration

    def text(self, index: int = 0) -> str:
        """The rest of the answer as one string; of one choice where there are several."""
        return "".join(delta.text for delta in self if delta.index == index)

    def close(self) -> None:
        """End the generation in the engine if it still runs."""
        if self._done:
            return
        self._end()
        if not self._finished.is_set():
            self._client._cancel(self.request_id)
            # The stages answer a cancelled request themselves; a stream that is still open then is cut.
            self._reader.join(timeout=2.0)
            self._call.cancel()

    def __enter__(self) -> ChatStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        # An iterator that was dropped half-way must not leave its generation running.
        if not getattr(self, "_done", True):
            self.close()

    def _end(self) -> None:
        self._done = True
        self._client._forget(self.request_id)


def _read(call: Any, answers: queue.SimpleQueue[Any], finished: threading.Event, num_open: int) -> None:
    try:
        for answer in call:
            delta = wire.delta_of(wire.response_of(answer))
            if delta is not None:
                num_open -= bool(delta.finish_reason)
                if not num_open:
                    finished.set()
                answers.put(delta)
        if not finished.is_set():
            raise TriptychError(ErrorKind.STAGE_FAILED, "the answer ended without a finish reason")
    except grpc.RpcError as error:
        answers.put(rpc_error(error))
    except TriptychError as error:
        finished.set()
        answers.put(error)
    answers.put(None)


def rpc_error(error: grpc.RpcError) -> TriptychError:
    """What a failed gRPC call means to the caller."""
    code, details = error.code(), error.details() or ""
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return TriptychError(ErrorKind.TIMEOUT, "the Triton server did not answer in time")
    if code is grpc.StatusCode.UNAVAILABLE:
        parsed = TriptychError.from_wire(details)
        if parsed.kind is not ErrorKind.STAGE_FAILED:
            return parsed
        return TriptychError(ErrorKind.STAGE_DEAD, f"the Triton server cannot be reached: {details}")
    if code is grpc.StatusCode.CANCELLED:
        return TriptychError(ErrorKind.CANCELLED, "the request was cancelled")
    return TriptychError.from_wire(details)
