"""Endpoints of OpenAI's that make pictures and speech, which a model that writes text does not."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import Response

from triptych.python_models.contract.errors import ErrorKind, TriptychError

from .body import discard
from .documentation import described
from .service import Service

_MADE = {
    "/v1/images/generations": "pictures",
    "/v1/images/edits": "pictures",
    "/v1/images/variations": "pictures",
    "/v1/audio/speech": "speech",
}


def router(service: Service) -> APIRouter:
    """The routes exist so that a client sees what is wrong, and not that its URL might be."""
    routes = APIRouter()
    for path, what in _MADE.items():
        _add(routes, service, path, what)
    return routes


def _add(routes: APIRouter, service: Service, path: str, what: str) -> None:
    summary = f"Always 400: a model that writes text makes no {what}"

    @routes.post(path, **described(summary, body={}, tag="Not here"))
    async def refuse(request: Request) -> Response:
        await discard(request)
        raise TriptychError(
            ErrorKind.UNSUPPORTED,
            f"the model {service.options.served_model_name!r} makes no {what}; it answers in text, at "
            "/v1/chat/completions",
            "model",
        )
