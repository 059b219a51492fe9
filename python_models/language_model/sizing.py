"""How many blocks the KV cache gets."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..contract.errors import ErrorKind, TriptychError
from ..contract.settings import Settings
from .runner.memory import device_memory
from .runner.step import KVGroup

_PREFIX_SHARE = 1.5
"""Blocks of a window group over what running requests can use: the rest keeps the ends of finished prompts."""


def state_slots(settings: Settings) -> tuple[int, int]:
    """For a decoder with recurrent layers: requests that run together, and prefixes whose state is saved."""
    slots = min(settings.max_running_requests, settings.max_mamba_cache_size or settings.max_running_requests)
    return slots, max(slots // 2, 2) if settings.prefix_cache else 0


def kv_blocks(
    settings: Settings,
    groups: Sequence[KVGroup],
    bytes_per_token: Sequence[int],
    context_length: int,
    device: str,
    memory: tuple[int, int] | None = None,
) -> tuple[int, ...]:
    """Blocks of ``settings.block_size`` tokens for each group of layers.

    A group without a window gets ``kv_cache_tokens`` where given; else what memory allows (on a GPU
    ``mem_fraction_static`` of all of it, less what is in use already, weights among it; on a CPU
    `runner.memory.CPU_BYTES`), but never more than ``max_running_requests`` requests of full length can use. A group
    with a window gets what its running requests can see and one step can add, and some more for the prefix cache;
    never more than the others.

    Args:
        settings: of the deployment.
        groups: of the decoder's layers.
        bytes_per_token: that one token takes in each group.
        context_length: tokens of the longest request.
        device: that holds the cache.
        memory: (free, total) bytes, where other devices share the layers: of the one with the least; None asks
            ``device``.

    Raises:
        TriptychError: not one block fits, saying which option to change.
    """
    size = settings.block_size
    useful = settings.max_running_requests * -(-context_length // size)
    wanted = [
        useful if g.window is None else min(useful, _window_blocks(settings, g.window, context_length)) for g in groups
    ]
    if settings.kv_cache_tokens:
        if settings.kv_cache_tokens < size:
            raise TriptychError(
                ErrorKind.INVALID_REQUEST,
                f"kv_cache_tokens {settings.kv_cache_tokens} is less than one block of {size} tokens",
                "settings.kv_cache_tokens",
            )
        most = settings.kv_cache_tokens // size
        return tuple(most if g.window is None else min(most, want) for g, want in zip(groups, wanted, strict=True))
    free, total = memory or device_memory(device)
    share = settings.mem_fraction_static if torch.device(device).type == "cuda" else 1
    room = int(total * share) - (total - free)
    # equal numbers of blocks fit in any case; what windows do not need of that goes to the others
    equal = room // (sum(bytes_per_token) * size)
    if equal < 1:
        raise TriptychError(
            ErrorKind.STAGE_FAILED,
            f"no memory is left for the KV cache on {device}: {max(room, 0) / 2**20:.0f} MiB of the share "
            f"mem_fraction_static {settings.mem_fraction_static:g}; raise it, or free memory on the device",
            "settings.mem_fraction_static",
            "language_model",
        )
    windowed = sum(
        min(want, equal) * size * width
        for group, want, width in zip(groups, wanted, bytes_per_token, strict=True)
        if group.window is not None
    )
    full_width = sum(width for group, width in zip(groups, bytes_per_token, strict=True) if group.window is None)
    rest = (room - windowed) // (full_width * size) if full_width else 0
    return tuple(min(want, rest if g.window is None else equal) for g, want in zip(groups, wanted, strict=True))


def _window_blocks(settings: Settings, window: int, context_length: int) -> int:
    """Blocks that all running requests can use at once in layers with this window."""
    size = settings.block_size
    step = settings.chunked_prefill_size or context_length
    # a window may begin and end inside a block, and so may each request's part of a step
    each = -(-window // size) + 2
    return int(_PREFIX_SHARE * (settings.max_running_requests * each + -(-step // size)))
