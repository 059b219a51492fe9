"""Token ids to text, piece by piece: complete characters only, stop strings held back and cut."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ...contract.sampling import SamplingParams

_WINDOW = 16
_LONGEST_WINDOW = 64
_INCOMPLETE = "\ufffd"


class Tokenizer(Protocol):
    """What is needed of transformers' tokenizers."""

    def decode(self, token_ids: list[int], **options: Any) -> str:
        """Text of tokens."""

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str | None]:
        """The vocabulary's own spelling of tokens."""


@dataclass(frozen=True)
class Piece:
    """New text, and the stop string that ended the answer with it."""

    text: str
    matched_stop: str | None = None


class Detokenizer:
    """The text of one request.

    A multi-byte character whose tokens are not all there yet decodes to U+FFFD at the end (one, or one per byte); that
    is kept until complete. Only a window of the last tokens is decoded at each step; its start moves on where what
    is left decodes to the same text without what went before.
    """

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams) -> None:
        self._tokenizer = tokenizer
        self._options = {
            "skip_special_tokens": params.skip_special_tokens,
            # it would take back text that was already sent
            "clean_up_tokenization_spaces": False,
        }
        self._stop = params.stop
        self._min_tokens = params.min_tokens
        self._window: list[int] = []
        self._given = 0
        self._held = ""
        self._count = 0

    def add(self, token_id: int) -> Piece:
        """Take one token; what may be the beginning of a stop string is held back."""
        self._count += 1
        self._window.append(token_id)
        text = self._decode()
        # bytes that never become a character are let go at last
        overlong = len(self._window) > _LONGEST_WINDOW
        stable = text if overlong else text.rstrip(_INCOMPLETE)
        self._held += stable[self._given :]
        self._given = max(self._given, len(stable))
        if len(self._window) > _WINDOW and self._given == len(text):
            self._advance(text, force=overlong)
        if not self._stop:
            return Piece(self._take(len(self._held)))
        if self._count >= self._min_tokens:
            found = [(at, stop) for stop in self._stop if (at := self._held.find(stop)) >= 0]
            if found:
                at, stop = min(found)
                return Piece(self._take(at), stop)
        return Piece(self._take(len(self._held) - self._longest_beginning()))

    def finish(self) -> str:
        """The text still held back, for an answer that ends without a stop string."""
        text = self._decode()
        self._held += text[self._given :]
        self._given = len(text)
        return self._take(len(self._held))

    def _advance(self, text: str, force: bool) -> None:
        """Drop the older half of the window, all of whose text was given."""
        kept = self._window[-_WINDOW // 2 :]
        rest = self._tokenizer.decode(kept, **self._options)
        if force or text.endswith(rest):
            self._window, self._given = kept, len(rest)

    def _decode(self) -> str:
        return self._tokenizer.decode(self._window, **self._options)

    def _take(self, count: int) -> str:
        text, self._held = self._held[:count], self._held[count:]
        return text

    def _longest_beginning(self) -> int:
        """Characters at the end of the held text that may become a stop string."""
        longest = 0
        for stop in self._stop:
            for size in range(min(len(stop) - 1, len(self._held)), longest, -1):
                if self._held.endswith(stop[:size]):
                    longest = size
                    break
        return longest


class Vocabulary:
    """Single tokens as text and bytes, for log probabilities."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._byte_level = "ByteLevel" in _decoder_types(tokenizer)

    def text(self, token_id: int) -> str:
        """The token decoded alone; U+FFFD where it is a part of a character."""
        return self._tokenizer.decode([token_id], skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def data(self, token_id: int) -> tuple[int, ...] | None:
        """The token's bytes; None where they cannot be known."""
        text = self.text(token_id)
        if _INCOMPLETE not in text:
            return tuple(text.encode())
        spelling = self._tokenizer.convert_ids_to_tokens([token_id])[0]
        if spelling is None:
            return None
        if self._byte_level:
            values = [_byte_of().get(char) for char in spelling]
            return None if None in values else tuple(v for v in values if v is not None)
        if len(spelling) == 6 and spelling.startswith("<0x") and spelling.endswith(">"):
            return (int(spelling[3:5], 16),)
        return None


def _decoder_types(tokenizer: Tokenizer) -> set[str]:
    """Names of the steps by which a fast tokenizer turns tokens into text; empty for others."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    decoder = getattr(backend, "decoder", None)
    if decoder is None:
        return set()
    state = json.loads(decoder.__getstate__())
    steps: Sequence[dict[str, Any]] = state.get("decoders", [state])
    return {str(step.get("type")) for step in steps}


@functools.cache
def _byte_of() -> dict[str, int]:
    """Byte-level BPE spells every byte as one printable character: itself where printable, else from U+0100 on."""
    plain = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)}
    table = {chr(byte): byte for byte in plain}
    for k, byte in enumerate(b for b in range(256) if b not in plain):
        table[chr(256 + k)] = byte
    return table
