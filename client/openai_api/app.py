"""The FastAPI application: routes, what every request passes through, life cycle and error handlers."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from triptych.python_models.contract.errors import TriptychError

from . import audio, completions, embeddings, errors, generative, models, page, responses, sglang, system, tokens
from .chat import chat_completions
from .documentation import described, document
from .drain import Gate
from .keys import RequireKey
from .middleware import RequestContext
from .observation import Observer
from .schemas import CHAT_ANSWER, chat_body
from .service import Service
from .tracing import Tracing


def create_app(service: Service) -> FastAPI:
    """The HTTP endpoint over a service; the service may connect to its Triton server later."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await service.close()
        if tracing is not None:
            await asyncio.to_thread(tracing.close)

    tracing = Tracing.to(service.options.otlp_traces_endpoint, service.options.served_model_name)
    app = FastAPI(lifespan=lifespan, openapi_url=None, docs_url=None, redoc_url=None)
    _add_middleware(app, service, tracing)
    app.add_exception_handler(TriptychError, errors.on_triptych_error)
    app.add_exception_handler(HTTPException, errors.on_http_error)

    # The response model would be built from the annotation, and there is none: bodies are checked and written by hand.
    @app.post(
        "/v1/chat/completions",
        **described("Answer a conversation", body=chat_body(), answer=CHAT_ANSWER, streams=True),
    )
    async def chat(request: Request) -> Response:
        return await chat_completions(request, service)

    app.include_router(completions.router(service))
    app.include_router(embeddings.router(service))
    app.include_router(tokens.router(service))
    app.include_router(sglang.router(service))
    app.include_router(responses.router(service))
    app.include_router(audio.router(service))
    app.include_router(generative.router(service))
    app.include_router(models.router(service))
    app.include_router(system.router(service))
    if service.options.playground:
        app.include_router(page.router())

    @functools.cache
    def documented() -> dict[str, Any]:
        return document(app, bool(service.options.api_keys))

    @app.get("/openapi.json", include_in_schema=False, response_model=None)
    async def openapi() -> dict[str, Any]:
        return documented()

    return app


def _add_middleware(app: FastAPI, service: Service, tracing: Tracing | None) -> None:
    """What every request passes through; the last one is the first."""
    options = service.options
    app.add_middleware(Gate, traffic=service.traffic)
    if options.api_keys:
        app.add_middleware(RequireKey, keys=options.api_keys)
    app.add_middleware(RequestContext, observer=Observer(service.metrics, options, tracing), traffic=service.traffic)
    if options.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=options.allowed_origins,
            allow_methods=("GET", "POST", "DELETE"),
            allow_headers=("*",),
            expose_headers=("x-request-id", "retry-after"),
        )
