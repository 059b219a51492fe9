"""The asynchronous gRPC adapter: the only module of the shim that talks to the Triton server."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from typing import Any

import grpc
from google.protobuf.json_format import MessageToJson
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc as rpc

from triptych.client.launcher.server import KEY_HEADER as MANAGEMENT_HEADER
from triptych.client.sdk import wire
from triptych.client.sdk.errors import rpc_error
from triptych.python_models.contract.errors import ErrorKind, TriptychError
from triptych.python_models.contract.settings import Settings
from triptych.python_models.contract.tensors import STAGES


class Triton:
    """One channel to a Triton server; make it inside the event loop that uses it.

    Args:
        url: gRPC address, ``host:port``.
        management_key: what the server wants before it loads a model; "" where it wants nothing.
    """

    def __init__(self, url: str, management_key: str = "") -> None:
        self._channel = grpc.aio.insecure_channel(wire.target(url), options=wire.CHANNEL_OPTIONS)
        self._stub = rpc.GRPCInferenceServiceStub(self._channel)
        self._management = ((f"triton-grpc-protocol-{MANAGEMENT_HEADER}", management_key),) if management_key else ()

    async def infer(self, message: Any, headers: Mapping[str, str] | None = None) -> AsyncGenerator[Any, None]:
        """Send one request on a stream of its own; its ``ModelInferResponse`` messages in order.

        A stream per request: an error ends no other request, and the end of the stream is the end of the request.

        Args:
            message: the ``ModelInferRequest``.
            headers: metadata to send along.

        Raises:
            TriptychError: what the server or a stage reported; STAGE_DEAD where the server cannot be reached.
        """
        call = self._stub.ModelStreamInfer(_once(message), metadata=tuple(headers.items()) if headers else None)
        del message
        try:
            async for answer in call:
                yield wire.response_of(answer)
        except grpc.RpcError as error:
            raise rpc_error(error) from None
        finally:
            call.cancel()

    async def control(
        self, stage: str, *, cancel: Sequence[str] = (), renew: Sequence[str] = (), timeout_s: float = 5.0
    ) -> None:
        """Cancel or renew requests in a stage; with no ids, probe it.

        Raises:
            TriptychError: STAGE_DEAD where its process is gone, TIMEOUT where it does not answer.
        """

        async def exchange() -> None:
            async for _ in self.infer(wire.control_message(stage, cancel=cancel, renew=renew)):
                pass

        try:
            await asyncio.wait_for(exchange(), timeout_s)
        except asyncio.TimeoutError:
            raise TriptychError(
                ErrorKind.TIMEOUT, f"{stage} did not answer within {timeout_s:g} s", stage=stage
            ) from None

    async def reload(self, stage: str, timeout_s: float = 600.0) -> None:
        """Load a stage anew, in a new process.

        The server takes a plain load of a model that it believes to be loaded for done, so the configuration is sent
        along with a parameter that differs every time (a changed instance group alone would keep the instances).

        Raises:
            TriptychError: why it does not load.
        """
        try:
            answer = await self._stub.ModelConfig(pb.ModelConfigRequest(name=stage), timeout=10.0)
            answer.config.parameters["loaded_ns"].string_value = str(time.time_ns())
            request = pb.RepositoryModelLoadRequest(model_name=stage)
            config = MessageToJson(answer.config, preserving_proto_field_name=True)
            request.parameters["config"].string_param = config
            await self._stub.RepositoryModelLoad(request, timeout=timeout_s, metadata=self._management)
        except grpc.RpcError as error:
            raise rpc_error(error) from None

    async def settings(self, stage: str) -> Settings:
        """The deployment's settings, from the server itself: every stage has them all.

        Raises:
            TriptychError: where the server cannot be reached or serves something else.
        """
        try:
            answer = await self._stub.ModelConfig(pb.ModelConfigRequest(name=stage), timeout=10.0)
        except grpc.RpcError as error:
            raise rpc_error(error) from None
        return wire.settings_of(answer)

    async def version(self) -> str:
        """The server's own version.

        Raises:
            TriptychError: where the server cannot be reached.
        """
        try:
            answer = await self._stub.ServerMetadata(pb.ServerMetadataRequest(), timeout=10.0)
        except grpc.RpcError as error:
            raise rpc_error(error) from None
        return str(answer.version)

    async def stages(self) -> list[str]:
        """The stages that this server has loaded.

        Raises:
            TriptychError: where the server cannot be reached.
        """
        loaded = []
        try:
            # the list of models is behind the management key
            for stage in STAGES:
                if (await self._stub.ModelReady(pb.ModelReadyRequest(name=stage), timeout=10.0)).ready:
                    loaded.append(stage)
        except grpc.RpcError as error:
            raise rpc_error(error) from None
        return loaded

    async def close(self) -> None:
        """Close the channel."""
        await self._channel.close()


async def _once(message: Any) -> AsyncIterator[Any]:
    yield message
