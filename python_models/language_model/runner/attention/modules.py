"""Plugs the paged KV cache into transformers' decoder layers, under an attention name of our own.

The decoder computes queries, keys and values of all requests of a step in one flat batch [1, T]. The step's context
travels as a keyword argument through the decoder, so there is no global state.
"""

from __future__ import annotations

from typing import Any

import torch

from ....contract.errors import ErrorKind, TriptychError
from ..context import AttentionContext, How

ATTENTION = "triptych_paged"
"""Name in transformers' attention registry. It has no entry in the mask registry, so decoders build no masks."""


def paged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    context: AttentionContext | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """The function that transformers calls in every layer.

    Args:
        module: the attention layer; ``layer_idx`` names its pages.
        query: [1, H, T, D].
        key: [1, Hk, T, D], new tokens only.
        value: [1, Hk, T, Dv].
        attention_mask: always None.
        scaling, sliding_window, softcap, s_aux: see :class:`How`.
        context: the step, given to the decoder by the runner.

    Returns:
        [1, T, H, Dv] and no weights.
    """
    if context is None or attention_mask is not None:
        raise TriptychError(
            ErrorKind.UNSUPPORTED,
            f"{type(module).__name__} does not pass the step's context on to its attention function: its layers cannot "
            "run on the paged KV cache",
            "model",
            "language_model",
        )
    sinks = s_aux if s_aux is not None else getattr(module, "sinks", None)
    how = How(scaling, sliding_window, softcap, sinks, getattr(module, "latent", None))
    layer: Any = module.layer_idx
    cross = context.cross
    if cross is not None and layer in cross.layers:
        return cross.attend(module, query[0], scaling)[None], None
    return context.attend(layer, query[0], key[0], value[0], how)[None], None


def register() -> None:
    """Make :func:`paged_attention` known to transformers as `ATTENTION`."""
    # imported here: whoever made the decoder has prepared the process for this import
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(ATTENTION, paged_attention)
