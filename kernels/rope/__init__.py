"""Head norm, rotary embedding and the write into the KV cache, in one pass."""

from __future__ import annotations

import torch

from .reference import rope_table_reference, rotate_and_store_reference, store_reference

__all__ = [
    "rope_table",
    "rope_table_reference",
    "rotate_and_store",
    "rotate_and_store_reference",
    "store",
    "store_reference",
]


def rope_table(
    position_ids: torch.Tensor, inv_freq: torch.Tensor, axis: torch.Tensor, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Angles of rotary embedding (Su et al. 2021) with one or several position axes (mrope, Wang et al. 2024).

    Args:
        position_ids: int64 [axes, T].
        inv_freq: float32 [R], radians per position; R is half the rotated width.
        axis: int64 [R], the axis of positions that each frequency follows.
        scaling: factor on both results (YaRN, longrope); 1 for most.

    Returns:
        cos, sin: float32 [T, R].
    """
    if position_ids.is_cuda:
        from .launch import launch_table

        return launch_table(position_ids, inv_freq, axis, scaling)
    return rope_table_reference(position_ids, inv_freq, axis, scaling)


def rotate_and_store(
    qkv: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    key_pages: torch.Tensor,
    value_pages: torch.Tensor,
    slots: torch.Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    interleaved: bool = False,
    query_norm: torch.Tensor | None = None,
    key_norm: torch.Tensor | None = None,
    eps: float = 1e-6,
    norm_offset: float = 0.0,
    key_scale: float = 1.0,
    value_scale: float = 1.0,
) -> torch.Tensor:
    """Norm and rotate queries and keys, write keys and values into their pages, return the queries.

    Args:
        qkv: [T, (H + 2 Hk) * D], heads of queries, keys, values in this order; float32, float16 or bfloat16; elements
            of a row next to each other.
        cos, sin: float32 [T, R], 2 R at most D: the first 2 R elements of a head are rotated. None rotates nothing.
        key_pages, value_pages: [N, Hk, S, D] of qkv's dtype or float8_e4m3fn.
        slots: int64 [T], block * S + offset of each token; -1 stores nothing.
        interleaved: pairs are (2 i, 2 i + 1) instead of (i, i + R).
        query_norm, key_norm: [D], weights of an RMS norm over each head before the rotation; both or neither.
        eps, norm_offset: of that norm, as in :func:`triptych.kernels.norm.rms_norm`.
        key_scale, value_scale: for float8 pages: what is stored is value / scale, clamped to +-448.

    Returns:
        Queries [T, H, D], contiguous.
    """
    if qkv.is_cuda:
        from .launch import launch_rotate as run
    else:
        run = rotate_and_store_reference
    return run(
        qkv,
        cos,
        sin,
        key_pages,
        value_pages,
        slots,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        interleaved=interleaved,
        query_norm=query_norm,
        key_norm=key_norm,
        eps=eps,
        norm_offset=norm_offset,
        key_scale=key_scale,
        value_scale=value_scale,
    )


def store(
    key: torch.Tensor,
    value: torch.Tensor,
    key_pages: torch.Tensor,
    value_pages: torch.Tensor,
    slots: torch.Tensor,
    *,
    key_scale: float = 1.0,
    value_scale: float = 1.0,
) -> None:
    """Write keys and values that are rotated already.

    Args:
        key, value: [T, Hk, D] and [T, Hk, Dv]; any strides over tokens and heads.
        key_pages, value_pages: [N, Hk, S, D] and [N, Hk, S, Dv].
        slots, key_scale, value_scale: as in :func:`rotate_and_store`.
    """
    if key.is_cuda:
        from .launch import launch_store

        launch_store(key, value, key_pages, value_pages, slots, key_scale=key_scale, value_scale=value_scale)
    else:
        store_reference(key, value, key_pages, value_pages, slots, key_scale=key_scale, value_scale=value_scale)
