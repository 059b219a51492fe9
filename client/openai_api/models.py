"""GET /v1/models and /v1/models/{name}."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from triptych.python_models.contract.errors import ErrorKind, TriptychError

from .documentation import described
from .fields import ANY_MODEL
from .service import Service

_CARD = {
    "type": "object",
    "required": ["id", "object", "created", "owned_by"],
    "properties": {
        "id": {"type": "string"},
        "object": {"const": "model"},
        "created": {"type": "integer"},
        "owned_by": {"type": "string"},
        "root": {"type": "string", "description": "the checkpoint"},
        "max_model_len": {"type": "integer"},
    },
}
_LIST = {
    "type": "object",
    "required": ["object", "data"],
    "properties": {"object": {"const": "list"}, "data": {"type": "array", "items": _CARD}},
}


def router(service: Service) -> APIRouter:
    """The model that this server has; there is one."""
    routes = APIRouter()

    @routes.get("/v1/models", **described("The models", answer=_LIST))
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_card(service)]}

    @routes.get("/v1/models/{name:path}", **described("One model", answer=_CARD))
    async def model(name: str) -> dict[str, Any]:
        if name not in (service.options.served_model_name, ANY_MODEL):
            raise TriptychError(
                ErrorKind.MODEL_NOT_FOUND,
                f"model {name!r} does not exist; this server has {service.options.served_model_name!r}",
                "model",
            )
        return _card(service)

    return routes


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
