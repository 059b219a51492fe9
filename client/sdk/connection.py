"""One gRPC channel to a Triton server and what runs on it: leases, retries, cancels and the watch for silence.

Thread-based: a thread reads each running request, one more looks after all of them. ``Client`` and ``AsyncClient`` both
stand on it.
"""

from __future__ import annotations

import contextlib
import random
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc as rpc

from triptych.client.calls import Call, Sink
from triptych.python_models.contract.errors import ErrorKind, TriptychError
from triptych.python_models.contract.settings import Settings
from triptych.python_models.contract.tensors import ENSEMBLES, LANGUAGE_MODEL

from . import wire
from .errors import rpc_error

_CONTROL_TIMEOUT_S = 5.0
_TICK_S = 0.25
# A cancel that overtakes its request on the way between two stages finds nothing to end, so it is sent again.
_CANCEL_PAUSES_S = (0.1, 0.3, 0.6, 1.0, 2.0)
_FIRST_BACKOFF_S, _LONGEST_BACKOFF_S = 0.1, 5.0
# Else a channel that lost its server waits for up to two minutes before it looks again.
_RECONNECT = (("grpc.initial_reconnect_backoff_ms", 200), ("grpc.max_reconnect_backoff_ms", 2000))
# What may be gone in a moment, of a request of which nothing was computed for its caller yet.
_RETRIED = (ErrorKind.STAGE_DEAD, ErrorKind.OVERLOADED)


@dataclass(frozen=True)
class TLS:
    """How to encrypt the connection. Values are PEM, as bytes or as the path of a file.

    Attributes:
        root_certificates: whom to trust; None: whom gRPC trusts by itself.
        private_key, certificate_chain: of this client, where the server asks for them.
        server_name: name in the server's certificate, where it is another than that of the address.
    """

    root_certificates: bytes | str | Path | None = None
    private_key: bytes | str | Path | None = None
    certificate_chain: bytes | str | Path | None = None
    server_name: str | None = None


@dataclass(frozen=True)
class Limits:
    """How patient a client is; see :class:`~triptych.client.sdk.Client`."""

    start_timeout_s: float
    silence_timeout_s: float
    retry_s: float
    lease_s: float


class Connection:
    """A channel.

    Args:
        url: gRPC address, ``host:port``; with the scheme ``grpcs`` or ``https`` it is encrypted.
        limits: how patient to be.
        tls: see :class:`TLS`; True: with the defaults.
        headers: sent with every call.
    """

    def __init__(
        self, url: str, limits: Limits, tls: TLS | bool | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        self.limits = limits
        if tls is None:
            tls = url.partition("://")[0] in ("grpcs", "https") and "://" in url
        self._channel = _channel(wire.target(url), TLS() if tls is True else tls or None)
        self._stub = rpc.GRPCInferenceServiceStub(self._channel)
        self._metadata = tuple((name.lower(), value) for name, value in (headers or {}).items())
        self._lock = threading.Lock()
        self._running: dict[int, Request] = {}
        self._cancelling: set[threading.Thread] = set()
        self._closed = threading.Event()
        self._keeper = threading.Thread(target=self._keep, name="triptych-keeper", daemon=True)
        self._keeper.start()

    def start(self, call: Call, sink: Sink) -> Request:
        """Begin a request and return at once.

        Raises:
            TriptychError: the client is closed.
        """
        request = Request(self, call, sink)
        with self._lock:
            if self._closed.is_set():
                raise TriptychError(ErrorKind.CANCELLED, "the client is closed")
            self._running[id(request)] = request
        request.begin()
        return request

    def control(
        self,
        stage: str,
        *,
        cancel: Sequence[str] = (),
        renew: Sequence[str] = (),
        timeout_s: float = _CONTROL_TIMEOUT_S,
    ) -> None:
        """Cancel or renew requests in one stage; with neither, probe it.

        Raises:
            TriptychError: STAGE_DEAD or TIMEOUT where the stage does not answer.
        """
        message = wire.control_message(stage, cancel=cancel, renew=renew)
        try:
            for answer in self._stub.ModelStreamInfer(iter([message]), timeout=timeout_s, metadata=self._metadata):
                wire.response_of(answer)
        except grpc.RpcError as error:
            raise rpc_error(error) from None

    def settings(self) -> Settings:
        """The deployment's settings.

        Raises:
            TriptychError: where the server cannot be reached or serves something else.
        """
        request = pb.ModelConfigRequest(name=LANGUAGE_MODEL.name)
        try:
            answer = self._stub.ModelConfig(request, timeout=_CONTROL_TIMEOUT_S, metadata=self._metadata)
        except grpc.RpcError as error:
            raise rpc_error(error) from None
        return wire.settings_of(answer)

    def close(self) -> None:
        """Cancel what runs and close the channel."""
        with self._lock:
            if self._closed.is_set():
                return
            self._closed.set()
            running = list(self._running.values())
        for request in running:
            request.cancel()
        with self._lock:
            cancelling = list(self._cancelling)
        for thread in cancelling:
            thread.join()
        self._keeper.join()
        self._channel.close()

    def infer(self, message: Any) -> Any:
        """Send one request on a stream of its own."""
        return self._stub.ModelStreamInfer(iter([message]), metadata=self._metadata)

    def forget(self, request: Request) -> None:
        """Nothing more will come of it."""
        with self._lock:
            self._running.pop(id(request), None)

    def in_background(self, work: Any, *args: Any) -> None:
        """Run something that ends a request; :meth:`close` waits for it."""

        def run() -> None:
            try:
                work(*args)
            finally:
                with self._lock:
                    self._cancelling.discard(thread)

        thread = threading.Thread(target=run, name="triptych-cancel", daemon=True)
        with self._lock:
            self._cancelling.add(thread)
        try:
            thread.start()
        except RuntimeError:
            # the interpreter is ending; the lease does the rest
            with self._lock:
                self._cancelling.discard(thread)

    def _keep(self) -> None:
        """Renew leases, notice what has been silent for too long."""
        renewed = time.monotonic()
        while not self._closed.wait(_TICK_S):
            with self._lock:
                running = list(self._running.values())
            now = time.monotonic()
            for request in running:
                request.check(now)
            if running and now - renewed >= self.limits.lease_s / 3:
                renewed = now
                ids = [request.request_id for request in running]
                try:
                    self.control(LANGUAGE_MODEL.name, renew=ids, timeout_s=max(1.0, self.limits.lease_s / 3))
                except TriptychError as error:
                    # one that only does not answer in time shows in the requests themselves
                    for request in running if error.kind is ErrorKind.STAGE_DEAD else ():
                        request.engine_died(error)


class Request:
    """One running request: sent again while nothing of its answer has come and what is wrong may pass.

    Attributes:
        request_id: the id under which every stage knows it; another one each time it is sent.
    """

    def __init__(self, connection: Connection, call: Call, sink: Sink) -> None:
        self.request_id = ""
        self._connection = connection
        self._limits = connection.limits
        self._request = replace(call.request, lease_s=connection.limits.lease_s)
        self._media: tuple[bytes, ...] = call.media
        self._sink = sink
        self._stop = threading.Event()
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._call: Any = None
        self._accepted = self._answered = False
        self._deadline = 0.0
        self._failure: TriptychError | None = None
        self._reader = threading.Thread(target=self._run, name="triptych-request", daemon=True)

    def begin(self) -> None:
        """Send it."""
        self._renew_id()
        self._reader.start()

    def cancel(self) -> None:
        """End it in every stage; returns at once, any number of times."""
        if self._stop.is_set() or self._ended.is_set():
            return
        self._stop.set()
        self._connection.in_background(self._cancel_in_stages)

    def check(self, now: float) -> None:
        """End it where it has been silent for too long."""
        with self._lock:
            if self._call is None or now < self._deadline:
                return
            limit = self._limits.silence_timeout_s if self._accepted else self._limits.start_timeout_s
            accepted = self._accepted
        if accepted:
            message = f"language_model gave no sign of life for {limit:g} s"
            error = TriptychError(ErrorKind.STAGE_DEAD, message, stage=LANGUAGE_MODEL.name)
        else:
            message = f"the request did not reach the engine within {limit:g} s (start_timeout_s)"
            error = TriptychError(ErrorKind.TIMEOUT, message)
        self._give_up(error)
        self._connection.in_background(self._send_cancel, self.request_id)

    def engine_died(self, error: TriptychError) -> None:
        """The server never ends what was in a stage that died."""
        if self._accepted:
            self._give_up(error)

    def _give_up(self, error: TriptychError) -> None:
        with self._lock:
            call, self._call = self._call, None
            self._failure = error
        if call is not None:
            call.cancel()

    def _run(self) -> None:
        try:
            self._sink(self._try_on())
        finally:
            self._ended.set()
            self._connection.forget(self)

    def _try_on(self) -> TriptychError | None:
        """Send it until it is answered, or must not be sent again; what ends the request."""
        until = time.monotonic() + self._limits.retry_s
        backoff = _FIRST_BACKOFF_S
        while True:
            error = self._once()
            if error is None:
                return None
            if self._stop.is_set():
                return TriptychError(ErrorKind.CANCELLED, "the request was cancelled")
            pause = backoff * random.uniform(0.5, 1.0)
            if self._answered or error.kind not in _RETRIED or time.monotonic() + pause > until:
                return error
            if self._stop.wait(pause):
                return TriptychError(ErrorKind.CANCELLED, "the request was cancelled")
            backoff = min(2 * backoff, _LONGEST_BACKOFF_S)
            self._renew_id()

    def _renew_id(self) -> None:
        self.request_id = uuid.uuid4().hex

    def _once(self) -> TriptychError | None:
        """Send it and read the answer; None at its end."""
        num_open = self._request.sampling.n
        message = wire.chat_message(self.request_id, self._request, self._media)
        with self._lock:
            self._failure, self._accepted = None, False
            self._deadline = time.monotonic() + self._limits.start_timeout_s
            call = self._call = self._connection.infer(message)
        del message
        try:
            for answer in call:
                delta = wire.delta_of(wire.response_of(answer))
                # not under the lock: it only ever grows, and this is once per token
                self._deadline, self._accepted = time.monotonic() + self._limits.silence_timeout_s, True
                if delta is None:
                    continue
                if not (self._answered or delta.is_heartbeat):
                    self._answered, self._media = True, ()
                num_open -= bool(delta.finish_reason)
                self._sink(delta)
            error = None if not num_open else _unfinished()
        except grpc.RpcError as problem:
            error = rpc_error(problem)
        except TriptychError as problem:
            error = problem
        finally:
            with self._lock:
                self._call = None
        if not num_open:
            return None
        return self._failure or error

    def _cancel_in_stages(self) -> None:
        for pause in _CANCEL_PAUSES_S:
            if self._ended.is_set():
                return
            self._send_cancel(self.request_id)
            # the stages answer a cancelled request themselves
            if self._ended.wait(pause):
                return
        with self._lock:
            call = self._call
        if call is not None:
            call.cancel()

    def _send_cancel(self, request_id: str) -> None:
        # the last stage first: there a generation costs most
        for step in reversed(ENSEMBLES[wire.ensemble_for(self._request)].steps):
            # one that is gone has nothing left to cancel
            with contextlib.suppress(TriptychError):
                self._connection.control(step.stage, cancel=[request_id], timeout_s=2.0)


def _unfinished() -> TriptychError:
    return TriptychError(ErrorKind.STAGE_FAILED, "the answer ended without a finish reason")


def _channel(target: str, tls: TLS | None) -> grpc.Channel:
    options: list[tuple[str, int | str]] = [*wire.CHANNEL_OPTIONS, *_RECONNECT]
    if tls is None:
        return grpc.insecure_channel(target, options=options)
    credentials = grpc.ssl_channel_credentials(
        _pem(tls.root_certificates), _pem(tls.private_key), _pem(tls.certificate_chain)
    )
    if tls.server_name:
        options.append(("grpc.ssl_target_name_override", tls.server_name))
    return grpc.secure_channel(target, credentials, options=options)


def _pem(value: bytes | str | Path | None) -> bytes | None:
    return value if value is None or isinstance(value, bytes) else Path(value).read_bytes()
