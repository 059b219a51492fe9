"""Deltas as the chunks of a streamed chat completion, or as one whole completion."""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
from collections.abc import AsyncGenerator, Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from triptych.python_models.contract.delta import Delta, TokenLogprob, Usage, put
from triptych.python_models.contract.errors import TriptychError

from . import timings
from .answers import Answers
from .errors import body_of

log = logging.getLogger("triptych.shim")

WRITE_LIMIT_S = 60.0
DONE = b"data: [DONE]\n\n"
# Sizes of chunks with obfuscation are multiples of it, in bytes.
_PAD = 64
_IMPOSSIBLE = -9999.0
_DELTA = b',"delta":{"content":'
_REASONING = b',"delta":{"reasoning_content":'


class EventStream(Response):
    """A server-sent event stream. The first event is written only when there is one, so until then any status fits."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None], on_end: Callable[[], None]) -> None:
        """Args: the events; ``on_end``, called in any case when the stream is over, begun or not."""
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._on_end = on_end
        self._stuck = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Write the events as they come; a client that takes none for too long is left."""
        try:
            await self._write(send, {"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for data in self._events:
                await self._write(send, {"type": "http.response.body", "body": data, "more_body": True})
            await self._write(send, {"type": "http.response.body", "body": b"", "more_body": False})
        except asyncio.CancelledError:
            if not self._stuck:
                raise
            log.warning("a client took nothing of its stream for %g s and was left", WRITE_LIMIT_S)
        finally:
            self._on_end()
            await self._events.aclose()

    async def _write(self, send: Send, message: Message) -> None:
        task = asyncio.current_task()
        assert task is not None
        # A timer costs far less per chunk than wait_for(), which makes a task.
        timer = asyncio.get_running_loop().call_later(WRITE_LIMIT_S, self._give_up, task)
        try:
            await send(message)
        finally:
            timer.cancel()

    def _give_up(self, task: asyncio.Task[Any]) -> None:
        self._stuck = True
        task.cancel()


@dataclass(frozen=True)
class Completion:
    """What all chunks of one answer share.

    Attributes:
        id: ``chatcmpl-...``.
        created: Unix time, the same in every chunk.
        model: the served model's name.
        fingerprint: of this deployment.
        include_usage: whether a usage chunk ends the stream.
        n: number of choices.
        include_obfuscation: bring the chunks to a multiple of :data:`_PAD` bytes with random characters.
        service_tier: what the answer says of it; left out where the request did not ask.
        cache_report: tell how many tokens of the prompt came from the prefix cache.
        answers: parses calls and reasoning.
        timed_from: when the request came, by ``time.perf_counter``, where it asks what the time went to; else None.
    """

    id: str
    created: int
    model: str
    fingerprint: str
    include_usage: bool = False
    n: int = 1
    include_obfuscation: bool = False
    service_tier: str | None = None
    cache_report: bool = True
    timed_from: float | None = None
    answers: Answers = field(default_factory=Answers)

    def first_chunks(self) -> bytes:
        """The chunks that name the role of each choice."""
        role = {"role": "assistant", "content": "", "refusal": None}
        return b"".join(self._chunk([self._choice(index, role)]) for index in range(self.n))

    def chunks(self, delta: Delta) -> bytes:
        """The chunks of one delta: its text, then the finish reason where it ends its choice."""
        if delta.syntax is not None or self.answers.syntax is not None:
            return self._parsed_chunks(delta)
        if not delta.finish_reason and not delta.logprobs:
            return self._text_chunk(delta.index, delta.text) if delta.text else b""
        out = b""
        if delta.text or delta.logprobs:
            out += self._chunk([self._choice(delta.index, {"content": delta.text}, logprobs(delta.logprobs))])
        if delta.finish_reason:
            out += self._chunk([self._choice(delta.index, {}, None, delta.finish_reason, delta.matched_stop)])
        return out

    def _parsed_chunks(self, delta: Delta) -> bytes:
        """As :meth:`chunks`, of an answer that may hold calls or reasoning."""
        answers = self.answers
        if delta.syntax is not None:
            answers.syntax = delta.syntax
        parts = answers.deltas(delta)
        if delta.logprobs and not parts:
            # of tokens whose text is held back
            parts = [{"content": ""}]
        out, found = b"", logprobs(delta.logprobs)
        for part in parts:
            if found is None and "content" in part:
                out += self._text_chunk(delta.index, part["content"])
            elif found is None and "reasoning_content" in part and not self.include_obfuscation:
                out += self._text_chunk(delta.index, part["reasoning_content"], _REASONING)
            else:
                out += self._chunk([self._choice(delta.index, part, found)])
            found = None
        if delta.finish_reason:
            reason = answers.finish_reason(delta)
            out += self._chunk([self._choice(delta.index, {}, None, reason, delta.matched_stop)])
        return out

    def end(self, deltas: Iterable[Delta]) -> bytes:
        """What follows the end of the last choice: a chunk of usage and timings, where asked for, and the end."""
        found = list(deltas)
        timed = self._timings(found)
        if not (self.include_usage or timed):
            return DONE
        return self._chunk([], usage(total(found), self.cache_report), timed) + DONE

    def whole(self, deltas: Iterable[Delta]) -> dict[str, Any]:
        """The completion of a request that does not stream."""
        taken = list(deltas)
        whole: dict[int, Delta] = {}
        for delta in taken:
            put(whole, delta)
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", **self._said(choice), "refusal": None, "annotations": []},
                "logprobs": logprobs(choice.logprobs),
                "finish_reason": self.answers.finish_reason(choice),
                "matched_stop": choice.matched_stop,
            }
            for index, choice in sorted(whole.items())
        ]
        body = self._head("chat.completion") | {"choices": choices, "usage": usage(total(taken), self.cache_report)}
        return body | self._timings(taken)

    def _said(self, choice: Delta) -> dict[str, Any]:
        """The fields of a message that a choice's text makes."""
        # the first choice tells it for all
        self.answers.syntax = choice.syntax or self.answers.syntax
        return {"content": choice.text} if self.answers.syntax is None else self.answers.message(choice)

    def _timings(self, deltas: Iterable[Delta]) -> dict[str, Any]:
        return {} if self.timed_from is None else {"timings": timings.report(deltas, self.timed_from, self.n)}

    def _head(self, kind: str) -> dict[str, Any]:
        head = {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }
        return head | {"service_tier": self.service_tier} if self.service_tier else head

    def _text_chunk(self, index: int, text: str, start: bytes = _DELTA) -> bytes:
        """As :meth:`_chunk` would write it: nearly every chunk is of this form, and most of it is always the same."""
        if self.include_obfuscation:
            return self._chunk([self._choice(index, {"content": text})])
        before, after = self._around
        return b"%s%d%s%s%s" % (before, index, start, json.dumps(text, ensure_ascii=False).encode(), after)

    @cached_property
    def _around(self) -> tuple[bytes, bytes]:
        """A chunk of text, but for its choice and its text."""
        before, after = self._chunk([self._choice(0, {"content": ""})]).split(b"0" + _DELTA + b'""')
        return before, after

    def _choice(
        self,
        index: int,
        delta: dict[str, Any],
        found: dict[str, Any] | None = None,
        finish_reason: str | None = None,
        matched_stop: str | int | None = None,
    ) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": found, "finish_reason": finish_reason}
        return choice | {"matched_stop": matched_stop} if finish_reason else choice

    def _chunk(
        self,
        choices: list[dict[str, Any]],
        total: dict[str, Any] | None = None,
        timed: dict[str, Any] | None = None,
    ) -> bytes:
        data = self._head("chat.completion.chunk") | {"choices": choices} | (timed or {})
        if self.include_usage:
            data["usage"] = total
        return event(padded(data) if self.include_obfuscation else data)


def total(deltas: Iterable[Delta]) -> Usage:
    """Usage counts all choices so far, so the largest is that of all."""
    return max((delta.usage for delta in deltas if delta.usage), key=lambda u: u.completion_tokens, default=Usage())


def event(data: dict[str, Any]) -> bytes:
    """One server-sent event with a JSON body."""
    return b"data: " + json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def error_event(error: TriptychError) -> bytes:
    """An error after the stream began."""
    return event(body_of(error))


def padded(data: dict[str, Any]) -> dict[str, Any]:
    """An event with random characters, so that its size says nearly nothing of its text's."""
    missing = -len(event(data | {"obfuscation": ""})) % _PAD
    return data | {"obfuscation": secrets.token_hex(missing)[:missing]}


def usage(found: Usage, cache_report: bool = True) -> dict[str, Any]:
    """OpenAI's usage object; video tokens beside its other ones.

    Args:
        found: what the engine counted.
        cache_report: tell how many tokens came from the prefix cache.
    """
    media = {
        "audio_tokens": found.audio_tokens,
        "image_tokens": found.image_tokens,
        "video_tokens": found.video_tokens,
    }
    cached = {"cached_tokens": found.cached_tokens} if cache_report else {}
    return {
        "prompt_tokens": found.prompt_tokens,
        "completion_tokens": found.completion_tokens,
        "total_tokens": found.prompt_tokens + found.completion_tokens,
        "prompt_tokens_details": cached | {"text_tokens": found.prompt_tokens - sum(media.values())} | media,
        "completion_tokens_details": {
            "reasoning_tokens": found.reasoning_tokens,
            "text_tokens": found.completion_tokens - found.reasoning_tokens,
            "audio_tokens": 0,
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        },
    }


def logprobs(items: tuple[TokenLogprob, ...]) -> dict[str, Any] | None:
    """OpenAI's logprobs object, None where none were asked for."""
    if not items:
        return None

    def entry(text: str, value: float, data: tuple[int, ...] | None) -> dict[str, Any]:
        # JSON has no infinity; this is OpenAI's word for a token that cannot be
        return {"token": text, "logprob": max(value, _IMPOSSIBLE), "bytes": None if data is None else list(data)}

    content = [
        entry(item.text, item.logprob, item.data)
        | {"top_logprobs": [entry(text, value, data) for _, text, value, data in item.top]}
        for item in items
    ]
    return {"content": content, "refusal": None}
