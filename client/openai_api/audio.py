"""POST /v1/audio/transcriptions and /v1/audio/translations: a sound's words, through the chat ensemble.

The model is asked in a chat of one message: the sound, then what to do with it (:func:`instruction`). It is a chat
model, so what comes back is its answer, word for word.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import PlainTextResponse, Response

from triptych.python_models.contract.delta import Delta, TokenLogprob, Usage, put
from triptych.python_models.contract.errors import ErrorKind, TriptychError, invalid
from triptych.python_models.contract.request import ChatRequest, MediaPart, Message, TextPart
from triptych.python_models.contract.sampling import SamplingParams

from . import parts, sse
from .body import FORM
from .documentation import Schema, described
from .errors import in_openai_words
from .fields import check_model
from .form import Form
from .form import parse as parse_form
from .run import Run, read
from .service import Service

# Of those that OpenAI has: the others tell times and languages, which this server does not know.
FORMATS = ("json", "text")
_NO_TIMES = "this server tells neither times nor the language that is spoken"
_FIELDS = ("model", "prompt", "response_format", "temperature", "top_p", "seed", "max_completion_tokens")
# Of a transcription alone; the last ones ask for what this server does not do.
_MORE = ("language", "stream", "include", "timestamp_granularities", "chunking_strategy")

_FILE = re.compile(r"\bmessages\[0\]\.content\[0\](\.\w+)*")
_USAGE: Schema = {
    "type": "object",
    "required": ["type", "input_tokens", "output_tokens", "total_tokens"],
    "properties": {
        "type": {"const": "tokens"},
        "input_tokens": {"type": "integer"},
        "input_token_details": {
            "type": "object",
            "properties": {"text_tokens": {"type": "integer"}, "audio_tokens": {"type": "integer"}},
        },
        "output_tokens": {"type": "integer"},
        "total_tokens": {"type": "integer"},
    },
}
_ANSWER: Schema = {
    "type": "object",
    "required": ["text"],
    "properties": {"text": {"type": "string"}, "usage": _USAGE, "logprobs": {"type": "array"}},
}


@dataclass(frozen=True)
class AudioCall:
    """A checked form.

    Attributes:
        request: what goes to the ensemble.
        file: the encoded sound.
        response_format: of :data:`FORMATS`.
        logprobs: report them.
    """

    request: ChatRequest
    file: bytes
    response_format: str
    logprobs: bool


def router(service: Service) -> APIRouter:
    """Both endpoints."""
    routes = APIRouter()

    @routes.post(
        "/v1/audio/transcriptions",
        **described("The words of a sound", __doc__ or "", form=_form_schema(True), answer=_ANSWER, streams=True),
    )
    async def transcriptions(request: Request) -> Response:
        return await _answer(request, service, translate=False)

    @routes.post(
        "/v1/audio/translations",
        **described("The words of a sound in English", __doc__ or "", form=_form_schema(False), answer=_ANSWER),
    )
    async def translations(request: Request) -> Response:
        return await _answer(request, service, translate=True)

    return routes


def instruction(translate: bool, language: str | None = None, prompt: str | None = None) -> str:
    """What the model is told to do with the sound before it."""
    if translate:
        words = "Translate the speech into English."
    elif language:
        words = f"Transcribe the speech. Its language is {language}."
    else:
        words = "Transcribe the speech in its own language."
    if prompt:
        words += f" Names, spelling and style as in this text, which came before: {prompt}"
    return f"{words} Answer with the words that are spoken and nothing else."


def parse(body: bytes, content_type: str, translate: bool, served_model_name: str, lease_s: float) -> AudioCall:
    """Check a form.

    Raises:
        TriptychError: naming the field at fault and what is allowed.
    """
    form = parse_form(body, content_type, _FIELDS if translate else (*_FIELDS, *_MORE), ("file",))
    check_model({"model": form.text("model")}, served_model_name)
    response_format = form.text("response_format") or "json"
    if response_format not in FORMATS:
        known = response_format in ("srt", "verbose_json", "vtt", "diarized_json")
        why = f": {_NO_TIMES}" if known else ""
        raise TriptychError(
            ErrorKind.UNSUPPORTED if known else ErrorKind.INVALID_REQUEST,
            f"response_format must be one of {', '.join(FORMATS)}, got {response_format!r}{why}",
            "response_format",
        )
    logprobs = _include(form, response_format)
    for name in ("timestamp_granularities", "chunking_strategy"):
        if any(form.fields.get(name, ())):
            why = _NO_TIMES if name == "timestamp_granularities" else "a sound is never cut into pieces"
            raise TriptychError(ErrorKind.UNSUPPORTED, f"{name} is not supported: {why}; leave it out", name)
    file = form.file("file")
    sampling: dict[str, Any] = {
        # what is heard, not what could be: as OpenAI has it
        "temperature": form.number("temperature", 0, 2) or 0.0,
        "top_p": form.number("top_p", 0, 1),
        "seed": form.integer("seed", -(2**63), 2**63 - 1),
        "max_tokens": form.integer("max_completion_tokens", 1, 2**31 - 1),
        "logprobs": logprobs,
    }
    given = {name: value for name, value in sampling.items() if value is not None}
    try:
        params = SamplingParams.from_json(given, "")
    except TriptychError as error:
        raise in_openai_words(error) from None
    text = instruction(translate, form.text("language"), form.text("prompt"))
    message = Message("user", (MediaPart("audio", blob=0), TextPart(parts.text(text, "prompt"))))
    stream = form.boolean("stream")
    if stream and response_format != "json":
        raise invalid("stream is only allowed with response_format json", "stream")
    return AudioCall(ChatRequest((message,), params, stream, lease_s), file, response_format, logprobs)


def _include(form: Form, response_format: str) -> bool:
    """Field ``include``: whether log probabilities are asked for."""
    wanted = [item for item in form.fields.get("include", ()) if item]
    if unknown := [item for item in wanted if item != "logprobs"]:
        raise invalid(f"include must be logprobs, got {unknown[0]!r}", "include")
    if wanted and response_format != "json":
        raise invalid("include is only allowed with response_format json", "include")
    return bool(wanted)


async def _answer(request: Request, service: Service, translate: bool) -> Response:
    arrival = time.perf_counter()
    options = service.options
    work = partial(
        parse,
        content_type=request.headers.get("content-type", ""),
        translate=translate,
        served_model_name=options.served_model_name,
        lease_s=options.lease_s,
    )
    call, ticket = await read(request, service, work, FORM)
    run = Run(request, service, ticket, [(call.request, (call.file,))], _in_its_words, arrival, "transcription")
    writer, stream, plain = _Transcript(call.logprobs), call.request.stream, call.response_format == "text"
    # the sound must not stay in memory while the answer is generated
    del call
    answer = await run.answer(writer, stream)
    if not plain:
        return answer
    return PlainTextResponse(f"{writer.text}\n")


def _in_its_words(error: TriptychError) -> TriptychError:
    """An error about the chat that was made of the form."""
    error = in_openai_words(error, {"max_tokens": "max_completion_tokens"})
    # the sound is what makes such a chat too long, too
    param = "file" if (error.param or "").startswith("messages") else error.param
    return TriptychError(error.kind, _FILE.sub("file", error.message), param, error.stage)


class _Transcript:
    """Writes deltas as OpenAI's transcript events, or one transcript.

    Attributes:
        text: of the whole answer, once it is written.
    """

    n = 1

    def __init__(self, logprobs: bool) -> None:
        self.text = ""
        self._logprobs = logprobs
        self._found: list[TokenLogprob] = []

    def first_chunks(self) -> bytes:
        return b""

    def chunks(self, delta: Delta) -> bytes:
        self.text += delta.text
        self._found += delta.logprobs
        if not delta.text and not delta.logprobs:
            return b""
        return sse.event({"type": "transcript.text.delta", "delta": delta.text} | self._logprobs_field(delta.logprobs))

    def end(self, deltas: Iterable[Delta]) -> bytes:
        done = {"type": "transcript.text.done", "text": self.text} | self._logprobs_field(self._found)
        return sse.event(done | {"usage": _usage(deltas)}) + sse.DONE

    def whole(self, deltas: Iterable[Delta]) -> Mapping[str, Any]:
        taken = list(deltas)
        joined: dict[int, Delta] = {}
        for delta in taken:
            put(joined, delta)
        self.text = joined[0].text
        return {"text": self.text} | self._logprobs_field(joined[0].logprobs) | {"usage": _usage(taken)}

    def _logprobs_field(self, found: Iterable[TokenLogprob]) -> dict[str, Any]:
        if not self._logprobs:
            return {}
        items = [
            {"token": item.text, "logprob": item.logprob, "bytes": None if item.data is None else list(item.data)}
            for item in found
        ]
        return {"logprobs": items}


def _usage(deltas: Iterable[Delta]) -> dict[str, Any]:
    found = max((delta.usage for delta in deltas if delta.usage), key=lambda u: u.completion_tokens, default=Usage())
    return {
        "type": "tokens",
        "input_tokens": found.prompt_tokens,
        "input_token_details": {
            "text_tokens": found.prompt_tokens - found.audio_tokens,
            "audio_tokens": found.audio_tokens,
        },
        "output_tokens": found.completion_tokens,
        "total_tokens": found.prompt_tokens + found.completion_tokens,
    }


def _form_schema(transcription: bool) -> dict[str, Any]:
    """Of the form's fields, for the documentation."""
    properties: dict[str, Any] = {
        "file": {"type": "string", "format": "binary", "description": "the sound: WAV, MP3, FLAC, OGG, M4A ..."},
        "model": {"type": "string"},
        "prompt": {"type": "string", "description": "text that came before, for names, spelling and style"},
        "response_format": {"enum": list(FORMATS), "default": "json"},
        "temperature": {"type": "number", "minimum": 0, "maximum": 2, "default": 0},
        "top_p": {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
        "seed": {"type": "integer"},
        "max_completion_tokens": {"type": "integer", "minimum": 1},
    }
    if transcription:
        properties |= {
            "language": {"type": "string", "description": "of the speech, as a code or a word"},
            "stream": {"type": "boolean", "default": False},
            "include": {"type": "array", "items": {"const": "logprobs"}},
        }
    return {
        "type": "object",
        "required": ["file", "model"],
        "properties": properties,
        "additionalProperties": False,
    }
