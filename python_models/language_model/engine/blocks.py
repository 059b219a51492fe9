"""Bookkeeping of the paged KV cache: which block belongs to whom. Holds no tensors."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray


class OutOfBlocks(Exception):  # noqa: N818 - a normal event of scheduling, not an error
    """Fewer blocks are free than were asked for."""


class BlockTable:
    """The blocks of one request in one group of layers, in the order of its tokens.

    Blocks as half-open intervals::

        [0, first)           given back, because they fell out of the group's window; any number stands there
        [first, len(self))   referenced by the request
    """

    __slots__ = ("_array", "_length", "first")

    def __init__(self) -> None:
        self._array: NDArray[np.int32] = np.empty(16, dtype=np.int32)
        self._length = 0
        self.first = 0

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> int:
        return int(self._array[index])

    @property
    def view(self) -> NDArray[np.int32]:
        """int32 [len(self)], without a copy; later growth does not show in it."""
        return self._array[: self._length]

    @property
    def held(self) -> list[int]:
        """The blocks that the request references."""
        blocks: list[int] = self._array[self.first : self._length].tolist()
        return blocks

    def extend(self, blocks: Sequence[int]) -> None:
        """Add blocks at the end."""
        end = self._length + len(blocks)
        if end > self._array.shape[0]:
            grown = np.empty(max(end, 2 * self._array.shape[0]), dtype=np.int32)
            grown[: self._length] = self.view
            self._array = grown
        self._array[self._length : end] = blocks
        self._length = end

    def start(self, first: int, blocks: Sequence[int]) -> None:
        """Fill an empty table: ``first`` places that are not held, then ``blocks``."""
        self.extend([0] * first + list(blocks))
        self.first = first

    def drop_before(self, index: int) -> list[int]:
        """Stop holding the blocks before ``index``; returns those that were held."""
        blocks: list[int] = self._array[self.first : index].tolist()
        self.first = index
        return blocks

    def clear(self) -> list[int]:
        """Stop holding anything; returns what was held."""
        blocks = self.held
        self._length = self.first = 0
        # views of the old array may still be read
        self._array = np.empty(16, dtype=np.int32)
        return blocks


class BlockPool:
    """Reference-counted KV blocks of one group of layers, with a prefix cache.

    Every block is in exactly one of three places::

        blank   never written or forgotten, free to take
        idle    nobody uses it, but its content is known by a key: found again by `acquire`, taken last-used first out
        in use  referenced by one request or, where its content is shared, by several

    A key stands for everything that decides a block's content: its tokens, media, positions and all before it.
    Not thread-safe: the engine's thread owns it.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        """Args: ``num_blocks`` blocks of ``block_size`` tokens each."""
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"a pool needs blocks and tokens in them, not {num_blocks} blocks of {block_size}")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._blank = list(range(num_blocks - 1, -1, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._references = [0] * num_blocks
        self._block_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}

    @property
    def num_free(self) -> int:
        """Blocks that `allocate` can give."""
        return len(self._blank) + len(self._idle)

    @property
    def usage(self) -> float:
        """Share of blocks in use, 0 to 1."""
        return 1 - self.num_free / self.num_blocks

    @property
    def kept(self) -> float:
        """Share of blocks that nobody uses, but whose content is known, 0 to 1."""
        return len(self._idle) / self.num_blocks

    def allocate(self, count: int) -> list[int]:
        """Take ``count`` blocks with unknown content; blank ones first, then the idle one unused for longest.

        Raises:
            OutOfBlocks: fewer are free; nothing is taken.
        """
        if count > self.num_free:
            raise OutOfBlocks(f"{count} blocks wanted, {self.num_free} free")
        blocks = []
        for _ in range(count):
            if self._blank:
                block = self._blank.pop()
            else:
                block, _ = self._idle.popitem(last=False)
                del self._block_of[self._key_of.pop(block)]
            self._references[block] = 1
            blocks.append(block)
        return blocks

    def __contains__(self, key: bytes) -> bool:
        return key in self._block_of

    def count_known(self, keys: Sequence[bytes]) -> int:
        """Length of the longest beginning of ``keys`` all of which are known."""
        for count, key in enumerate(keys):
            if key not in self._block_of:
                return count
        return len(keys)

    def acquire(self, keys: Sequence[bytes]) -> list[int]:
        """Take known blocks, shared with whoever else uses them.

        Raises:
            KeyError: one of them is not known; nothing is taken.
        """
        blocks = [self._block_of[key] for key in keys]
        for block in blocks:
            self._idle.pop(block, None)
            self._references[block] += 1
        return blocks

    def release(self, blocks: Sequence[int]) -> None:
        """Give up one reference to each block; ``blocks`` is in prompt order."""
        # from the end, so that a prefix is forgotten after what builds on it
        for block in reversed(blocks):
            if self._references[block] < 1:
                raise ValueError(f"block {block} was released more often than taken")
            self._references[block] -= 1
            if self._references[block] == 0:
                if block in self._key_of:
                    self._idle[block] = None
                else:
                    self._blank.append(block)

    def publish(self, block: int, key: bytes) -> None:
        """Make the content of a full, computed block known; a no-op where the same content is known already."""
        if self._references[block] < 1:
            raise ValueError(f"block {block} is published but not in use")
        if key not in self._block_of and block not in self._key_of:
            self._block_of[key] = block
            self._key_of[block] = key

    def forget(self, keys: Iterable[bytes], blocks: Iterable[int] = ()) -> list[int]:
        """Make content unknown because it is wrong.

        Args:
            keys: of the content.
            blocks: that one request holds. Other requests' blocks of the same content stay known: each computed it.

        Returns:
            Blocks that may be blanked: nobody uses them, or only that request.
        """
        own = dict.fromkeys(blocks)
        free = []
        for key in keys:
            block = self._block_of.get(key)
            if block is None or (block not in own and block not in self._idle):
                continue
            del self._block_of[key], self._key_of[block]
            if block in self._idle:
                del self._idle[block]
                self._blank.append(block)
                free.append(block)
        return free + [block for block in own if self._references[block] == 1]

    def check(self, expected: Iterable[Sequence[int]] = ()) -> None:
        """Verify every invariant; ``expected`` are the blocks that each request holds (none when idle).

        Raises:
            AssertionError: that says which invariant does not hold.
        """
        counts = [0] * self.num_blocks
        for table in expected:
            for block in table:
                counts[block] += 1
        if counts != self._references:
            wrong = [b for b in range(self.num_blocks) if counts[b] != self._references[b]]
            raise AssertionError(f"references of blocks {wrong} do not match the requests' block tables")
        free = [*self._blank, *self._idle]
        if len(set(free)) != len(free):
            raise AssertionError("a block is free twice")
        if set(free) != {b for b in range(self.num_blocks) if self._references[b] == 0}:
            raise AssertionError("free blocks and unreferenced blocks differ")
        if {block: key for key, block in self._block_of.items()} != self._key_of:
            raise AssertionError("the two directions of the prefix cache differ")
        if any(block not in self._key_of for block in self._idle) or any(b in self._key_of for b in self._blank):
            raise AssertionError("an idle block has no key, or a blank one has")
