"""Linear layers of few rows: memory-bound, fused with what surrounds them."""

from __future__ import annotations

import torch

from .reference import linear_reference

__all__ = ["fits", "linear", "linear_reference"]


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    norm: tuple[torch.Tensor, float, float] | None = None,
    gate: str | None = None,
) -> torch.Tensor:
    """``residual + act(gate) * up`` or ``residual + y`` with ``y = norm(x) @ weight^T + bias``.

    Where the launch table says so (few rows, sm_90) one kernel does all of it, else each part is an op of its own.
    Intermediate results are rounded to x's dtype in the same places either way. No atomics: the same input gives the
    same bits, whatever the other rows are; another number of rows may sum in another order.

    Args:
        x: [M, K], elements of a row next to each other; float32, float16 or bfloat16.
        weight: [N, K] of x's dtype, contiguous rows; with a gate its rows first, then as many of the up projection.
        bias: [N].
        residual: of the result's shape and dtype.
        norm: (weight [K], eps, offset) of an RMS norm of x, as :func:`triptych.kernels.norm.rms_norm`.
        gate: "silu", "gelu_tanh" or "gelu" (:func:`triptych.kernels.activation.gated`).

    Returns:
        [M, N], with a gate [M, N / 2]; contiguous.

    Raises:
        ValueError: shapes that do not fit, an unknown activation.
    """
    if x.is_cuda:
        from .launch import launch, select

        entry = select(x.shape[0], weight.shape[0], weight.shape[1], x.dtype, x.device)
        if entry is not None:
            return launch(x, weight, entry, bias=bias, residual=residual, norm=norm, gate=gate)
    return linear_reference(x, weight, bias=bias, residual=residual, norm=norm, gate=gate)


def fits(rows: int, out_features: int, in_features: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether :func:`linear` runs as one kernel of its own (or one and a small reduction) instead of cuBLAS.

    Args:
        rows: M, rows of x.
        out_features: N, rows of the weight (gate and up together).
        in_features: K.
        dtype: of x and the weight.
        device: of x and the weight.
    """
    if device.type != "cuda":
        return False
    from .launch import select

    return select(rows, out_features, in_features, dtype, device) is not None
