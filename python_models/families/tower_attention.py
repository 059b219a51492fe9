"""Attention of vision and audio towers in one call for all windows, pictures and sounds of a batch.

Towers of transformers that pack sequences call attention once with sequence bounds where the implementation's name
says "flash", and once for every window otherwise: hundreds of launches a layer for a large picture.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

import torch

from ...kernels.packed_attention import packed_attention
from ..contract.errors import ErrorKind, TriptychError

_NAME = "triptych_flash_packed"


def choose_attention(
    towers: Sequence[Any], name: str, backend: str, device: str, dtype: torch.dtype, *, packs: bool
) -> None:
    """Have the towers of an encoder attend as ``--mm-attention-backend`` says.

    Args:
        towers: its modules; one that does not attend stays as it is.
        name: of the family.
        backend: the option.
        device, dtype: of the tower.
        packs: the family's towers can attend in one call for all sequences.

    Raises:
        TriptychError: UNSUPPORTED where this cannot be.
    """
    on_gpu = torch.device(device).type == "cuda"
    if backend == "triton" and not packs:
        raise _refuse(backend, f"the encoders of {name} do not pack their sequences; use auto or sdpa")
    if backend == "triton" or (backend == "auto" and packs and on_gpu):
        for tower in towers:
            use_packed_attention(tower)
    elif backend == "flash_attn":
        if not on_gpu or dtype == torch.float32:
            raise _refuse(backend, "it needs a GPU and dtype bfloat16 or float16")
        if importlib.util.find_spec("flash_attn") is None:
            raise _refuse(backend, "it needs the package flash_attn, which is not installed")
        from transformers.modeling_utils import PreTrainedModel

        attend = [tower for tower in towers if isinstance(tower, PreTrainedModel)]
        if not attend:
            raise _refuse(backend, f"the encoders of {name} have an attention of their own")
        for tower in attend:
            try:
                tower.set_attn_implementation("flash_attention_2")
            except (ValueError, ImportError) as error:
                raise _refuse(backend, str(error)) from None


def _refuse(backend: str, why: str) -> TriptychError:
    message = f"mm_attention_backend {backend} is not possible: {why}"
    return TriptychError(ErrorKind.UNSUPPORTED, message, "settings.mm_attention_backend")


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
