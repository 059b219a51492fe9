"""Multi-head latent attention (MLA, DeepSeek-V2, arXiv:2405.04434): what is kept of a token is one compressed vector.

Layers of transformers keep a latent, of which they make keys and values of all heads, and a rotated key that the heads
share. Pages hold the two side by side, as one key of one head; its beginning, the latent, is the value too.

A head's score is ``q . (U k)`` for a latent ``k``, which is ``(U^T q) . k``: single tokens take their queries to the
latents, so nothing is made of a whole context at every step (weight absorption, section 2.1.2 of the paper). Longer
slices make keys and values as transformers does, which is less work for them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class Latent:
    """How a layer makes keys and values of its latents.

    Shapes: H heads of keys D = nope + rope wide and values Dv wide; latents of rank R.
    """

    def __init__(self, module: nn.Module) -> None:
        """Args: an attention layer of transformers that has a method ``expand_kv``."""
        layer: Any = module
        self._module = layer
        # of the class: the layer may have been given to another executor before
        self._expand: Callable[..., tuple[torch.Tensor, torch.Tensor]] = type(layer).expand_kv.__get__(layer)
        self.rank = int(layer.kv_lora_rank)
        self.value_width = int(layer.v_head_dim)
        self._nope = int(layer.qk_nope_head_dim)
        self._weight: torch.Tensor | None = None

    def expand(self, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, n, R + rope] -> keys [B, H, n, D] and values [B, H, n, Dv]."""
        return self._expand(latents[:, None, :, : self.rank], latents[:, None, :, self.rank :])

    def absorb(self, query: torch.Tensor) -> torch.Tensor:
        """Queries [n, H, D] -> [n, H, R + rope], for keys as they are kept."""
        nope = query[..., : self._nope].transpose(0, 1) @ self._up[:, : self._nope]
        return torch.cat([nope.transpose(0, 1), query[..., self._nope :]], dim=-1)

    def project(self, attended: torch.Tensor) -> torch.Tensor:
        """What attention over latents gives, [n, H, R] -> [n, H, Dv]."""
        values = attended.transpose(0, 1) @ self._up[:, self._nope :].transpose(1, 2)
        return values.transpose(0, 1)

    @property
    def _up(self) -> torch.Tensor:
        """[H, nope + Dv, R]."""
        if self._weight is None:
            linear = self._module.kv_b_proj
            if type(linear) is nn.Linear:
                weight = linear.weight
            else:
                # quantised ones have no such matrix
                example = next(self._module.kv_a_layernorm.parameters())
                weight = linear(torch.eye(self.rank, dtype=example.dtype, device=example.device)).T.contiguous()
            self._weight = weight.view(-1, self._nope + self.value_width, self.rank)
        return self._weight


def attach(model: nn.Module) -> None:
    """Have every layer with latents hand them to its attention function as they are kept.

    The attention function finds a :class:`Latent` as attribute ``latent`` of the layer. As keys and values it gets
    [1, 1, T, R + rope] and [1, 1, T, R].
    """
    for module in model.modules():
        if hasattr(type(module), "expand_kv"):
            module.latent = Latent(module)  # type: ignore[assignment]
            module.expand_kv = _keep  # type: ignore[assignment]


def _keep(latent: torch.Tensor, rotated: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.cat([latent, rotated], dim=-1), latent
