"""POST /tokenize and /detokenize, with vLLM's fields; the tokenizer is that of the stage preprocess."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from triptych.client.sdk import wire
from triptych.python_models.contract import _check as check
from triptych.python_models.contract.errors import ErrorKind, TriptychError, invalid
from triptych.python_models.contract.request import ChatRequest, RawPrompt, prompt_ids
from triptych.python_models.contract.tensors import PREPROCESS

from . import parts
from .documentation import described
from .errors import in_openai_words
from .fields import check_model, json_object, only, optional_boolean, parse_fields
from .run import read
from .schemas import BOOLEAN, MESSAGES, chat_fields
from .service import Service

_T = TypeVar("_T")

_CHAT = (
    *("messages", "add_generation_prompt", "continue_final_message", "tools", "chat_template_kwargs"),
    *("tool_choice", "reasoning_effort"),
)
_FIELDS = ("model", "prompt", "add_special_tokens", "return_token_strs", *_CHAT)
_NAMES = {"prompt.text": "prompt"}

_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}}
_TOKENIZE = {
    "type": "object",
    "properties": {
        "model": {"type": ["string", "null"]},
        "prompt": {"type": "string", "description": "either this"},
        **chat_fields(*_CHAT),
        "messages": MESSAGES | {"description": "or a chat, media and all"},
        "add_special_tokens": BOOLEAN | {"description": "of a prompt: those that begin a text"},
        "return_token_strs": BOOLEAN,
    },
    "additionalProperties": False,
}
_TOKENS = {
    "type": "object",
    "required": ["count", "max_model_len", "tokens", "token_strs"],
    "properties": {
        "count": {"type": "integer"},
        "max_model_len": {"type": "integer"},
        "tokens": _IDS,
        "token_strs": {"type": ["array", "null"], "items": {"type": "string"}},
    },
}
_DETOKENIZE = {
    "type": "object",
    "required": ["tokens"],
    "properties": {"model": {"type": ["string", "null"]}, "tokens": _IDS},
}
_TEXT = {"type": "object", "required": ["prompt"], "properties": {"prompt": {"type": "string"}}}


@dataclass(frozen=True)
class TokenizeCall:
    """A checked body of /tokenize: a request that nothing is generated for."""

    request: ChatRequest
    media: tuple[bytes, ...]
    strings: bool


def router(service: Service) -> APIRouter:
    """POST /tokenize and /detokenize."""
    routes = APIRouter()

    @routes.post(
        "/tokenize",
        **described("Token ids of a prompt or a chat", body=_TOKENIZE, answer=_TOKENS, tag="Tokens"),
    )
    async def tokenize(request: Request) -> Response:
        call, ticket = await read(request, service, partial(parse, served_model_name=service.options.served_model_name))
        try:
            return JSONResponse(await _while_there(request, _tokenized(service, call)))
        except TriptychError as error:
            service.note(error)
            raise in_openai_words(error, _NAMES) from None
        finally:
            ticket.release()

    @routes.post("/detokenize", **described("Text of token ids", body=_DETOKENIZE, answer=_TEXT, tag="Tokens"))
    async def detokenize(request: Request) -> Response:
        ids, ticket = await read(
            request, service, partial(_parse_ids, served_model_name=service.options.served_model_name)
        )
        try:
            found = await _while_there(request, spell(service, ids))
        except TriptychError as error:
            raise in_openai_words(error, {"detokenize": "tokens"}) from None
        finally:
            ticket.release()
        return JSONResponse({"prompt": found.text})

    return routes


def parse(body: bytes, served_model_name: str) -> TokenizeCall:
    """Check a body of /tokenize.

    Raises:
        TriptychError: naming the field at fault and what is allowed.
    """
    data = json_object(body)
    check.known_keys(data, _FIELDS, "")
    strings = optional_boolean(data, "return_token_strs")
    if (data.get("messages") is None) == (data.get("prompt") is None):
        raise invalid("exactly one of prompt and messages is needed", "prompt")
    if data.get("messages") is not None:
        # the template writes the special tokens of a chat
        if data.get("add_special_tokens") is not None:
            only(False)(data["add_special_tokens"], "add_special_tokens")
        own = {name: data[name] for name in _CHAT if name in data}
        # nothing runs that a lease could end
        chat = parse_fields({**own, "model": data.get("model") or served_model_name}, served_model_name, 1)
        return TokenizeCall(replace(chat.request, lease_s=None), chat.media, strings)
    _check_model(data, served_model_name)
    for name in _CHAT:
        if data.get(name) is not None:
            raise invalid(f"{name} is only allowed with messages", name)
    special = data.get("add_special_tokens") is None or optional_boolean(data, "add_special_tokens")
    prompt = RawPrompt(parts.text(data["prompt"], "prompt"), add_special_tokens=special)
    return TokenizeCall(ChatRequest((), prompt=prompt), (), strings)


async def spell(service: Service, ids: Sequence[int]) -> wire.Spelling:
    """Text and spelling of token ids.

    Raises:
        TriptychError: INVALID_REQUEST for an id that there is not, naming ``detokenize[i]``.
    """
    return wire.spelling_of(await _ask(service, partial(wire.spell_message, ids)))


async def texts_of(service: Service, prompts: Sequence[Sequence[int]]) -> list[str]:
    """Texts of prompts that are token ids.

    Raises:
        TriptychError: INVALID_REQUEST for an id that there is not, naming it in field ``prompt``.
    """
    found = []
    for index, ids in enumerate(prompts):
        where = "prompt" if len(prompts) == 1 else f"prompt[{index}]"
        try:
            found.append((await spell(service, ids)).text)
        except TriptychError as error:
            raise in_openai_words(error, {"detokenize": where}) from None
    return found


def _parse_ids(body: bytes, served_model_name: str) -> tuple[int, ...]:
    data = json_object(body)
    check.known_keys(data, ("model", "tokens"), "")
    _check_model(data, served_model_name)
    return () if data.get("tokens") == [] else prompt_ids(data.get("tokens"), "tokens")


def _check_model(data: Mapping[str, Any], served_model_name: str) -> None:
    if data.get("model") is not None:
        check_model(data, served_model_name)


async def _tokenized(service: Service, call: TokenizeCall) -> dict[str, Any]:
    message = partial(wire.tokens_message, request=call.request, media=call.media)
    ids = wire.ids_of(await _ask(service, lambda request_id: message(request_id)))
    spelling = await spell(service, ids if call.strings else ())
    return {
        "count": len(ids),
        "max_model_len": spelling.about["context_length"],
        "tokens": list(ids),
        "token_strs": list(spelling.strings) if call.strings else None,
    }


async def _ask(service: Service, message: Callable[[str], Any]) -> Any:
    """The one answer of preprocess; the request is ended there where nobody waits for it any more."""
    request_id = f"tokens-{uuid.uuid4().hex}"
    triton = service.triton((PREPROCESS.name,))
    try:
        async with contextlib.aclosing(triton.infer(message(request_id))) as answers:
            async for response in answers:
                if response.outputs:
                    return response
    except asyncio.CancelledError:
        service.spawn(triton.control(PREPROCESS.name, cancel=[request_id]))
        raise
    raise TriptychError(ErrorKind.STAGE_FAILED, "preprocess gave no answer", stage=PREPROCESS.name)


async def _while_there(request: Request, work: Coroutine[Any, Any, _T]) -> _T:
    """The result, unless the client goes away first.

    Raises:
        TriptychError: CANCELLED where it has.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        request.state.client_closed = True
        raise TriptychError(ErrorKind.CANCELLED, "the client went away")
    finally:
        for one in (task, gone):
            one.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
