"""Random lives of requests against the scheduler alone, with a model of what every block really holds.

The model writes, for each token that a step computes, a number that stands for that token and all before it into the
place that the block tables name, and checks each place that the token would read. So whatever a block is believed to
hold must be what was written to it, whoever wrote it.
"""

from __future__ import annotations

import zlib
from collections import deque

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from triptych.python_models.language_model.engine.config import EngineConfig
from triptych.python_models.language_model.engine.request import Prompt, Request
from triptych.python_models.language_model.engine.scheduler import Scheduler
from triptych.python_models.language_model.engine.speculation import PromptLookup

VOCAB = 3


def make_config(num_blocks, windows=(None,), **options):
    values = {
        "block_size": 4,
        "context_length": 200,
        "max_running": 4,
        "max_queued": 100,
        "max_step_tokens": 16,
        "heartbeat_s": 1.0,
        "timeout_s": 1.0,
        "eos_token_ids": frozenset(),
    }
    if isinstance(num_blocks, int):
        num_blocks = (num_blocks,) * len(windows)
    return EngineConfig(num_blocks=num_blocks, windows=windows, **(values | options))


def make_request(config, ids, max_tokens=100, **options):
    ids = np.array(ids, dtype=np.int64)
    spans = options.pop("spans", ())
    prompt = Prompt(ids, np.arange(len(ids), dtype=np.int64)[None], spans=spans)
    options.setdefault("cacheable", config.prefix_cache)
    return Request("", prompt, max_tokens, config.block_size, len(config.num_blocks), **options)


class Simulation:
    """A device that runs steps in order, one behind the host where ``overlap`` is set."""

    def __init__(self, config, overlap):
        self.config = config
        self.overlap = overlap
        self.scheduler = Scheduler(config)
        self.memory = [np.zeros(n * config.block_size, dtype=np.int64) for n in config.num_blocks]
        self.tokens = {}
        self.flight = deque()
        self.alive = []
        self.preempted = self.hits = self.drafted = self.right = 0

    def add(self, request):
        self.tokens[request] = request.prompt.token_ids.tolist()
        self.alive.append(request)
        self.scheduler.add(request)

    def end(self, request):
        request.done = True
        self.alive.remove(request)
        self.scheduler.remove(request)

    def iterate(self):
        before = {r: r.number for r in self.scheduler.running}
        plan = self.scheduler.plan()
        self.scheduler.check()
        self.check_plan(plan, before)
        self.preempted += len(plan.preempted)
        results = [self.compute(work) for work in plan.work]
        self.flight.append((plan.work, results))
        while len(self.flight) > (1 if self.overlap else 0):
            self.finish(*self.flight.popleft())
            self.scheduler.check()
        return bool(plan.work)

    def check_plan(self, plan, before):
        total = sum(work.count for work in plan.work)
        limit = self.config.max_step_tokens
        spans = any(work.request.prompt.spans for work in plan.work)
        assert not limit or total <= limit or spans
        for work in plan.work:
            for start, end in work.request.prompt.spans:
                assert not start < work.start < end, "a span is cut at its beginning"
                assert not start < work.start + work.count < end, "a span is cut at its end"

    def prefix(self, request, tokens, upto):
        """A number for tokens [0, upto]; a token of a span stands for its whole span."""
        for start, end in request.prompt.spans:
            if start <= upto < end:
                return zlib.crc32(bytes(tokens[:end]) + bytes([upto]) + request.salt.encode()) + 1
        return zlib.crc32(bytes(tokens[: upto + 1]) + request.salt.encode()) + 1

    def compute(self, work):
        """Write and read as a runner would; the tokens chosen, one for each logits row."""
        request, size = work.request, self.config.block_size
        known = self.tokens[request]
        part = work.slice()
        assert part.slot >= 0
        tokens = known + list(work.drafts)
        assert len(tokens) >= work.start + work.count
        given = part.token_ids.tolist()
        wanted = tokens[work.start : work.start + work.count]
        assert given[part.first_on_device :] == wanted[part.first_on_device :]
        end = work.start + work.count
        for group, window in enumerate(self.config.windows):
            table = part.block_tables[group]
            assert len(table) * size >= end
            held = request.tables[group].held
            for p in range(work.start, end):
                assert table[p // size] in held
                self.memory[group][table[p // size] * size + p % size] = self.prefix(request, tokens, p)
            for q in range(work.start, end):
                for p in range(0 if window is None else max(0, q - window + 1), q + 1):
                    found = self.memory[group][table[p // size] * size + p % size]
                    assert found == self.prefix(request, tokens, p), f"token {q} finds something else at {p}"
        results = []
        for k in range(work.num_logits):
            upto = end - work.num_logits + k
            results.append(self.prefix(request, tokens, upto) % VOCAB)
        if work.num_logits:
            assert work.number == len(known) - request.num_prompt
            right = self.accepted(work, results)
            self.tokens[request] = known + results[:right]
        return results

    @staticmethod
    def accepted(work, results):
        count = 1
        for draft, result in zip(work.drafts, results, strict=False):
            if draft != result:
                break
            count += 1
        return count

    def finish(self, works, results):
        for work, sampled in zip(works, results, strict=True):
            request = work.request
            if request.done:
                continue
            count = work.count
            if work.num_logits:
                right = self.accepted(work, sampled)
                for token in sampled[:right]:
                    request.append(token)
                request.num_tokens += right - 1
                count -= work.num_logits - right
                self.drafted += len(work.drafts)
                self.right += right - 1
                if request.speculation is not None and work.drafts:
                    request.speculation.report(len(work.drafts), right - 1)
            self.scheduler.commit(work, count)
            self.hits += request.num_cached
            if request.num_known >= request.limit:
                assert request.num_known == request.limit
                self.end(request)


@st.composite
def lives(draw):
    size = draw(st.integers(1, 12))
    out = []
    for _ in range(size):
        # few different beginnings, so that the prefix cache is used
        seed = draw(st.integers(0, 2))
        length = draw(st.integers(1, 40))
        # few different ones, so that they are shared too
        spans = tuple(
            span for span in draw(st.sampled_from([(), (), ((2, 9),), ((0, 3), (5, 14))])) if span[1] < length
        )
        out.append(
            {
                "ids": [seed, *((i * i + i // 3) % VOCAB for i in range(1, length))],
                "max_tokens": draw(st.integers(1, 20)),
                "spans": spans,
                "priority": draw(st.sampled_from([0, 0, 0, 1, 2])),
                "salt": draw(st.sampled_from(["", "", "s"])),
                "speculative": draw(st.sampled_from([0, 0, 3])),
                "gap": draw(st.integers(0, 4)),
                "cancel": draw(st.sampled_from([None, None, None, 1, 5])),
            }
        )
    return out


@given(
    lives=lives(),
    # 60 tokens of prompt and answer need 15 blocks
    num_blocks=st.integers(15, 30),
    windows=st.sampled_from([(None,), (None, 6), (None, 9, 3), (5,)]),
    narrow=st.integers(0, 12),
    max_running=st.integers(1, 5),
    max_step_tokens=st.sampled_from([0, 1, 3, 7, 16, 64]),
    overlap=st.booleans(),
    prefix_cache=st.booleans(),
)
@settings(max_examples=600, deadline=None)
def test_blocks_hold_what_they_are_believed_to_hold(
    lives, num_blocks, windows, narrow, max_running, max_step_tokens, overlap, prefix_cache
):
    counts = tuple(num_blocks if w is None else max(num_blocks - narrow, 6) for w in windows)
    config = make_config(
        counts, windows, max_running=max_running, max_step_tokens=max_step_tokens, prefix_cache=prefix_cache
    )
    run_lives(Simulation(config, overlap), lives)


def run_lives(simulation, lives):
    config, scheduler = simulation.config, simulation.scheduler
    cancels = []
    queue = deque(lives)
    clock, idle = 0, 0
    gap = 0
    while queue or simulation.alive:
        clock += 1
        while queue and gap <= 0:
            life = queue.popleft()
            gap = life["gap"]
            speculation = None
            if life["speculative"]:
                speculation = PromptLookup(life["ids"], life["speculative"], VOCAB)
            request = make_request(
                config,
                life["ids"],
                life["max_tokens"],
                spans=life["spans"],
                priority=life["priority"],
                salt=life["salt"],
                speculation=speculation,
                speculative_tokens=life["speculative"],
            )
            simulation.add(request)
            if life["cancel"] is not None:
                cancels.append((clock + life["cancel"], request))
        gap -= 1
        for when, request in cancels:
            if when == clock and not request.done:
                simulation.end(request)
                scheduler.check()
        idle = 0 if simulation.iterate() else idle + 1
        assert idle < 5 or not simulation.alive, "nothing goes on"
        assert clock < 5000
    while simulation.flight:
        simulation.finish(*simulation.flight.popleft())
    scheduler.check()
    assert scheduler.idle


@pytest.mark.parametrize("overlap", [False, True])
def test_the_random_lives_meet_what_they_are_to_meet(overlap):
    """The property above says little if nothing is preempted, shared or guessed."""
    config = make_config((16, 8), (None, 6), max_running=4)
    simulation = Simulation(config, overlap)
    life = {"max_tokens": 20, "spans": (), "priority": 0, "salt": "", "speculative": 3, "gap": 1, "cancel": None}
    run_lives(simulation, [{"ids": [0, 1, 2, 0, 1, 2, 0, 1, 2, k % 2], **life} for k in range(12)])
    assert simulation.preempted
    assert simulation.hits
    assert simulation.drafted > simulation.right > 0
