"""API keys: who may ask. Only their hashes are kept, and nothing that is written anywhere holds one."""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Iterable

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from .body import discard
from .errors import error_object

# What probes and scrapers ask, which have no key; as on SGLang's server. The page holds no secret: it asks with the
# key that its user gives it.
FREE = re.compile(r"/(health(_generate)?|ready|live|metrics|version|favicon\.ico|assets/.*)?")

_SCHEME = "bearer "


class ApiKeys:
    """The keys of a server, as SHA-256 hashes; with none, everybody may ask.

    Args:
        keys: in plain text; not kept.
    """

    def __init__(self, keys: Iterable[str] = ()) -> None:
        self._hashes = tuple(sorted({_hash(key) for key in keys}))

    def __len__(self) -> int:
        return len(self._hashes)

    def __repr__(self) -> str:
        return f"{len(self)} API keys"

    def allow(self, authorization: str) -> bool:
        """Whether a header ``Authorization`` carries one of the keys; takes as long whichever it is."""
        if not self._hashes:
            return True
        if authorization[: len(_SCHEME)].lower() != _SCHEME:
            return False
        given = _hash(authorization[len(_SCHEME) :].strip())
        # a sum, which does not end with the first that fits
        return sum(hmac.compare_digest(given, known) for known in self._hashes) > 0


def _hash(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


class RequireKey:
    """Pure ASGI: answers 401 in OpenAI's form to whoever has no key, before anything of the request is read."""

    def __init__(self, app: ASGIApp, keys: ApiKeys) -> None:
        self.app = app
        self.keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] == "http" and scope["method"] != "OPTIONS" and not FREE.fullmatch(scope["path"]):
            given = Headers(scope=scope).get("authorization", "")
            if not self.keys.allow(given):
                await _refuse(bool(given), scope, receive, send)
                return
        await self.app(scope, receive, send)


async def _refuse(given: bool, scope: Scope, receive: Receive, send: Send) -> None:
    message = (
        "the API key is not one of this server's; send one as the header 'Authorization: Bearer KEY'"
        if given
        else "this server wants an API key; send it as the header 'Authorization: Bearer KEY'"
    )
    # who asks before sending need not send
    if "expect" not in Headers(scope=scope):
        await discard(Request(scope, receive))
    body = error_object(message, 401, None, "invalid_api_key")
    await JSONResponse(body, 401, {"www-authenticate": "Bearer"})(scope, receive, send)
