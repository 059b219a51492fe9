"""What the ranks of a group agree on before they start."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from ..step import Runner

if TYPE_CHECKING:
    from ..fused.shard import Collectives


class RankRunner(Runner, Protocol):
    """What one rank computes with, rank 0 as well as the workers: a :class:`~..runner.DecoderRunner` of its shard."""

    @property
    def bytes_per_token(self) -> tuple[int, ...]:
        """Bytes that one token takes on this rank in the KV cache of each group of layers."""

    def allocate(self, num_blocks: Sequence[int]) -> None:
        """Make this rank's part of the KV cache; the same number of blocks on every rank."""

    def warm_up(self, longest: int = 0) -> None:
        """Compile and capture; runs collectives, so on all ranks at once."""

    def free(self) -> None:
        """Give the KV cache's memory back."""


@dataclass(frozen=True)
class Member:
    """A rank, as the function that builds its runner sees it.

    Attributes:
        rank, size: of the group.
        expert_parallel: experts lie whole on one rank each.
        device: torch device of this rank.
        collectives: of the group.
    """

    rank: int
    size: int
    expert_parallel: bool
    device: str
    collectives: Collectives


@dataclass(frozen=True)
class Recipe:
    """How every rank builds its runner.

    Attributes:
        build: "package.module:function", called as ``function(member, **options)``; gives a :class:`RankRunner`.
        options: of that function; JSON values.
        expert_parallel: see :class:`Member`.
        dtype: name of the dtype of what layers sum.
        one_shot: sum small tensors through symmetric memory where possible.
    """

    build: str
    options: Mapping[str, Any]
    expert_parallel: bool = False
    dtype: str = "bfloat16"
    one_shot: bool = True

    def make(self, member: Member) -> RankRunner:
        """Build the runner of a rank."""
        module, _, name = self.build.partition(":")
        build: Callable[..., RankRunner] = getattr(importlib.import_module(module), name)
        return build(member, **self.options)
