"""What an endpoint takes and answers, written next to its route: the document at /openapi.json is made of it.

::

    @routes.post("/v1/completions", **described("Continue a text", body=BODY, answer=ANSWER, streams=True))

Schemas are JSON Schema as plain dicts. Errors and API keys, which are the same for all endpoints, are added by
:func:`document`.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse, PlainTextResponse, Response

from .keys import FREE

Schema = Mapping[str, Any]

JSON = "application/json"
FORM = "multipart/form-data"
EVENTS = "text/event-stream"
_EVENT: Schema = {
    "type": "object",
    "required": ["data"],
    "properties": {
        "event": {"type": "string"},
        "data": {"type": "string", "description": "JSON; after the last, `[DONE]`"},
    },
    "description": "one event of the stream",
}
_ERROR: Schema = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string", "description": "what was wrong, and what is allowed"},
                "type": {"enum": ["invalid_request_error", "server_error"]},
                "param": {"type": ["string", "null"], "description": "the field at fault"},
                "code": {"type": "string"},
            },
        }
    },
}
_ERRORS = {
    400: "The request is not one that this server can answer; `param` names the field",
    401: "The API key is missing or not one of the server's",
    404: "No such model",
    405: "The method is not one of this path",
    413: "The body is larger than `--max-body-mb`",
    415: "The body is of a type that this endpoint does not read",
    499: "The client went away",
    500: "A stage failed",
    503: "The server is loading, overloaded, restarting a stage or shutting down; `Retry-After` says when to ask again",
    504: "Media did not come, or could not be decoded, in time",
}
_OF_ALL = (405, 500, 503)
_OF_BODIES = (400, 404, 413, 415, 499, 504)


def described(
    summary: str,
    text: str = "",
    *,
    body: Schema | None = None,
    form: Schema | None = None,
    answer: Schema | None = None,
    answer_type: str | None = JSON,
    streams: bool = False,
    tag: str = "OpenAI",
    more: Mapping[int, tuple[str, Schema | None]] | None = None,
) -> dict[str, Any]:
    """Keyword arguments for the decorator of a route.

    Args:
        summary: a line.
        text: what else there is to know, in Markdown.
        body: schema of a JSON body.
        form: schema of a form (multipart) instead; files are ``{"type": "string", "format": "binary"}``.
        answer: schema of the answer with status 200; None: any.
        answer_type: its media type; None: it has no body.
        streams: with ``stream: true`` the answer is server-sent events.
        tag: group of endpoints.
        more: {status: (description, schema)} of further answers; the usual errors need not be named.
    """
    content: dict[str, Any] = {} if answer_type is None else {answer_type: {"schema": dict(answer or {})}}
    if streams:
        content[EVENTS] = {"schema": dict(_EVENT)}
    responses: dict[int, dict[str, Any]] = {
        200: {"description": "The answer"} | ({"content": content} if content else {})
    }
    for status, (words, schema) in (more or {}).items():
        responses[status] = {"description": words, "content": {JSON: {"schema": dict(schema or {})}}}
    extra: dict[str, Any] = {"responses": {str(status): answer for status, answer in responses.items()}}
    if (schema := form if body is None else body) is not None:
        extra["requestBody"] = {
            "required": True,
            "content": {FORM if body is None else JSON: {"schema": dict(schema)}},
        }
    return {
        "response_model": None,
        "summary": summary,
        "description": text or summary,
        "tags": [tag],
        "openapi_extra": extra,
        # what FastAPI says of a 200 by itself must not contradict it
        "response_class": JSONResponse if answer_type == JSON else PlainTextResponse if answer_type else Response,
    }


def document(app: FastAPI, needs_key: bool) -> dict[str, Any]:
    """The OpenAPI document of an application's routes.

    Args:
        app: with all its routes.
        needs_key: the server has API keys.
    """
    found = get_openapi(
        title="Triptych",
        version=version("triptych"),
        description="Multimodal LLM serving on NVIDIA Triton Inference Server.",
        routes=app.routes,
    )
    components = found.setdefault("components", {})
    # FastAPI's own form of validation errors, which no endpoint has
    components["schemas"] = {"Error": dict(_ERROR)}
    if needs_key:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for path, item in found["paths"].items():
        for method, operation in item.items():
            _complete(operation, method, needs_key and not FREE.fullmatch(path), "{" in path)
    return found


def _complete(operation: dict[str, Any], method: str, needs_key: bool, has_name: bool) -> None:
    responses = operation.setdefault("responses", {})
    responses.pop("422", None)
    statuses = set(_OF_ALL)
    if method == "post":
        statuses |= set(_OF_BODIES)
    if has_name:
        statuses.add(404)
    if needs_key:
        statuses.add(401)
        operation["security"] = [{"key": []}]
    for status in sorted(statuses):
        if str(status) not in responses:
            responses[str(status)] = {
                "description": _ERRORS[status],
                "content": {JSON: {"schema": {"$ref": "#/components/schemas/Error"}}},
            }
