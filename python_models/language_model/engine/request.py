"""The state of one request inside the engine."""

from __future__ import annotations

import bisect
import hashlib
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ...contract.plan import MediaItem
from ..runner.step import MediaRows, Slice
from .blocks import BlockTable

if TYPE_CHECKING:
    import torch

    from ..runner.cross import CrossMedia
    from .delivery import Choice
    from .speculation import PromptLookup

_NEVER = 2**62


@dataclass(frozen=True)
class Prompt:
    """What the language model reads, validated.

    Attributes:
        token_ids: int64 [L].
        position_ids: int64 [axes, L]; behind the axes of positions those of :func:`~..runner.executor.token_axes`.
        rope_delta: position of generated token number k is (L + k) * position_step + rope_delta on every axis of
            positions.
        items: the media, for usage and for the keys of the prefix cache.
        media: rows of each encoder.
        spans: [start, end) of bidirectional attention, ascending, apart from each other.
        generated: what the axes that are no positions are for generated tokens.
        switch_at: a request of more tokens is computed anew with 1 on the last axis, see :class:`~..runner.rope`;
            None where there is no such switch ahead.
        cross: media that cross-attention layers read, and what those layers keep of them.
    """

    token_ids: NDArray[np.int64]
    position_ids: NDArray[np.int64]
    rope_delta: int = 0
    items: tuple[MediaItem, ...] = ()
    media: tuple[MediaRows, ...] = ()
    spans: tuple[tuple[int, int], ...] = ()
    generated: tuple[int, ...] = ()
    switch_at: int | None = None
    position_step: int = 1
    cross: CrossMedia | None = None

    def __len__(self) -> int:
        return int(self.token_ids.shape[0])

    @property
    def rows(self) -> list[torch.Tensor]:
        """Of all media, as they arrived; those for cross-attention layers until they are used."""
        across = [] if self.cross is None or self.cross.rows is None else [self.cross.rows]
        return [*(part.rows for part in self.media), *across]

    @property
    def media_bytes(self) -> int:
        """Bytes of all rows, and of what cross-attention layers make of them."""
        across = 0 if self.cross is None else self.cross.nbytes
        return across + sum(part.rows.nbytes for part in self.media)

    @property
    def root(self) -> bytes:
        """What decides keys and values from the first token on, beside the tokens."""
        # a token before the first picture attends to all of them, see CrossStep.attend
        digests = (item.digest.encode() for item in self.items if item.cross is not None)
        # a byte that no salt has
        return b"".join(b"\xff" + digest for digest in digests)


class Work:
    """What one step computes of one request.

    Attributes:
        request: whose tokens.
        start, count: the tokens [start, start + count).
        drafts: guesses, the last of those tokens.
        num_logits: 0 inside a prompt, else 1 + guesses.
        number: of the generated token that the first logits choose.
        late: the first token is in flight: it is known to the device only.
        seating: of the request's blocks, see :attr:`Request.seating`.
        load, saves: see :class:`~..runner.step.Slice`.
    """

    __slots__ = ("count", "drafts", "late", "load", "num_logits", "number", "request", "saves", "seating", "start")

    def __init__(self, request: Request, count: int, drafts: Sequence[int] = ()) -> None:
        """Put the next ``count`` tokens of a request, guesses included, to work."""
        self.request = request
        self.start = start = request.num_scheduled
        self.count = count
        self.drafts = drafts
        self.seating = request.seating
        self.late = start >= request.num_known
        self.load = -1
        self.saves: tuple[tuple[int, int], ...] = ()
        request.num_scheduled = end = start + count
        self.number = request.num_tokens - request.num_prompt
        if end >= request.num_tokens:
            self.num_logits = 1 + len(drafts)
            request.num_tokens += 1
        else:
            self.num_logits = 0

    @property
    def current(self) -> bool:
        """Whether the request still holds the blocks that this was computed in."""
        return self.seating == self.request.seating

    @property
    def embeds(self) -> bool:
        """Whether it ends the prompt of a request for an embedding."""
        return self.request.embed and self.num_logits > 0

    def undo(self) -> None:
        """As if this work, the request's latest, had never been planned."""
        request = self.request
        if self.current:
            request.num_scheduled = self.start
        if self.num_logits:
            request.num_tokens -= 1

    def slice(self) -> Slice:
        """The tensors of this work."""
        part = self.request.part(self.start, self.count, self.num_logits, self.drafts, self.late)
        if not (self.saves or self.load >= 0 or self.embeds):
            return part
        return replace(part, load=self.load, saves=self.saves, embed=self.embeds)


@dataclass(eq=False, slots=True)
class Request:
    """One answer in the making, as scheduler and runner see it; owned by the engine's thread once submitted.

    Tokens of a request, as half-open intervals::

        [0, num_computed)            keys and values lie in the blocks of the tables
        [num_computed, num_scheduled)   a step that computes them is queued
        [num_scheduled, num_tokens)  to be computed: the rest of a prompt, or the token sampled last
        [0, num_prompt)              the prompt; what follows was generated
        [num_known, num_tokens)      at most one: sampled in the step that is queued, not known to the host yet
    """

    request_id: str
    prompt: Prompt
    max_tokens: int
    block_size: int
    num_groups: int = 1
    priority: int = 0
    index: int = 0
    """Number of the choice among those of the same prompt."""
    salt: str = ""
    cacheable: bool = True
    sampler: Any = None
    choice: Choice | None = None
    speculation: PromptLookup | None = None
    speculative_tokens: int = 0
    embed: bool = False
    """It is no answer that is wanted but the hidden state of the prompt's last token."""
    hidden: torch.Tensor | None = None
    """That state, [H] on the device, once a step that computes it is queued."""

    number: int = 0
    num_prompt: int = 0
    num_tokens: int = 0
    num_known: int = 0
    num_scheduled: int = 0
    num_computed: int = 0
    limit: int = 0
    """Tokens at which it ends in any case."""
    num_cached: int = 0
    started: bool = False

    slot: int = -1
    seating: int = 0
    """Counts how often the request lost its blocks; what was computed in earlier ones is not in the present ones."""
    admitted: float | None = None
    """Time of the engine's clock when it first got a place among the running ones."""
    seated_at: int = 0
    """The step in which it got the present ones."""
    num_hit: int = 0
    """Tokens that the prefix cache gave then."""
    room: int = 0
    """Tokens that its blocks have places for."""
    tables: tuple[BlockTable, ...] = ()
    views: tuple[NDArray[np.int32], ...] = ()
    keys: list[bytes] = field(default_factory=list)
    publish_at: int = _NEVER
    """Computed tokens at which the next block is full."""
    load: int = -1
    """Number of the saved state that it holds because it begins with it."""
    save_at: tuple[int, ...] = ()
    """Tokens after which states are to be saved, ascending."""
    saving: list[tuple[int, int]] = field(default_factory=list)
    """(tokens, number) of states that queued steps save."""
    done: bool = False
    switch_at: int = _NEVER
    """See :attr:`Prompt.switch_at`."""

    _ids: NDArray[np.int64] = field(init=False)
    _positions: NDArray[np.int64] = field(init=False)
    _generated: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.num_prompt = self.num_tokens = self.num_known = len(self.prompt)
        self.limit = self.num_prompt + self.max_tokens
        self.tables = tuple(BlockTable() for _ in range(self.num_groups))
        self._ids = self.prompt.token_ids
        self._positions = self.prompt.position_ids
        self._generated = self.prompt.generated
        if self.prompt.switch_at is not None:
            self.switch_at = self.prompt.switch_at

    @property
    def num_output(self) -> int:
        """Generated tokens that are known."""
        return self.num_known - self.num_prompt

    @property
    def output_ids(self) -> list[int]:
        """The generated tokens that are known."""
        ids: list[int] = self._ids[self.num_prompt : self.num_known].tolist()
        return ids

    @property
    def num_pending(self) -> int:
        """Tokens that no step computes yet."""
        return self.num_tokens - self.num_scheduled

    @property
    def in_flight(self) -> bool:
        """Whether a token is sampled, but not known to the host."""
        return self.num_tokens > self.num_known

    def append(self, token_id: int) -> None:
        """Take a token that became known."""
        if self.num_known >= self._ids.shape[0]:
            self._extend(self.num_known + 1)
        self._ids[self.num_known] = token_id
        self.num_known += 1
        if self.speculation is not None:
            self.speculation.append(token_id)

    def switch(self) -> None:
        """Go over to what is beyond :attr:`switch_at`; what is computed of it before is of no use any more."""
        self.switch_at = _NEVER
        # the prompt's belong to all its choices
        self._positions = self._positions.copy()
        self._positions[-1] = 1
        self._generated = (*self._generated[:-1], 1)
        self.keys.clear()

    def cut(self, end: int) -> int:
        """The largest place up to ``end`` that is in the middle of no span."""
        spans = self.prompt.spans
        at = bisect.bisect_left(spans, (end, 0)) - 1
        return spans[at][0] if at >= 0 and end < spans[at][1] else end

    def span_end(self, start: int) -> int:
        """End of the uncuttable piece that begins at ``start``: of a span, else of one token."""
        spans = self.prompt.spans
        at = bisect.bisect_left(spans, (start, 0))
        return spans[at][1] if at < len(spans) and spans[at][0] == start else start + 1

    def part(
        self, start: int, count: int, num_logits: int = 0, drafts: Sequence[int] = (), late: bool = False
    ) -> Slice:
        """The tensors of tokens [start, start + count); see :class:`Work` for the others."""
        end = start + count
        if end > self._ids.shape[0]:
            self._extend(end)
        ids = self._ids[start:end]
        if drafts:
            ids = ids.copy()
            ids[-len(drafts) :] = drafts
        positions = self._positions[:, start:end]
        if start >= self.num_prompt:
            cross = self.prompt.cross
            return Slice(ids, positions, start, self.views, self.slot, late, num_logits=num_logits, cross=cross)
        media = []
        for part in self.prompt.media:
            low, high = np.searchsorted(part.positions, (start, end))
            if low < high:
                media.append(MediaRows(part.positions[low:high] - start, part.rows[low:high]))
        spans = tuple((s - start, e - start) for s, e in self.prompt.spans if s >= start and e <= end)
        return Slice(
            ids, positions, start, self.views, self.slot, late, tuple(media), spans, num_logits, self.prompt.cross
        )

    def block_keys(self, num_tokens: int) -> Sequence[bytes]:
        """Prefix-cache keys of the full blocks among the first ``num_tokens`` tokens, which are known."""
        count = num_tokens // self.block_size
        while len(self.keys) < count:
            start = len(self.keys) * self.block_size
            end = start + self.block_size
            begin = self.keys[-1] if self.keys else self.salt.encode() + self.prompt.root
            digest = hashlib.blake2b(begin, digest_size=16)
            digest.update(self._ids[start:end].tobytes())
            # equal features may stand at other positions (frame rates of a video), so positions count too
            digest.update(self._positions[:, start:end].tobytes())
            for mark in self._marks(start, end):
                digest.update(mark)
            self.keys.append(digest.digest())
        return self.keys if len(self.keys) == count else self.keys[:count]

    def _extend(self, size: int) -> None:
        """Room for ``size`` tokens, and more, with the positions of those to come."""
        have = self._ids.shape[0]
        size = max(size, min(self.limit, have + max(64, have // 2)))
        ids = np.zeros(size, dtype=np.int64)
        ids[: self.num_known] = self._ids[: self.num_known]
        positions = np.empty((self._positions.shape[0], size), dtype=np.int64)
        positions[:, :have] = self._positions
        positions[:, have:] = np.arange(have, size) * self.prompt.position_step + self.prompt.rope_delta
        if generated := self._generated:
            positions[-len(generated) :, have:] = np.array(generated)[:, None]
        self._ids, self._positions = ids, positions

    def _marks(self, start: int, end: int) -> list[bytes]:
        """What decides the content of [start, end) beside tokens and positions.

        That is whose rows placeholders take, and which of them, and where spans begin and end.
        """
        if start >= self.num_prompt:
            return []
        marks = []
        for item in self.prompt.items:
            row = 0
            for low, high in item.spans:
                first, last = max(low, start), min(high, end)
                if first < last:
                    marks.append(f"{item.digest}:{row + first - low}:{first - start}:{last - start};".encode())
                row += high - low
        marks.extend(f"{s - start}-{e - start};".encode() for s, e in self.prompt.spans if s < end and e > start)
        return marks


def draw_seed() -> int:
    """A seed for a request that brought none."""
    return secrets.randbits(63)


def seed_of_choice(seed: int, index: int) -> int:
    """The seed of one of several answers to a prompt; the first one's is the request's own."""
    if index == 0:
        return seed
    digest = hashlib.blake2b(f"{seed}:{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
