"""Attention of vision and audio towers in one call for all windows, pictures and sounds of a batch.

Towers of transformers that pack sequences call attention once with sequence bounds where the implementation's name
says "flash", and once for every window otherwise: hundreds of launches a layer for a large picture.
"""

from __future__ import annotations

from typing import Any

import torch

from ...kernels.packed_attention import packed_attention

_NAME = "triptych_flash_packed"


def use_packed_attention(tower: Any) -> None:
    """Have a tower attend through :func:`packed_attention`.

    Args:
        tower: a model of transformers whose attention takes ``cu_seq_lens_q`` and ``max_length_q``; other modules,
            such as projectors, do not attend and stay as they are.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel

    if not isinstance(tower, PreTrainedModel):
        return
    ALL_ATTENTION_FUNCTIONS.register(_NAME, _attend)
    # set_attn_implementation would look for a package of that name
    tower.config._attn_implementation = _NAME


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    scaling: float | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """query, key, value [1, H, T, D] -> [1, T, H, D]."""
    if cu_seq_lens_q is None or max_length_q is None or attention_mask is not None:
        raise RuntimeError(f"{type(module).__name__} gave its attention no sequence bounds")
    parts = [part[0].transpose(0, 1) for part in (query, key, value)]
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    starts = cu_seq_lens_q.to(torch.int32)
    return packed_attention(parts[0], parts[1], parts[2], starts, int(max_length_q), scale)[None], None
