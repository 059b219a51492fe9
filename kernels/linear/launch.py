"""Launches of the linear layers: which entry of the table, and how."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache

import torch

from .._launch import next_power_of_2, pdl
from ..activation import KINDS
from ..norm import rms_norm
from .kernel import _dot_kernel, _fma_kernel, _reduce_kernel
from .table import TABLE, Dot, Entry, Fma

# how many powers of two, of rows and of columns together, a shape may lie from the nearest in the table
_REACH = 5.0
_REDUCE_BLOCK = 256


@lru_cache(maxsize=1024)
def _major(device: torch.device) -> int:
    return torch.cuda.get_device_capability(device)[0]


@lru_cache(maxsize=4096)
def _nearest(rows: int, out_features: int, in_features: int, major: int) -> Entry | None:
    def distance(shape: tuple[int, int]) -> float:
        return abs(math.log2(shape[0] / out_features)) + abs(math.log2(shape[1] / in_features))

    shape = min(TABLE, key=distance)
    if distance(shape) > _REACH or in_features % 8:
        return None
    entry = next((entry for most, entry in TABLE[shape] if rows <= most), None)
    widest = next_power_of_2(in_features)
    if isinstance(entry, Fma) and entry.block_k > widest:
        # narrower weights: as many elements of a tile, none of them beside the weight
        return replace(entry, block_n=entry.block_n * (entry.block_k // widest), block_k=widest)
    # the ways with tensor cores are measured on sm_90 only
    return entry if major == 9 or isinstance(entry, Fma) else None


def select(rows: int, out_features: int, in_features: int, dtype: torch.dtype, device: torch.device) -> Entry | None:
    """The table's entry for x [rows, in_features] and a weight [out_features, in_features]; None: cuBLAS is faster."""
    if dtype.itemsize != 2 or not rows or not out_features:
        return None
    return _nearest(rows, out_features, in_features, _major(device))


def launch(
    x: torch.Tensor,
    weight: torch.Tensor,
    entry: Entry,
    *,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    norm: tuple[torch.Tensor, float, float] | None = None,
    gate: str | None = None,
) -> torch.Tensor:
    """See :func:`triptych.kernels.linear.linear`; ``entry`` says how."""
    rows, width = x.shape
    features = weight.shape[0]
    if gate is not None:
        if gate not in KINDS:
            raise ValueError(f"activation {gate!r} is not one of {', '.join(KINDS)}")
        if features % 2:
            raise ValueError(f"gate and up are equally wide, but together {features}")
    columns = features // 2 if gate is not None else features
    if weight.shape[1] != width or (bias is not None and bias.shape != (features,)):
        raise ValueError(
            f"x {tuple(x.shape)} and weight {tuple(weight.shape)} do not fit"
            + ("" if bias is None else f" bias {tuple(bias.shape)}")
        )
    if residual is not None and (residual.shape != (rows, columns) or residual.stride(1) != 1):
        raise ValueError(f"residual {tuple(residual.shape)} is not of the result's shape {(rows, columns)}")
    if x.stride(1) != 1 or weight.stride(1) != 1:
        raise ValueError("elements of a row must lie next to each other")
    if isinstance(entry, Fma):
        return _launch_fma(x, weight, entry, columns, bias, residual, norm, gate)
    if norm is not None:
        x, _ = rms_norm(x, norm[0], norm[1], offset=norm[2])
    return _launch_dot(x, weight, entry, columns, bias, residual, gate)


def _prefetch(weight: torch.Tensor, size: int) -> int:
    """Bytes of each row to prefetch: none where rows do not start at multiples of 16 bytes."""
    aligned = weight.stride(0) * weight.element_size() % 16 == 0 and weight.data_ptr() % 16 == 0
    return max(size, 0) // 16 * 16 if aligned else 0


def _launch_fma(
    x: torch.Tensor,
    weight: torch.Tensor,
    entry: Fma,
    columns: int,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    norm: tuple[torch.Tensor, float, float] | None,
    gate: str | None,
) -> torch.Tensor:
    rows, width = x.shape
    if rows > 4:
        raise ValueError(f"{rows} rows are too many: at most 4")
    out = torch.empty((rows, columns), dtype=x.dtype, device=x.device)
    flag = pdl(x)
    # the first block_k columns are loaded, not prefetched, except where a program goes on to other rows
    ahead = width - entry.block_k if width > entry.block_k else width
    norm_weight, eps, offset = norm if norm is not None else (None, 0.0, 0.0)
    _fma_kernel[(-(-columns // (entry.block_n * entry.groups)),)](
        x,
        weight,
        bias,
        residual,
        norm_weight,
        out,
        x.stride(0),
        weight.stride(0),
        0 if residual is None else residual.stride(0),
        rows,
        columns,
        float(eps),
        float(offset),
        entry.groups,
        _prefetch(weight, min(entry.prefetch, ahead * weight.element_size())),
        K=width,
        M=(1, 1, 2, 4, 4)[rows],
        BLOCK_N=entry.block_n,
        BLOCK_K=entry.block_k,
        GATE=gate or "",
        BIAS=bias is not None,
        NORM=norm is not None,
        GEMMA=offset != 0,
        PDL=flag,
        num_warps=entry.warps,
        launch_pdl=flag,
    )
    return out


def _launch_dot(
    x: torch.Tensor,
    weight: torch.Tensor,
    entry: Dot,
    columns: int,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    gate: str | None,
) -> torch.Tensor:
    rows, width = x.shape
    out = torch.empty((rows, columns), dtype=x.dtype, device=x.device)
    flag = pdl(x)
    # as many steps for each split; the last may have fewer
    span = -(-width // (entry.splits * entry.block_k)) * entry.block_k
    splits = -(-width // span)
    partial = None
    if splits > 1:
        partial = torch.empty((splits, rows, weight.shape[0]), dtype=torch.float32, device=x.device)
    block_m = next(block for block in (16, 32, 64, 128) if rows <= block or block == 128)
    shortest = width - (splits - 1) * span
    residual_row = 0 if residual is None else residual.stride(0)
    _dot_kernel[(-(-columns // entry.block_n), splits, -(-rows // block_m))](
        x,
        weight,
        bias,
        residual,
        out,
        partial,
        x.stride(0),
        weight.stride(0),
        residual_row,
        rows,
        columns,
        span,
        _prefetch(weight, min(entry.prefetch, shortest * weight.element_size())),
        K=width,
        BLOCK_M=block_m,
        BLOCK_N=entry.block_n,
        BLOCK_K=entry.block_k,
        GATE=gate or "",
        BIAS=bias is not None,
        UPCAST=not x.is_cuda,
        PDL=flag,
        num_warps=entry.warps,
        num_stages=entry.stages,
        launch_pdl=flag,
        # see below
        enable_fp_fusion=False,
    )
    if partial is not None:
        _reduce_kernel[(-(-columns // _REDUCE_BLOCK), rows)](
            partial,
            bias,
            residual,
            out,
            residual_row,
            rows,
            columns,
            splits,
            BLOCK=_REDUCE_BLOCK,
            GATE=gate or "",
            BIAS=bias is not None,
            PDL=flag,
            num_warps=2,
            launch_pdl=flag,
            # product and sum of the last step are bfloat16 to the compiler, and one instruction with one rounding
            enable_fp_fusion=False,
        )
    return out
