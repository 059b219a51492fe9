"""A gRPC server that speaks the wire contract and answers by a script: what clients do when things go wrong."""

from __future__ import annotations

import json
import struct
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import grpc
import numpy as np
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc as rpc

from triptych.python_models.contract.delta import Delta, Usage
from triptych.python_models.contract.errors import ErrorKind, TriptychError


@dataclass
class Asked:
    """One request to an ensemble, as it arrived."""

    request_id: str
    request: dict[str, Any]
    cancelled: threading.Event = field(default_factory=threading.Event)


Script = Callable[[Asked, int], Iterator[Any]]
"""(request, how many came before) -> deltas and errors to send; a gRPC status code aborts the call."""


class FakeServer(rpc.GRPCInferenceServiceServicer):
    """Attributes: what came: requests, (stage, id) of cancels and renewals, metadata of the last call; ``dead``: stages
    answer no control requests.
    """

    def __init__(self, script: Script, credentials: grpc.ServerCredentials | None = None, port: int = 0) -> None:
        self.script = script
        self.asked: list[Asked] = []
        self.cancels: list[tuple[str, str]] = []
        self.renewals: list[str] = []
        self.metadata: dict[str, str] = {}
        self.running = self.most_running = 0
        self.dead = False
        self._lock = threading.Lock()
        self._server = grpc.server(ThreadPoolExecutor(32))
        rpc.add_GRPCInferenceServiceServicer_to_server(self, self._server)
        address = f"localhost:{port}"
        if credentials is None:
            self.port = self._server.add_insecure_port(address)
        else:
            self.port = self._server.add_secure_port(address, credentials)
        self._server.start()

    @property
    def url(self) -> str:
        return f"localhost:{self.port}"

    def stop(self) -> None:
        for asked in self.asked:
            asked.cancelled.set()
        self._server.stop(None).wait()

    def __enter__(self) -> FakeServer:
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def ModelStreamInfer(self, messages: Any, context: Any) -> Iterator[Any]:
        self.metadata = dict(context.invocation_metadata())
        for message in messages:
            tensors = dict(zip((i.name for i in message.inputs), message.raw_input_contents, strict=True))
            if "request" in tensors:
                yield from self._answer(message.id, json.loads(strings(tensors["request"])[0]), context)
                continue
            for request_id in strings(tensors.get("cancel", b"")):
                self.cancels.append((message.model_name, request_id))
                for asked in self.asked:
                    if asked.request_id == request_id:
                        asked.cancelled.set()
            if self.dead:
                error = TriptychError(ErrorKind.STAGE_DEAD, "gone", stage=message.model_name)
                yield pb.ModelStreamInferResponse(error_message=error.to_wire())
                return
            self.renewals += strings(tensors.get("renew", b""))
            yield pb.ModelStreamInferResponse(infer_response=pb.ModelInferResponse())

    def _answer(self, request_id: str, request: dict[str, Any], context: Any) -> Iterator[Any]:
        asked = Asked(request_id, request)
        with self._lock:
            number = len(self.asked)
            self.asked.append(asked)
            self.running += 1
            self.most_running = max(self.most_running, self.running)
        try:
            for item in self.script(asked, number):
                if isinstance(item, grpc.StatusCode):
                    context.abort(item, "as the script says")
                if isinstance(item, TriptychError):
                    yield pb.ModelStreamInferResponse(error_message=f"in ensemble 'chat', {item.to_wire()}")
                    return
                yield pb.ModelStreamInferResponse(infer_response=response(item))
            yield pb.ModelStreamInferResponse(infer_response=pb.ModelInferResponse())
        finally:
            with self._lock:
                self.running -= 1


def answer(text: str = "ok") -> list[Delta]:
    """A whole answer, a delta for each letter."""
    deltas = [Delta(letter, (ord(letter),)) for letter in text]
    return [Delta(usage=Usage(3)), *deltas, Delta(finish_reason="stop", usage=Usage(3, 0, len(text)))]


def endless(asked: Asked) -> Iterator[Any]:
    """Tokens until it is cancelled."""
    yield Delta(usage=Usage(3))
    while not asked.cancelled.wait(0.01):
        yield Delta("x", (1,))
    yield TriptychError(ErrorKind.CANCELLED, "the request was cancelled", stage="language_model")


def silent_after_acceptance(asked: Asked) -> Iterator[Any]:
    """As an engine that died with a request in it."""
    yield Delta(usage=Usage(3))
    yield from silent(asked)


def silent(asked: Asked) -> Iterator[Any]:
    """Nothing until it is cancelled."""
    asked.cancelled.wait(60)
    yield TriptychError(ErrorKind.CANCELLED, "the request was cancelled")


def strings(raw: bytes) -> list[str]:
    found, start = [], 0
    while start < len(raw):
        (size,) = struct.unpack_from("<I", raw, start)
        found.append(raw[start + 4 : start + 4 + size].decode())
        start += 4 + size
    return found


def response(delta: Delta) -> Any:
    made = pb.ModelInferResponse()
    for name, value in delta.to_tensors().items():
        if isinstance(value, np.ndarray):
            made.outputs.add(name=name, datatype="INT32", shape=list(value.shape))
            made.raw_output_contents.append(value.tobytes())
        else:
            made.outputs.add(name=name, datatype="BYTES", shape=[1])
            data = value[0].encode()
            made.raw_output_contents.append(struct.pack("<I", len(data)) + data)
    return made


def wait_until(true: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)
