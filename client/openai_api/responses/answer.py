"""Deltas as a Responses object, or as the events of its stream in OpenAI's order."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from triptych.python_models.contract.delta import Delta, TokenLogprob, Usage, put
from triptych.python_models.contract.errors import TriptychError

from .. import sse
from ..answers import Answers
from ..generation import ABORTED
from ..tool_parsers import Arguments, Call, Reasoning, Text
from ..tool_parsers import Event as Piece
from .output import CallItem, Event, Item, MessageItem, ReasoningItem

_Item = TypeVar("_Item", bound=Item)

# What a response that was cut off says of it; OpenAI has no word for one that the server was told to end.
_INCOMPLETE: dict[str, dict[str, str] | None] = {"length": {"reason": "max_output_tokens"}, ABORTED: None}


class Answer:
    """One response in the making. An item of its output is opened by the first piece of text of its kind.

    Args:
        request_id: of the generation; the ids of the response and its items are made from it.
        created: Unix time.
        model: the served model's name.
        echo: what the response repeats of the request, field ``store`` included.
        cache_report: tell how many tokens of the prompt came from the prefix cache.
        include_obfuscation: bring events of text to a multiple of a size with random characters.
        keep: called with the finished response; None to keep nothing.
        answers: tells calls and reasoning from text.
    """

    # choices of the generation
    n = 1

    def __init__(
        self,
        request_id: str,
        created: int,
        model: str,
        echo: Mapping[str, Any],
        cache_report: bool = True,
        include_obfuscation: bool = False,
        keep: Callable[[dict[str, Any]], object] | None = None,
        answers: Answers | None = None,
    ) -> None:
        self._mark = request_id.rpartition("-")[2]
        self._head = {"id": f"resp_{self._mark}", "object": "response", "created_at": created, "model": model}
        self._echo = echo
        self._cache_report = cache_report
        self._include_obfuscation = include_obfuscation
        self._keep = keep
        self._answers = Answers() if answers is None else answers
        self._num_events = 0
        self._output: list[dict[str, Any]] = []
        self._open: Item | None = None
        # of tokens whose text is still to come
        self._logprobs: list[dict[str, Any]] = []
        self._reason = ""

    def first_chunks(self) -> bytes:
        """The events that say that the response has begun."""
        response = self._response("in_progress", None)
        return self._write(("created", {"response": response})) + self._write(("in_progress", {"response": response}))

    def chunks(self, delta: Delta) -> bytes:
        """The events of one delta."""
        if delta.syntax is not None:
            self._answers.syntax = delta.syntax
        self._logprobs += logprobs(delta.logprobs)
        pieces = self._pieces(delta)
        if pieces and not any(isinstance(piece, Text) for piece in pieces):
            # only the text of the answer has them
            self._logprobs = []
        out = [self._write(event) for piece in pieces for event in self._take(piece)]
        if delta.finish_reason:
            self._reason = delta.finish_reason
            # an answer without any text is an empty text
            last = self._close() if self._open or self._output else [*self._take(Text("")), *self._close()]
            out += [self._write(event) for event in last]
        return b"".join(out)

    def end(self, deltas: Iterable[Delta]) -> bytes:
        """The event that ends the response, with all of it."""
        response = self._finish(deltas)
        return self._write((response["status"], {"response": response}))

    def whole(self, deltas: Iterable[Delta]) -> dict[str, Any]:
        """The response of a request that does not stream."""
        taken = list(deltas)
        merged: dict[int, Delta] = {}
        for delta in taken:
            put(merged, delta)
        for delta in merged.values():
            self.chunks(delta)
        return self._finish(taken)

    def failed(self, error: TriptychError) -> bytes:
        """The event of a failure after the stream began."""
        response = self._response("failed", None)
        response["error"] = {"code": "server_error", "message": error.message}
        return self._write(("failed", {"response": response}))

    def _pieces(self, delta: Delta) -> list[Piece]:
        if self._answers.syntax is None:
            return [Text(delta.text)] if delta.text or delta.logprobs else []
        return self._answers.read(delta)

    def _take(self, piece: Piece) -> list[Event]:
        if isinstance(piece, Call):
            events = self._close()
            self._open = CallItem(self._mark, len(self._output), piece.name, self._answers.new_id())
            return [*events, *self._open.begin()]
        if isinstance(piece, Arguments):
            assert isinstance(self._open, CallItem)
            return [self._open.add(piece.text)]
        if isinstance(piece, Reasoning):
            events, thoughts = self._of(ReasoningItem)
            return [*events, thoughts.add(piece.text)]
        events, message = self._of(MessageItem)
        told, self._logprobs = self._logprobs, []
        message.logprobs += told
        return [*events, message.add(piece.text, logprobs=told)]

    def _of(self, kind: type[_Item]) -> tuple[list[Event], _Item]:
        """The open item of a kind, and the events that open it where it is not."""
        if isinstance(self._open, kind):
            return [], self._open
        events = self._close()
        item = kind(self._mark, len(self._output))
        self._open = item
        return [*events, *item.begin()], item

    def _close(self) -> list[Event]:
        """End the item that is open."""
        if self._open is None:
            return []
        item, self._open = self._open, None
        status = "incomplete" if self._reason in _INCOMPLETE else "completed"
        self._output.append(item.whole(status))
        return list(item.end(status))

    def _finish(self, deltas: Iterable[Delta]) -> dict[str, Any]:
        cut = self._reason in _INCOMPLETE
        response = self._response("incomplete" if cut else "completed", usage(sse.total(deltas), self._cache_report))
        response["completed_at"] = None if cut else int(time.time())
        response["incomplete_details"] = _INCOMPLETE.get(self._reason)
        if self._keep is not None:
            self._keep(response)
        return response

    def _response(self, status: str, counts: dict[str, Any] | None) -> dict[str, Any]:
        return {
            **self._head,
            "status": status,
            "completed_at": None,
            "error": None,
            "incomplete_details": None,
            "output": list(self._output),
            "usage": counts,
            **self._echo,
        }

    def _write(self, event: Event) -> bytes:
        kind, fields = event
        data = {"type": f"response.{kind}", "sequence_number": self._num_events, **fields}
        self._num_events += 1
        if self._include_obfuscation and "delta" in fields:
            data = sse.padded(data)
        return b"event: response.%s\n" % kind.encode() + sse.event(data)


def usage(found: Usage, cache_report: bool) -> dict[str, Any]:
    """Token counts as the Responses API has them."""
    chat = sse.usage(found, cache_report)
    # what is computed is cached, but for an incomplete block at the end
    written = {"cache_write_tokens": found.prompt_tokens - found.cached_tokens} if cache_report else {}
    return {
        "input_tokens": chat["prompt_tokens"],
        "input_tokens_details": chat["prompt_tokens_details"] | written,
        "output_tokens": chat["completion_tokens"],
        "output_tokens_details": chat["completion_tokens_details"],
        "total_tokens": chat["total_tokens"],
    }


def logprobs(items: Sequence[TokenLogprob]) -> list[dict[str, Any]]:
    """Log probabilities as the Responses API has them: ``bytes`` is always a list."""
    found = sse.logprobs(tuple(items))
    if found is None:
        return []
    content: list[dict[str, Any]] = found["content"]
    for item in (entry for token in content for entry in (token, *token["top_logprobs"])):
        if item["bytes"] is None:
            item["bytes"] = list(item["token"].encode())
    return content
