"""What every request gets, whatever its route: an id, a place in the metrics."""

from __future__ import annotations

import logging
import re
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .drain import Traffic
from .errors import answer_to, unexpected
from .observation import Observer, route_of

log = logging.getLogger("triptych.shim")

CLIENT_CLOSED = 499

_USABLE_ID = re.compile(r"[!-~]{1,128}")


class RequestContext:
    """Pure ASGI: takes or makes ``X-Request-Id``, returns it, has the request observed.

    A fault of the shim is answered here, so that its answer has these headers too. While the server drains, every
    answer ends its connection: its client asks elsewhere next time.

    Not a ``BaseHTTPMiddleware``: that one runs the endpoint in another task and hides disconnects from streams.
    """

    def __init__(self, app: ASGIApp, observer: Observer, traffic: Traffic) -> None:
        self.app = app
        self.observer = observer
        self.traffic = traffic

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if _USABLE_ID.fullmatch(given) else f"req_{uuid.uuid4().hex}"
        scope.setdefault("state", {})["request_id"] = request_id
        token = self.observer.begin(scope["method"], scope["path"], request_id, headers)
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                if self.traffic.closing:
                    headers["connection"] = "close"
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        except Exception as error:
            # with an answer under way all that is left is to end the connection, as the server does then
            if status:
                raise
            log.exception("the endpoint failed")
            scope["state"]["error"] = failure = unexpected(error)
            await answer_to(failure)(scope, receive, send_with_id)
        finally:
            if scope["state"].get("client_closed"):
                status = CLIENT_CLOSED
            self.observer.end(token, status or CLIENT_CLOSED, scope["state"], route_of(scope))
