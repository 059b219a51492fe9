"""Gated activations: SiLU(gate) * up and GELU(gate) * up."""

from __future__ import annotations

import torch

from .reference import gated_reference

__all__ = ["KINDS", "gated", "gated_reference"]

KINDS = ("silu", "gelu_tanh", "gelu")


def gated(gate_up: torch.Tensor, kind: str) -> torch.Tensor:
    """``act(gate) * up`` (Shazeer 2020), rounded to the dtype after each of the two, as transformers' modules round.

    Args:
        gate_up: [T, 2 F], gates first; float32, float16 or bfloat16; elements of a row next to each other.
        kind: "silu", "gelu_tanh" (its tanh form) or "gelu" (exact).

    Returns:
        [T, F], contiguous.

    Raises:
        ValueError: another kind, or an odd width.
    """
    if kind not in KINDS:
        raise ValueError(f"activation {kind!r} is not one of {', '.join(KINDS)}")
    if gate_up.shape[-1] % 2:
        raise ValueError(f"gate and up are equally wide, but together {gate_up.shape[-1]}")
    if gate_up.is_cuda:
        from .launch import launch

        return launch(gate_up, kind)
    return gated_reference(gate_up, kind)
