"""Mixture of experts: routing and grouped GEMM."""

from __future__ import annotations

import torch

from ..activation import KINDS
from .reference import experts_reference, route_reference

__all__ = ["experts", "experts_reference", "route", "route_reference"]

_SCORING = ("softmax", "sigmoid")


def route(
    logits: torch.Tensor,
    top_k: int,
    *,
    renormalise: bool,
    scoring: str,
    bias: torch.Tensor | None = None,
    groups: tuple[int, int] = (1, 1),
    scale: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which experts each token goes to, and with what weight.

    Softmax with ``renormalise`` is Qwen3-MoE's router, softmax with a bias ERNIE 4.5's, sigmoid with bias, groups and
    scale that of DeepSeek-V3 (2412.19437, section 2.1.2) and GLM-4.5. Of equal scores a GPU takes the first.

    Args:
        logits: [T, E]; softmax and sigmoid are in float32.
        top_k: experts of a token.
        renormalise: divide the weights by their sum over the token's experts.
        scoring: "softmax" or "sigmoid".
        bias: float32 [E], added to the scores to choose experts, not to their weights.
        groups: (n, m): of n groups of E / n experts, only those of the m groups whose two best scores have the
            largest sum can be chosen. (1, 1) is no restriction.
        scale: multiplies the weights last.

    Returns:
        weights float32 [T, top_k], experts int64 [T, top_k]. transformers' Qwen3 and ERNIE routers round the weights
        to the model's dtype; GLM's does not.

    Raises:
        ValueError: an unknown scoring, groups that do not divide E, more experts asked for than can be chosen.
    """
    count, keep = groups
    if scoring not in _SCORING:
        raise ValueError(f"scoring {scoring!r} is not one of {', '.join(_SCORING)}")
    if logits.shape[1] % count or not 1 <= keep <= count:
        raise ValueError(f"{keep} of {count} groups of {logits.shape[1]} experts are impossible")
    if not 1 <= top_k <= logits.shape[1] // count * keep:
        raise ValueError(f"{top_k} experts of {keep} of {count} groups of {logits.shape[1]} experts are impossible")
    if logits.is_cuda:
        from .launch import launch_route

        return launch_route(logits, top_k, renormalise, scoring, bias, groups, scale)
    return route_reference(
        logits, top_k, renormalise=renormalise, scoring=scoring, bias=bias, groups=groups, scale=scale
    )


def experts(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    weights: torch.Tensor,
    experts: torch.Tensor,
    *,
    activation: str,
    first_expert: int = 0,
) -> torch.Tensor:
    """Sum over a token's experts of ``weight * down(act(gate(x)) * up(x))``.

    On a GPU: no synchronisation with the host, grids from shapes alone (safe in CUDA graphs), no atomics: the same
    input gives the same bits.

    Args:
        x: [T, H]; float32, float16 or bfloat16.
        gate_up: [E, 2 F, H] of x's dtype, gates first.
        down: [E, H, F].
        weights: [T, k], any float dtype.
        experts: int64 [T, k].
        activation: "silu", "gelu_tanh" or "gelu".
        first_expert: the number of the first of the E experts here. Others contribute nothing: their part comes from
            another rank (expert parallel).

    Returns:
        [T, H].

    Raises:
        ValueError: shapes that do not fit, an unknown activation.
    """
    if activation not in KINDS:
        raise ValueError(f"activation {activation!r} is not one of {', '.join(KINDS)}")
    count, double, hidden = gate_up.shape
    if x.shape[1] != hidden or down.shape != (count, hidden, double // 2) or double % 2:
        raise ValueError(
            f"x {tuple(x.shape)}, gate_up {tuple(gate_up.shape)} and down {tuple(down.shape)} do not fit each other"
        )
    if weights.shape != experts.shape or len(experts) != len(x):
        raise ValueError(
            f"weights {tuple(weights.shape)} and experts {tuple(experts.shape)} do not fit {len(x)} tokens"
        )
    if x.is_cuda:
        from .launch import launch_experts

        return launch_experts(x, gate_up, down, weights, experts, activation, first_expert)
    return experts_reference(x, gate_up, down, weights, experts, activation=activation, first_expert=first_expert)
