"""Reads a request body within its limits."""

from __future__ import annotations

import asyncio

from starlette.exceptions import HTTPException
from starlette.requests import Request

from triptych.python_models.contract.errors import ErrorKind, TriptychError, invalid

from .admission import Ticket

# A client that is still sending would not see the answer if the connection were closed under it.
_DISCARD_S = 10.0
# A body that stops in the middle holds a place that others could use.
_SILENCE_S = 60.0


JSON, FORM = "application/json", "multipart/form-data"


def check_type(request: Request, media_type: str) -> None:
    """Refuse a body of the wrong type before it is read.

    Clients often send JSON without saying so (curl -d says that it is a form), so anything but a multipart form is
    taken for JSON.

    Args:
        request: the HTTP request.
        media_type: JSON or FORM: what the endpoint reads.

    Raises:
        HTTPException: 415.
    """
    given = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if given != FORM if media_type == FORM else given.startswith("multipart/"):
        raise HTTPException(415, f"the body must be {media_type}, not {given or 'without a type'}")
    if (coding := request.headers.get("content-encoding", "identity").lower()) != "identity":
        raise HTTPException(415, f"the body must be sent as it is, not with Content-Encoding {coding}")


async def read_body(request: Request, ticket: Ticket, max_bytes: int) -> bytes:
    """The whole body.

    Args:
        request: the HTTP request.
        ticket: accounts for the bytes.
        max_bytes: the limit.

    Raises:
        TriptychError: TOO_LARGE, OVERLOADED, CANCELLED where the client went away, or a wrong Content-Length.
    """
    declared = request.headers.get("content-length")
    if declared is not None and not declared.isdecimal():
        raise invalid(f"the header Content-Length must be a number, got {declared!r}")
    chunks: list[bytes] = []
    size, more = 0, True
    try:
        if declared is not None and int(declared) > max_bytes:
            raise _too_large(max_bytes)
        while more:
            message = await asyncio.wait_for(request.receive(), _SILENCE_S)
            if message["type"] == "http.disconnect":
                raise TriptychError(ErrorKind.CANCELLED, "the client went away")
            chunk, more = message.get("body", b""), message.get("more_body", False)
            size += len(chunk)
            if size > max_bytes:
                raise _too_large(max_bytes)
            ticket.grow(len(chunk))
            chunks.append(chunk)
    except asyncio.TimeoutError:
        raise invalid(f"the request body did not go on for {_SILENCE_S:g} s") from None
    except TriptychError as error:
        chunks.clear()
        ticket.release_bytes()
        if more and error.kind is not ErrorKind.CANCELLED:
            await discard(request)
        raise
    return b"".join(chunks)


def _too_large(max_bytes: int) -> TriptychError:
    return TriptychError(
        ErrorKind.TOO_LARGE, f"the request body is larger than this server's limit of {max_bytes} bytes"
    )


async def discard(request: Request) -> None:
    """Take what is left of a body that is refused, within limits."""

    async def rest() -> None:
        while True:
            message = await request.receive()
            if message["type"] != "http.request" or not message.get("more_body", False):
                return

    try:
        await asyncio.wait_for(rest(), _DISCARD_S)
    except asyncio.TimeoutError:
        return
