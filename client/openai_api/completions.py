"""POST /v1/completions: prompts without a chat template, from the body to the last byte."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from triptych.python_models.contract import _check as check
from triptych.python_models.contract.errors import ErrorKind, TriptychError, invalid
from triptych.python_models.contract.request import ChatRequest, RawPrompt, prompt_ids
from triptych.python_models.contract.sampling import MAX_CHOICES, MAX_TOP_LOGPROBS, SamplingParams

from . import parts
from .documentation import described
from .fields import (
    StreamOptions,
    check_model,
    json_object,
    optional_boolean,
    parse_sampling,
    parse_stream_options,
    priority_and_salt,
)
from .run import Run, read
from .schemas import BOOLEAN, chat_fields, choice, integer
from .service import Service
from .text_completion import TextCompletion
from .tokens import texts_of

MAX_PROMPTS = 256
DEFAULT_MAX_TOKENS = 16

_SAMPLING = frozenset(f.name for f in fields(SamplingParams)) - {"grammar", "top_logprobs", "logprobs"}
_FIELDS = (
    *("model", "prompt", "best_of", "echo", "logprobs", "stream", "stream_options", "suffix", "user"),
    *("add_special_tokens", "priority", "cache_salt", "return_timings", "response_format", "regex", "ebnf"),
    *_SAMPLING,
)
# What the contract's fields are called here.
_NAMES = {"prompt.text": "prompt", "prompt.token_ids": "prompt"}

_ANSWER = {
    "type": "object",
    "required": ["id", "object", "created", "model", "choices", "usage"],
    "properties": {
        "id": {"type": "string"},
        "object": {"const": "text_completion"},
        "created": {"type": "integer"},
        "model": {"type": "string"},
        "choices": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["index", "text", "logprobs", "finish_reason"],
                "properties": {
                    "index": {"type": "integer"},
                    "text": {"type": "string"},
                    "logprobs": {"type": ["object", "null"]},
                    "finish_reason": {"enum": ["stop", "length"]},
                },
            },
        },
        "usage": {"type": "object"},
    },
}
_IDS = {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0}}
_BODY = {
    "type": "object",
    "required": ["model", "prompt"],
    "properties": {
        "model": {"type": "string"},
        "prompt": {
            "anyOf": [
                {"type": "string"},
                {"type": "array", "minItems": 1, "items": {"type": "string"}},
                _IDS,
                {"type": "array", "minItems": 1, "items": _IDS},
            ]
        },
        **chat_fields(
            *sorted(set(_FIELDS) - {"prompt", "best_of", "echo", "logprobs", "suffix", "add_special_tokens"})
        ),
        "max_tokens": integer(1) | {"default": DEFAULT_MAX_TOKENS},
        "best_of": integer(1, MAX_CHOICES),
        "echo": BOOLEAN | {"description": "each answer begins with its prompt"},
        "logprobs": integer(0, MAX_TOP_LOGPROBS),
        "suffix": choice(""),
        "add_special_tokens": BOOLEAN | {"description": "those that begin a text"},
    },
    "additionalProperties": False,
}


@dataclass(frozen=True)
class CompletionCall:
    """A checked body.

    Attributes:
        requests: one for each prompt.
        keep: choices of a prompt that are answered, of as many as are generated.
        echo: each choice begins with its prompt.
        logprobs: they are part of the answer.
        stream_options: what the stream holds beside it.
        names: see :func:`.errors.in_openai_words`.
        return_timings: say at the end what the time went to.
    """

    requests: tuple[ChatRequest, ...]
    keep: int
    echo: bool
    logprobs: bool
    stream_options: StreamOptions
    names: Mapping[str, str]
    return_timings: bool


def router(service: Service) -> APIRouter:
    """The one route."""
    routes = APIRouter()

    @routes.post(
        "/v1/completions",
        **described(
            "Continue texts",
            "The prompt goes to the model as it is: no chat template, and special tokens in it are special tokens. "
            "Several prompts are answered by `n` choices each, in their order.",
            body=_BODY,
            answer=_ANSWER,
            streams=True,
        ),
    )
    async def completions(request: Request) -> Response:
        return await answer(request, service)

    return routes


async def answer(request: Request, service: Service) -> Response:
    """Answer one request.

    Raises:
        TriptychError: for every failure before the first byte of the answer.
    """
    arrival = time.perf_counter()
    options = service.options
    work = partial(parse, served_model_name=options.served_model_name, lease_s=options.lease_s)
    call, ticket = await read(request, service, work)
    try:
        echoed = await _echoed(service, call)
    except BaseException:
        ticket.release()
        raise
    run = Run(request, service, ticket, [(ask, ()) for ask in call.requests], call.names, arrival, "cmpl")
    writer = TextCompletion(
        run.id,
        int(time.time()),
        options.served_model_name,
        service.fingerprint,
        len(call.requests),
        call.requests[0].sampling.n,
        call.keep,
        echoed,
        call.logprobs,
        call.stream_options,
        options.enable_cache_report,
        arrival if call.return_timings else None,
    )
    return await run.answer(writer, call.requests[0].stream)


def parse(body: bytes, served_model_name: str, lease_s: float) -> CompletionCall:
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
    if data.get("suffix"):
        raise TriptychError(ErrorKind.UNSUPPORTED, "suffix is not supported: the answer follows the prompt", "suffix")
    if data.get("user") is not None:
        check.string(data["user"], "user")
    stream = optional_boolean(data, "stream")
    stream_options = parse_stream_options(data, stream)
    special = data.get("add_special_tokens") is None or optional_boolean(data, "add_special_tokens")
    prompts = _prompts(data.get("prompt"), special)
    echo = optional_boolean(data, "echo")
    timings = optional_boolean(data, "return_timings")
    if timings and len(prompts) > 1:
        raise invalid("return_timings is only allowed with one prompt", "return_timings")
    sampling, keep, logprobs, names = _sampling(data, stream)
    if echo and logprobs:
        message = "logprobs is not supported with echo: true; log probabilities of prompts are not computed"
        raise TriptychError(ErrorKind.UNSUPPORTED, message, "logprobs")
    first = ChatRequest(
        (),
        sampling,
        stream,
        lease_s,
        **priority_and_salt(data),
    )
    requests = tuple(replace(first, prompt=prompt) for prompt in prompts)
    return CompletionCall(requests, keep, echo, logprobs, stream_options, {**_NAMES, **names}, timings)


def _sampling(data: Mapping[str, Any], stream: bool) -> tuple[SamplingParams, int, bool, Mapping[str, str]]:
    """(parameters, choices of a prompt to keep, log probabilities are wanted, names)."""
    top = data.get("logprobs")
    if top is not None:
        check.integer(top, "logprobs", 0, MAX_TOP_LOGPROBS)
    given = {name: value for name, value in data.items() if name != "logprobs"}
    if given.get("max_tokens") is None:
        given["max_tokens"] = DEFAULT_MAX_TOKENS
    params, names = parse_sampling(given)
    keep = params.n
    best = data.get("best_of")
    if best is not None:
        best = check.integer(best, "best_of", 1, MAX_CHOICES)
        if best < keep:
            raise invalid(f"best_of must be at least n ({keep}), got {best}", "best_of")
        if best > keep and stream:
            raise invalid("best_of must be n with stream: true: which are the best is known at the end", "best_of")
    generated = keep if best is None else best
    # to find the best
    wanted = top is not None or generated > keep
    return replace(params, n=generated, logprobs=wanted, top_logprobs=top or 0), keep, top is not None, names


def _prompts(value: Any, special: bool) -> list[RawPrompt]:
    """Field ``prompt``: a text, token ids, or a list of either."""
    if isinstance(value, str):
        return [RawPrompt(_text(value, "prompt"), add_special_tokens=special)]
    if not isinstance(value, list) or not value:
        raise invalid(
            "prompt must be a string, a list of token ids, or a list of at least one of either, not "
            + ("an empty list" if value == [] else check.json_type(value)),
            "prompt",
        )
    if all(type(item) is int for item in value):
        return [RawPrompt(None, prompt_ids(value, "prompt"))]
    if len(value) > MAX_PROMPTS:
        raise invalid(f"prompt has {len(value)} prompts; at most {MAX_PROMPTS} are allowed", "prompt")
    if all(isinstance(item, str) for item in value):
        return [RawPrompt(_text(item, f"prompt[{k}]"), add_special_tokens=special) for k, item in enumerate(value)]
    if all(isinstance(item, list) for item in value):
        return [RawPrompt(None, prompt_ids(item, f"prompt[{k}]")) for k, item in enumerate(value)]
    kinds = sorted({check.json_type(item) for item in value})
    raise invalid(f"prompt must hold strings, token ids, or lists of token ids, all of one kind, not {kinds}", "prompt")


def _text(value: str, where: str) -> str:
    if not value:
        raise invalid(f"{where} must not be empty", where)
    return parts.text(value, where)


async def _echoed(service: Service, call: CompletionCall) -> Sequence[str]:
    """The text of each prompt, where choices begin with it."""
    if not call.echo:
        return ()
    prompts = [request.prompt for request in call.requests if request.prompt is not None]
    ids = [prompt.token_ids for prompt in prompts if prompt.token_ids is not None]
    return await texts_of(service, ids) if ids else [prompt.text or "" for prompt in prompts]
