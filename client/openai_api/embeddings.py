"""POST /v1/embeddings: texts, pictures and conversations as vectors, the decoder's last hidden state of each.

What such a vector is good for depends on the checkpoint: those trained for it (Qwen3-VL-Embedding, GME, ...) pool the
last token too.
"""

from __future__ import annotations

import base64
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from fastapi import APIRouter, Request
from fastapi.responses import Response

from triptych.python_models.contract import _check as check
from triptych.python_models.contract.delta import Delta
from triptych.python_models.contract.errors import TriptychError, invalid
from triptych.python_models.contract.request import ChatRequest, RawPrompt, TemplateInputs
from triptych.python_models.contract.request import prompt_ids as checked_ids

from . import parts
from .documentation import described
from .fields import check_model, json_object, priority_and_salt
from .run import Ask, Run, read
from .service import Service

MAX_INPUTS = 256

_FIELDS = (
    *("model", "input", "messages", "encoding_format", "dimensions", "user", "chat_template_kwargs"),
    *("priority", "cache_salt"),
)
_MODALITIES = ("image", "video", "audio")
_IDS = {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0}}
_OBJECT = {
    "type": "object",
    "minProperties": 1,
    "properties": {name: {"type": "string"} for name in ("text", *_MODALITIES)},
    "additionalProperties": False,
    "description": "one vector for all of it; media as data: or http(s) URLs",
}
_BODY = {
    "type": "object",
    "required": ["model"],
    "properties": {
        "model": {"type": "string"},
        "input": {
            "anyOf": [
                {"type": "string"},
                _IDS,
                {"type": "array", "minItems": 1, "maxItems": MAX_INPUTS, "items": {"type": "string"}},
                {"type": "array", "minItems": 1, "maxItems": MAX_INPUTS, "items": _IDS},
                {"type": "array", "minItems": 1, "maxItems": MAX_INPUTS, "items": _OBJECT},
            ],
            "description": "texts go to the model as they are, objects through its chat template",
        },
        "messages": {"type": "array", "description": "a conversation, in place of input"},
        "encoding_format": {"enum": ["float", "base64", None]},
        "dimensions": {"type": ["integer", "null"], "minimum": 1},
        "user": {"type": ["string", "null"]},
        "chat_template_kwargs": {"type": ["object", "null"]},
        "priority": {"type": ["integer", "null"]},
        "cache_salt": {"type": ["string", "null"]},
    },
    "additionalProperties": False,
}
_ANSWER = {
    "type": "object",
    "required": ["object", "data", "model", "usage"],
    "properties": {
        "object": {"const": "list"},
        "data": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["object", "index", "embedding"],
                "properties": {
                    "object": {"const": "embedding"},
                    "index": {"type": "integer"},
                    "embedding": {"anyOf": [{"type": "array", "items": {"type": "number"}}, {"type": "string"}]},
                },
            },
        },
        "model": {"type": "string"},
        "usage": {"type": "object"},
    },
}
_PLACE = re.compile(r"^(prompt\.text|prompt\.token_ids|prompt)\b")


@dataclass(frozen=True)
class EmbeddingCall:
    """A checked body.

    Attributes:
        asks: a request for each vector, with its media.
        form: "float" or "base64".
        dimensions: numbers of each vector; None: all.
    """

    asks: tuple[Ask, ...]
    form: str
    dimensions: int | None


@dataclass
class EmbeddingWriter:
    """Writes vectors in the order of what they are of."""

    call: EmbeddingCall
    model: str

    @property
    def n(self) -> int:
        """Vectors."""
        return len(self.call.asks)

    def whole(self, deltas: Iterable[Delta]) -> dict[str, Any]:
        """The body.

        Raises:
            TriptychError: INVALID_REQUEST for more dimensions than there are.
        """
        ends = sorted((delta for delta in deltas if delta.finish_reason), key=lambda delta: delta.index)
        prompt_tokens = sum(delta.usage.prompt_tokens for delta in ends if delta.usage is not None)
        return {
            "object": "list",
            "data": [
                {"object": "embedding", "index": index, "embedding": self._vector(delta.embedding)}
                for index, delta in enumerate(ends)
            ],
            "model": self.model,
            "usage": {"prompt_tokens": prompt_tokens, "total_tokens": prompt_tokens},
        }

    def _vector(self, data: bytes) -> list[float] | str:
        vector = np.frombuffer(data, dtype="<f4")
        if (wanted := self.call.dimensions) is not None:
            if wanted > len(vector):
                message = f"dimensions must be at most {len(vector)}, what this model has, got {wanted}"
                raise invalid(message, "dimensions")
            # as models trained for several lengths are used (Kusupati et al. 2022, arXiv:2205.13147)
            vector = vector[:wanted] / np.linalg.norm(vector[:wanted])
        if self.call.form == "base64":
            return base64.b64encode(vector.astype("<f4").tobytes()).decode()
        found: list[float] = vector.tolist()
        return found


def router(service: Service) -> APIRouter:
    """The one route."""
    routes = APIRouter()

    @routes.post(
        "/v1/embeddings",
        **described(
            "Texts, pictures, videos and sounds as vectors",
            "Each is the last hidden state of the last token, of length 1; `dimensions` keeps its first numbers.",
            body=_BODY,
            answer=_ANSWER,
        ),
    )
    async def embeddings(request: Request) -> Response:
        arrival = time.perf_counter()
        options = service.options
        work = partial(parse, served_model_name=options.served_model_name, lease_s=options.lease_s)
        call, ticket = await read(request, service, work)
        run = Run(request, service, ticket, call.asks, _in_its_words, arrival, "embd")
        return await run.whole(EmbeddingWriter(call, options.served_model_name))

    return routes


def parse(body: bytes, served_model_name: str, lease_s: float) -> EmbeddingCall:
    """Check a request body.

    Args:
        body: the raw body.
        served_model_name: the only model there is.
        lease_s: see ``ChatRequest.lease_s``.

    Raises:
        TriptychError: naming the field at fault and what is allowed.
    """
    data = json_object(body)
    check.known_keys(data, _FIELDS, "")
    check_model(data, served_model_name)
    if data.get("user") is not None:
        check.string(data["user"], "user")
    form = data.get("encoding_format") or "float"
    if form not in ("float", "base64"):
        raise invalid(f"encoding_format must be float or base64, got {form!r}", "encoding_format")
    dimensions = data.get("dimensions")
    if dimensions is not None:
        check.integer(dimensions, "dimensions", 1, 2**31 - 1)
    if (data.get("input") is None) == (data.get("messages") is None):
        raise invalid("exactly one of input and messages is needed", "input")
    first = ChatRequest(
        (),
        stream=False,
        lease_s=lease_s,
        **priority_and_salt(data),
        embed=True,
    )
    variables = data.get("chat_template_kwargs")
    if variables is not None:
        first = replace(first, template=TemplateInputs(variables=check.mapping(variables, "chat_template_kwargs")))
    if data.get("messages") is not None:
        blobs: list[bytes] = []
        messages = parts.messages(data["messages"], blobs)
        return EmbeddingCall(((replace(first, messages=messages), tuple(blobs)),), form, dimensions)
    return EmbeddingCall(tuple(_asks(data["input"], first, variables is not None)), form, dimensions)


def _asks(value: Any, first: ChatRequest, templated: bool) -> Iterable[Ask]:
    """Field ``input``: a text, token ids, or a list of texts, token ids or objects."""
    if isinstance(value, list) and value and all(type(item) is int for item in value):
        items, where = [value], "input"
    elif isinstance(value, list):
        items, where = value, "input[{}]"
    else:
        items, where = [value], "input"
    if not 1 <= len(items) <= MAX_INPUTS:
        raise invalid(f"input has {len(items)} entries; 1 to {MAX_INPUTS} are allowed", "input")
    for number, item in enumerate(items):
        place = where.format(number)
        if isinstance(item, Mapping):
            yield _object(item, place, first)
            continue
        if templated:
            raise invalid("chat_template_kwargs is only allowed with objects: texts have no template", place)
        if isinstance(item, str) and item:
            yield replace(first, prompt=RawPrompt(parts.text(item, place), add_special_tokens=True)), ()
        elif isinstance(item, list):
            yield replace(first, prompt=RawPrompt(None, checked_ids(item, place))), ()
        else:
            said = "an empty string" if item == "" else check.json_type(item)
            raise invalid(f"{place} must be a text, a list of token ids or an object, not {said}", place)


def _object(item: Mapping[str, Any], where: str, first: ChatRequest) -> Ask:
    """A text with media, as one message: media come first."""
    check.known_keys(item, ("text", *_MODALITIES), where)
    given = {name: value for name, value in item.items() if value is not None}
    if not given:
        raise invalid(f"{where} needs at least one of text, {', '.join(_MODALITIES)}", where)
    content: list[dict[str, Any]] = []
    for name in _MODALITIES:
        if name in given:
            url = check.string(given[name], f"{where}.{name}")
            content.append({"type": f"{name}_url", f"{name}_url": {"url": url}})
    if "text" in given:
        content.append({"type": "text", "text": check.string(given["text"], f"{where}.text")})
    blobs: list[bytes] = []
    try:
        messages = parts.messages([{"role": "user", "content": content}], blobs)
    except TriptychError as error:
        raise TriptychError(error.kind, error.message.replace("messages[0]", where), where) from None
    return replace(first, messages=messages), tuple(blobs)


def _in_its_words(error: TriptychError) -> TriptychError:
    """What a stage says of a prompt is of the input."""
    param = None if error.param is None else _PLACE.sub("input", error.param)
    return TriptychError(error.kind, _PLACE.sub("input", error.message), param, error.stage)
