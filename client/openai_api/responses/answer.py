"""Deltas as a Responses object, or as the events of its stream in OpenAI's order."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from triptych.python_models.contract.delta import Delta, TokenLogprob, Usage, put
from triptych.python_models.contract.errors import TriptychError

from .. import sse

# What a response that was cut off says of it.
_INCOMPLETE = {"length": "max_output_tokens"}


class Answer:
    """One response in the making. An item of its output is opened by the first delta that is of its kind.

    Args:
        request_id: of the generation; the ids of the response and its items are made from it.
        created: Unix time.
        model: the served model's name.
        echo: what the response repeats of the request, field ``store`` included.
        cache_report: tell how many tokens of the prompt came from the prefix cache.
        include_obfuscation: bring events of text to a multiple of a size with random characters.
        keep: called with the finished response; None to keep nothing.
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
    ) -> None:
        self._mark = request_id.rpartition("-")[2]
        self._head = {"id": f"resp_{self._mark}", "object": "response", "created_at": created, "model": model}
        self._echo = echo
        self._cache_report = cache_report
        self._include_obfuscation = include_obfuscation
        self._keep = keep
        self._num_events = 0
        self._output: list[dict[str, Any]] = []
        self._text: _Text | None = None
        self._reason = ""

    def first_chunks(self) -> bytes:
        """The events that say that the response has begun."""
        response = self._response("in_progress", None)
        return self._event("response.created", response=response) + self._event(
            "response.in_progress", response=response
        )

    def chunks(self, delta: Delta) -> bytes:
        """The events of one delta."""
        out = b""
        if delta.text or delta.logprobs:
            out += self._add_text(delta.text, delta.logprobs)
        if delta.finish_reason:
            self._reason = delta.finish_reason
            out += self._close()
        return out

    def end(self, deltas: Iterable[Delta]) -> bytes:
        """The event that ends the response, with all of it."""
        response = self._finish(deltas)
        return self._event(f"response.{response['status']}", response=response)

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
        return self._event("response.failed", response=response)

    def _finish(self, deltas: Iterable[Delta]) -> dict[str, Any]:
        cut = _INCOMPLETE.get(self._reason)
        response = self._response("incomplete" if cut else "completed", usage(sse.total(deltas), self._cache_report))
        response["completed_at"] = None if cut else int(time.time())
        response["incomplete_details"] = {"reason": cut} if cut else None
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

    def _add_text(self, text: str, found: Sequence[TokenLogprob]) -> bytes:
        out = b""
        if self._text is None:
            self._text = _Text(f"msg_{self._mark}_{len(self._output)}", len(self._output))
            item = self._text.item("in_progress")
            out += self._event("response.output_item.added", output_index=self._text.index, item=item | {"content": []})
            out += self._event("response.content_part.added", **self._text.place, part=item["content"][0])
        self._text.pieces.append(text)
        told = logprobs(found)
        self._text.logprobs += told
        event = {**self._text.place, "delta": text, "logprobs": told}
        return out + self._event("response.output_text.delta", self._include_obfuscation, **event)

    def _close(self) -> bytes:
        """End what is open; an answer without any text is an empty text."""
        out = b"" if self._text or self._output else self._add_text("", ())
        if self._text is None:
            return out
        done, self._text = self._text, None
        item = done.item("incomplete" if self._reason in _INCOMPLETE else "completed")
        [part] = item["content"]
        self._output.append(item)
        return b"".join(
            (
                out,
                self._event("response.output_text.done", **done.place, text=part["text"], logprobs=part["logprobs"]),
                self._event("response.content_part.done", **done.place, part=part),
                self._event("response.output_item.done", output_index=done.index, item=item),
            )
        )

    def _event(self, kind: str, obfuscated: bool = False, /, **fields: Any) -> bytes:
        data = {"type": kind, "sequence_number": self._num_events, **fields}
        self._num_events += 1
        return b"event: %s\n" % kind.encode() + sse.event(sse.padded(data) if obfuscated else data)


class _Text:
    """The message that is being written.

    Args:
        item_id: its id.
        index: its place in the output.
    """

    def __init__(self, item_id: str, index: int) -> None:
        self.index = index
        self.place = {"item_id": item_id, "output_index": index, "content_index": 0}
        self.pieces: list[str] = []
        self.logprobs: list[dict[str, Any]] = []

    def item(self, status: str) -> dict[str, Any]:
        """As an item of the output."""
        part = {
            "type": "output_text",
            "text": "".join(self.pieces),
            "annotations": [],
            "logprobs": list(self.logprobs),
        }
        return {
            "id": self.place["item_id"],
            "type": "message",
            "status": status,
            "role": "assistant",
            "content": [part],
        }


def usage(found: Usage, cache_report: bool) -> dict[str, Any]:
    """Token counts as the Responses API has them."""
    chat = sse.usage(found, cache_report)
    return {
        "input_tokens": chat["prompt_tokens"],
        "input_tokens_details": chat["prompt_tokens_details"],
        "output_tokens": chat["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": 0} | chat["completion_tokens_details"],
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
