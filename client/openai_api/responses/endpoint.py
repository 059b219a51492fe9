"""POST /v1/responses, and what can be done with a stored response."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from triptych.python_models.contract.errors import ErrorKind, TriptychError, invalid

from ..answers import Answers
from ..documentation import described
from ..run import Run, read
from ..service import Service
from .answer import Answer
from .documents import BODY, DELETED, ITEMS, RESPONSE
from .request import ResponseCall, parse
from .store import Store, Stored

_PAGE = 20
_MAX_PAGE = 100


def router(service: Service) -> APIRouter:
    """The endpoints, over a store of their own."""
    routes = APIRouter()
    store = Store(service.options.response_store_bytes)

    @routes.post("/v1/responses", **described("Create a response", body=BODY, answer=RESPONSE, streams=True))
    async def create(request: Request) -> Response:
        return await _create(request, service, store)

    @routes.get("/v1/responses/{response_id}", **described("A stored response", answer=RESPONSE))
    async def retrieve(response_id: str, request: Request) -> Response:
        if request.query_params.get("stream") in ("true", "1"):
            raise TriptychError(ErrorKind.UNSUPPORTED, "stream is not supported on a stored response", "stream")
        return JSONResponse(_stored(store, response_id).response)

    @routes.delete("/v1/responses/{response_id}", **described("Forget a stored response", answer=DELETED))
    async def delete(response_id: str) -> Response:
        _stored(store, response_id)
        store.delete(response_id)
        return JSONResponse({"id": response_id, "object": "response", "deleted": True})

    @routes.get(
        "/v1/responses/{response_id}/input_items",
        **described(
            "What a stored response was given",
            "Query: `limit` (1 to 100, 20), `order` (`desc` or `asc`), `after` (id of an item).",
            answer=ITEMS,
        ),
    )
    async def input_items(response_id: str, request: Request) -> Response:
        return JSONResponse(_page(_stored(store, response_id), dict(request.query_params)))

    return routes


async def _create(request: Request, service: Service, store: Store) -> Response:
    arrival = time.perf_counter()
    options = service.options
    sizes: list[int] = []

    def work(body: bytes) -> ResponseCall:
        sizes.append(len(body))
        return parse(body, options.served_model_name, options.lease_s, store)

    call, ticket = await read(request, service, work)
    chat = call.chat
    run = Run(request, service, ticket, [(chat.request, chat.media)], call.in_its_words, arrival, "resp")
    keep = partial(store.put, input_items=call.input_items, before=call.before, num_bytes=sizes[0])
    answer = Answer(
        run.id,
        int(time.time()),
        options.served_model_name,
        call.echo | {"store": call.store},
        options.enable_cache_report,
        call.include_obfuscation,
        keep if call.store else None,
        Answers(chat.request.template.tools, chat.stream_reasoning),
    )
    stream, stored = chat.request.stream, call.store
    # Large media must not stay in memory while the answer is generated, unless they are to be stored with it.
    del call, chat, keep
    return await run.answer(answer, stream, answer.failed, holds_body=stored)


def _stored(store: Store, response_id: str) -> Stored:
    found = store.get(response_id)
    if found is None:
        raise TriptychError(
            ErrorKind.NOT_FOUND,
            f"there is no response {response_id!r}: it was made with store: false, was deleted, or is not among the "
            f"last {store.max_bytes / 2**20:g} MiB of responses that this server keeps",
        )
    return found


def _page(found: Stored, query: dict[str, str]) -> dict[str, Any]:
    """One page of the input of a response."""
    limit, order, after = query.get("limit", str(_PAGE)), query.get("order", "desc"), query.get("after")
    if not limit.isdecimal() or not 1 <= int(limit) <= _MAX_PAGE:
        raise invalid(f"limit must be a number between 1 and {_MAX_PAGE}, got {limit!r}", "limit")
    if order not in ("asc", "desc"):
        raise invalid(f"order must be asc or desc, got {order!r}", "order")
    mark = found.response["id"].removeprefix("resp_")
    items = [
        {"type": "message", "id": f"item_{mark}_{index}"} | {k: v for k, v in item.items() if v is not None}
        for index, item in enumerate(found.input_items)
    ]
    if order == "desc":
        items.reverse()
    if after is not None:
        places = [index for index, item in enumerate(items) if item["id"] == after]
        if not places:
            raise invalid(f"there is no item {after!r}", "after")
        items = items[places[0] + 1 :]
    shown = items[: int(limit)]
    return {
        "object": "list",
        "data": shown,
        "first_id": shown[0]["id"] if shown else None,
        "last_id": shown[-1]["id"] if shown else None,
        "has_more": len(items) > len(shown),
    }
