"""Which part of every weight a rank holds: tensor parallel by columns and rows, experts whole where asked.

Shoeybi et al. 2019 (Megatron-LM): QKV and gate+up are split by output rows, O and down by input columns, so a layer
needs one sum over ranks after attention and one after its MLP.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch


class Collectives(Protocol):
    """What ranks do together. Both calls are capturable in CUDA graphs and made by all ranks in the same order."""

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over ranks, of the same shape; may overwrite its argument."""

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """[..., n] of every rank -> [..., size * n], in the order of ranks."""


class Alone:
    """:class:`Collectives` of a single rank."""

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor itself."""
        return tensor

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor itself."""
        return tensor


@dataclass(frozen=True)
class Shard:
    """One rank of a tensor-parallel group.

    Attributes:
        rank, size: 0 <= rank < size.
        expert_parallel: experts lie whole on one rank each; else every expert is split like a dense MLP.
    """

    rank: int = 0
    size: int = 1
    expert_parallel: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise ValueError(f"rank {self.rank} is not one of {self.size}")

    def even(self, count: int) -> tuple[int, int]:
        """This rank's [start, stop) of ``count`` that the group shares evenly."""
        part = count // self.size
        return self.rank * part, (self.rank + 1) * part

    def kv_heads(self, count: int) -> tuple[int, int]:
        """[start, stop) of key heads; with fewer heads than ranks, neighbours hold the same head."""
        if count >= self.size:
            return self.even(count)
        head = self.rank * count // self.size
        return head, head + 1

    def vocabulary(self, count: int) -> tuple[int, int, int]:
        """[start, stop) of the head's rows, and the rows of the largest part: the last rank may have fewer."""
        part = -(-count // self.size)
        start = min(self.rank * part, count)
        return start, min(start + part, count), part

    def unfit(self, heads: int, kv_heads: int) -> str | None:
        """Why attention heads cannot be split over the group; None when they can."""
        if heads % self.size or (kv_heads % self.size and self.size % kv_heads):
            return f"{heads} query and {kv_heads} key heads cannot be split over {self.size} ranks"
        return None
