"""Typed clients of the ensembles, over gRPC, without the OpenAI shim."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Mapping

from triptych.client.calls import AsyncCalls, SyncCalls
from triptych.python_models.contract.settings import Settings

from .connection import TLS, Connection, Limits

# Requests of a batch in flight at most.
_WINDOW = 32


class Client(SyncCalls):
    """Asks the ensembles of a Triton server; the same calls as :class:`triptych.Engine`.

    Args:
        url: gRPC address, ``host:port``; with the scheme ``grpcs`` the connection is encrypted.
        start_timeout_s: longest time until the engine has accepted a request.
        silence_timeout_s: longest silence from then on. The engine sends heartbeats, so this is not the length of an
            answer but the time after which a dead server is noticed.
        retry_s: a request of which no token has come is sent again, after growing pauses, for so long while the server
            cannot be reached, is overloaded or a stage of it is dead; 0: never. With the first token that ends.
        lease_s: the engine ends a request that this client has not renewed for so long (a background thread renews), so
            a killed client does not leave generations running.
        max_in_flight: requests of a batch in flight at most.
        tls: see :class:`TLS`; True: with the defaults.
        headers: gRPC metadata of every call, such as the key of a server that restricts its protocols.

    Thread-safe: any number of requests may run at once.
    """

    def __init__(
        self,
        url: str = "127.0.0.1:8001",
        *,
        start_timeout_s: float = 120.0,
        silence_timeout_s: float = 15.0,
        retry_s: float = 30.0,
        lease_s: float = 10.0,
        max_in_flight: int = _WINDOW,
        tls: TLS | bool | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        limits = Limits(start_timeout_s, silence_timeout_s, retry_s, lease_s)
        self._connection = Connection(url, limits, tls, headers)
        super().__init__(self._connection.start, max_in_flight)
        self._closer = weakref.finalize(self, self._connection.close)

    def probe(self, stage: str) -> None:
        """Ask a stage for a sign of life.

        Raises:
            TriptychError: STAGE_DEAD or TIMEOUT where it gives none.
        """
        self._connection.control(stage)

    def settings(self) -> Settings:
        """The deployment's settings.

        Raises:
            TriptychError: where the server cannot be reached or serves something else.
        """
        return self._connection.settings()

    def close(self) -> None:
        """Cancel what runs and close the connection."""
        self._closer()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class AsyncClient(AsyncCalls):
    """As :class:`Client`, for asyncio. Cancelling a task ends in the engine what it waits for."""

    def __init__(
        self,
        url: str = "127.0.0.1:8001",
        *,
        start_timeout_s: float = 120.0,
        silence_timeout_s: float = 15.0,
        retry_s: float = 30.0,
        lease_s: float = 10.0,
        max_in_flight: int = _WINDOW,
        tls: TLS | bool | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        limits = Limits(start_timeout_s, silence_timeout_s, retry_s, lease_s)
        self._connection = Connection(url, limits, tls, headers)
        super().__init__(self._connection.start, max_in_flight)
        self._closer = weakref.finalize(self, self._connection.close)

    async def probe(self, stage: str) -> None:
        """Ask a stage for a sign of life.

        Raises:
            TriptychError: STAGE_DEAD or TIMEOUT where it gives none.
        """
        await asyncio.to_thread(self._connection.control, stage)

    async def settings(self) -> Settings:
        """The deployment's settings.

        Raises:
            TriptychError: where the server cannot be reached or serves something else.
        """
        return await asyncio.to_thread(self._connection.settings)

    async def close(self) -> None:
        """Cancel what runs and close the connection."""
        await asyncio.to_thread(self._closer)

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()
