"""The real tritonserver, with scripted stages or a tiny checkpoint, and a plain gRPC client to talk to it."""

from __future__ import annotations

import queue
import time
import urllib.request
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from triptych.client.launcher import TritonServer, find_server
from triptych.python_models.contract.errors import TriptychError
from triptych.python_models.contract.settings import Settings
from triptych.python_models.contract.tensors import CANCEL, ENSEMBLES, STAGES, STRING

with warnings.catch_warnings():
    # the client's own imports warn
    warnings.simplefilter("ignore")
    import tritonclient.grpc as grpc

LOAD_S = 120.0
NO_PROXY = urllib.request.build_opener(urllib.request.ProxyHandler({}))
SCRIPTED = {
    "preprocess": "Preprocess",
    "vision_encoder": "VisionEncoder",
    "audio_encoder": "AudioEncoder",
    "language_model": "LanguageModel",
}
SCRIPTED_SETTINGS = Settings(model="/nowhere/ü 漢")


@dataclass
class Stream:
    """A running request; ``events`` gets dicts of outputs, at the end None or the error."""

    request_id: str
    client: Any
    events: queue.SimpleQueue[Any] = field(default_factory=queue.SimpleQueue)
    ended: bool = False

    def next(self, timeout_s: float = 30) -> Any:
        """The next response; None after the last. Raises the TriptychError that ended the request."""
        if self.ended:
            return None
        event = self.events.get(timeout=timeout_s)
        if event is None or isinstance(event, TriptychError):
            self.ended = True
            self.client.stop_stream(cancel_requests=True)
            self.client.close()
        if isinstance(event, TriptychError):
            raise event
        return event

    def all(self, timeout_s: float = 60) -> list[dict[str, Any]]:
        """Every response up to the last."""
        return list(iter(lambda: self.next(timeout_s), None))


class Client:
    """What a tritonclient user would write, by the contract's specs."""

    def __init__(self, server: TritonServer) -> None:
        self.server = server

    def stream(self, model: str, tensors: Mapping[str, Any], request_id: str = "") -> Stream:
        """Start one streaming request on a connection of its own."""
        request_id = request_id or uuid.uuid4().hex
        client = connect(self.server)
        stream = Stream(request_id, client)

        def arrived(result: Any, error: Any) -> None:
            if error is not None:
                stream.events.put(TriptychError.from_wire(error.message()))
                return
            response = result.get_response()
            if response.outputs:
                stream.events.put({o.name: result.as_numpy(o.name) for o in response.outputs})
            if response.parameters["triton_final_response"].bool_param:
                stream.events.put(None)

        client.start_stream(arrived)
        client.async_stream_infer(
            model, inputs(model, tensors), request_id=request_id, enable_empty_final_response=True
        )
        return stream

    def infer(self, model: str, tensors: Mapping[str, Any], timeout_s: float = 30) -> dict[str, Any]:
        """One unary request (models that are not decoupled)."""
        with connect(self.server) as client:
            result = client.infer(model, inputs(model, tensors), client_timeout=timeout_s)
            return {o.name: result.as_numpy(o.name) for o in result.get_response().outputs}

    def cancel(self, model: str, *ids: str) -> list[dict[str, Any]]:
        """A control request; its (empty) answer."""
        return self.stream(model, {CANCEL.name: list(ids)}).all()

    def metric(self, name: str, **labels: str) -> float | None:
        """A sample of the server's /metrics."""
        with NO_PROXY.open(self.server.metrics_url, timeout=10) as answer:
            page = answer.read().decode()
        for line in page.splitlines():
            head, _, value = line.rpartition(" ")
            if head.split("{")[0] == name and all(f'{k}="{v}"' in head for k, v in labels.items()):
                return float(value)
        return None

    def settled(self, name: str, **labels: str) -> float:
        """The sample (0 where there is none yet) once what went before has been reported."""
        value = None
        while value != (value := self.metric(name, **labels) or 0.0):
            time.sleep(0.5)
        return value

    def wait_metric(self, wanted: Callable[[float], bool], name: str, **labels: str) -> float:
        """The sample once it is as wanted; fails after 15 s."""
        deadline = time.monotonic() + 15
        while True:
            value = self.metric(name, **labels)
            if value is not None and wanted(value):
                return value
            assert time.monotonic() < deadline, f"{name} {labels} stayed at {value}"
            time.sleep(0.05)


def connect(server: TritonServer) -> Any:
    # a proxy of the environment would be in the way of a local connection
    options = [("grpc.enable_http_proxy", 0), ("grpc.max_receive_message_length", -1)]
    return grpc.InferenceServerClient(server.grpc_url, channel_args=options)


def inputs(model: str, tensors: Mapping[str, Any]) -> list[Any]:
    specs = {t.name: t for t in (STAGES[model] if model in STAGES else ENSEMBLES[model]).inputs}
    made = []
    for name, value in tensors.items():
        if specs[name].dtype == STRING:
            array = np.empty((len(value),), dtype=np.object_)
            array[:] = [item.encode() if isinstance(item, str) else item for item in value]
            kind = "BYTES"
        else:
            array, kind = np.asarray(value), specs[name].dtype.removeprefix("TYPE_")
        tensor = grpc.InferInput(name, list(array.shape), kind)
        tensor.set_data_from_numpy(array)
        made.append(tensor)
    return made


def scripted_classes() -> dict[str, str]:
    return {stage: f"{Path(__file__).with_name('scripted_stage.py')}:{name}" for stage, name in SCRIPTED.items()}


def start_server(server: TritonServer, said: list[str] | None = None) -> Client:
    """Start and load; what the progress callback is told goes to ``said``."""
    server.start()
    try:
        server.wait_ready(LOAD_S, (said if said is not None else []).append)
    except BaseException:
        server.stop()
        raise
    return Client(server)


@pytest.fixture(scope="session")
def start() -> Callable[..., Client]:
    """Start a server, load its models and give a client of it."""
    return start_server


@pytest.fixture
def new_server(tmp_path: Path) -> Iterator[Callable[..., TritonServer]]:
    """Make servers with scripted stages (not started), which are stopped at the end."""
    servers: list[TritonServer] = []

    def make(settings: Settings = SCRIPTED_SETTINGS, gpu_ids: Sequence[int] = (), **options: Any) -> TritonServer:
        options = {"stage_classes": scripted_classes(), "log": tmp_path / f"server{len(servers)}.log"} | options
        servers.append(TritonServer(find_server(), settings, gpu_ids=gpu_ids, **options))
        return servers[-1]

    yield make
    for server in servers:
        server.stop()


@pytest.fixture(scope="session")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """A server with scripted stages and BF16 embeddings, shared by the tests that leave it whole."""
    log = tmp_path_factory.mktemp("scripted") / "server.log"
    server = TritonServer(
        find_server(), SCRIPTED_SETTINGS, embedding_dtype="BF16", stage_classes=scripted_classes(), log=log
    )
    client = start_server(server)
    yield client
    server.stop()
