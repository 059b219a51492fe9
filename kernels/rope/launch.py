"""Launch table of the rotation and of the KV write."""

from __future__ import annotations

import torch

from .._launch import next_power_of_2, pdl
from .kernel import _rotate_kernel, _store_kernel, _table_kernel

# most tokens -> heads of a program. A warp of 32 handles a head or two; few tokens spread over more SMs
_HEADS = ((16, 2), (64, 4), (1 << 62, 8))


def _heads(tokens: int, heads: int) -> int:
    return min(next(count for most, count in _HEADS if tokens <= most), next_power_of_2(heads))


def _warps(block_heads: int, width: int) -> int:
    # 8 elements a thread
    return min(max(block_heads * next_power_of_2(width) // 256, 1), 8)


def launch_table(
    position_ids: torch.Tensor, inv_freq: torch.Tensor, axis: torch.Tensor, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`triptych.kernels.rope.rope_table`."""
    tokens, half = position_ids.shape[1], len(inv_freq)
    if position_ids.stride(1) != 1:
        position_ids = position_ids.contiguous()
    cos = torch.empty((tokens, half), dtype=torch.float32, device=position_ids.device)
    sin = torch.empty_like(cos)
    if tokens:
        flag = pdl(position_ids)
        _table_kernel[(-(-tokens // 4),)](
            position_ids,
            inv_freq,
            axis,
            cos,
            sin,
            position_ids.stride(0),
            tokens,
            half,
            float(scaling),
            BLOCK_T=4,
            BLOCK_R=next_power_of_2(half),
            INTERPRETED=not position_ids.is_cuda,
            PDL=flag,
            num_warps=4,
            launch_pdl=flag,
        )
    return cos, sin


def launch_rotate(
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
    """See :func:`triptych.kernels.rope.rotate_and_store`."""
    tokens, heads = qkv.shape[0], num_heads + 2 * num_kv_heads
    width = qkv.shape[1] // heads
    half = width // 2 if cos is None else cos.shape[1]
    if (
        key_pages.shape != value_pages.shape
        or key_pages.shape[1] != num_kv_heads
        or key_pages.shape[3] * heads != qkv.shape[1]
    ):
        raise ValueError(
            f"qkv {tuple(qkv.shape)} of {num_heads} and {num_kv_heads} heads does not fit pages "
            f"{tuple(key_pages.shape)} and {tuple(value_pages.shape)}"
        )
    if width % 2 or 2 * half > width:
        raise ValueError(f"cannot rotate {2 * half} of {width} elements of a head")
    if qkv.stride(1) != 1 or key_pages.stride(3) != 1 or value_pages.stride(3) != 1:
        raise ValueError("elements of a head must lie next to each other")
    if (query_norm is None) != (key_norm is None):
        raise ValueError("query_norm and key_norm come together")
    query = torch.empty((tokens, num_heads, width), dtype=qkv.dtype, device=qkv.device)
    if tokens:
        flag = pdl(qkv)
        block_heads = _heads(tokens, heads)
        _rotate_kernel[(tokens, -(-heads // block_heads))](
            qkv,
            cos,
            sin,
            query_norm,
            key_norm,
            slots,
            query,
            key_pages,
            value_pages,
            qkv.stride(0),
            0 if cos is None else cos.stride(0),
            *key_pages.stride()[:3],
            *value_pages.stride()[:3],
            key_pages.shape[2],
            eps,
            float(norm_offset),
            float(key_scale),
            float(value_scale),
            NUM_HEADS=num_heads,
            NUM_KV_HEADS=num_kv_heads,
            WIDTH=width,
            HALF=half,
            BLOCK_HALF=next_power_of_2(half),
            BLOCK_REST=next_power_of_2(max(width - 2 * half, 1)),
            BLOCK_HEADS=block_heads,
            INTERLEAVED=interleaved,
            GEMMA=norm_offset != 0,
            FP8=key_pages.dtype == torch.float8_e4m3fn,
            PDL=flag,
            num_warps=_warps(block_heads, width),
            launch_pdl=flag,
        )
    return query


def launch_store(
    key: torch.Tensor,
    value: torch.Tensor,
    key_pages: torch.Tensor,
    value_pages: torch.Tensor,
    slots: torch.Tensor,
    *,
    key_scale: float = 1.0,
    value_scale: float = 1.0,
) -> None:
    """See :func:`triptych.kernels.rope.store`."""
    tokens, heads, width = key.shape
    value_width = value.shape[2]
    if key_pages.shape[1::2] != (heads, width) or value_pages.shape[1::2] != (heads, value_width):
        raise ValueError(
            f"keys {tuple(key.shape)} and values {tuple(value.shape)} do not fit pages {tuple(key_pages.shape)} and "
            f"{tuple(value_pages.shape)}"
        )
    if any(tensor.stride(-1) != 1 for tensor in (key, value, key_pages, value_pages)):
        raise ValueError("elements of a head must lie next to each other")
    if not tokens:
        return
    flag = pdl(key)
    block_heads = _heads(tokens, heads)
    _store_kernel[(tokens, -(-heads // block_heads))](
        key,
        value,
        slots,
        key_pages,
        value_pages,
        *key.stride()[:2],
        *value.stride()[:2],
        *key_pages.stride()[:3],
        *value_pages.stride()[:3],
        key_pages.shape[2],
        float(key_scale),
        float(value_scale),
        NUM_KV_HEADS=heads,
        KEY_WIDTH=width,
        VALUE_WIDTH=value_width,
        BLOCK_KEY=next_power_of_2(width),
        BLOCK_VALUE=next_power_of_2(value_width),
        BLOCK_HEADS=block_heads,
        FP8=key_pages.dtype == torch.float8_e4m3fn,
        PDL=flag,
        num_warps=_warps(block_heads, max(width, value_width)),
        launch_pdl=flag,
    )
