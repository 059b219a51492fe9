"""What every endpoint that generates has in common, from the body to the last byte."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol, TypeVar

from fastapi import Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from triptych.python_models.contract.delta import Delta
from triptych.python_models.contract.errors import ErrorKind, TriptychError
from triptych.python_models.contract.request import ChatRequest
from triptych.python_models.contract.tensors import CHAT_TEXT

from . import sse
from .admission import Ticket
from .body import JSON, check_type, discard, read_body
from .errors import in_openai_words
from .generation import Generation, Generations
from .observation import route_of
from .service import Service

_T = TypeVar("_T")

TEXT_STAGES = tuple(step.stage for step in CHAT_TEXT.steps)
# Parsing more than this would hold up the tokens of all other requests.
_PARSE_INLINE_BYTES = 2**20


class WholeWriter(Protocol):
    """Writes deltas in the words of one endpoint.

    Deltas are numbered over all choices: those of the second prompt follow those of the first.
    """

    @property
    def n(self) -> int:
        """Choices of all prompts together."""

    def whole(self, deltas: Iterable[Delta]) -> Any:
        """The JSON body of an answer that is not streamed."""


class Writer(WholeWriter, Protocol):
    """One of an endpoint that streams too."""

    def first_chunks(self) -> bytes:
        """What a stream begins with."""

    def chunks(self, delta: Delta) -> bytes:
        """The events of one delta."""

    def end(self, deltas: Iterable[Delta]) -> bytes:
        """What follows the end of the last choice. Args: the last deltas."""


Names = Mapping[str, str] | Callable[[TriptychError], TriptychError]

Ask = tuple[ChatRequest, tuple[bytes, ...]]
"""A request and its media."""


async def read(
    request: Request, service: Service, parse: Callable[[bytes], _T], media_type: str = JSON
) -> tuple[_T, Ticket]:
    """Take a request on and check its body.

    Args:
        request: of the client.
        service: the shim's state.
        parse: the body -> what it asks for.
        media_type: of the body, see :func:`.body.check_type`.

    Returns:
        What it asks for, and its share of the shim, which the caller releases.

    Raises:
        TriptychError: it cannot be served now, or what ``parse`` says.
        HTTPException: 415.
    """
    try:
        check_type(request, media_type)
        # Before the body is read: what no request can do without. The rest is known once it is parsed.
        if error := service.unavailable(TEXT_STAGES):
            raise error
        ticket = service.admission.enter()
    except (TriptychError, HTTPException):
        await discard(request)
        raise
    try:
        body = await read_body(request, ticket, service.options.max_body_bytes)
        work = partial(parse, body)
        call = await asyncio.to_thread(work) if len(body) > _PARSE_INLINE_BYTES else work()
    except BaseException as error:
        ticket.release()
        if isinstance(error, TriptychError) and error.kind is ErrorKind.CANCELLED:
            request.state.client_closed = True
        raise
    return call, ticket


class Run:
    """One accepted request: its generations, the watch over its client, and its share of the shim."""

    def __init__(
        self,
        request: Request,
        service: Service,
        ticket: Ticket,
        asks: Sequence[Ask],
        names: Names,
        arrival: float,
        prefix: str = "chatcmpl",
    ) -> None:
        """Begin to generate.

        Args:
            request: of the client.
            service: the shim's state.
            ticket: the request's share of it, released at its end.
            asks: what to generate; their choices are numbered one after the other.
            names: see :func:`.errors.in_openai_words`, or what to use in its place.
            arrival: of the request, by ``time.perf_counter``.
            prefix: of ids.

        Raises:
            TriptychError: it cannot be served now.
        """
        try:
            self._generation = service.begin(asks, prefix)
        except BaseException:
            ticket.release()
            raise
        self._service = service
        self._ticket = ticket
        self._in_its_words = names if callable(names) else partial(in_openai_words, names=names)
        self._arrival = arrival
        self._route = route_of(request.scope)
        self._saw_text = False
        self._watch = asyncio.create_task(_until_gone(request, self._generation, service))

    @property
    def id(self) -> str:
        """Of the answer."""
        return self._generation.id

    @property
    def members(self) -> tuple[Generation, ...]:
        """The generation of each thing asked."""
        found = self._generation
        return found.members if isinstance(found, Generations) else (found,)

    async def answer(
        self,
        writer: Writer,
        stream: bool,
        failed: Callable[[TriptychError], bytes] = sse.error_event,
        holds_body: bool = False,
    ) -> Response:
        """The response; for a stream, once the engine has accepted the request.

        Args:
            writer: writes it.
            stream: as events.
            failed: the event of a failure after the stream began.
            holds_body: the writer needs the body to the end, so it counts as held.
        """
        if not stream:
            return await self.whole(writer, holds_body)
        try:
            deltas = await self._first(holds_body)
        except BaseException:
            self._close()
            raise
        return sse.EventStream(self._events(writer, deltas, failed), self._close)

    async def whole(self, writer: WholeWriter, holds_body: bool = False) -> Response:
        """The response in one piece. Args: see :meth:`answer`."""
        try:
            deltas = await self._first(holds_body)
            while sum(bool(delta.finish_reason) for delta in deltas) < writer.n:
                deltas += await self._next()
            body = writer.whole(deltas)
        except BaseException:
            self._close()
            raise
        self._close()
        return JSONResponse(body)

    async def _first(self, holds_body: bool) -> list[Delta]:
        deltas = await self._next()
        if not holds_body:
            self._ticket.release_bytes()
        return deltas

    async def _events(
        self, writer: Writer, deltas: list[Delta], failed: Callable[[TriptychError], bytes]
    ) -> AsyncGenerator[bytes, None]:
        try:
            yield writer.first_chunks()
            num_open = writer.n
            while True:
                data = b"".join(writer.chunks(delta) for delta in deltas)
                num_open -= sum(bool(delta.finish_reason) for delta in deltas)
                if not num_open:
                    break
                if data:
                    yield data
                deltas = await self._next()
            yield data + writer.end(deltas)
        except TriptychError as error:
            yield failed(error)

    async def _next(self) -> list[Delta]:
        try:
            deltas = await self._generation.next()
        except TriptychError as error:
            self._service.note(error)
            raise self._in_its_words(error) from None
        if not self._saw_text and any(delta.token_ids for delta in deltas):
            self._saw_text = True
            self._service.metrics.first_token.labels(self._route).observe(time.perf_counter() - self._arrival)
        return deltas

    def _close(self) -> None:
        self._watch.cancel()
        self._service.cancel(self._generation)
        self._service.metrics.duration.labels(self._route).observe(time.perf_counter() - self._arrival)
        self._ticket.release()


async def _until_gone(request: Request, generation: Generation | Generations, service: Service) -> None:
    """Cancel the generation the moment its client goes away, whether anything is being written or not."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    request.state.client_closed = True
    service.metrics.cancelled.inc()
    service.cancel(generation)
