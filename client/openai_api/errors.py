"""Every failure as an OpenAI error object: ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from triptych.python_models.contract.errors import ErrorKind, TriptychError

RETRY_AFTER_S = 2

_SAMPLING = re.compile(r"\bsampling\.(?=[a-z])")
# "grammar" is a plain word too, so only where a message begins with it.
_FIELDS = {"max_tokens": r"\bmax_tokens\b", "grammar": r"^grammar(\.value)?\b"}
_HTTP_CODES = {
    400: "invalid_request",
    404: "not_found",
    405: "method_not_allowed",
    413: "too_large",
    415: "unsupported_media_type",
}


def in_openai_words(error: TriptychError, names: Mapping[str, str] | None = None) -> TriptychError:
    """The error with the names a caller of the OpenAI API knows instead of the contract's.

    Args:
        error: as a stage reported it, for example with param ``sampling.temperature``.
        names: what the request calls fields of the contract, such as ``max_tokens`` (``max_completion_tokens``),
            ``grammar`` and ``prompt.text``.
    """

    def rename(text: str) -> str:
        text = _SAMPLING.sub("", text)
        for ours, theirs in (names or {}).items():
            text = re.sub(_FIELDS.get(ours) or rf"(?<![\w.]){re.escape(ours)}(?!\w)", theirs.replace("\\", r"\\"), text)
        return text

    param = rename(error.param) if error.param else None
    return TriptychError(error.kind, rename(error.message), param, error.stage)


def error_object(message: str, status: int, param: str | None, code: str) -> dict[str, Any]:
    """The JSON body of an error answer."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    shown = None if param is None else _encodable(param)
    return {"error": {"message": _encodable(message), "type": kind, "param": shown, "code": code}}


def body_of(error: TriptychError) -> dict[str, Any]:
    """The JSON body of an error answer, or of an error inside a stream."""
    return error_object(error.message, error.kind.status, error.param, error.kind.value)


def answer_to(error: TriptychError) -> JSONResponse:
    """The HTTP answer to an error."""
    status = error.kind.status
    headers = {"retry-after": str(RETRY_AFTER_S)} if status == 503 else None
    return JSONResponse(body_of(error), status, headers)


async def on_triptych_error(request: Request, error: Exception) -> JSONResponse:
    """Exception handler for :class:`TriptychError`."""
    assert isinstance(error, TriptychError)
    # for what is told of the request at its end
    request.state.error = error
    return answer_to(error)


async def on_http_error(request: Request, error: Exception) -> JSONResponse:
    """Exception handler for the framework's own errors: unknown routes and methods."""
    assert isinstance(error, HTTPException)
    path = f"{request.method} {request.url.path}"
    message = {
        404: f"there is no {path}; GET /openapi.json lists what there is",
        405: f"{path} is not allowed; allowed: {(error.headers or {}).get('Allow', '')}",
    }.get(error.status_code, str(error.detail))
    code = _HTTP_CODES.get(error.status_code, "invalid_request")
    return JSONResponse(error_object(message, error.status_code, None, code), error.status_code, error.headers)


def unexpected(error: Exception) -> TriptychError:
    """A fault of the shim itself, without what it says: that may hold what a request held."""
    return TriptychError(ErrorKind.STAGE_FAILED, f"the HTTP endpoint failed: {type(error).__name__}")


def _encodable(text: str) -> str:
    """The text without the unpaired surrogates that a request may name in a field."""
    return text.encode("utf-8", "replace").decode()
