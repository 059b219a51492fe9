"""How much memory a device has."""

from __future__ import annotations

import torch

CPU_BYTES = 2**30
"""Of main memory, for the KV cache on a CPU."""


def device_memory(device: str) -> tuple[int, int]:
    """(free, total) bytes; on a CPU `CPU_BYTES` are all there is to take."""
    if torch.device(device).type != "cuda":
        return CPU_BYTES, CPU_BYTES
    # what torch holds in reserve counts as free
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)
