"""Token ids to text, piece by piece: complete characters only, stop strings held back and cut."""

from __future__ import annotations

import codecs
import functools
import json
from collections.abc import Callable, Sequence
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
    """The text of one answer: complete characters only, what may be the beginning of a stop string is held back."""

    def __init__(self, vocabulary: Vocabulary, params: SamplingParams, kept: frozenset[str] = frozenset()) -> None:
        """Args: ``kept``: special tokens that belong to the text even where others are left out."""
        self._text: _Bytes | _Window = vocabulary.stream(params.skip_special_tokens, kept)
        self._stop = params.stop
        self._min_tokens = params.min_tokens
        self._held = ""
        self._count = 0

    def add(self, token_id: int) -> Piece:
        """Take one token."""
        text = self._text.add(token_id)
        if not self._stop:
            return Piece(text)
        self._count += 1
        self._held += text
        if self._count >= self._min_tokens:
            found = [(at, stop) for stop in self._stop if (at := self._held.find(stop)) >= 0]
            if found:
                at, stop = min(found)
                return Piece(self._take(at), stop)
        return Piece(self._take(len(self._held) - self._longest_beginning()))

    def finish(self) -> str:
        """The text still held back, for an answer that ends without a stop string."""
        self._held += self._text.finish()
        return self._take(len(self._held))

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


class _Bytes:
    """Text of byte-level BPE: every token stands for its bytes, whatever is around it.

    A tenth of the time that decoding a window takes.
    """

    def __init__(self, bytes_of: Callable[[int], bytes], left_out: frozenset[int]) -> None:
        self._bytes_of = bytes_of
        self._left_out = left_out
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token_id: int) -> str:
        """Characters that are complete with this token."""
        return "" if token_id in self._left_out else self._decoder.decode(self._bytes_of(token_id))

    def finish(self) -> str:
        """What never became a character."""
        return self._decoder.decode(b"", True)


class _Window:
    """Text of any tokenizer.

    A multi-byte character whose tokens are not all there yet decodes to U+FFFD at the end (one, or one per byte); that
    is kept until complete. Only a window of the last tokens is decoded at each step; its start moves on where what
    is left decodes to the same text without what went before.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool, left_out: frozenset[int] = frozenset()) -> None:
        """Args: the tokenizer; whether to have it leave special tokens out; ids that are left out in any case."""
        self._tokenizer = tokenizer
        self._left_out = left_out
        # cleaning up would take back text that was already sent
        self._options = {"skip_special_tokens": skip_special_tokens, "clean_up_tokenization_spaces": False}
        self._window: list[int] = []
        self._given = 0

    def add(self, token_id: int) -> str:
        """Characters that are complete with this token."""
        if token_id in self._left_out:
            return ""
        self._window.append(token_id)
        text = self._decode()
        # bytes that never become a character are let go at last
        overlong = len(self._window) > _LONGEST_WINDOW
        stable = text if overlong else text.rstrip(_INCOMPLETE)
        new = stable[self._given :]
        self._given = max(self._given, len(stable))
        if len(self._window) > _WINDOW and self._given == len(text):
            self._advance(text, force=overlong)
        return new

    def finish(self) -> str:
        """What never became a character."""
        text = self._decode()
        new = text[self._given :]
        self._given = len(text)
        return new

    def _advance(self, text: str, force: bool) -> None:
        """Drop the older half of the window, all of whose text was given."""
        kept = self._window[-_WINDOW // 2 :]
        rest = self._tokenizer.decode(kept, **self._options)
        if force or text.endswith(rest):
            self._window, self._given = kept, len(rest)

    def _decode(self) -> str:
        return self._tokenizer.decode(self._window, **self._options)


class Vocabulary:
    """Single tokens as text and bytes, and streams of text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        steps = _decoder_types(tokenizer)
        self._byte_level = "ByteLevel" in steps
        self._only_bytes = steps == {"ByteLevel"}
        added = getattr(tokenizer, "added_tokens_decoder", {})
        self._special = {token_id: str(token.content) for token_id, token in added.items() if token.special}
        self._known: dict[int, bytes] = {}

    def stream(self, skip_special_tokens: bool, kept: frozenset[str] = frozenset()) -> _Bytes | _Window:
        """The text of an answer, token by token. Args: see :class:`Detokenizer`."""
        left_out = frozenset[int]()
        if skip_special_tokens:
            left_out = frozenset(token_id for token_id, text in self._special.items() if text not in kept)
        if self._only_bytes:
            return _Bytes(self._bytes, left_out)
        if len(left_out) == len(self._special):
            return _Window(self._tokenizer, skip_special_tokens)
        return _Window(self._tokenizer, False, left_out)

    def _bytes(self, token_id: int) -> bytes:
        """A token of byte-level BPE as its decoder has it: added tokens stand for themselves."""
        data = self._known.get(token_id)
        if data is None:
            spelling = self._tokenizer.convert_ids_to_tokens([token_id])[0] or ""
            table = _byte_of()
            values = [table.get(char) for char in spelling]
            data = spelling.encode() if None in values else bytes(v for v in values if v is not None)
            self._known[token_id] = data
        return data

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
