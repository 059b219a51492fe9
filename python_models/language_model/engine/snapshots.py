"""Bookkeeping of saved states of recurrent layers: which prefix each one belongs to. Holds no tensors.

Blocks of the KV cache can be read at any length, but the state of a recurrent layer is that after exactly one prefix.
So it is saved where a later request may begin: where the prompt leaves what the prefix cache knows, and after its
last full block.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from .request import Request, Work


class Snapshots:
    """Numbers of saved states. Each one is in exactly one of three places::

        blank     nothing is in it
        reserved  a step that writes it is planned; it is known when that step was read
        known     found by the key of its prefix (that of the prefix's last block); held by requests that begin with it

    Of those that nobody holds the one unused for longest makes room. Not thread-safe: the engine's thread owns it.
    """

    def __init__(self, count: int, block_size: int) -> None:
        """Args: how many there are (0 keeps none); tokens in a block."""
        self.count = count
        self._block_size = block_size
        self._blank = list(range(count - 1, -1, -1))
        self._reserved: set[int] = set()
        self._number_of: OrderedDict[bytes, int] = OrderedDict()
        self._key_of: dict[int, bytes] = {}
        self._holders = [0] * count

    def longest(self, keys: Sequence[bytes]) -> int:
        """Blocks in the longest beginning of ``keys`` whose state is known."""
        return next((count for count in range(len(keys), 0, -1) if keys[count - 1] in self._number_of), 0)

    def enter(self, request: Request, keys: Sequence[bytes], hit: int, known: int) -> None:
        """A request got its blocks.

        Args:
            request: the request.
            keys: of its full blocks.
            hit: blocks that it takes from the prefix cache, with the state after them.
            known: blocks that the prefix cache has: the next one that begins alike could begin there.
        """
        if hit:
            self._number_of.move_to_end(keys[hit - 1])
            request.load = self._number_of[keys[hit - 1]]
            self._holders[request.load] += 1
        size = self._block_size
        wanted = sorted(count for count in {known, len(keys)} if count > hit and keys[count - 1] not in self._number_of)
        # inside a span nobody can begin
        request.save_at = tuple(count * size for count in wanted if request.cut(count * size) == count * size)

    def note(self, work: Work) -> None:
        """Tell planned work which state it begins with, and which ones it saves."""
        request = work.request
        if request.load >= 0 and work.start == request.num_hit:
            work.load = request.load
        end = work.start + work.count
        while request.save_at and request.save_at[0] <= end:
            tokens, *rest = request.save_at
            request.save_at = tuple(rest)
            number = self._reserve()
            if number is not None:
                request.saving.append((tokens, number))
                work.saves += ((tokens - work.start, number),)

    def commit(self, request: Request, end: int) -> None:
        """The first ``end`` tokens of a request are computed and right."""
        if request.load >= 0 and end > request.num_hit:
            self._release(request)
        while request.saving and request.saving[0][0] <= end:
            tokens, number = request.saving.pop(0)
            self._reserved.remove(number)
            key = request.block_keys(tokens)[-1]
            if key in self._number_of:
                # another request was faster
                self._blank.append(number)
            else:
                self._number_of[key] = number
                self._key_of[number] = key

    def leave(self, request: Request) -> None:
        """A request lost its state, or its place: nothing that it saves is needed any more."""
        if request.load >= 0:
            self._release(request)
        for _, number in request.saving:
            self._reserved.remove(number)
            self._blank.append(number)
        request.saving.clear()
        request.save_at = ()

    def forget(self, keys: Iterable[bytes]) -> None:
        """What belongs to these prefixes is wrong."""
        for key in keys:
            if key in self._number_of:
                self._drop(key)

    def check(self, running: Sequence[Request]) -> None:
        """Verify every invariant.

        Raises:
            AssertionError: that says which does not hold.
        """
        if sorted(number for request in running for _, number in request.saving) != sorted(self._reserved):
            raise AssertionError("reserved states do not match the requests that save them")
        held = [request.load for request in running]
        if [held.count(number) for number in range(self.count)] != self._holders:
            raise AssertionError("held states do not match the requests that begin with them")
        if {number: key for key, number in self._number_of.items()} != self._key_of:
            raise AssertionError("the two directions of the saved states differ")
        forgotten = [n for n in range(self.count) if self._holders[n] and n not in self._key_of]
        if sorted([*self._blank, *self._reserved, *self._key_of, *forgotten]) != list(range(self.count)):
            raise AssertionError("a saved state is lost, or in two places")

    def _reserve(self) -> int | None:
        """A number to write to, at the cost of what was unused for longest; None where all are held."""
        if not self._blank:
            key = next((key for key, number in self._number_of.items() if not self._holders[number]), None)
            if key is None:
                return None
            self._drop(key)
        number = self._blank.pop()
        self._reserved.add(number)
        return number

    def _release(self, request: Request) -> None:
        number, request.load = request.load, -1
        self._holders[number] -= 1
        if not self._holders[number] and number not in self._key_of:
            self._blank.append(number)

    def _drop(self, key: bytes) -> None:
        number = self._number_of.pop(key)
        del self._key_of[number]
        if not self._holders[number]:
            self._blank.append(number)
