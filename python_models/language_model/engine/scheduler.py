"""Which request computes how many tokens in the next step. Counts only: it knows neither tensors nor time."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

from .blocks import BlockPool, OutOfBlocks
from .request import Request


@dataclass(frozen=True)
class StepPlan:
    """One step of the engine.

    Attributes:
        tokens: request -> how many of its pending tokens to compute. A prompt, a part of one, what is left of one
            after a hit in the prefix cache, and a decode are all the same thing.
        preempted: requests that lost their blocks to others and will be computed again.
    """

    tokens: Mapping[Request, int]
    preempted: tuple[Request, ...] = ()


class Scheduler:
    """First come, first served, within three bounds: KV blocks, running requests and tokens per step.

    A request gets the blocks for all its known tokens when it is admitted and one more at a time while it decodes.
    When none is left, the request that came last gives its blocks back, goes to the front of the queue and is
    computed again later (recompute keeps its generated tokens, so the answer stays the same). Therefore all running
    requests came before all waiting ones, and the oldest always goes on. Decodes take their token before prompts
    take what is left of a step.
    """

    def __init__(self, pool: BlockPool, max_running: int, max_step_tokens: int) -> None:
        """Args: ``max_running`` requests at once, ``max_step_tokens`` tokens computed in one step at most."""
        self.pool = pool
        self.max_running = max_running
        self.max_step_tokens = max_step_tokens
        self.running: list[Request] = []
        self.waiting: deque[Request] = deque()
        self._added = 0

    def add(self, request: Request) -> None:
        """Queue a request; it must fit into the whole pool when alone."""
        self._added += 1
        request.number = self._added
        self.waiting.append(request)

    def remove(self, request: Request) -> None:
        """Take a request out, whatever its state, and free its blocks."""
        if request in self.running:
            self.running.remove(request)
        elif request in self.waiting:
            self.waiting.remove(request)
        self._release(request)

    def plan(self) -> StepPlan:
        """Decide the next step, preempting and admitting as needed."""
        tokens: dict[Request, int] = {}
        preempted: list[Request] = []
        # never more than a step takes: nobody is admitted into a step that they fill
        for request in [r for r in self.running if r.num_pending == 1]:
            if request in preempted or not self._grow(request, preempted):
                continue
            tokens[request] = 1
        budget = self.max_step_tokens - len(tokens)
        for request in self.running:
            if budget and request.num_pending > 1:
                tokens[request] = count = min(request.num_pending, budget)
                budget -= count
        while budget and self.waiting and not preempted and len(self.running) < self.max_running:
            request = self.waiting[0]
            if not self._admit(request):
                break
            self.waiting.popleft()
            self.running.append(request)
            tokens[request] = count = min(request.num_pending, budget)
            budget -= count
        return StepPlan(tokens, tuple(preempted))

    def advance(self, request: Request, count: int) -> None:
        """Record that ``count`` tokens were computed; blocks that became full are known to the prefix cache."""
        request.num_computed += count
        keys = request.block_keys(request.num_computed)
        for index in range(request.num_published, len(keys)):
            self.pool.publish(request.block_table[index], keys[index])
        request.num_published = len(keys)

    def check(self) -> None:
        """Verify the invariants of queues and blocks.

        Raises:
            AssertionError: that says which does not hold.
        """
        self.pool.check([r.block_table for r in self.running])
        if any(r.block_table or r.num_computed for r in self.waiting):
            raise AssertionError("a waiting request holds blocks")
        if len(self.running) > self.max_running:
            raise AssertionError(f"{len(self.running)} requests run, {self.max_running} may")
        for request in self.running:
            if len(request.block_table) * self.pool.block_size < request.num_computed:
                raise AssertionError(f"request {request.request_id!r} computed more tokens than it has blocks for")
        order = [r.number for r in (*self.running, *self.waiting)]
        if order != sorted(order):
            raise AssertionError("a request overtook one that came before it")

    def _admit(self, request: Request) -> bool:
        """Give a waiting request the blocks of all its known tokens, known ones from the prefix cache."""
        # the newest token is always computed: its logits are needed
        cached = self.pool.acquire(request.block_keys(request.num_tokens - 1))
        needed = self.pool.blocks_for(request.num_tokens) - len(cached)
        # a little room for those who decode, else the newcomer would soon be preempted again
        reserve = min(len(self.running), self.pool.num_blocks // 50)
        if self.pool.num_free < needed + reserve:
            self.pool.release(cached)
            return False
        request.block_table = cached + self.pool.allocate(needed)
        request.num_computed = len(cached) * self.pool.block_size
        request.num_published = len(cached)
        if not request.admitted_before:
            request.num_cached = request.num_computed
            request.admitted_before = True
        return True

    def _grow(self, request: Request, preempted: list[Request]) -> bool:
        """Make room for one more token; False where the request itself had to give way."""
        while len(request.block_table) * self.pool.block_size <= request.num_computed:
            try:
                request.block_table += self.pool.allocate(1)
            except OutOfBlocks:
                # it comes after `request` in this step's order, so nothing was planned for it yet
                victim = self.running.pop()
                self._release(victim)
                self.waiting.appendleft(victim)
                preempted.append(victim)
                if victim is request:
                    return False
        return True

    def _release(self, request: Request) -> None:
        self.pool.release(request.block_table)
        request.block_table = []
        request.num_computed = 0
