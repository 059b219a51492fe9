"""How a decoder layer reaches the paged KV cache of a step, whatever the attention backend."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from .latent import Latent

if TYPE_CHECKING:
    from .cross import CrossStep


@dataclass(frozen=True)
class How:
    """A layer's own manner of attending.

    Attributes:
        scaling: factor on query . key; None is 1 / sqrt(D).
        window: a token sees itself and the window - 1 tokens before it; None sees all.
        softcap: scores are squashed to (-softcap, softcap) by tanh (Gemma 2).
        sinks: [H], a score per head that takes probability and gives nothing (gpt-oss).
        latent: keys and values are made of what is kept, see :mod:`.latent`.
    """

    scaling: float | None = None
    window: int | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None
    latent: Latent | None = None


@dataclass(frozen=True)
class Rope:
    """Rotary embedding of a step for the layers that share it.

    Attributes:
        cos, sin: float32 [T, R], R = half the rotated width, mrope axes and the family's scaling applied.
        interleaved: pairs are (2i, 2i + 1) (GLM) instead of (i, i + R).
    """

    cos: torch.Tensor
    sin: torch.Tensor
    interleaved: bool = False


@dataclass(frozen=True)
class HeadNorm:
    """RMS norm over each head of queries and keys, before the rotation (Qwen3, Gemma 3).

    Attributes:
        query, key: [D] weights.
        eps: added to the mean square.
        offset: added to the weights (1 for Gemma).
    """

    query: torch.Tensor
    key: torch.Tensor
    eps: float
    offset: float = 0.0


class AttentionContext(Protocol):
    """The KV cache and the requests of one step, as a layer sees them.

    What recurrent layers see of it is its attribute ``states``, a :class:`~.recurrent.StateContext`.
    """

    @property
    def cross(self) -> CrossStep | None:
        """What cross-attention layers see of it; None where no request has media that they read."""

    def attend(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, how: How) -> torch.Tensor:
        """transformers' layers: store, then attend.

        query [H, T, D], new key [Hk, T, D] and value [Hk, T, Dv], all rotated -> [T, H, Dv]. With ``how.latent`` keys
        are [1, T, R + rope] and their first R columns are the values.
        """

    def rotate_and_store(
        self, layer: int, qkv: torch.Tensor, heads: tuple[int, int], rope: Rope | None, norm: HeadNorm | None
    ) -> torch.Tensor:
        """Fused layers: norm and rotate queries and keys, store keys and values.

        qkv [T, (H + 2 Hk) * D], not rotated; heads = (H, Hk) -> queries [T, H, D].
        """

    def attend_stored(self, layer: int, query: torch.Tensor, how: How) -> torch.Tensor:
        """Fused layers: query [T, H, D], rotated, over what is stored, this step's tokens included -> [T, H, Dv]."""
