"""The routes."""

from __future__ import annotations

import asyncio
import time
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import PlainTextResponse, Response

from triptych.client.sdk import wire
from triptych.python_models.contract import _check as check
from triptych.python_models.contract.errors import ErrorKind, TriptychError, invalid
from triptych.python_models.contract.request import ChatRequest, RawPrompt
from triptych.python_models.contract.sampling import SamplingParams
from triptych.python_models.contract.tensors import FLUSH, LANGUAGE_MODEL, STAGES

from ..body import read_body
from ..documentation import described
from ..fields import json_object, optional_boolean
from ..generation import Generation
from ..run import TEXT_STAGES, Run, read
from ..schemas import BOOLEAN, chat_fields, choice, text
from ..service import Service
from ..tokens import spell
from ..triton import Triton
from .answer import Answers, failed
from .request import REFUSED, parse

HEALTH_S = 20.0
MAX_FLUSH_WAIT_S = 600.0
_FLUSH_PAUSE_S = 0.1
_MAX_CONTROL_BYTES = 2**20
_TAG = "SGLang"

_ANY = {"type": "object"}
_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}}
_GENERATE = {
    "type": "object",
    "properties": {
        "text": {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]},
        "input_ids": {"anyOf": [_IDS, {"type": "array", "items": _IDS}]},
        "sampling_params": {"anyOf": [_ANY, {"type": "array", "items": _ANY}, {"type": "null"}]},
        "image_data": {},
        "video_data": {},
        "audio_data": {},
        "rid": {"anyOf": [{"type": ["string", "null"]}, {"type": "array", "items": {"type": "string"}}]},
        "stream": {"type": ["boolean", "null"]},
        "return_logprob": {"anyOf": [{"type": ["boolean", "null"]}, {"type": "array", "items": {"type": "boolean"}}]},
        "top_logprobs_num": {},
        "logprob_start_len": {},
        "return_text_in_logprobs": BOOLEAN,
        "modalities": {},
        "priority": chat_fields("priority")["priority"],
        "extra_key": text("the prefix cache is shared with requests of the same key alone"),
        **{name: choice() for name in REFUSED},
        "log_metrics": BOOLEAN,
        "return_hidden_states": choice(False),
    },
    "additionalProperties": False,
}
_ANSWER = {
    "type": "object",
    "required": ["text", "output_ids", "meta_info"],
    "properties": {"text": {"type": "string"}, "output_ids": _IDS, "meta_info": _ANY},
}
_ABORT = {
    "type": "object",
    "properties": {"rid": text(), "abort_all": BOOLEAN, "abort_message": text("not used")},
    "additionalProperties": False,
}
_FLUSHED = (
    "Cache flushed.\nPlease check backend logs for more details. (When there are running or waiting requests, the "
    "operation will not be performed.)\n"
)


class _Running:
    """Requests by the ids that their callers gave them."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._named: dict[str, Generation] = {}

    def check(self, rids: tuple[str, ...]) -> None:
        """Raises TriptychError where an id is in use."""
        self._named = {rid: one for rid, one in self._named.items() if not one.finished}
        for rid in rids:
            if rid in self._named:
                raise invalid(f"rid {rid!r} is the id of a request that still runs", "rid")

    def add(self, rids: tuple[str, ...], members: tuple[Generation, ...]) -> None:
        self._named |= dict(zip(rids, members, strict=True))

    async def abort(self, rid: str | None) -> None:
        """End the request of an id, that of any endpoint's answer too; None for all."""
        found = {one.id: one for one in self._service.generations if rid is None or _is_of(one, rid)}
        if rid in self._named:
            found[self._named[rid].id] = self._named[rid]
        await asyncio.gather(*(one.abort() for one in found.values()))


def _is_of(generation: Generation, rid: str) -> bool:
    """Whether it is a part of the answer with this id."""
    return generation.id == rid or generation.id.startswith(f"{rid}-")


def router(service: Service) -> APIRouter:
    """POST /generate, and what is asked of the server."""
    routes = APIRouter()
    running = _Running(service)

    @routes.post(
        "/generate",
        **described(
            "SGLang's native generation",
            "One prompt or several, as text or token ids, with media beside them. Every event of a stream has all of "
            "the answer so far.",
            body=_GENERATE,
            answer={"anyOf": [_ANSWER, {"type": "array", "items": _ANSWER}]},
            streams=True,
            tag=_TAG,
        ),
    )
    async def generate(request: Request) -> Response:
        arrival = time.perf_counter()
        call, ticket = await read(request, service, partial(parse, lease_s=service.options.lease_s))
        try:
            running.check(call.rids)
        except TriptychError:
            ticket.release()
            raise
        run = Run(request, service, ticket, call.asks, call.in_its_words, arrival, "gen")
        running.add(call.rids, run.members)
        choices = [ask.sampling.n for ask, _ in call.asks]
        writer = Answers(call.rids, choices, call.logprobs, call.batch, arrival)
        stream = call.stream
        # Large media must not stay in memory while the answer is generated.
        del call
        return await run.answer(writer, stream, failed)

    @routes.post(
        "/abort_request", **described("End a request", "By its `rid`, or all.", body=_ABORT, answer_type=None, tag=_TAG)
    )
    async def abort(request: Request) -> Response:
        data = json_object(await _small_body(request, service))
        check.known_keys(data, ("rid", "abort_all", "abort_message"), "")
        rid = data.get("rid")
        if data.get("abort_message") is not None:
            check.string(data["abort_message"], "abort_message")
        everything = optional_boolean(data, "abort_all")
        if not everything and not check.string(rid, "rid"):
            raise invalid("rid must name a request, or abort_all be true", "rid")
        await running.abort(None if everything else rid)
        return Response(status_code=200)

    @routes.post(
        "/flush_cache",
        **described(
            "Empty the prefix cache and the encoders' caches",
            "Fails while requests run or wait; with `?timeout=S` it waits for them so long.",
            answer={"type": "string"},
            answer_type="text/plain",
            tag=_TAG,
        ),
    )
    async def flush(request: Request) -> Response:
        given = request.query_params.get("timeout", "0")
        try:
            wait = check.number(float(given), "timeout", 0, MAX_FLUSH_WAIT_S)
        except ValueError:
            raise invalid(f"timeout must be a number of seconds, got {given!r}", "timeout") from None
        triton = service.triton(TEXT_STAGES)
        try:
            await _flush(service, triton, wait)
        except TriptychError as error:
            return PlainTextResponse(f"Cache not flushed: {error.message}\n", 400)
        return PlainTextResponse(_FLUSHED)

    routes.add_api_route("/flush_cache", flush, methods=["GET"], response_model=None, include_in_schema=False)

    @routes.get("/health_generate", **described("Does it generate a token?", answer_type=None, tag=_TAG))
    async def health() -> Response:
        try:
            await asyncio.wait_for(_one_token(service), HEALTH_S)
        except asyncio.TimeoutError:
            raise TriptychError(ErrorKind.OVERLOADED, f"no token was generated within {HEALTH_S:g} s") from None
        return Response(status_code=200)

    @routes.get("/model_info", **described("The model", answer=_ANY, tag=_TAG))
    async def model_info() -> dict[str, Any]:
        about = (await spell(service, ())).about
        assert service.settings is not None
        model = service.settings.model
        return {
            "model_path": model,
            "tokenizer_path": model,
            "is_generation": True,
            "preferred_sampling_params": None,
            "weight_version": "default",
            "has_image_understanding": "image" in about["modalities"],
            "has_audio_understanding": "audio" in about["modalities"],
            "model_type": about["model_type"],
            "architectures": about["architectures"],
        }

    @routes.get("/server_info", **described("Options and state of the server", answer=_ANY, tag=_TAG))
    async def server_info() -> dict[str, Any]:
        about = (await spell(service, ())).about
        assert service.settings is not None
        settings = asdict(service.settings)
        return {
            **settings,
            "model_path": service.settings.model,
            "served_model_name": service.options.served_model_name,
            "max_inflight_requests": service.options.max_inflight_requests,
            "context_length": about["context_length"],
            "version": version("triptych"),
            "tritonserver": service.triton_version,
            "internal_states": [{"running_requests": len(service.generations)}],
        }

    for path, endpoint in (("/get_model_info", model_info), ("/get_server_info", server_info)):
        routes.add_api_route(path, endpoint, methods=["GET"], response_model=None, include_in_schema=False)
    return routes


async def _small_body(request: Request, service: Service) -> bytes:
    ticket = service.admission.enter()
    try:
        return await read_body(request, ticket, _MAX_CONTROL_BYTES)
    finally:
        ticket.release()


async def _flush(service: Service, triton: Triton, wait_s: float) -> None:
    """Empty the caches of all stages.

    Raises:
        TriptychError: OVERLOADED where requests are still in the way after ``wait_s``, or what a stage says.
    """
    until = time.monotonic() + wait_s
    # the engine first: it refuses while it has requests, and then nothing is emptied
    stages = [LANGUAGE_MODEL.name] + [
        name
        for name, spec in STAGES.items()
        if name in service.loaded_stages and FLUSH in spec.inputs and name != LANGUAGE_MODEL.name
    ]
    while True:
        try:
            if service.generations:
                raise TriptychError(ErrorKind.OVERLOADED, f"{len(service.generations)} requests run or wait")
            for stage in stages:
                async for _ in triton.infer(wire.flush_message(stage)):
                    pass
        except TriptychError as error:
            if error.kind is not ErrorKind.OVERLOADED or time.monotonic() >= until:
                raise
            await asyncio.sleep(_FLUSH_PAUSE_S)
        else:
            return


async def _one_token(service: Service) -> None:
    """Generate one; raises TriptychError where that fails."""
    sampling = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True)
    request = ChatRequest((), sampling, lease_s=service.options.lease_s, prompt=RawPrompt("0"))
    generation = service.begin([(request, ())], "health")
    try:
        while not any(delta.token_ids for delta in await generation.next()):
            pass
    finally:
        service.cancel(generation)
