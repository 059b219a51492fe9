"""What launches need to know of a device, asked once per process."""

from __future__ import annotations

from functools import cache

import torch


@cache
def _properties(index: int) -> tuple[tuple[int, int], int]:
    properties = torch.cuda.get_device_properties(index)
    return (properties.major, properties.minor), properties.multi_processor_count


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def capability(tensor: torch.Tensor) -> tuple[int, int]:
    """Compute capability of the tensor's GPU, (9, 0) on an H200; (0, 0) where kernels run in the interpreter."""
    return _properties(_index(tensor.device))[0] if tensor.is_cuda else (0, 0)


def num_sms(tensor: torch.Tensor) -> int:
    """Streaming multiprocessors of the tensor's GPU, 132 on an H200; 1 where kernels run in the interpreter."""
    return _properties(_index(tensor.device))[1] if tensor.is_cuda else 1


def pdl(tensor: torch.Tensor) -> bool:
    """Whether kernels on this tensor are launched with programmatic dependent launch (sm_90 and later).

    Such a kernel may start while the one before it in the stream still runs. Its part of the contract, with
    ``flag = pdl(x)``, is ``kernel[grid](..., PDL=flag, launch_pdl=flag)`` and in the kernel

        if PDL:
            tl.extra.cuda.gdc_wait()               # before the first read of what earlier kernels write, and before
                                                   # the first write: an earlier kernel may still read that memory
            tl.extra.cuda.gdc_launch_dependents()  # the next kernel may be put on free SMs; it waits there in turn

    Only memory that no kernel in flight writes (weights) may be read before the wait. Every program must reach
    ``gdc_wait``: a kernel that ends without it would let the next one pass its own wait too early.
    """
    return tensor.is_cuda and capability(tensor) >= (9, 0)


def next_power_of_2(n: int) -> int:
    """Smallest power of two that is at least ``n``, for ``n`` >= 1."""
    return 1 << (n - 1).bit_length()
