"""The state of one request inside the engine."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ...contract.delta import TokenLogprob, Usage
from ...contract.plan import MediaItem
from ...contract.sampling import SamplingParams
from ..runner.step import MediaRows, Slice

if TYPE_CHECKING:
    from ...stage import Responder
    from .detokenizer import Detokenizer
    from .sampler import SamplerState


@dataclass(frozen=True)
class Prompt:
    """What the language model reads, validated.

    Attributes:
        token_ids: int64 [L].
        position_ids: int64 [axes, L].
        rope_delta: position of generated token number k is L + rope_delta + k on every axis.
        items: the media, for usage and for the keys of the prefix cache.
        media: rows of each encoder.
    """

    token_ids: NDArray[np.int64]
    position_ids: NDArray[np.int64]
    rope_delta: int = 0
    items: tuple[MediaItem, ...] = ()
    media: tuple[MediaRows, ...] = ()

    def __len__(self) -> int:
        return int(self.token_ids.shape[0])


@dataclass(frozen=True)
class Limits:
    """When a request ends in any case, in seconds of the engine's clock.

    Attributes:
        max_tokens: tokens it may generate.
        lease_s: it ends when not renewed for this long; None for no lease.
        timeout_s: it ends after this long.
    """

    max_tokens: int
    lease_s: float | None
    timeout_s: float


@dataclass(eq=False)
class Request:
    """One request from arrival to its last answer; owned by the engine's thread once submitted.

    Tokens of a request, as half-open intervals::

        [0, num_computed)            keys and values lie in the blocks of block_table
        [num_computed, num_tokens)   known, not computed yet: the rest of a prompt, or the token sampled last
        [0, len(prompt))             the prompt; what follows was generated
    """

    request_id: str
    prompt: Prompt
    sampling: SamplingParams
    limits: Limits
    responder: Responder
    detokenizer: Detokenizer
    sampler: SamplerState
    block_size: int
    stream: bool = True
    arrival: float = 0.0

    output_ids: list[int] = field(default_factory=list)
    num_computed: int = 0
    num_cached: int = 0
    num_published: int = 0
    block_table: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)
    admitted_before: bool = False
    number: int = 0

    renewed: float = 0.0
    last_sent: float = 0.0
    last_token: float | None = None
    text: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    done: bool = False

    @property
    def num_tokens(self) -> int:
        """Known tokens: prompt and output."""
        return len(self.prompt) + len(self.output_ids)

    @property
    def num_pending(self) -> int:
        """Known tokens whose keys and values are not computed."""
        return self.num_tokens - self.num_computed

    def slice(self, count: int) -> Slice:
        """The next ``count`` tokens to compute."""
        start, end = self.num_computed, self.num_computed + count
        media = []
        for part in self.prompt.media:
            low, high = np.searchsorted(part.positions, (start, end))
            if low < high:
                media.append(MediaRows(part.positions[low:high] - start, part.rows[low:high]))
        return Slice(
            token_ids=self._tokens(start, end),
            position_ids=self._positions(start, end),
            start=start,
            block_tables=(np.asarray(self.block_table, dtype=np.int32),),
            media=tuple(media),
            num_logits=int(end == self.num_tokens),
        )

    def block_keys(self, num_tokens: int) -> Sequence[bytes]:
        """Prefix-cache keys of the full blocks among the first ``num_tokens`` tokens."""
        count = num_tokens // self.block_size
        while len(self.keys) < count:
            start = len(self.keys) * self.block_size
            end = start + self.block_size
            digest = hashlib.blake2b(self.keys[-1] if self.keys else b"", digest_size=16)
            digest.update(self._tokens(start, end).tobytes())
            # equal features may stand at other positions (frame rates of a video), so positions count too
            digest.update(self._positions(start, end).tobytes())
            for mark in self._media_marks(start, end):
                digest.update(mark)
            self.keys.append(digest.digest())
        return self.keys[:count]

    def usage(self) -> Usage:
        """Token counts so far."""
        rows = {"image": 0, "video": 0, "audio": 0}
        for item in self.prompt.items:
            rows[item.modality] += item.num_rows
        return Usage(
            prompt_tokens=len(self.prompt),
            cached_tokens=self.num_cached,
            completion_tokens=len(self.output_ids),
            image_tokens=rows["image"],
            video_tokens=rows["video"],
            audio_tokens=rows["audio"],
        )

    def _tokens(self, start: int, end: int) -> NDArray[np.int64]:
        length = len(self.prompt)
        if end <= length:
            return self.prompt.token_ids[start:end]
        tail = np.asarray(self.output_ids[max(start - length, 0) : end - length], dtype=np.int64)
        return tail if start >= length else np.concatenate([self.prompt.token_ids[start:], tail])

    def _positions(self, start: int, end: int) -> NDArray[np.int64]:
        length, axes = len(self.prompt), self.prompt.position_ids.shape[0]
        if end <= length:
            return self.prompt.position_ids[:, start:end]
        tail = np.arange(max(start, length), end, dtype=np.int64) + self.prompt.rope_delta
        spread = np.broadcast_to(tail, (axes, tail.shape[0]))
        return spread if start >= length else np.concatenate([self.prompt.position_ids[:, start:], spread], axis=1)

    def _media_marks(self, start: int, end: int) -> list[bytes]:
        """What tells placeholders in [start, end) apart: whose rows they take, and which of them."""
        marks = []
        for item in self.prompt.items:
            row = 0
            for low, high in item.spans:
                first, last = max(low, start), min(high, end)
                if first < last:
                    marks.append(f"{item.digest}:{row + first - low}:{first - start}:{last - start};".encode())
                row += high - low
        return marks


def draw_seed() -> int:
    """A seed for a request that brought none."""
    return secrets.randbits(63)
