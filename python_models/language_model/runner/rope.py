"""Rotary frequencies that depend on the length of a request: LongRoPE (arXiv:2402.13753) and dynamic NTK scaling.

transformers picks them by the longest position of a batch, which here holds tokens of many requests.

LongRoPE has two sets: one up to the length the model was first trained with, the switch, one beyond. A token's set is
that of its request's prompt, or the long one where the token itself lies beyond the switch. What happens to keys that
are stored when an answer crosses the switch is up to each model of transformers: most go on with those they have, those
of the Phi line compute everything anew. Both are done here as there, see ``RopeSwitch.recompute``.

Dynamic scaling changes nothing up to ``max_position_embeddings``, and no request is longer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

_RECOMPUTING = frozenset({"phi3", "phi4_multimodal", "phimoe"})
"""Model types whose ``prepare_inputs_for_generation`` drops the KV cache at the switch.

That of phi4_multimodal does so in transformers 5.23 without going back to the first token, and so forgets what was
said; here it is computed anew like the others.
"""


@dataclass(frozen=True)
class RopeSwitch:
    """Where a decoder goes over to its long frequencies.

    Attributes:
        length: the longest request of the short ones.
        recompute: a request that grows beyond it is computed anew from its first token.
    """

    length: int
    recompute: bool

    @classmethod
    def of(cls, config: Any) -> RopeSwitch | None:
        """Of transformers' text config; None where the frequencies do not depend on the length."""
        rope: Mapping[str, Any] = getattr(config, "rope_parameters", None) or {}
        if rope.get("rope_type") != "longrope":
            return None
        return cls(int(rope["original_max_position_embeddings"]), config.model_type in _RECOMPUTING)


class RopeByRequest:
    """The ``forward`` of a rotary embedding of transformers with "longrope", for a batch of many requests."""

    def __init__(self, rotary: nn.Module, switch: RopeSwitch) -> None:
        """Put it in the place of the module's own."""
        # of the class: the module may have been given to another executor before
        self._forward = type(rotary).forward.__get__(rotary)
        self._switch = switch
        self._long = torch.zeros(0, dtype=torch.bool)
        rotary.forward = self

    def choose(self, position_ids: torch.Tensor, long: torch.Tensor) -> None:
        """For the next call.

        Args:
            position_ids: int64 [axes, T].
            long: int64 [T], 1 for tokens of requests that are computed with the long set.
        """
        self._long = (long > 0) | (position_ids >= self._switch.length).any(0)

    def __call__(self, x: torch.Tensor, position_ids: torch.Tensor, *args: Any, **options: Any) -> Any:
        """Cosine and sine [..., T, D], each token's of its own set."""
        # one more position at the end decides which set transformers takes
        last = torch.full_like(position_ids[..., :1], self._switch.length)
        beyond = torch.cat([position_ids, last], -1)
        within = torch.cat([position_ids.masked_fill(self._long, 0), torch.zeros_like(last)], -1)
        long = self._forward(x, beyond, *args, **options)
        short = self._forward(x, within, *args, **options)
        chosen = self._long[:, None]
        return tuple(torch.where(chosen, a[..., :-1, :], b[..., :-1, :]) for a, b in zip(long, short, strict=True))


def by_request(text_model: nn.Module, config: Any) -> RopeByRequest | None:
    """Make the decoder stack's rotary embedding ready for batches of many requests; what has to be told each step."""
    switch = RopeSwitch.of(config)
    return None if switch is None else RopeByRequest(text_model.get_submodule("rotary_emb"), switch)


def refusal(text_model: nn.Module, config: Any, num_axes: int) -> str | None:
    """What of the rotary embedding would give other tokens than transformers, or None."""
    rope: Mapping[str, Any] = getattr(config, "rope_parameters", None) or {}
    # one set of parameters for each type of layer, where they differ
    kinds = {str(part.get("rope_type")) for part in rope.values() if isinstance(part, dict)}
    if varying := kinds & {"dynamic", "longrope"}:
        return f"rope_type {', '.join(sorted(varying))} for one type of layers"
    kind = rope.get("rope_type")
    if kind in ("dynamic", "longrope") and getattr(text_model, "rotary_emb", None) is None:
        return f"rope_type {kind} elsewhere than in its stack"
    if kind == "dynamic" and num_axes > 1:
        return "rope_type dynamic with several axes of positions"
    return None
