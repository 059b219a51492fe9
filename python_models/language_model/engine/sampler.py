"""Chooses the next token of every row of a step, in one batch on the device, without waiting for it.

Order of operations per row: repetition, presence and frequency penalties, logit bias, suppression of stop tokens
before ``min_tokens`` and of runs that may not repeat, the grammar's mask; then argmax for greedy rows, else
temperature, top-k, top-p, min-p and one draw.
"""

from __future__ import annotations

import hashlib
import struct
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ....kernels.sampling import GREEDY_BELOW, draw, greedy
from ...contract.sampling import SamplingParams
from .grammar import GrammarState
from .repetition import RepeatGuard

# of a token's entry in the table of counts: the prompt holds it
_IN_PROMPT = 1 << 30
# rows whose penalties are computed at once: bounds the temporary memory, 4 * V bytes a row several times over
_PENALTY_ROWS = 32

Array = NDArray[Any]


@dataclass(frozen=True)
class Sampled:
    """The outcome for one row.

    Attributes:
        token_id: the chosen token; -1 where the logits hold NaN or +inf, or nothing but -inf.
        logprob: natural log probability under the model's own distribution (no penalties, bias, temperature, filters),
            where asked for.
        top: the most likely tokens of that distribution with theirs, best first.
        rank: tokens of it that are at least as likely, itself among them; 0 where not asked for.
    """

    token_id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    rank: int = 0


class SamplerState:
    """What the sampler remembers of one answer.

    Attributes:
        needs_history: the next token depends on all those before it, so they must have been accepted before the row
            is launched, and an answer can have one row in a launch. Others may be launched ahead of the host.
        num_generated: accepted tokens.
        grammar: where the answer is in its grammar, or None.
        guard: of runs that may not repeat, or None.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt_ids: NDArray[np.int64],
        seed: int,
        stop_ids: frozenset[int],
        vocab_size: int,
        grammar: GrammarState | None = None,
    ) -> None:
        """Args: ``stop_ids``: tokens that end the answer; ``seed``: used with the token's number for its draw."""
        self.params = params
        self.seed = seed
        self.grammar = grammar
        self.num_generated = 0
        self.greedy = params.temperature < GREEDY_BELOW or params.top_k == 1
        self.tracks = bool(params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1.0)
        self.guard: RepeatGuard | None = None
        if params.no_repeat_ngram_size:
            self.guard = RepeatGuard(
                params.no_repeat_ngram_size,
                params.no_repeat_ngram_window_size,
                params.no_repeat_ngram_allowed_ids,
                prompt_ids,
                vocab_size,
            )
        self.needs_history = self.tracks or self.guard is not None or grammar is not None
        suppressed = sorted(i for i in stop_ids if i < vocab_size) if params.min_tokens else []
        self.suppressed: NDArray[np.int64] = np.array(suppressed, dtype=np.int64)
        self.bias_ids: NDArray[np.int64] = np.array(list(params.logit_bias), dtype=np.int64)
        self.bias_values: NDArray[np.float32] = np.array(list(params.logit_bias.values()), dtype=np.float32)
        self.plain = self.greedy and not (
            params.logprobs or self.needs_history or len(suppressed) or len(self.bias_ids)
        )
        # what the table of counts has not been told of yet: generated tokens, and those of the prompt
        self.untold: list[int] = []
        self.prompt_ids: NDArray[np.int64] = np.empty(0, dtype=np.int64)
        if params.repetition_penalty != 1.0:
            # placeholders of media may lie outside the vocabulary
            self.prompt_ids = np.unique(prompt_ids[(prompt_ids >= 0) & (prompt_ids < vocab_size)])
        self.place = -1
        self.lease: weakref.finalize[Any, SamplerState] | None = None

    def accept(self, token_id: int) -> None:
        """Record a generated token.

        Raises:
            ValueError: the grammar does not allow it.
        """
        self.num_generated += 1
        if self.tracks:
            self.untold.append(token_id)
        if self.guard is not None:
            self.guard.accept(token_id)
        if self.grammar is not None:
            self.grammar.accept(token_id)

    def uniform(self, number: int) -> float:
        """The draw for generated token ``number``, in [0, 1): of that and the seed alone, so the same in any batch."""
        digest = hashlib.blake2b(struct.pack("<qq", self.seed, number), digest_size=8).digest()
        return (int.from_bytes(digest, "little") >> 11) * 2.0**-53

    def suppresses(self, number: int) -> bool:
        """Whether generated token ``number`` must not end the answer."""
        return number < self.params.min_tokens and len(self.suppressed) > 0

    def release(self) -> None:
        """The answer is over: its place on the device is free."""
        if self.lease is not None:
            self.lease()


@dataclass(frozen=True)
class SampleRow:
    """One row of logits.

    Attributes:
        state: of the answer that it belongs to.
        slot: where in ``last_tokens`` the token goes; -1 for nowhere.
        number: which generated token of the answer it chooses, counted from 0.
    """

    state: SamplerState
    slot: int
    number: int


class Pending:
    """Tokens on their way to the host."""

    def __init__(
        self, tokens: torch.Tensor, wanted: Sequence[tuple[int, int]] = (), logprobs: Sequence[torch.Tensor] = ()
    ) -> None:
        """Start the copies.

        Args:
            tokens: int64 [N] on the device.
            wanted: (row, alternatives) of those that report log probabilities.
            logprobs: their own [W] and its rank [W], the best [W, K] and those tokens' ids [W, K], on the device.
        """
        self._wanted = wanted
        self._event: torch.cuda.Event | None = None
        self._host = [tokens, *logprobs]
        if tokens.is_cuda:
            self._host = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for t in self._host]
            for host, tensor in zip(self._host, (tokens, *logprobs), strict=True):
                host.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()

    def result(self) -> list[Sampled]:
        """Wait for the device; one outcome per row."""
        if self._event is not None:
            self._event.synchronize()
        tokens, *logprobs = (tensor.tolist() for tensor in self._host)
        out = [Sampled(token) for token in tokens]
        if self._wanted:
            for (row, count), own, rank, values, ids in zip(self._wanted, *logprobs, strict=True):
                out[row] = Sampled(tokens[row], own, tuple(zip(ids[:count], values[:count], strict=True)), rank)
        return out


class Sampler:
    """Batched sampling on the device of the logits; nothing in :meth:`launch` waits for a GPU."""

    def __init__(self, vocab_size: int, device: str | torch.device) -> None:
        """Args: ``vocab_size``, the width of the logits; ``device`` that they are on."""
        self._vocab_size = vocab_size
        self._device = torch.device(device)
        self._counts = _Counts(vocab_size, self._device)
        self._slots: tuple[tuple[int, ...], torch.Tensor] | None = None

    def launch(self, logits: torch.Tensor, rows: Sequence[SampleRow], last_tokens: torch.Tensor) -> Pending:
        """Queue the choice of one token per row.

        Args:
            logits: [N, V] of any float dtype; not changed.
            rows: one each; `SamplerState.accept` is the caller's.
            last_tokens: int64 on the device; each token is written to the slot of its row.
        """
        if all(row.state.plain for row in rows):
            tokens, usable = greedy(logits)
            pending = Pending(_told(tokens, usable))
        else:
            tokens, pending = self._choose(logits, rows)
        self._remember(tokens, rows, last_tokens)
        return pending

    def _choose(self, logits: torch.Tensor, rows: Sequence[SampleRow]) -> tuple[torch.Tensor, Pending]:
        wanted = [(k, row.state.params.top_logprobs) for k, row in enumerate(rows) if row.state.params.logprobs]
        parts = self._adjustments(rows)
        drawn = not all(row.state.greedy for row in rows)
        if drawn:
            parts |= _draw_arrays(rows)
        if wanted:
            parts["wanted"] = np.array([k for k, _ in wanted], dtype=np.int64)
        sent = _upload(parts, self._device)
        scores = self._adjust(logits, rows, sent)
        tokens, usable = greedy(scores)
        if scores is not logits:
            # a mask may hide a NaN
            usable = usable & greedy(logits)[1]
        if drawn:
            tokens = draw(scores, *(sent[name] for name in _DRAW))
        logprobs: Sequence[torch.Tensor] = ()
        if wanted:
            known = logits.index_select(0, sent["wanted"]).float().log_softmax(dim=-1)
            own = known.gather(1, tokens.index_select(0, sent["wanted"])[:, None])
            rank = (known >= own).sum(dim=-1)
            most = min(max(count for _, count in wanted), known.shape[-1])
            logprobs = (own[:, 0], rank, *known.topk(most, dim=-1))
        return tokens, Pending(_told(tokens, usable), wanted, logprobs)

    def _remember(self, tokens: torch.Tensor, rows: Sequence[SampleRow], last_tokens: torch.Tensor) -> None:
        slots = tuple(row.slot for row in rows)
        if self._slots is None or self._slots[0] != slots:
            # in a steady run of decodes these stay the same
            kept = [k for k, slot in enumerate(slots) if slot >= 0]
            places = np.array([kept, [slots[k] for k in kept]], dtype=np.int64).reshape(2, -1)
            self._slots = slots, _upload({"places": places}, self._device)["places"]
        source, target = self._slots[1]
        if len(target):
            tokens = tokens if len(target) == len(rows) else tokens.index_select(0, source)
            last_tokens.index_copy_(0, target, tokens)

    def _adjustments(self, rows: Sequence[SampleRow]) -> dict[str, Array]:
        """What changes logits, packed for one copy to the device. Places are in the flattened [N * V] scores."""
        size = self._vocab_size
        parts: dict[str, Array] = {}
        biased = [(k, row.state) for k, row in enumerate(rows) if len(row.state.bias_ids)]
        if biased:
            parts["bias_at"] = np.concatenate([state.bias_ids + k * size for k, state in biased])
            parts["bias"] = np.concatenate([state.bias_values for _, state in biased])
        banned = [row.state.suppressed + k * size for k, row in enumerate(rows) if row.state.suppresses(row.number)]
        banned += [row.state.guard.banned() + k * size for k, row in enumerate(rows) if row.state.guard is not None]
        if banned:
            parts["banned"] = np.concatenate(banned)
        masks = [(k, row.state.grammar.mask) for k, row in enumerate(rows) if row.state.grammar is not None]
        masked = [(k, mask) for k, mask in masks if mask is not None]
        if masked:
            parts["masked"] = np.array([k for k, _ in masked], dtype=np.int64)
            parts["masks"] = np.stack([mask for _, mask in masked])
        tracked = [(k, row.state) for k, row in enumerate(rows) if row.state.tracks]
        if tracked:
            parts |= self._counts.told([state for _, state in tracked])
            parts["tracked"] = np.array([k for k, _ in tracked], dtype=np.int64)
            penalties = [
                (s.params.repetition_penalty, s.params.frequency_penalty, s.params.presence_penalty) for _, s in tracked
            ]
            parts["penalties"] = np.array(penalties, dtype=np.float32)
        return parts

    def _adjust(
        self, logits: torch.Tensor, rows: Sequence[SampleRow], sent: Mapping[str, torch.Tensor]
    ) -> torch.Tensor:
        """Penalties, bias, suppression and masks; a float32 copy where anything changes."""
        if not sent.keys() & {"tracked", "bias", "banned", "masked"}:
            return logits
        scores = logits.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        if "tracked" in sent:
            self._counts.update([row.state for row in rows if row.state.tracks], sent)
            for start in range(0, len(sent["tracked"]), _PENALTY_ROWS):
                part = slice(start, start + _PENALTY_ROWS)
                where = sent["tracked"][part]
                counts = self._counts.table.index_select(0, sent["places"][part])
                values = _penalise(scores.index_select(0, where), counts, sent["penalties"][part])
                scores.index_copy_(0, where, values)
        if "bias" in sent:
            scores.view(-1).scatter_add_(0, sent["bias_at"], sent["bias"])
        if "banned" in sent:
            scores.view(-1).index_fill_(0, sent["banned"], -torch.inf)
        if "masked" in sent:
            bits = torch.arange(32, dtype=torch.int32, device=scores.device)
            allowed = (sent["masks"][:, :, None] >> bits & 1).bool().flatten(1)[:, : self._vocab_size]
            masked = scores.index_select(0, sent["masked"]).masked_fill_(~allowed, -torch.inf)
            scores.index_copy_(0, sent["masked"], masked)
        return scores


class _Counts:
    """On the device: how often each token was generated, and whether the prompt holds it, for answers with penalties.

    A row of int32 [V] for each such answer, told of new tokens only, so that a step costs the host the same whatever
    the length of prompt and answer.
    """

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self.table = torch.zeros((0, vocab_size), dtype=torch.int32, device=device)
        self._free: list[int] = []

    def told(self, states: Sequence[SamplerState]) -> dict[str, Array]:
        """The news about these answers, for :meth:`update`, and their rows."""
        size = self.table.shape[1]
        at: list[Array] = []
        added: list[Array] = []
        for state in states:
            if state.place < 0:
                self._take(state)
            for ids, value in ((state.prompt_ids, _IN_PROMPT), (state.untold, 1)):
                if len(ids):
                    at.append(np.asarray(ids, dtype=np.int64) + state.place * size)
                    added.append(np.full(len(ids), value, dtype=np.int32))
        parts: dict[str, Array] = {"places": np.array([state.place for state in states], dtype=np.int64)}
        if at:
            parts["counted_at"], parts["counted"] = np.concatenate(at), np.concatenate(added)
        return parts

    def update(self, states: Sequence[SamplerState], sent: Mapping[str, torch.Tensor]) -> None:
        """Enter the news."""
        if "counted" in sent:
            self.table.view(-1).scatter_add_(0, sent["counted_at"], sent["counted"])
        for state in states:
            state.untold.clear()
            state.prompt_ids = state.prompt_ids[:0]

    def _take(self, state: SamplerState) -> None:
        if not self._free:
            old = self.table
            count = max(8, 2 * old.shape[0])
            self.table = torch.zeros((count, old.shape[1]), dtype=old.dtype, device=old.device)
            self.table[: old.shape[0]] = old
            self._free.extend(range(old.shape[0], count))
        state.place = self._free.pop()
        self.table[state.place].zero_()
        # also where the answer is forgotten without a release
        state.lease = weakref.finalize(state, self._free.append, state.place)


def _penalise(scores: torch.Tensor, counts: torch.Tensor, penalties: torch.Tensor) -> torch.Tensor:
    """Repetition penalty (Keskar et al. 2019), then OpenAI's presence and frequency penalties.

    Args:
        scores: float32 [R, V].
        counts: rows of the table, int32 [R, V].
        penalties: float32 [R, 3]: repetition, frequency, presence.
    """
    repetition, frequency, presence = penalties[:, :, None].unbind(1)
    generated = counts & (_IN_PROMPT - 1)
    repeated = torch.where(scores < 0, scores * repetition, scores / repetition)
    scores = torch.where((counts > 0) & (repetition != 1), repeated, scores)
    return scores - (frequency * generated + presence * (generated > 0))


def _told(tokens: torch.Tensor, usable: torch.Tensor) -> torch.Tensor:
    """What the host is told; the device goes on with a token that can be embedded, whatever came of its row."""
    return torch.where(usable, tokens, -1)


def _upload(parts: Mapping[str, Array], device: torch.device) -> dict[str, torch.Tensor]:
    """Arrays on the device; for a GPU in one copy out of pinned memory, which torch reuses only once it is done."""
    if device.type != "cuda":
        return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in parts.items()}
    ends = np.cumsum([-(-array.nbytes // 16) * 16 for array in parts.values()]).tolist()
    host = torch.empty(ends[-1] if ends else 0, dtype=torch.uint8, pin_memory=True)
    view = host.numpy()
    for start, array in zip((0, *ends), parts.values(), strict=False):
        view[start : start + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    sent = host.to(device, non_blocking=True)
    return {
        name: sent[start : start + array.nbytes].view(_TORCH[array.dtype.char]).view(array.shape)
        for start, (name, array) in zip((0, *ends), parts.items(), strict=False)
    }


_TORCH = {
    np.dtype(numpy).char: dtype
    for numpy, dtype in (
        (np.int64, torch.int64),
        (np.int32, torch.int32),
        (np.float64, torch.float64),
        (np.float32, torch.float32),
    )
}
_DRAW = ("temperature", "top_k", "top_p", "min_p", "uniform")


def _draw_arrays(rows: Sequence[SampleRow]) -> dict[str, Array]:
    params = [row.state.params for row in rows]
    # greedy rows need no draw, and hashing costs
    draws = [0.0 if row.state.greedy else row.state.uniform(row.number) for row in rows]
    return {
        "temperature": np.array([p.temperature for p in params], dtype=np.float32),
        "top_k": np.array([p.top_k for p in params], dtype=np.int32),
        "top_p": np.array([p.top_p for p in params], dtype=np.float32),
        "min_p": np.array([p.min_p for p in params], dtype=np.float32),
        "uniform": np.array(draws, dtype=np.float64),
    }
