"""POST /v1/chat/completions, from the body to the last byte."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from functools import partial

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from triptych.python_models.contract.delta import Delta
from triptych.python_models.contract.errors import ErrorKind, TriptychError
from triptych.python_models.contract.tensors import CHAT_TEXT

from . import sse
from .admission import Ticket
from .body import discard, read_body
from .errors import in_openai_words
from .fields import ChatCall, parse
from .generation import Generation
from .service import Service

TEXT_STAGES = tuple(step.stage for step in CHAT_TEXT.steps)
# Parsing more than this would hold up the tokens of all other requests.
_PARSE_INLINE_BYTES = 2**20


async def chat_completions(request: Request, service: Service) -> Response:
    """Answer one chat completion.

    Raises:
        TriptychError: for every failure before the first byte of the answer.
    """
    arrival = time.perf_counter()
    try:
        # Before the body is read: what no request can do without. The rest is known once it is parsed.
        if error := service.unavailable(TEXT_STAGES):
            raise error
        ticket = service.admission.enter()
    except TriptychError:
        await discard(request)
        raise
    try:
        options = service.options
        body = await read_body(request, ticket, options.max_body_bytes)
        work = partial(parse, body, options.served_model_name, options.lease_s)
        call = await asyncio.to_thread(work) if len(body) > _PARSE_INLINE_BYTES else work()
        del body, work
        run = _Run(request, service, ticket, call, arrival)
        # Large media must not stay in memory while the answer is generated.
        del call
    except BaseException as error:
        ticket.release()
        if isinstance(error, TriptychError) and error.kind is ErrorKind.CANCELLED:
            request.state.client_closed = True
        raise
    return await run.answer()


class _Run:
    """One accepted request: its generation, the watch over its client, and its share of the shim."""

    def __init__(self, request: Request, service: Service, ticket: Ticket, call: ChatCall, arrival: float) -> None:
        self._generation = service.begin(call.request, call.media)
        self._service = service
        self._ticket = ticket
        self._names = call.names
        self._stream = call.request.stream
        self._arrival = arrival
        self._saw_text = False
        self._completion = sse.Completion(
            self._generation.id,
            int(time.time()),
            service.options.served_model_name,
            service.fingerprint,
            call.stream_options.include_usage,
            call.request.sampling.n,
            call.stream_options.include_obfuscation,
            call.service_tier,
            service.options.enable_cache_report,
            arrival if call.return_timings else None,
        )
        self._watch = asyncio.create_task(_until_gone(request, self._generation, service))

    async def answer(self) -> Response:
        """The response; for a stream, once the engine has accepted the request."""
        try:
            deltas = await self._next()
            self._ticket.release_bytes()
            if self._stream:
                return sse.EventStream(self._events(deltas), self._close)
            while sum(bool(delta.finish_reason) for delta in deltas) < self._completion.n:
                deltas += await self._next()
            body = self._completion.whole(deltas)
        except BaseException:
            self._close()
            raise
        self._close()
        return JSONResponse(body)

    async def _events(self, deltas: list[Delta]) -> AsyncGenerator[bytes, None]:
        try:
            yield self._completion.first_chunks()
            num_open = self._completion.n
            while True:
                data = b"".join(self._completion.chunks(delta) for delta in deltas)
                num_open -= sum(bool(delta.finish_reason) for delta in deltas)
                if not num_open:
                    break
                if data:
                    yield data
                deltas = await self._next()
            yield data + self._completion.end(deltas)
        except TriptychError as error:
            yield sse.error_event(error)

    async def _next(self) -> list[Delta]:
        try:
            deltas = await self._generation.next()
        except TriptychError as error:
            self._service.note(error)
            raise in_openai_words(error, self._names) from None
        if not self._saw_text and any(delta.token_ids for delta in deltas):
            self._saw_text = True
            self._service.metrics.first_token.observe(time.perf_counter() - self._arrival)
        return deltas

    def _close(self) -> None:
        self._watch.cancel()
        self._service.cancel(self._generation)
        self._service.metrics.duration.observe(time.perf_counter() - self._arrival)
        self._ticket.release()


async def _until_gone(request: Request, generation: Generation, service: Service) -> None:
    """Cancel the generation the moment its client goes away, whether anything is being written or not."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    request.state.client_closed = True
    service.metrics.cancelled.inc()
    service.cancel(generation)
