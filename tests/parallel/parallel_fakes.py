"""A model for the control plane: what it answers depends on everything that every rank has seen of a request."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from triptych.python_models.language_model.runner.parallel.member import Member
from triptych.python_models.language_model.runner.step import KVGroup, Slice

BLOCK = 4


class FakeRunner:
    """Each rank keeps the tokens of its own positions; logits are a sum over ranks."""

    vocab_size = 16
    kv_groups = (KVGroup((0,)), KVGroup((1,), 3))
    bytes_per_token = (8, 8)

    def __init__(self, member: Member, fail_rank: int = -1) -> None:
        torch.set_num_threads(1)
        self._member = member
        self._fail_rank = fail_rank
        self.last_tokens = torch.zeros(8, dtype=torch.int64)
        self._memory = np.zeros(0, dtype=np.int64)

    def allocate(self, num_blocks: Sequence[int]) -> None:
        self._memory = np.zeros(num_blocks[0] * BLOCK, dtype=np.int64)

    def warm_up(self, longest: int = 0) -> None:
        assert longest != 13 or self._member.rank == 0, "an unlucky number"

    def free(self) -> None:
        self._memory = np.zeros(0, dtype=np.int64)

    def scrub(self, group: int, blocks: Sequence[int]) -> None:
        for block in blocks:
            self._memory[block * BLOCK : (block + 1) * BLOCK] = group + 1

    def forward(self, slices: Sequence[Slice]) -> torch.Tensor:
        rank, size = self._member.rank, self._member.size
        sums = []
        for piece in slices:
            ids = piece.token_ids.copy()
            if ids[0] == 1001:
                raise ValueError("every rank refuses 1001")
            if ids[0] == 1002 and rank == self._fail_rank:
                raise ValueError("this rank refuses 1002")
            if ids[0] == 1003 and rank == self._fail_rank:
                print("going down", file=sys.stderr, flush=True)
                os._exit(7)
            if ids[0] == 1004 and rank == self._fail_rank:
                time.sleep(1000)
            if piece.first_on_device:
                ids[0] = self.last_tokens[piece.slot]
            values = ids * 31 + piece.position_ids.sum(0) * 7 + piece.num_logits + 1000 * len(piece.spans)
            for media in piece.media:
                values[media.positions] += (media.rows.float().sum(1) * 100).long().numpy()
            places = np.arange(piece.start + len(piece))
            slots = piece.block_tables[0][places // BLOCK].astype(np.int64) * BLOCK + places % BLOCK
            self._memory[slots[piece.start :]] = values + piece.block_tables[1].sum()
            own = slots[places % size == rank]
            sums.append(int((self._memory[own] * (places[places % size == rank] + 1)).sum()))
        total = self._member.collectives.all_reduce(torch.tensor(sums))
        seeds = [int(s) for s, piece in zip(total, slices, strict=True) for _ in range(piece.num_logits)]
        logits = torch.zeros(len(seeds), self.vocab_size)
        for row, seed in enumerate(seeds):
            logits[row] = torch.randn(self.vocab_size, generator=torch.Generator().manual_seed(seed % 2**31))
        return logits


def build(member: Member, **options: Any) -> FakeRunner:
    """The recipe's function."""
    if options.get("die") == member.rank:
        print("no such file: weights.bin", file=sys.stderr, flush=True)
        os._exit(3)
    if options.get("raise") == member.rank:
        raise MemoryError("only 3 bytes are left")
    return FakeRunner(member, options.get("fail_rank", -1))


class Alone:
    """The collectives of a single rank."""

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor


def alone() -> FakeRunner:
    """The same model in one process."""
    return FakeRunner(Member(0, 1, False, "cpu", Alone()))
