"""Gated activations in plain torch: what runs on a CPU."""

from __future__ import annotations

import torch
from torch.nn import functional


def gated_reference(gate_up: torch.Tensor, kind: str) -> torch.Tensor:
    """See :func:`triptych.kernels.activation.gated`; any shape [..., 2 F]."""
    gate, up = gate_up.chunk(2, dim=-1)
    if kind == "silu":
        return functional.silu(gate) * up
    return functional.gelu(gate, approximate="tanh" if kind == "gelu_tanh" else "none") * up
