"""The FastAPI application: routes, life cycle and error handlers."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException

from triptych.python_models.contract.errors import ErrorKind, TriptychError

from . import errors, metrics
from .chat import chat_completions
from .fields import ANY_MODEL
from .middleware import RequestContext
from .service import Service


def create_app(service: Service) -> FastAPI:
    """The HTTP endpoint over a service; the service may connect to its Triton server later."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await service.close()

    app = FastAPI(lifespan=lifespan, openapi_url=None, docs_url=None, redoc_url=None)
    app.add_middleware(RequestContext, metrics=service.metrics)
    app.add_exception_handler(TriptychError, errors.on_triptych_error)
    app.add_exception_handler(HTTPException, errors.on_http_error)
    app.add_exception_handler(Exception, errors.on_unexpected)

    # The response model would be built from the annotation, and there is none: bodies are checked and written by hand.
    @app.post("/v1/chat/completions", response_model=None)
    async def completions(request: Request) -> Response:
        return await chat_completions(request, service)

    @app.get("/v1/models", response_model=None)
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_card(service)]}

    @app.get("/v1/models/{name:path}", response_model=None)
    async def model(name: str) -> dict[str, Any]:
        if name not in (service.options.served_model_name, ANY_MODEL):
            raise TriptychError(
                ErrorKind.MODEL_NOT_FOUND,
                f"model {name!r} does not exist; this server has {service.options.served_model_name!r}",
                "model",
            )
        return _card(service)

    @app.get("/health", response_model=None)
    async def health() -> Response:
        states = service.monitor.states if service.monitor is not None else {}
        body: dict[str, Any] = {"status": "ok", "stages": {name: state.up for name, state in states.items()}}
        error = service.unavailable()
        if error is None:
            return JSONResponse(body)
        return JSONResponse(
            body | {"status": "unavailable"} | errors.body_of(error),
            503,
            {"retry-after": str(errors.RETRY_AFTER_S)},
        )

    @app.get("/metrics", response_model=None)
    async def scrape() -> Response:
        service.refresh_gauges()
        text = service.metrics.text()
        if service.metrics_url:
            text += await metrics.triton_metrics(service.metrics_url)
        return PlainTextResponse(text, media_type=metrics.CONTENT_TYPE)

    return app


def _card(service: Service) -> dict[str, Any]:
    card: dict[str, Any] = {
        "id": service.options.served_model_name,
        "object": "model",
        "created": service.created,
        "owned_by": "triptych",
    }
    if service.settings is not None:
        card["root"] = service.settings.model
        if service.settings.context_length:
            card["max_model_len"] = service.settings.context_length
    return card
