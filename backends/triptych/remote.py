"""An encoder stage whose tower runs elsewhere: features go to a pool of other Triton servers, embeddings come back.

So encoders are scaled apart from the language model, on cheaper GPUs if need be. To the ensemble nothing changes.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
import numpy as np
import torch
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc as rpc

from triptych.python_models.contract.errors import ErrorKind, TriptychError
from triptych.python_models.contract.settings import Settings
from triptych.python_models.contract.tensors import CANCEL, STAGES
from triptych.python_models.stage import Responder, Stage, Telemetry

_LOG = logging.getLogger(__name__)
_TORCH = {"FP32": torch.float32, "BF16": torch.bfloat16, "FP16": torch.float16}
_CHANNEL = (
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.enable_http_proxy", 0),
)
# how often names are looked up anew: a pool that grows is used within this time
_RESOLVE_S = 5.0
# a server that could not be reached is left out for so long
_REST_S = 2.0


@dataclass(eq=False)
class _Server:
    """One server of the pool."""

    address: str
    channel: Any
    stub: Any
    in_flight: int = 0
    rests_until: float = 0.0


@dataclass(eq=False)
class _Job:
    """A request with media."""

    request_id: str
    message: Any
    responder: Responder
    arrived: float
    call: Any = None
    server: _Server | None = None
    done: bool = False
    tried: set[str] = field(default_factory=set)


class RemoteEncoderStage(Stage):
    """Hosts no weights: each request goes to the server of the pool that has the fewest of them.

    A server that cannot be reached costs a request nothing but time: it goes to another one, as encoding it twice does
    no harm. Only when none is left does it end with STAGE_DEAD.
    """

    def __init__(self, name: str, addresses: str, settings: Settings, telemetry: Telemetry, device: str) -> None:
        """Look the pool up; it need not be there yet.

        Args:
            name: of the stage, "vision_encoder" or "audio_encoder".
            addresses: "host:port" of gRPC endpoints, comma-separated; a host with several addresses is several
                servers, looked up again every few seconds.
            settings, telemetry, device: see :class:`~triptych.python_models.stage.Stage`; embeddings are handed on
                from ``device``.
        """
        super().__init__(settings, telemetry, device)
        self.name = name
        modality = name.removesuffix("_encoder")
        self._input, self._output, self._error = (f"{modality}_{part}" for part in ("features", "embeddings", "error"))
        self._addresses = [address.strip() for address in addresses.split(",")]
        self._lock = threading.Lock()
        self._servers: dict[str, _Server] = {}
        self._jobs: set[_Job] = set()
        self._closing = threading.Event()
        self._resolve()
        self._resolver = threading.Thread(target=self._keep_resolving, name=f"{name}-pool", daemon=True)
        self._resolver.start()

    def submit(self, request_id: str, inputs: Mapping[str, Any], responder: Responder) -> None:
        """See :meth:`Stage.submit`. Without features the answer has no tensors and is sent at once."""
        features = inputs.get(self._input)
        if features is None or len(features) == 0:
            responder.send({}, final=True)
            return
        message = pb.ModelInferRequest(model_name=self.name, id=request_id)
        # without the one that only those ask for who want errors as errors of the call
        spec = STAGES[self.name]
        for output in spec.outputs:
            if output.name != spec.alone:
                message.outputs.add(name=output.name)
        tensor = message.inputs.add(name=self._input, datatype="UINT8")
        tensor.shape.append(len(features))
        message.raw_input_contents.append(np.ascontiguousarray(features).tobytes())
        job = _Job(request_id, message, responder, time.monotonic())
        with self._lock:
            self._jobs.add(job)
            self._gauge()
        self._send(job)

    def flush(self, responder: Responder) -> None:
        """The caches are elsewhere, and other servers' too."""
        message = f"{self.name} runs on other servers, whose caches are not this one's to empty"
        responder.fail(TriptychError(ErrorKind.UNSUPPORTED, message, stage=self.name))

    def cancel(self, request_ids: Sequence[str]) -> None:
        """See :meth:`Stage.cancel`."""
        ids = set(request_ids) - {""}
        with self._lock:
            hit = [job for job in self._jobs if job.request_id in ids]
        for job in hit:
            server = job.server
            self._fail(job, TriptychError(ErrorKind.CANCELLED, "the request was cancelled", stage=self.name))
            if server is not None:
                message = pb.ModelInferRequest(model_name=self.name)
                message.inputs.add(name=CANCEL.name, datatype="BYTES").shape.append(1)
                raw = job.request_id.encode()
                message.raw_input_contents.append(len(raw).to_bytes(4, "little") + raw)
                server.stub.ModelInfer.future(message, timeout=5.0)

    def close(self) -> None:
        """See :meth:`Stage.close`."""
        self._closing.set()
        with self._lock:
            left = list(self._jobs)
        for job in left:
            self._fail(job, TriptychError(ErrorKind.STAGE_DEAD, f"{self.name} is shutting down", stage=self.name))
        self._resolver.join()
        with self._lock:
            servers = list(self._servers.values())
            self._servers.clear()
        for server in servers:
            server.channel.close()

    def _send(self, job: _Job) -> None:
        """To the server with the least to do of those that have not failed it yet."""
        with self._lock:
            if job.done:
                return
            left = [server for server in self._servers.values() if server.address not in job.tried]
            now = time.monotonic()
            rested = [server for server in left if server.rests_until <= now]
            chosen = min(rested or left, key=lambda server: server.in_flight, default=None)
            if chosen is not None:
                chosen.in_flight += 1
                job.server = chosen
                job.tried.add(chosen.address)
        if chosen is None:
            reached = ", ".join(sorted(job.tried)) or "no address was found"
            message = f"no server of the pool {', '.join(self._addresses)} can be reached ({reached}); try again later"
            self._fail(job, TriptychError(ErrorKind.STAGE_DEAD, message, stage=self.name))
            return
        waited = time.monotonic() - job.arrived
        limit = max(self.settings.mm_per_request_timeout - waited, 0.001)
        job.call = chosen.stub.ModelInfer.future(job.message, timeout=limit)
        job.call.add_done_callback(lambda call: self._answered(job, chosen, call))
        if job.done:
            # cancelled in between, before there was a call to cancel
            job.call.cancel()

    def _answered(self, job: _Job, server: _Server, call: Any) -> None:
        """Runs in a thread of gRPC's."""
        with self._lock:
            server.in_flight -= 1
        try:
            answer = self._read(call.result())
        except grpc.FutureCancelledError:
            return
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.UNAVAILABLE and not self._closing.is_set():
                _LOG.warning("%s cannot be reached: %s", server.address, error.details())
                server.rests_until = time.monotonic() + _REST_S
                self._send(job)
                return
            self._fail(job, self._meant(error, server))
            return
        except TriptychError as error:
            self._fail(job, error)
            return
        except Exception as error:  # noqa: BLE001 - the request must end, whatever came
            _LOG.exception("request %s: the answer of %s cannot be read", job.request_id, server.address)
            message = f"the answer of {server.address} cannot be read: {type(error).__name__}: {error}"
            self._fail(job, TriptychError(ErrorKind.STAGE_FAILED, message, stage=self.name))
            return
        if self._finish(job, "ok"):
            job.responder.send(answer, final=True)

    def _read(self, response: Any) -> dict[str, Any]:
        """The stage's outputs in a ``ModelInferResponse``.

        Raises:
            TriptychError: what the other server's stage reported.
        """
        found: dict[str, Any] = {}
        for output, raw in zip(response.outputs, response.raw_output_contents, strict=True):
            if output.name == self._error:
                raise TriptychError.from_wire(raw[4:].decode("utf-8", "replace"))
            if output.name == self._output:
                rows = torch.frombuffer(bytearray(raw), dtype=_TORCH[output.datatype]).view(*output.shape)
                found[output.name] = rows.to(self.device)
                if rows.device != found[output.name].device:
                    torch.cuda.current_stream(torch.device(self.device)).synchronize()
            else:
                found[output.name] = np.frombuffer(raw, dtype=np.int32).reshape(tuple(output.shape))
        if self._output not in found:
            raise TriptychError(ErrorKind.STAGE_FAILED, f"the answer has no {self._output}", stage=self.name)
        return found

    def _meant(self, error: Any, server: _Server) -> TriptychError:
        if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
            limit = self.settings.mm_per_request_timeout
            message = f"{self.name} at {server.address} did not answer within mm_per_request_timeout ({limit:g} s)"
            return TriptychError(ErrorKind.TIMEOUT, message, stage=self.name)
        return TriptychError.from_wire(error.details() or str(error.code()))

    def _fail(self, job: _Job, error: TriptychError) -> None:
        if self._finish(job, error.kind.value):
            if job.call is not None:
                job.call.cancel()
            job.responder.fail(error)

    def _finish(self, job: _Job, outcome: str) -> bool:
        """True for the first caller, who then answers the request."""
        with self._lock:
            if job.done:
                return False
            job.done = True
            self._jobs.discard(job)
            self._gauge()
        self.telemetry.add("triptych_requests_total", 1, outcome=outcome)
        self.telemetry.observe("triptych_stage_seconds", time.monotonic() - job.arrived)
        return True

    def _gauge(self) -> None:
        self.telemetry.set("triptych_requests_running", len(self._jobs))

    def _keep_resolving(self) -> None:
        while not self._closing.wait(_RESOLVE_S):
            self._resolve()

    def _resolve(self) -> None:
        """Bring the pool up to date; of a name that cannot be looked up now, what is known stays."""
        wanted: set[str] = set()
        for address in self._addresses:
            host, _, port = address.rpartition(":")
            try:
                found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
            except OSError as error:
                _LOG.warning("%s cannot be looked up: %s", address, error)
                return
            for family, _, _, _, place in found:
                name = str(place[0])
                wanted.add(f"[{name}]:{int(port)}" if family == socket.AF_INET6 else f"{name}:{int(port)}")
        with self._lock:
            gone = [self._servers.pop(address) for address in set(self._servers) - wanted]
            for address in wanted - set(self._servers):
                channel = grpc.insecure_channel(address, options=_CHANNEL)
                self._servers[address] = _Server(address, channel, rpc.GRPCInferenceServiceStub(channel))
        for server in gone:
            # what still runs there ends by itself
            timer = threading.Timer(self.settings.mm_per_request_timeout, server.channel.close)
            timer.daemon = True
            timer.start()
