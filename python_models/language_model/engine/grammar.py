"""Structured output: grammars compiled by xgrammar (Dong et al. 2024) off the hot loop, and one matcher per answer.

A compiled grammar says for every state which tokens of the vocabulary may follow; the matcher of an answer keeps that
as a bit mask, filled on the host while the GPU computes the logits that it will be laid over.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ...contract.errors import ErrorKind, TriptychError, invalid
from ...contract.sampling import Grammar
from ...stage import Telemetry

if TYPE_CHECKING:
    import xgrammar

logger = logging.getLogger(__name__)

_THREADS = 2
# in a row between two tokens of JSON; a model that has nothing to say fills the page with blanks otherwise
_MAX_WHITESPACE = 1
_ANY_OBJECT = '{"type":"object"}'
_FREE = ("any_text", "triggered_tags", "regex", "grammar")
_CONTROL = re.compile(rb"[\x00-\x09\x0b\x0c\x0e-\x1f]")
_ORIGIN = re.compile(r"^\[[\d:]+\] \S+:\d+: (?:Check failed: )?")


@dataclass(frozen=True)
class Compiled:
    """A compiled grammar.

    Attributes:
        rules: xgrammar's.
        tokens: int32 [ceil(V / 32)], a bit mask of the tokens that may occur at all; None: any.
    """

    rules: xgrammar.CompiledGrammar
    tokens: NDArray[np.int32] | None = None

    @property
    def num_bytes(self) -> int:
        """Memory that it takes by itself."""
        return int(self.rules.memory_size_bytes)


class GrammarCompiler:
    """Compiles grammars for one tokenizer in threads of its own; those used last are kept.

    Thread-safe. A vocabulary of 150 k tokens takes about a second to prepare at the first grammar, a schema a few
    milliseconds.
    """

    def __init__(
        self,
        tokenizer: Any,
        vocab_size: int,
        stop_ids: frozenset[int],
        telemetry: Telemetry,
        cache_bytes: int = 256 * 2**20,
    ) -> None:
        """Args: ``vocab_size`` is the width of the logits, ``stop_ids`` the checkpoint's own end tokens."""
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._stop_ids = sorted(i for i in stop_ids if i < vocab_size)
        self._telemetry = telemetry
        self._cache_bytes = cache_bytes
        self._lock = threading.Lock()
        self._making = threading.Lock()
        self._cache: OrderedDict[Grammar, Compiled] = OrderedDict()
        self._waiting: dict[Grammar, list[Callable[[Any], None]]] = {}
        self._compiler: xgrammar.GrammarCompiler | None = None
        self._printable: NDArray[np.int32] | None = None
        self._threads = ThreadPoolExecutor(_THREADS, "triptych-grammar")

    def compile(self, grammar: Grammar, then: Callable[[Compiled | TriptychError], None]) -> None:
        """Have a grammar compiled; returns at once.

        Args:
            grammar: what to compile.
            then: called with the outcome, once: here and now where it is known, else by a thread of the compiler. It
                must not raise. Errors are INVALID_REQUEST with the compiler's reason, or UNSUPPORTED where the
                tokenizer is of a kind that no grammar works with; their field is ``grammar``.
        """
        with self._lock:
            compiled = self._cache.get(grammar)
            if compiled is not None:
                self._cache.move_to_end(grammar)
            else:
                others = self._waiting.setdefault(grammar, [])
                others.append(then)
                if len(others) > 1:
                    return
        if compiled is not None:
            then(compiled)
            return
        try:
            self._threads.submit(self._work, grammar)
        except RuntimeError:
            # closed
            self._give_up()

    @property
    def cached_bytes(self) -> int:
        """Bytes of the grammars that are kept."""
        with self._lock:
            return sum(item.num_bytes for item in self._cache.values())

    def close(self) -> None:
        """Stop; what waits to be compiled ends with an error."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._give_up()

    def _give_up(self) -> None:
        with self._lock:
            left = [then for waiting in self._waiting.values() for then in waiting]
            self._waiting.clear()
        for then in left:
            then(TriptychError(ErrorKind.STAGE_DEAD, "the language model has stopped", None, "language_model"))

    def _work(self, grammar: Grammar) -> None:
        outcome: Compiled | TriptychError
        start = time.perf_counter()
        try:
            outcome = self._compile(grammar)
        except TriptychError as error:
            outcome = error
        except Exception as error:
            logger.exception("a grammar of type %s cannot be compiled", grammar.type)
            outcome = TriptychError(
                ErrorKind.STAGE_FAILED, f"the grammar cannot be compiled: {error}", "grammar", "language_model"
            )
        self._telemetry.observe("triptych_grammar_compile_seconds", time.perf_counter() - start)
        with self._lock:
            waiting = self._waiting.pop(grammar, [])
            if not isinstance(outcome, TriptychError):
                self._keep(grammar, outcome)
        for then in waiting:
            then(outcome)

    def _keep(self, grammar: Grammar, compiled: Compiled) -> None:
        self._cache[grammar] = compiled
        size = sum(item.num_bytes for item in self._cache.values())
        while size > self._cache_bytes and self._cache:
            _, oldest = self._cache.popitem(last=False)
            size -= oldest.num_bytes

    def _compile(self, grammar: Grammar) -> Compiled:
        compiler = self._ready()
        try:
            if grammar.type == "regex":
                return Compiled(compiler.compile_regex(grammar.value))
            if grammar.type == "ebnf":
                return Compiled(compiler.compile_grammar(grammar.value))
            if grammar.type == "structural_tag":
                # what is no JSON may hold any character
                free = any(f'"{kind}"' in grammar.value for kind in _FREE)
                return Compiled(compiler.compile_structural_tag(grammar.value), None if free else self._printable)
            schema = _ANY_OBJECT if grammar.type == "json_object" else grammar.value
            strict = grammar.type == "json_schema"
            rules = compiler.compile_json_schema(schema, strict_mode=strict, max_whitespace_cnt=_MAX_WHITESPACE)
            return Compiled(rules, self._printable)
        # its errors have no common type of their own
        except (RuntimeError, ValueError) as error:
            reason = _ORIGIN.sub("", str(error)).strip()
            raise invalid(f"grammar: the {grammar.type} cannot be compiled: {reason}", "grammar") from None

    def _ready(self) -> xgrammar.GrammarCompiler:
        with self._making:
            if self._compiler is None:
                import xgrammar

                try:
                    info = xgrammar.TokenizerInfo.from_huggingface(
                        self._tokenizer, vocab_size=self._vocab_size, stop_token_ids=self._stop_ids or None
                    )
                except Exception as error:
                    raise TriptychError(
                        ErrorKind.UNSUPPORTED,
                        f"grammars do not work with this model's tokenizer ({type(self._tokenizer).__name__}): {error}",
                        "grammar",
                    ) from error
                # one thread each: compiling must not take the cores from what is being served
                self._compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)
                self._printable = _printable(info.decoded_vocab, self._vocab_size)
            return self._compiler


class GrammarState:
    """Where an answer is in its grammar; owned by the engine's thread.

    Attributes:
        mask: int32 [ceil(V / 32)], bit i % 32 of word i // 32 says whether token i may come next; None: any may.
        finished: the text is complete and nothing but an end token may follow.
    """

    def __init__(self, compiled: Compiled, stop_ids: frozenset[int], vocab_size: int) -> None:
        """Args: ``stop_ids``: tokens that end this answer, allowed only where the text is complete."""
        import xgrammar

        ends = sorted(i for i in stop_ids if i < vocab_size)
        self._matcher = xgrammar.GrammarMatcher(compiled.rules, override_stop_tokens=ends or None)
        self._bits: NDArray[np.int32] = np.empty((1, -(-vocab_size // 32)), dtype=np.int32)
        self._others = np.full_like(self._bits, -1)
        if rest := vocab_size % 32:
            self._others[0, -1] = (1 << rest) - 1
        for token_id in ends:
            self._others.view(np.uint32)[0, token_id // 32] &= np.uint32(~(1 << token_id % 32) & 0xFFFFFFFF)
        self._tokens = compiled.tokens
        self.mask: NDArray[np.int32] | None = None
        self.finished = False
        self._look()

    def accept(self, token_id: int) -> None:
        """Take the next token.

        Raises:
            ValueError: the grammar does not allow it.
        """
        if self.finished or not self._matcher.accept_token(token_id):
            raise ValueError(f"token {token_id} is not allowed by the request's grammar")
        self._look()

    def rollback(self, count: int) -> None:
        """Take back the last ``count`` tokens."""
        self._matcher.rollback(count)
        self._look()

    def _look(self) -> None:
        """What may come next."""
        if self._matcher.is_terminated():
            self.mask, self.finished = None, True
            return
        masked = self._matcher.fill_next_token_bitmask(self._bits)
        if self._tokens is not None:
            if not masked:
                self._bits.fill(-1)
            self._bits &= self._tokens
            masked = True
        self.mask = self._bits[0] if masked else None
        self.finished = masked and not np.any(self._bits & self._others)


def _printable(vocabulary: Sequence[bytes], size: int) -> NDArray[np.int32]:
    """The tokens that JSON can hold: xgrammar lets control characters into strings, where they must be escaped.

    Line ends are left: it allows them between tokens only.
    """
    bits = np.zeros(-(-size // 32) * 32, dtype=np.uint8)
    for token_id, data in enumerate(vocabulary[:size]):
        bits[token_id] = not _CONTROL.search(data)
    return np.packbits(bits, bitorder="little").view(np.int32)
