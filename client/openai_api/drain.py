"""A graceful end: new requests are refused, those that run may finish."""

from __future__ import annotations

import asyncio

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from triptych.python_models.contract.errors import ErrorKind, TriptychError

from .body import discard
from .errors import answer_to
from .keys import FREE


class Traffic:
    """The requests in flight, and whether more are taken on.

    Attributes:
        running: requests that are being answered, probes and scrapes left out.
        closing: no more are taken on.
    """

    def __init__(self) -> None:
        self.running = 0
        self.closing = False
        self._changed = asyncio.Event()

    def close(self) -> None:
        """Take no more requests on."""
        self.closing = True

    def why_not(self) -> TriptychError | None:
        """The error for a new request, or None."""
        if not self.closing:
            return None
        return TriptychError(ErrorKind.OVERLOADED, "the server is shutting down and takes no new requests")

    async def ended(self) -> None:
        """Return once nothing runs any more."""
        while self.running:
            self._changed.clear()
            await self._changed.wait()

    def enter(self) -> None:
        """One request more."""
        self.running += 1

    def leave(self) -> None:
        """One request less."""
        self.running -= 1
        self._changed.set()


class Gate:
    """Pure ASGI: counts requests, and refuses them with 503 while the server drains."""

    def __init__(self, app: ASGIApp, traffic: Traffic) -> None:
        self.app = app
        self.traffic = traffic

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http" or FREE.fullmatch(scope["path"]):
            await self.app(scope, receive, send)
        elif error := self.traffic.why_not():
            await discard(Request(scope, receive))
            await answer_to(error)(scope, receive, send)
        else:
            self.traffic.enter()
            try:
                await self.app(scope, receive, send)
            finally:
                self.traffic.leave()
