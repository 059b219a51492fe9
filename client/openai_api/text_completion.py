"""Deltas as the chunks of a streamed completion of /v1/completions, or as a whole one."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from triptych.python_models.contract.delta import Delta, TokenLogprob, Usage, put

from . import sse, timings
from .fields import StreamOptions

_IMPOSSIBLE = -9999.0
_TEXT = b',"text":'


@dataclass
class TextCompletion:
    """Writes the choices of one or several prompts; choice ``k`` of prompt ``p`` has number ``p * keep + k``.

    Attributes:
        id: ``cmpl-...``.
        created: Unix time.
        model: the served model's name.
        fingerprint: of this deployment.
        prompts: number of prompts.
        generated: choices of each that the engine makes.
        keep: choices of each that are answered: those with the highest log probability per token.
        echoed: the prompts' texts, where choices begin with them.
        logprobs: answer with log probabilities.
        stream_options: what a stream holds beside the answer.
        cache_report: tell how many tokens of prompts came from the prefix cache.
        timed_from: when the request came, where it asks what the time went to; else None.
    """

    id: str
    created: int
    model: str
    fingerprint: str
    prompts: int
    generated: int
    keep: int
    echoed: Sequence[str]
    logprobs: bool
    stream_options: StreamOptions
    cache_report: bool = True
    timed_from: float | None = None
    _usage: dict[int, Usage] = field(default_factory=dict)
    _offset: dict[int, int] = field(default_factory=dict)

    @property
    def n(self) -> int:
        """See :class:`.run.Writer`."""
        return self.prompts * self.generated

    def first_chunks(self) -> bytes:
        """The prompts, where they are asked for."""
        if not self.echoed:
            return b""
        return b"".join(self._text_chunk(k, self._echo(k)) for k in range(self.n))

    def chunks(self, delta: Delta) -> bytes:
        """The chunks of one delta: its text, then the finish reason where it ends its choice."""
        if delta.usage is not None:
            self._count(delta)
        if not delta.finish_reason and not delta.logprobs:
            return self._text_chunk(delta.index, delta.text) if delta.text else b""
        out = b""
        if delta.text or delta.logprobs:
            out += self._chunk([self._choice(delta.index, delta.text, self._logprobs(delta.index, delta.logprobs))])
        if delta.finish_reason:
            choice = self._choice(delta.index, "", None, delta.finish_reason)
            out += self._chunk([choice | {"matched_stop": delta.matched_stop}])
        return out

    def end(self, deltas: Iterable[Delta]) -> bytes:
        """A chunk of usage and timings, where asked for, and the end of the stream."""
        timed = self._timings(deltas)
        if not (self.stream_options.include_usage or timed):
            return sse.DONE
        return self._chunk([], self._total(), timed) + sse.DONE

    def whole(self, deltas: Iterable[Delta]) -> dict[str, Any]:
        """The body of a request that does not stream."""
        taken = list(deltas)
        whole: dict[int, Delta] = {}
        for delta in taken:
            if delta.usage is not None:
                self._count(delta)
            put(whole, delta)
        choices: list[dict[str, Any]] = []
        for prompt in range(self.prompts):
            own = [whole[prompt * self.generated + k] for k in range(self.generated)]
            if self.keep < self.generated:
                # sorted() keeps the order of equals
                own = sorted(own, key=lambda choice: -_mean(choice.logprobs))[: self.keep]
            for delta in own:
                found = self._logprobs(delta.index, delta.logprobs) if self.logprobs else None
                choice = self._choice(len(choices), self._echo(delta.index) + delta.text, found, delta.finish_reason)
                choices.append(choice | {"matched_stop": delta.matched_stop})
        return self._head() | {"choices": choices, "usage": self._total()} | self._timings(taken)

    def _echo(self, index: int) -> str:
        return self.echoed[index // self.generated] if self.echoed else ""

    def _count(self, delta: Delta) -> None:
        """Keep the usage of a prompt; the latest counts all of its choices so far."""
        prompt = delta.index // self.generated
        assert delta.usage is not None
        known = self._usage.get(prompt)
        if known is None or delta.usage.completion_tokens >= known.completion_tokens:
            self._usage[prompt] = delta.usage

    def _total(self) -> dict[str, Any]:
        sums = {name: sum(getattr(usage, name) for usage in self._usage.values()) for name in vars(Usage())}
        return sse.usage(Usage(**sums), self.cache_report)

    def _timings(self, deltas: Iterable[Delta]) -> dict[str, Any]:
        return {} if self.timed_from is None else {"timings": timings.report(deltas, self.timed_from, self.n)}

    def _head(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }

    def _text_chunk(self, index: int, text: str) -> bytes:
        """As :meth:`_chunk` would write it: nearly every chunk is of this form, and most of it is always the same."""
        if self.stream_options.include_obfuscation:
            return self._chunk([self._choice(index, text)])
        before, after = self._around
        return b"%s%d%s%s%s" % (before, index, _TEXT, json.dumps(text, ensure_ascii=False).encode(), after)

    @cached_property
    def _around(self) -> tuple[bytes, bytes]:
        """A chunk of text, but for its choice and its text."""
        before, after = self._chunk([self._choice(0, "")]).split(b"0" + _TEXT + b'""')
        return before, after

    def _choice(
        self, index: int, text: str, found: dict[str, Any] | None = None, finish_reason: str | None = None
    ) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": found, "finish_reason": finish_reason}

    def _chunk(
        self,
        choices: list[dict[str, Any]],
        total: dict[str, Any] | None = None,
        timed: dict[str, Any] | None = None,
    ) -> bytes:
        data = self._head() | {"choices": choices} | (timed or {})
        if self.stream_options.include_usage:
            data["usage"] = total
        return sse.event(sse.padded(data) if self.stream_options.include_obfuscation else data)

    def _logprobs(self, index: int, items: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        """The legacy object; offsets are those of characters in the text of the choice."""
        if not items:
            return None
        offset = self._offset.get(index, len(self._echo(index)))
        offsets = []
        for item in items:
            offsets.append(offset)
            offset += len(item.text)
        self._offset[index] = offset
        return {
            "tokens": [_name(item.text, item.data) for item in items],
            "token_logprobs": [finite(item.logprob) for item in items],
            "top_logprobs": [
                {_name(text, data): finite(value) for _, text, value, data in item.top}
                | {_name(item.text, item.data): finite(item.logprob)}
                for item in items
            ],
            "text_offset": offsets,
        }


def _name(text: str, data: tuple[int, ...] | None) -> str:
    """A token's text, or OpenAI's spelling of one that is part of a character."""
    return text if data is None or "\ufffd" not in text else "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def finite(value: float) -> float:
    """JSON has no infinity; this is OpenAI's word for a token that cannot be."""
    return max(value, _IMPOSSIBLE)


def _mean(items: Sequence[TokenLogprob]) -> float:
    return sum(finite(item.logprob) for item in items) / len(items) if items else 0.0
