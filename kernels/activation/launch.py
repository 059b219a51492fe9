"""Launch table of the gated activations."""

from __future__ import annotations

import torch

from .._launch import pdl
from .kernel import _gated_kernel

# most rows -> (elements of a program, warps). Few rows: many small programs, so that every SM has one
_TABLE = ((8, 256, 2), (64, 512, 2), (1 << 62, 1024, 4))


def launch(gate_up: torch.Tensor, kind: str) -> torch.Tensor:
    """See :func:`triptych.kernels.activation.gated`."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    if gate_up.stride(1) != 1:
        raise ValueError("elements of a row must lie next to each other")
    out = torch.empty((rows, width), dtype=gate_up.dtype, device=gate_up.device)
    if rows:
        _, block, warps = next(entry for entry in _TABLE if rows <= entry[0])
        flag = pdl(gate_up)
        _gated_kernel[(rows, -(-width // block))](
            gate_up,
            out,
            gate_up.stride(0),
            width,
            KIND=kind,
            BLOCK=block,
            PDL=flag,
            num_warps=warps,
            launch_pdl=flag,
        )
    return out
