"""Chooses the next token of every request of a step, in one batch.

Order of operations per row: repetition, presence and frequency penalties, logit bias, suppression of stop tokens
before ``min_tokens``; then argmax for greedy rows, else temperature, top-k, top-p, min-p and one draw.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from ...contract.sampling import SamplingParams

_GREEDY_BELOW = 1e-5


@dataclass(frozen=True)
class Sampled:
    """The outcome for one request.

    Attributes:
        token_id: the chosen token; -1 where the logits hold NaN or +inf, or nothing but -inf.
        logprob: natural log probability under the model's own distribution (no penalties, bias, temperature, filters),
            where asked for.
        top: the most likely tokens of that distribution with theirs, best first.
    """

    token_id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class SamplerState:
    """What the sampler remembers of one request."""

    def __init__(
        self,
        params: SamplingParams,
        prompt_ids: NDArray[np.int64],
        seed: int,
        stop_ids: frozenset[int],
        vocab_size: int,
    ) -> None:
        """Args: ``stop_ids``: tokens that end the answer; ``seed``: used with the token's number for its draw."""
        self.params = params
        self.seed = seed
        self.num_generated = 0
        self.greedy = params.temperature < _GREEDY_BELOW or params.top_k == 1
        self.suppressed = sorted(i for i in stop_ids if i < vocab_size) if params.min_tokens else []
        self.bias = tuple(params.logit_bias.items())
        self.tracks = bool(params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1.0)
        self._counts: dict[int, int] = {}
        self._seen: set[int] = set()
        if params.repetition_penalty != 1.0:
            # placeholders of media may lie outside the vocabulary
            self._seen = {int(i) for i in np.unique(prompt_ids) if 0 <= i < vocab_size}

    def accept(self, token_id: int) -> None:
        """Record a generated token."""
        self.num_generated += 1
        if self.tracks:
            self._counts[token_id] = self._counts.get(token_id, 0) + 1
            self._seen.add(token_id)

    def uniform(self) -> float:
        """The draw for the next token, in [0, 1): of seed and token number alone, so the same in any batch."""
        digest = hashlib.blake2b(struct.pack("<qq", self.seed, self.num_generated), digest_size=8).digest()
        return (int.from_bytes(digest, "little") >> 11) * 2.0**-53

    def penalised(self) -> list[tuple[int, int]]:
        """(token, times generated) of every token that a penalty touches."""
        if self.params.repetition_penalty != 1.0:
            return [(token, self._counts.get(token, 0)) for token in self._seen]
        return list(self._counts.items())


class Sampler:
    """Batched sampling on the device of the logits."""

    def sample(self, logits: torch.Tensor, states: Sequence[SamplerState]) -> list[Sampled]:
        """Choose one token per row.

        Args:
            logits: [N, V] of any float dtype; not changed.
            states: one per row; `SamplerState.accept` is the caller's.
        """
        raw = logits.float()
        scores = self._adjust(raw, states)
        chosen = scores.argmax(dim=-1)
        drawn = [row for row, state in enumerate(states) if not state.greedy]
        if drawn:
            index = torch.tensor(drawn, device=raw.device)
            chosen = chosen.index_copy(0, index, self._draw(scores[index], [states[row] for row in drawn]))
        # the maximum is NaN where anything is
        usable = scores.amax(dim=-1).isfinite().tolist()
        tokens = [token if good else -1 for token, good in zip(chosen.tolist(), usable, strict=True)]
        wanted = [row for row, state in enumerate(states) if state.params.logprobs]
        if not wanted:
            return [Sampled(token) for token in tokens]
        return self._with_logprobs(raw, tokens, states, wanted)

    def _adjust(self, raw: torch.Tensor, states: Sequence[SamplerState]) -> torch.Tensor:
        """Penalties, bias and suppression; a copy where anything changes."""
        scores = raw
        tracked = [(row, state) for row, state in enumerate(states) if state.tracks]
        if tracked:
            scores = self._penalise(scores.clone(), tracked)
        biased = [(row, token, value) for row, state in enumerate(states) for token, value in state.bias]
        if biased:
            rows, tokens, values = (list(part) for part in zip(*biased, strict=True))
            where = (torch.tensor(rows, device=raw.device), torch.tensor(tokens, device=raw.device))
            scores = scores.index_put(where, torch.tensor(values, device=raw.device), accumulate=True)
        banned = [
            (row, token)
            for row, state in enumerate(states)
            if state.suppressed and state.num_generated < state.params.min_tokens
            for token in state.suppressed
        ]
        if banned:
            rows, tokens = (list(part) for part in zip(*banned, strict=True))
            where = (torch.tensor(rows, device=raw.device), torch.tensor(tokens, device=raw.device))
            scores = scores.index_put(where, torch.tensor(-torch.inf, device=raw.device))
        return scores

    def _penalise(self, scores: torch.Tensor, tracked: Sequence[tuple[int, SamplerState]]) -> torch.Tensor:
        """Repetition penalty (Keskar et al. 2019), then OpenAI's presence and frequency penalties, in place."""
        rows: list[int] = []
        tokens: list[int] = []
        factors: list[float] = []
        subtract: list[float] = []
        for row, state in tracked:
            params = state.params
            for token, count in state.penalised():
                rows.append(row)
                tokens.append(token)
                factors.append(params.repetition_penalty)
                subtract.append(params.frequency_penalty * count + (params.presence_penalty if count else 0.0))
        if not rows:
            return scores
        device = scores.device
        where = (torch.tensor(rows, device=device), torch.tensor(tokens, device=device))
        factor = torch.tensor(factors, device=device)
        value = scores[where]
        value = torch.where(value < 0, value * factor, value / factor) - torch.tensor(subtract, device=device)
        return scores.index_put_(where, value)

    def _draw(self, scores: torch.Tensor, states: Sequence[SamplerState]) -> torch.Tensor:
        """Sample one token per row by inverting the cumulative distribution in vocabulary order."""
        device = scores.device

        def column(value: Callable[[SamplingParams], float]) -> torch.Tensor:
            return torch.tensor([value(state.params) for state in states], device=device)[:, None]

        probabilities = (scores / column(lambda p: p.temperature)).softmax(dim=-1)
        cut = [row for row, state in enumerate(states) if state.params.top_k > 1 or state.params.top_p < 1]
        if cut:
            index = torch.tensor(cut, device=device)
            kept = _top(probabilities[index], [states[row].params for row in cut])
            probabilities = probabilities.index_copy(0, index, kept)
        if any(state.params.min_p for state in states):
            floor = column(lambda p: p.min_p) * probabilities.amax(dim=-1, keepdim=True)
            probabilities = probabilities.masked_fill(probabilities < floor, 0.0)
        total = probabilities.cumsum(dim=-1, dtype=torch.float64)
        draws = torch.tensor([state.uniform() for state in states], dtype=torch.float64, device=device)
        # strictly beyond the draw, so a token without probability is never met
        found = torch.searchsorted(total, draws[:, None] * total[:, -1:], right=True)[:, 0]
        return found.clamp(max=scores.shape[-1] - 1)

    def _with_logprobs(
        self, raw: torch.Tensor, tokens: list[int], states: Sequence[SamplerState], wanted: list[int]
    ) -> list[Sampled]:
        logprobs = raw[torch.tensor(wanted, device=raw.device)].log_softmax(dim=-1)
        picked = torch.tensor([max(tokens[row], 0) for row in wanted], device=raw.device)
        own = logprobs.gather(1, picked[:, None])[:, 0].tolist()
        most = min(max(states[row].params.top_logprobs for row in wanted), raw.shape[-1])
        values, ids = (part.tolist() for part in logprobs.topk(most, dim=-1))
        out = [Sampled(token) for token in tokens]
        for k, row in enumerate(wanted):
            count = states[row].params.top_logprobs
            top = tuple(zip(ids[k][:count], values[k][:count], strict=True))
            out[row] = Sampled(tokens[row], own[k], top)
        return out


def _top(probabilities: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
    """Zero all but the top-k and nucleus (Holtzman et al. 2020) tokens of each row; the nucleus is of what k left."""
    device = probabilities.device
    size = probabilities.shape[-1]
    ordered, index = probabilities.sort(dim=-1, descending=True, stable=True)
    limit = torch.tensor([p.top_k if 0 < p.top_k < size else size for p in params], device=device)[:, None]
    ordered = ordered.masked_fill(torch.arange(size, device=device) >= limit, 0.0)
    share = torch.tensor([p.top_p for p in params], dtype=torch.float64, device=device)[:, None]
    total = ordered.cumsum(dim=-1, dtype=torch.float64)
    # a token stays while those before it fall short of the share; at 1 rounding must not cut anything
    before = total - ordered
    ordered = ordered.masked_fill((before >= share * total[:, -1:]) & (share < 1), 0.0)
    return torch.zeros_like(probabilities).scatter(1, index, ordered)
