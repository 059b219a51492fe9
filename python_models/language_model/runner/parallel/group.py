"""The collectives of a group of ranks: NCCL on GPUs, gloo on CPUs, peer-to-peer sums for small tensors.

Every rank makes the same calls in the same order. The calls are counted, so that ranks whose step failed can find
out whether they failed at the same place.
"""

from __future__ import annotations

import logging
import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ....contract.errors import ErrorKind, TriptychError

logger = logging.getLogger(__name__)

ONE_SHOT_BYTES = 2**20
"""Tensors up to this size are summed by one kernel that reads all peers; larger ones go through NCCL."""
_ALIGNMENT = 16
_JOIN_S = 600
# renamed in torch 2.13
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
# NVLink multicast stays off: it needs rights on the fabric that not every machine gives.
_ENVIRONMENT = {
    "NCCL_NVLS_ENABLE": "0",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    # a dead rank is found by our own watch; NCCL's would query events while graphs are captured
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
    "TORCH_NCCL_ENABLE_MONITORING": "0",
}


class Group:
    """:class:`~..fused.shard.Collectives` over torch.distributed's default group, which this process must not use
    otherwise.

    Attributes:
        num_calls: collectives begun so far.
        how: what sums small tensors, for logs: "nccl", "symmetric memory" or "gloo".
    """

    def __init__(
        self, rank: int, size: int, device: str, store: Path, *, one_shot: bool = True, dtype: torch.dtype
    ) -> None:
        """Meet the other ranks.

        Args:
            rank: of this process.
            size: of the group.
            device: of this rank.
            store: a file that all ranks reach and that no other group uses.
            one_shot: sum small tensors through symmetric memory where the GPUs can do that.
            dtype: of what is summed that way.

        Raises:
            TriptychError: STAGE_FAILED, with the cause.
        """
        self.rank, self.size = rank, size
        self.num_calls = 0
        self._device = torch.device(device)
        self._buffer: torch.Tensor | None = None
        self._aborted = False
        refuse_second_group()
        on_gpu = self._device.type == "cuda"
        os.environ.update(_ENVIRONMENT)
        if on_gpu:
            torch.cuda.set_device(self._device)
        else:
            # gloo would look up the host's name, which need not have an address
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        try:
            dist.init_process_group(
                "nccl" if on_gpu else "gloo",
                store=torch._C._distributed_c10d.FileStore(str(store), size),
                rank=rank,
                world_size=size,
                timeout=timedelta(seconds=_JOIN_S),
                # the communicator is made now, not in the middle of a capture
                device_id=self._device if on_gpu else None,
            )
            # the first collective sets up connections
            self._sum(torch.ones(1, device=self._device))
        except (RuntimeError, ValueError) as error:
            raise TriptychError(ErrorKind.STAGE_FAILED, f"rank {rank} cannot join the others: {error}") from error
        self.how = "nccl" if on_gpu else "gloo"
        if on_gpu and one_shot:
            self._try_one_shot(dtype)
        if rank == 0:
            logger.info("%d ranks joined; small tensors are summed by %s", size, self.how)

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """See :class:`~..fused.shard.Collectives`."""
        self.num_calls += 1
        if self._buffer is not None and self._fits(tensor, self._buffer):
            return self._one_shot(tensor, self._buffer)
        return self._sum(tensor)

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """See :class:`~..fused.shard.Collectives`."""
        self.num_calls += 1
        # gloo wants the parts one after the other along the first dimension
        out = tensor.new_empty(self.size * tensor.shape[0], *tensor.shape[1:])
        _all_gather(out, tensor.contiguous())
        return out.view(self.size, *tensor.shape).movedim(0, -2).reshape(*tensor.shape[:-1], -1)

    def broadcast(self, tensor: torch.Tensor) -> None:
        """Give rank 0's tensor to all, in place."""
        self.num_calls += 1
        dist.broadcast(tensor, 0)

    def abort(self) -> None:
        """Let go of collectives that wait for a rank that is gone; from any thread."""
        if self._device.type == "cuda" and not self._aborted and dist.is_initialized():
            self._aborted = True
            abort: Any = dist.distributed_c10d._abort_process_group
            abort()

    def close(self) -> None:
        """Leave the group; captured graphs must be gone."""
        self._buffer = None
        if self._device.type == "cuda":
            # destroying a communicator that was captured waits for ever for the other ranks
            self.abort()
        elif dist.is_initialized():
            dist.destroy_process_group()

    @staticmethod
    def _sum(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.contiguous()
        dist.all_reduce(tensor)
        return tensor

    @staticmethod
    def _fits(tensor: torch.Tensor, buffer: torch.Tensor) -> bool:
        count = tensor.numel()
        return (
            tensor.dtype == buffer.dtype
            and 0 < count <= buffer.numel()
            and count * tensor.element_size() % _ALIGNMENT == 0
        )

    @staticmethod
    def _one_shot(tensor: torch.Tensor, buffer: torch.Tensor) -> torch.Tensor:
        name = dist.group.WORLD.group_name  # type: ignore[union-attr]
        # the kernel of the sum before this one ended only after all peers had read the buffer
        part = buffer[: tensor.numel()]
        out: torch.Tensor = torch.ops.symm_mem.one_shot_all_reduce_copy(part, tensor.reshape(-1), "sum", name)
        return out.view(tensor.shape)

    def _try_one_shot(self, dtype: torch.dtype) -> None:
        """Set up symmetric memory if it works on every rank, or do without it on every rank."""
        buffer, cause = None, ""
        try:
            buffer = self._symmetric(dtype)
        except (RuntimeError, ImportError, AttributeError) as error:
            cause = f"{type(error).__name__}: {error}".splitlines()[0]
        if buffer is not None and self._agreed(True):
            if self._agreed(self._proven(buffer)):
                self._buffer, self.how = buffer, "symmetric memory"
                return
            cause = "the sums are wrong"
        elif buffer is None:
            self._agreed(False)
        logger.info("rank %d: no symmetric memory (%s)", self.rank, cause or "another rank has none")

    def _proven(self, buffer: torch.Tensor) -> bool:
        """Whether sums through the buffer, one right after the other, are those of NCCL."""
        right = True
        try:
            for number, count in enumerate((8, 3584, buffer.numel()) * 4):
                places = torch.arange(count, device=self._device)
                # small whole numbers: exact in every dtype
                sample = (places % 8 + self.rank + number).to(buffer.dtype)
                right &= bool(torch.equal(self._one_shot(sample, buffer), self._sum(sample.clone())))
        except RuntimeError as error:
            logger.info("rank %d: %s", self.rank, error)
            right = False
        return right

    def _symmetric(self, dtype: torch.dtype) -> torch.Tensor:
        import torch.distributed._symmetric_memory as symmetric

        name = dist.group.WORLD.group_name  # type: ignore[union-attr]
        peers = [i for i in range(torch.cuda.device_count()) if i != self._device.index]
        if not all(torch.cuda.can_device_access_peer(self._device, peer) for peer in peers):
            raise RuntimeError("the GPUs cannot reach each other's memory")
        buffer = symmetric.empty(ONE_SHOT_BYTES // dtype.itemsize, dtype=dtype, device=self._device)
        handle: Any = symmetric.rendezvous(buffer, name)
        if getattr(handle, "multicast_ptr", 0):
            raise RuntimeError("multicast is on although it was turned off")
        return buffer

    def _agreed(self, mine: bool) -> bool:
        """Whether it is true on every rank."""
        votes = self._sum(torch.tensor([int(mine)], device=self._device))
        return int(votes) == self.size


def refuse_second_group() -> None:
    """Raise STAGE_FAILED where this process has a default group of torch.distributed already."""
    if dist.is_initialized():
        raise TriptychError(
            ErrorKind.STAGE_FAILED, "this process is a member of another torch.distributed group already"
        )
