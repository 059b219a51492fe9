"""How many blocks the KV cache gets."""

from __future__ import annotations

import torch

from ..contract.errors import ErrorKind, TriptychError
from ..contract.settings import Settings

CPU_BYTES = 2**30
"""Of main memory, where ``kv_cache_tokens`` is not given."""


def kv_blocks(settings: Settings, bytes_per_token: int, context_length: int, device: str) -> int:
    """Blocks of ``settings.block_size`` tokens.

    ``kv_cache_tokens`` where given; else what memory allows (on a GPU ``mem_fraction_static`` of all of it, less what
    is in use already, weights among it; on a CPU `CPU_BYTES`), but never more than ``max_running_requests`` requests
    of full length can use.

    Raises:
        TriptychError: not one block fits, saying which option to change.
    """
    size = settings.block_size
    if settings.kv_cache_tokens:
        if settings.kv_cache_tokens < size:
            raise TriptychError(
                ErrorKind.INVALID_REQUEST,
                f"kv_cache_tokens {settings.kv_cache_tokens} is less than one block of {size} tokens",
                "settings.kv_cache_tokens",
            )
        return settings.kv_cache_tokens // size
    room = CPU_BYTES
    if torch.device(device).type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        room = int(total * settings.mem_fraction_static) - (total - free)
    useful = settings.max_running_requests * -(-context_length // size)
    blocks = min(useful, room // (bytes_per_token * size))
    if blocks < 1:
        raise TriptychError(
            ErrorKind.STAGE_FAILED,
            f"no memory is left for the KV cache on {device}: {max(room, 0) / 2**20:.0f} MiB of the share "
            f"mem_fraction_static {settings.mem_fraction_static:g}; raise it, or free memory on the device",
            "settings.mem_fraction_static",
            "language_model",
        )
    return blocks
