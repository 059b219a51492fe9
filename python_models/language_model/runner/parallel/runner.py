"""Rank 0: a runner that makes all ranks compute each step together."""

from __future__ import annotations

import dataclasses
import logging
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ....contract.errors import TriptychError
from ..memory import device_memory
from ..step import KVGroup, MediaRows, Slice
from .group import Group, refuse_second_group
from .member import Member, RankRunner, Recipe
from .watch import Watch
from .wire import Kind, frame, json_frame, pack

logger = logging.getLogger(__name__)

START_S = 120.0
"""For a worker to come up: it imports torch."""
CALL_S = 1800.0
"""For loading, allocating or capturing, beyond the time that rank 0 takes for it."""
_CLOSE_S = 3.0


class ParallelRunner:
    """A :class:`~..step.Runner` over all ranks of a group; its own rank's part is an ordinary runner.

    A step is sent to the workers before rank 0 computes it. What the workers do not know (tokens that were sampled
    on rank 0's device and that the host has not seen, rows of media) is broadcast between the devices, queued before
    the step, so nothing waits for a device. When a rank dies or gets stuck, every call raises STAGE_DEAD with its
    name, all workers are gone, and ``on_fault`` has been called: a device that waits in a collective for a rank that
    is gone can only be freed by ending the process.
    """

    def __init__(
        self, recipe: Recipe, devices: Sequence[str], on_fault: Callable[[TriptychError], None] | None = None
    ) -> None:
        """Start the workers and build every rank's runner.

        Args:
            recipe: see :class:`.member.Recipe`.
            devices: of the ranks, this process' own first.
            on_fault: called once, from any thread, when a rank is lost.

        Raises:
            TriptychError: a rank could not start or build, in its own words.
        """
        size = len(devices)
        refuse_second_group()
        self._device = torch.device(devices[0])
        self._step = 0
        self._on_fault = on_fault
        self._group: Group | None = None
        self._folder = Path(tempfile.mkdtemp(prefix="triptych-ranks-"))
        store = self._folder / "store"
        about = {"size": size, "store": str(store), "recipe": dataclasses.asdict(recipe)}
        self._watch = Watch([about | {"rank": r, "device": devices[r]} for r in range(1, size)], self._lost)
        try:
            self._on_all("hello", lambda: None, timeout_s=START_S)
            dtype = getattr(torch, recipe.dtype)
            self._group = self._on_all(
                "join", lambda: Group(0, size, devices[0], store, one_shot=recipe.one_shot, dtype=dtype)
            )
            member = Member(0, size, recipe.expert_parallel, devices[0], self._group)
            self._local: RankRunner = self._on_all("build", lambda: recipe.make(member))
        except BaseException:
            self.close()
            raise

    @property
    def vocab_size(self) -> int:
        """Width of the logits."""
        return self._local.vocab_size

    @property
    def kv_groups(self) -> tuple[KVGroup, ...]:
        """See :class:`~..step.Runner`."""
        return self._local.kv_groups

    @property
    def saved_states(self) -> None:
        """Decoders with recurrent layers are not shared by ranks."""
        return

    @property
    def last_tokens(self) -> torch.Tensor:
        """See :class:`~..step.Runner`; only rank 0's is written to."""
        return self._local.last_tokens

    @property
    def bytes_per_token(self) -> tuple[int, ...]:
        """See :class:`.member.RankRunner`."""
        return self._local.bytes_per_token

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers."""
        return [peer.process.pid for peer in self._watch.peers]

    def memory(self) -> tuple[int, int]:
        """(free, total) bytes of the device that has the least free; see ``sizing.kv_blocks``."""
        others: list[tuple[int, int]] = []
        own: tuple[int, int] = self._on_all("memory", lambda: device_memory(str(self._device)), collect=others)
        return min([own, *((free, total) for free, total in others)])

    def allocate(self, num_blocks: Sequence[int]) -> None:
        """Make the KV cache of every rank.

        Raises:
            TriptychError: a rank has not that much memory.
        """
        self._on_all("allocate", lambda: self._local.allocate(num_blocks), list(num_blocks))

    def warm_up(self, longest: int = 0) -> None:
        """Compile and capture on every rank."""
        self._on_all("warm_up", lambda: self._local.warm_up(longest), longest)

    def free(self) -> None:
        """Give the KV cache's memory back on every rank that is still there."""
        if self._watch.usable:
            self._on_all("free", self._local.free)
        else:
            self._local.free()

    def scrub(self, group: int, blocks: Sequence[int]) -> None:
        """See :class:`~..step.Runner`."""
        call = {"method": "scrub", "args": [group, [int(block) for block in blocks]], "reply": False}
        self._watch.send(json_frame(Kind.CALL, call))
        self._local.scrub(group, blocks)

    @property
    def hidden(self) -> torch.Tensor:
        """See :class:`~..step.Runner`."""
        return self._local.hidden

    def forward(self, slices: Sequence[Slice]) -> torch.Tensor:
        """See :class:`~..step.Runner`.

        Raises:
            TriptychError: STAGE_DEAD when a rank is lost; it names the rank, and why.
        """
        assert self._group is not None
        self._step += 1
        slices = [self._placed(piece) for piece in slices]
        tokens = sum(map(len, slices))
        self._watch.send_step(self._step, frame(Kind.STEP, pack(self._step, slices)), tokens)
        try:
            for piece in slices:
                for media in piece.media:
                    self._group.broadcast(media.rows)
            if any(piece.first_on_device for piece in slices):
                self._group.broadcast(self._local.last_tokens)
            return self._local.forward(slices)
        except Exception as error:
            self._watch.settle(self._step, error, self._group.num_calls)
            raise

    def close(self) -> None:
        """End the workers and leave the group."""
        self._watch.close(_CLOSE_S)
        if self._group is not None:
            if (local := getattr(self, "_local", None)) is not None:
                local.free()
            self._group.close()
            self._group = None
        shutil.rmtree(self._folder, ignore_errors=True)

    def _placed(self, piece: Slice) -> Slice:
        """The slice with its media where they can be broadcast from."""
        if not piece.media:
            return piece
        media = tuple(MediaRows(m.positions, m.rows.to(self._device).contiguous()) for m in piece.media)
        return dataclasses.replace(piece, media=media)

    def _on_all(
        self,
        method: str,
        local: Callable[[], Any],
        *args: Any,
        collect: list[Any] | None = None,
        timeout_s: float = CALL_S,
    ) -> Any:
        """Have every worker call a method while this rank calls ``local``; its result, theirs in ``collect``.

        Raises:
            TriptychError: what a worker raised, or why it is gone.
        """
        self._watch.send_call(json_frame(Kind.CALL, {"method": method, "args": args, "reply": True}))
        try:
            own = local()
        except Exception as error:
            self._watch.abandon_call(error)
            raise
        answers = self._watch.results(timeout_s)
        if collect is not None:
            collect.extend(answers)
        return own

    def _lost(self, fault: TriptychError) -> None:
        if self._on_fault is not None:
            self._on_fault(fault)
        if (group := self._group) is not None:
            group.abort()
