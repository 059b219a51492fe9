"""Which request computes how many tokens in the next step. Counts only: it knows neither tensors nor time."""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ..runner.step import Slice
from .blocks import BlockPool
from .config import EngineConfig
from .request import _NEVER, Request, Work
from .snapshots import Snapshots

_UNCHUNKED = 8192
"""Where prompts are not cut, whole ones join a step up to this many tokens."""
_MOST_DRAFTS = 128
"""Guessed tokens in one step: more of them would slow down everybody's step."""


@dataclass(frozen=True)
class StepPlan:
    """One step of the engine.

    Attributes:
        work: what it computes, the decodes first.
        preempted: requests that lost their blocks to others and will be computed again.
        admitted: requests that got a place among the running ones.
    """

    work: Sequence[Work]
    preempted: tuple[Request, ...] = ()
    admitted: tuple[Request, ...] = ()

    @property
    def tokens(self) -> Mapping[Request, int]:
        """Request -> how many of its tokens are computed."""
        return {work.request: work.count for work in self.work}


class Scheduler:
    """Who computes what, within three bounds: KV blocks, running requests and tokens per step.

    Rank: higher priority first, then first come. Requests are admitted in the order of their ranks, nobody overtakes.
    An admitted one gets the blocks for all its tokens, or, in groups of layers with a window, those of each step in
    turn. When blocks run out, the running request of the lowest rank gives its own back and is computed again later
    (recompute keeps its generated tokens, so the answer stays the same). A request may also be admitted in the place
    of one of lower priority. The running request of the highest rank can thus always go on, and the oldest of a
    priority gives way only to higher priorities.

    A step holds one token of every decoding request, then guesses of their next ones, then prompts. Of what is left
    for prompts, the first in line gets half, the others get the rest, the one with the fewest tokens left first, and
    what they do not need goes back to the first. So streams never wait for more than one chunk of a long prompt, nor
    do short prompts wait for it, and it is itself never starved. Uncuttable spans are taken whole by the first in
    line; others wait until they fit.
    """

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._windows = config.windows
        self._has_windows = any(window is not None for window in config.windows)
        self.pools = tuple(BlockPool(count, config.block_size) for count in config.num_blocks)
        self.snapshots = None if config.saved_states is None else Snapshots(config.saved_states, config.block_size)
        self.block_size = config.block_size
        self.max_step_tokens = config.max_step_tokens
        # every one that runs can decode in the same step
        self.max_running = min(config.max_running, config.max_step_tokens or config.max_running)
        self.running: list[Request] = []
        self.waiting: list[Request] = []
        self._slots = list(range(config.max_running - 1, -1, -1))
        self._added = 0
        self._step = 0
        self._preempted: list[Request] = []
        self._admitted: list[Request] = []

    @property
    def usage(self) -> float:
        """Share of blocks in use of the fullest pool, 0 to 1."""
        return max(pool.usage for pool in self.pools)

    @property
    def kept(self) -> float:
        """Share of blocks that hold finished requests for prompts to come, of the pool that has most, 0 to 1."""
        return max(pool.kept for pool in self.pools)

    @property
    def idle(self) -> bool:
        """Whether no block is in use."""
        return all(pool.num_free == pool.num_blocks for pool in self.pools)

    def add(self, request: Request, number: int | None = None) -> None:
        """Queue a request; it must fit into the whole pools when alone.

        Args:
            request: a new one.
            number: of the request whose place in the line it shares; None for the end of the line.
        """
        if number is None:
            self._added += 1
            number = self._added
        request.number = number
        bisect.insort(self.waiting, request, key=_rank)

    def remove(self, request: Request) -> None:
        """Take a request out, whatever its state, and free its blocks."""
        if request.slot >= 0:
            self.running.remove(request)
            self._unseat(request)
        elif request in self.waiting:
            self.waiting.remove(request)

    def plan(self) -> StepPlan:
        """Decide the next step, preempting and admitting as needed."""
        self._step += 1
        self._preempted = []
        self._admitted = []
        counts: dict[Request, int] = {}
        prompts: list[Request] = []
        guessing: list[Request] = []
        stalled = False
        for request in self.running.copy():
            pending = request.num_tokens - request.num_scheduled
            if request.slot < 0 or request.num_tokens >= request.limit:
                # preempted a moment ago, or its last token is on its way
                continue
            if request.num_tokens > request.switch_at:
                self._move_back(request)
                continue
            if pending > 1:
                prompts.append(request)
                continue
            if request.speculation is not None and request.speculation.active:
                if request.in_flight:
                    # a guess begins with a known token
                    continue
                guessing.append(request)
            if request.num_scheduled >= request.room and not self._grow(request, 1, 1, counts):
                stalled = True
                continue
            counts[request] = 1
        budget = (self.max_step_tokens or _UNCHUNKED) - len(counts)
        if self.waiting and not stalled and not self._preempted:
            budget = self._admit_waiting(budget, prompts, counts)
        drafts = self._guess(guessing, counts, budget // 2) if guessing else {}
        budget -= sum(map(len, drafts.values()))
        if prompts and budget > 0:
            # decodes may have preempted some
            self._add_prompts([r for r in prompts if r.slot >= 0], budget, counts)
        work = [Work(request, count, drafts.get(request, ())) for request, count in counts.items()]
        if self.snapshots is not None:
            for one in work:
                self.snapshots.note(one)
        return StepPlan(work, tuple(self._preempted), tuple(self._admitted))

    def again(self, work: Work) -> Work:
        """The same work, after :meth:`Work.undo`, as the request stands now."""
        request = work.request
        request.started = True
        return Work(request, work.count, work.drafts)

    def replay(self, work: Work) -> Iterator[Slice]:
        """What has to be computed before undone work is computed again.

        Keys and values of a step are written again into the same places, but recurrent layers have lost the state
        before it: theirs is made anew from the first token on.
        """
        request, start = work.request, 0
        if self.snapshots is None:
            return
        self.snapshots.leave(request)
        while start < work.start:
            end = request.cut(min(start + (self.max_step_tokens or _UNCHUNKED), work.start))
            end = end if end > start else request.span_end(start)
            yield request.part(start, end - start)
            start = end

    def restart(self, works: Sequence[Work]) -> None:
        """Requests of undone work that is not computed again at once go back into the line where they lost a state."""
        if self.snapshots is None:
            return
        for work in works:
            if work.current and not work.request.done:
                self._move_back(work.request)

    def commit(self, work: Work, count: int) -> None:
        """Record that the first ``count`` tokens of some work are computed and right; they are known by now.

        Blocks that became full are known to the prefix cache; those that fell out of a window are given back.
        """
        request = work.request
        if not work.current:
            return
        request.num_computed = end = work.start + count
        if count < work.count:
            request.num_scheduled = end
        if end >= request.publish_at:
            self._publish(request, end)
        if self.snapshots is not None:
            self.snapshots.commit(request, end)
        if self._has_windows:
            self._release_passed(request, end)

    def poison(self, request: Request) -> list[list[int]]:
        """Forget what a request computed, because it is wrong.

        Returns:
            For each group the blocks to blank, which nobody else uses.
        """
        keys = request.keys[: request.num_computed // self.block_size] if request.cacheable else []
        if self.snapshots is not None:
            self.snapshots.forget(keys)
        return [pool.forget(keys, table.held) for pool, table in zip(self.pools, request.tables, strict=True)]

    def check(self) -> None:
        """Verify the invariants of queues and blocks.

        Raises:
            AssertionError: that says which does not hold.
        """
        for group, pool in enumerate(self.pools):
            pool.check([r.tables[group].held for r in self.running])
        if self.snapshots is not None:
            self.snapshots.check(self.running)
        if any(len(table) for r in self.waiting for table in r.tables):
            raise AssertionError("a waiting request holds blocks")
        if any(r.num_scheduled or r.slot >= 0 for r in self.waiting):
            raise AssertionError("a waiting request has computed tokens or a slot")
        if len(self.running) > self.max_running:
            raise AssertionError(f"{len(self.running)} requests run, {self.max_running} may")
        slots = sorted([r.slot for r in self.running] + self._slots)
        if slots != list(range(self._config.max_running)):
            raise AssertionError("a slot is lost or taken twice")
        for request in self.running:
            name = request.request_id
            if not request.num_computed <= request.num_scheduled <= request.room:
                raise AssertionError(f"request {name!r} computed more tokens than it has blocks for")
            for table, window in zip(request.tables, self._windows, strict=True):
                if table.first > _first_seen(window, request.num_computed, self.block_size):
                    raise AssertionError(f"request {name!r} gave back a block that it still sees")
        for queue in (self.running, self.waiting):
            if [_rank(r) for r in queue] != sorted(_rank(r) for r in queue):
                raise AssertionError("a queue is out of order")
        # the further choices of a prompt come into the line late, at the place of the first
        late = {r.number for r in self.waiting if r.index}
        newest: dict[int, int] = {}
        for request in self.running:
            newest[request.priority] = request.number
        for request in self.waiting:
            if request.number < newest.get(request.priority, 0) and request.number not in late:
                raise AssertionError("a request overtook one that came before it")

    def _admit_waiting(self, budget: int, prompts: list[Request], counts: dict[Request, int]) -> int:
        """Seat waiting requests; returns what is left of the budget."""
        while self.waiting and budget > 0:
            request = self.waiting[0]
            if request.in_flight or request in self._preempted:
                # its newest token comes with the step that is queued; or it gave way to others in this step
                break
            if len(self.running) >= self.max_running or not self._seat(request):
                victim = self.running[-1] if self.running else None
                if victim is None or victim.priority >= request.priority:
                    break
                budget += counts.get(victim, 0)
                self._preempt(victim, counts)
                continue
            self.waiting.remove(request)
            request.slot = self._slots.pop()
            request.seated_at = self._step
            self._admitted.append(request)
            bisect.insort(self.running, request, key=_rank)
            if request.num_pending > 1:
                bisect.insort(prompts, request, key=_rank)
            elif request.num_scheduled < request.room or self._grow(request, 1, 1, counts):
                counts[request] = 1
                request.started = True
                budget -= 1
        return budget

    def _guess(self, guessing: list[Request], counts: dict[Request, int], budget: int) -> dict[Request, list[int]]:
        """Guesses for decodes of this step, as far as blocks are free and tokens are left."""
        budget = min(budget, _MOST_DRAFTS)
        drafts: dict[Request, list[int]] = {}
        for request in guessing:
            speculation = request.speculation
            if speculation is None or request not in counts or budget < 1:
                continue
            most = min(budget, request.speculative_tokens, request.limit - request.num_tokens - 1)
            most = min(most, request.switch_at - request.num_tokens)
            draft = speculation.propose(most)
            if draft and request.num_scheduled + 1 + len(draft) > request.room:
                granted = self._extend(request, 2, 1 + len(draft))
                draft = draft[: max(granted - 1, 0)]
            if draft:
                drafts[request] = draft
                counts[request] += len(draft)
                budget -= len(draft)
        return drafts

    def _add_prompts(self, prompts: list[Request], budget: int, counts: dict[Request, int]) -> None:
        """Share a budget of tokens among prompts, which are in the order of their ranks."""
        for request in prompts:
            if not request.started and request.seated_at != self._step:
                self._reseat(request)
        shares = self._share(prompts, budget)
        for request in prompts:
            share = shares.get(request, 0)
            if not share or request.slot < 0:
                continue
            if request.num_scheduled + share > request.room:
                least = request.span_end(request.num_scheduled) - request.num_scheduled
                share = self._grow(request, least, share, counts)
                share = request.cut(request.num_scheduled + share) - request.num_scheduled
            if share:
                counts[request] = share
                request.started = True

    def _share(self, prompts: list[Request], budget: int) -> dict[Request, int]:
        if not prompts:
            return {}
        first, *others = prompts
        shares = {first: self._chunk(first, budget - budget // 2 if others else budget, True)}
        left = budget - shares[first]
        for request in sorted(others, key=lambda r: r.num_tokens - r.num_scheduled):
            if left <= 0:
                break
            shares[request] = share = self._chunk(request, left, False)
            left -= share
        if left > 0 and others:
            shares[first] = self._chunk(first, shares[first] + left, True)
        return shares

    def _chunk(self, request: Request, most: int, first: bool) -> int:
        """How many of its next tokens a request computes out of ``most``; the first in line computes some always."""
        pending = request.num_tokens - request.num_scheduled
        if not self.max_step_tokens:
            return pending if first or pending <= most else 0
        start = request.num_scheduled
        end = request.cut(start + min(pending, most))
        if end <= start and first:
            end = request.span_end(start)
        return end - start

    def _seat(self, request: Request, again: bool = False) -> bool:
        """Give a request the blocks of all its tokens, known ones from the prefix cache; False where too few are free.

        In groups with a window it gets only what the cache has; the rest must be free for its first step, unless it
        had a place before (``again``).
        """
        if request.num_tokens > request.switch_at:
            request.switch()
        # the newest token is always computed: its logits are needed
        keys = request.block_keys(request.num_tokens - 1) if request.cacheable else ()
        known = self._match(request, keys)
        hit = known if self.snapshots is None else self.snapshots.longest(keys[:known])
        total = -(-request.num_tokens // self.block_size)
        # a little room for those who decode, else the newcomer would soon be preempted again
        others = 0 if again else len(self.running)
        step = min(request.num_tokens, self.max_step_tokens or request.num_tokens)
        fits = True
        for pool, window, table in zip(self.pools, self._windows, request.tables, strict=True):
            first = _first_seen(window, hit * self.block_size, self.block_size)
            table.start(first, pool.acquire(keys[first:hit]))
            needed = total - hit
            if window is not None:
                span = self._config.blocks_of_span(window, step)
                needed = 0 if again else min(needed, span, pool.num_blocks - (hit - first))
            fits = fits and pool.num_free >= needed + min(others, pool.num_blocks // 50)
        if not fits:
            for pool, table in zip(self.pools, request.tables, strict=True):
                pool.release(table.clear())
            return False
        for pool, window, table in zip(self.pools, self._windows, request.tables, strict=True):
            if window is None:
                table.extend(pool.allocate(total - hit))
        self._note_tables(request)
        request.num_hit = request.num_scheduled = request.num_computed = hit * self.block_size
        request.publish_at = request.num_hit + self.block_size if request.cacheable else _NEVER
        if self.snapshots is not None:
            self.snapshots.enter(request, keys, hit, known)
        if not request.started:
            request.num_cached = request.num_hit
        return True

    def _reseat(self, request: Request) -> None:
        """Look into the prefix cache once more for a request that waited for its first step: others computed since."""
        keys = request.block_keys(request.num_tokens - 1) if request.cacheable else ()
        known = self._match(request, keys)
        if self.snapshots is not None:
            known = self.snapshots.longest(keys[:known])
        if known * self.block_size <= request.num_hit:
            return
        for pool, table in zip(self.pools, request.tables, strict=True):
            pool.release(table.clear())
        if self.snapshots is not None:
            self.snapshots.leave(request)
        # what it held is enough: every block more that the cache gives is one less to take
        if not self._seat(request, again=True):
            raise AssertionError(f"request {request.request_id!r} does not fit into its own blocks")

    def _match(self, request: Request, keys: Sequence[bytes]) -> int:
        """Blocks at the beginning that need not be computed.

        Groups without a window know all of them, groups with one know those that the next token sees.
        """
        count = len(keys)
        for pool, window in zip(self.pools, self._windows, strict=True):
            if window is None:
                count = pool.count_known(keys[:count])
        settled = False
        while count and not settled:
            # a span is computed whole or not at all
            edge = request.cut(count * self.block_size) // self.block_size
            settled = edge == count
            count = edge
            for pool, window in zip(self.pools, self._windows, strict=True):
                if window is None:
                    continue
                first = _first_seen(window, count * self.block_size, self.block_size)
                for index in range(count - 1, first - 1, -1):
                    if keys[index] not in pool:
                        count, settled = index, False
                        break
        return count

    def _extend(self, request: Request, least: int, most: int) -> int:
        """Blocks for up to ``most`` more tokens from what is free: how many, or 0 where it is not even ``least``."""
        end = request.num_scheduled + most
        size = self.block_size
        for pool, table in zip(self.pools, request.tables, strict=True):
            end = min(end, (len(table) + pool.num_free) * size)
        count = end - request.num_scheduled
        if count < least:
            return 0
        blocks = -(-end // size)
        for pool, table in zip(self.pools, request.tables, strict=True):
            if blocks > len(table):
                table.extend(pool.allocate(blocks - len(table)))
        self._note_tables(request)
        return count

    def _grow(self, request: Request, least: int, most: int, counts: dict[Request, int]) -> int:
        """As `_extend`, at the cost of requests of lower rank where needed; 0 where even that is too little."""
        while not (count := self._extend(request, least, most)):
            victim = self.running[-1]
            if victim is request:
                return 0
            self._preempt(victim, counts)
        return count

    def _preempt(self, victim: Request, counts: dict[Request, int]) -> None:
        self._move_back(victim)
        counts.pop(victim, None)
        self._preempted.append(victim)

    def _move_back(self, request: Request) -> None:
        """From running to waiting."""
        self.running.remove(request)
        self._unseat(request)
        bisect.insort(self.waiting, request, key=_rank)

    def _unseat(self, request: Request) -> None:
        for pool, table in zip(self.pools, request.tables, strict=True):
            pool.release(table.clear())
        if self.snapshots is not None:
            self.snapshots.leave(request)
        self._slots.append(request.slot)
        request.slot = -1
        request.seating += 1
        request.num_scheduled = request.num_computed = request.room = 0

    def _publish(self, request: Request, end: int) -> None:
        keys = request.block_keys(end)
        for index in range(request.publish_at // self.block_size - 1, len(keys)):
            for pool, table in zip(self.pools, request.tables, strict=True):
                if index >= table.first:
                    pool.publish(table[index], keys[index])
        request.publish_at = (len(keys) + 1) * self.block_size

    def _release_passed(self, request: Request, end: int) -> None:
        for pool, window, table in zip(self.pools, self._windows, request.tables, strict=True):
            first = _first_seen(window, end, self.block_size)
            if first > table.first:
                pool.release(table.drop_before(first))

    def _note_tables(self, request: Request) -> None:
        request.views = tuple(table.view for table in request.tables)
        request.room = min(map(len, request.tables)) * self.block_size


def _rank(request: Request) -> tuple[int, int, int]:
    return (-request.priority, request.number, request.index)


def _first_seen(window: int | None, position: int, block_size: int) -> int:
    """The first block of which tokens at ``position`` and beyond see anything."""
    return 0 if window is None else max(0, position - window + 1) // block_size
