"""Choice of the next token."""

from __future__ import annotations

import torch

from .reference import GREEDY_BELOW, draw_reference, greedy_reference

__all__ = ["GREEDY_BELOW", "draw", "draw_reference", "greedy", "greedy_reference"]


def greedy(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The most likely token of each row.

    Args:
        logits: [N, V], float32, float16 or bfloat16; elements of a row next to each other.

    Returns:
        tokens: int64 [N], the lowest of equally likely ones; some token of the vocabulary where the row is not usable.
        usable: bool [N], false where the row holds NaN or +inf, or nothing but -inf.
    """
    if logits.is_cuda:
        from .launch import launch_greedy

        return launch_greedy(logits)
    return greedy_reference(logits)


def draw(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    uniform: torch.Tensor,
) -> torch.Tensor:
    """Draw a token of each row by inverting the cumulative distribution in vocabulary order.

    The distribution is softmax(logits / temperature), cut by top-k, then to the nucleus of what that left, then to what
    has at least min_p times the probability of the most likely token. Of equally likely tokens at an edge those of
    lower id stay, as in a stable sort. The token does not depend on the rows around it.

    Args:
        logits: [N, V], float32, float16 or bfloat16; elements of a row next to each other.
        temperature: float32 [N]; below GREEDY_BELOW the row is greedy.
        top_k: int32 [N]; 0 or less, or V or more, keeps all; 1 is greedy.
        top_p: [N], share of the probability to keep; 1 keeps all.
        min_p: float32 [N]; 0 keeps all.
        uniform: float64 [N], in [0, 1).

    Returns:
        tokens: int64 [N]; what :func:`greedy` gives where the row is not usable.
    """
    if logits.is_cuda:
        from .launch import launch_draw

        return launch_draw(logits, temperature, top_k, top_p, min_p, uniform)
    return draw_reference(logits, temperature, top_k, top_p, min_p, uniform)
