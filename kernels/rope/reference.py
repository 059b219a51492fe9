"""Head norm, rotation and KV write in plain torch: what runs on a CPU."""

from __future__ import annotations

import torch

# largest finite float8_e4m3fn
FP8_MAX = 448.0


def rope_table_reference(
    position_ids: torch.Tensor, inv_freq: torch.Tensor, axis: torch.Tensor, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`triptych.kernels.rope.rope_table`."""
    if len(position_ids) == 1:
        angles = position_ids[0, :, None].float() * inv_freq
    else:
        angles = position_ids.T[:, axis].float() * inv_freq
    return angles.cos() * scaling, angles.sin() * scaling


def rotate_and_store_reference(
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
    heads = qkv.view(len(qkv), num_heads + 2 * num_kv_heads, key_pages.shape[-1])
    # queries and keys take the same way
    both, value = heads[:, : num_heads + num_kv_heads], heads[:, num_heads + num_kv_heads :]
    if query_norm is not None:
        assert key_norm is not None
        both = _head_norm(both, query_norm, key_norm, num_heads, eps, norm_offset)
    if cos is not None:
        assert sin is not None
        both = _rotate(both, cos[:, None], sin[:, None], interleaved)
    store_reference(
        both[:, num_heads:], value, key_pages, value_pages, slots, key_scale=key_scale, value_scale=value_scale
    )
    query: torch.Tensor = both[:, :num_heads].contiguous()
    return query


def _head_norm(
    x: torch.Tensor, query: torch.Tensor, key: torch.Tensor, num_heads: int, eps: float, offset: float
) -> torch.Tensor:
    """RMS norm of each head of x [T, H + Hk, D]."""
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    weight = torch.cat([query.expand(num_heads, -1), key.expand(x.shape[1] - num_heads, -1)])
    if offset:
        return (normed * (offset + weight.float())).to(x.dtype)
    return (weight * normed.to(x.dtype)).to(x.dtype)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """Rotate the first 2 R elements of every head of x [T, heads, D] in float32; cos and sin [T, 1, R]."""
    half = cos.shape[-1]
    wide = x.float()
    rotated = wide[..., : 2 * half]
    if interleaved:
        first, second = rotated[..., ::2], rotated[..., 1::2]
    else:
        first, second = rotated[..., :half], rotated[..., half:]
    a, b = first * cos - second * sin, second * cos + first * sin
    parts = [torch.stack([a, b], dim=-1).flatten(-2)] if interleaved else [a, b]
    if 2 * half < x.shape[-1]:
        parts.append(wide[..., 2 * half :])
    return torch.cat(parts, dim=-1).to(x.dtype)


def store_reference(
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
    used = slots >= 0
    if not used.all():
        key, value, slots = key[used], value[used], slots[used]
    size = key_pages.shape[2]
    block, offset = slots // size, slots % size
    for rows, pages, scale in ((key, key_pages, key_scale), (value, value_pages, value_scale)):
        if pages.dtype == torch.float8_e4m3fn:
            # indexed writes know no float8
            rows = (rows.float() / scale).clamp(-FP8_MAX, FP8_MAX).to(pages.dtype).view(torch.uint8)
            pages = pages.view(torch.uint8)
        pages.transpose(1, 2)[block, offset] = rows
