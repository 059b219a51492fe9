"""How far every worker is: a few numbers in shared memory, written without locks and read by rank 0's watch."""

from __future__ import annotations

import mmap
import os
import time
from dataclasses import dataclass

import numpy as np

_COLUMNS = 8
"""A cache line for each rank: nobody's writes disturb another's."""
_PULSE, _RECEIVED, _QUEUED, _DONE, _CALLS = range(5)


@dataclass(frozen=True)
class Progress:
    """What a worker has said of itself.

    Attributes:
        pulse: seconds of the monotonic clock at its last sign of life; 0 before the first.
        received: last step whose message it read.
        queued: last step it has handed to its device.
        done: last step that its device is known to have finished.
        calls: collectives it had begun at its last sign of life.
    """

    pulse: float
    received: int
    queued: int
    done: int
    calls: int


class Board:
    """One row for each rank; a row has one writer."""

    def __init__(self, size: int, fd: int | None = None) -> None:
        """Args: number of ranks; ``fd`` of a board that another process made."""
        self.fd = os.memfd_create("triptych-board", os.MFD_CLOEXEC) if fd is None else fd
        num_bytes = size * _COLUMNS * 8
        if fd is None:
            os.ftruncate(self.fd, num_bytes)
        self._rows = np.frombuffer(mmap.mmap(self.fd, num_bytes), np.int64).reshape(size, _COLUMNS)

    def close(self) -> None:
        """Close the file; the memory goes with the last process that maps it."""
        os.close(self.fd)

    def pulse(self, rank: int, calls: int) -> None:
        """Give a sign of life."""
        self._rows[rank, _CALLS] = calls
        self._rows[rank, _PULSE] = time.monotonic_ns()

    def received(self, rank: int, step: int) -> None:
        """The message of a step is read."""
        self._rows[rank, _RECEIVED] = step

    def queued(self, rank: int, step: int) -> None:
        """A step's work is handed to the device."""
        self._rows[rank, _QUEUED] = step

    def done(self, rank: int, step: int) -> None:
        """A step's work is finished."""
        self._rows[rank, _DONE] = step

    def read(self, rank: int) -> Progress:
        """What a worker wrote last."""
        row = self._rows[rank]
        return Progress(int(row[_PULSE]) / 1e9, *(int(row[i]) for i in (_RECEIVED, _QUEUED, _DONE, _CALLS)))
