"""The scheduler and the block pool, without any tensors."""

from __future__ import annotations

import numpy as np
import pytest

from triptych.python_models.contract.errors import TriptychError
from triptych.python_models.language_model.engine.blocks import BlockPool, BlockTable, OutOfBlocks
from triptych.python_models.language_model.engine.config import EngineConfig
from triptych.python_models.language_model.engine.request import Prompt, Request
from triptych.python_models.language_model.engine.scheduler import Scheduler


def config(num_blocks, max_running=8, max_step_tokens=100, windows=(None,), **options):
    values = {
        "block_size": 4,
        "context_length": 10_000,
        "max_queued": 100,
        "heartbeat_s": 1.0,
        "timeout_s": 1.0,
        "eos_token_ids": frozenset(),
    } | options
    if isinstance(num_blocks, int):
        num_blocks = (num_blocks,) * len(windows)
    return EngineConfig(num_blocks, max_running=max_running, max_step_tokens=max_step_tokens, windows=windows, **values)


def scheduler_of(*args, **options):
    return Scheduler(config(*args, **options))


def request(length, first=0, groups=1, **options):
    ids = np.arange(first, first + length, dtype=np.int64)
    spans = options.pop("spans", ())
    prompt = Prompt(ids, np.arange(length, dtype=np.int64)[None], spans=spans)
    return Request("", prompt, options.pop("max_tokens", 100), 4, groups, **options)


def step(scheduler):
    """Plan and carry out one step: every request whose tokens are all computed gets one more."""
    plan = scheduler.plan()
    scheduler.check()
    for work in plan.work:
        if work.num_logits:
            work.request.append(1)
        scheduler.commit(work, work.count)
    scheduler.check()
    return plan


def add(scheduler, *requests):
    for one in requests:
        scheduler.add(one)
    return requests


def test_pool_gives_and_takes_back():
    pool = BlockPool(3, 4)
    first, second = pool.allocate(2), pool.allocate(1)
    with pytest.raises(OutOfBlocks):
        pool.allocate(1)
    pool.check([first, second])
    pool.release(first)
    assert pool.num_free == 2
    assert set(pool.allocate(2)) == set(first)
    with pytest.raises(AssertionError, match="references"):
        pool.check()


def test_pool_refuses_a_double_release():
    pool = BlockPool(2, 4)
    blocks = pool.allocate(1)
    pool.release(blocks)
    with pytest.raises(ValueError, match="released"):
        pool.release(blocks)


def test_pool_shares_known_blocks_and_forgets_the_oldest():
    pool = BlockPool(4, 4)
    table = pool.allocate(3)
    for block, key in zip(table, (b"a", b"b", b"c"), strict=True):
        pool.publish(block, key)
    assert pool.count_known([b"a", b"b", b"x"]) == 2
    assert pool.acquire([b"a", b"b"]) == table[:2]
    with pytest.raises(KeyError):
        pool.acquire([b"a", b"x"])
    pool.release(table)
    pool.release(table[:2])
    pool.check()
    assert pool.num_free == 4
    # one blank block, then the end of the known prefix goes first
    taken = pool.allocate(2)
    assert table[2] in taken
    assert pool.count_known([b"a", b"b", b"c"]) == 2
    assert pool.acquire([b"a", b"b"]) == table[:2]
    pool.check([taken, table[:2]])


def test_pool_forgets_wrong_content():
    pool = BlockPool(4, 4)
    table = pool.allocate(2)
    pool.publish(table[0], b"a")
    pool.publish(table[1], b"b")
    shared = pool.acquire([b"a"])
    assert pool.forget([b"a", b"b"], table) == [table[1]]
    pool.release(table)
    pool.release(shared)
    assert b"a" not in pool
    pool.check()


def test_pool_forgets_idle_content_but_leaves_that_of_others_alone():
    pool = BlockPool(4, 4)
    idle, other = pool.allocate(1), pool.allocate(1)
    pool.publish(idle[0], b"a")
    pool.publish(other[0], b"b")
    pool.release(idle)
    # somebody's block "b" is his own computation; mine of the same content was never known
    assert pool.forget([b"a", b"b"]) == idle
    assert b"b" in pool
    pool.check([other])


def test_tables_grow_without_changing_views():
    table = BlockTable()
    table.start(2, [7, 8])
    view = table.view
    table.extend(range(100))
    assert view.tolist() == [0, 0, 7, 8]
    assert table.view.tolist()[2:6] == [7, 8, 0, 1]
    assert table.view.dtype == np.int32
    assert table.drop_before(3) == [7]
    assert table.held == [8, *range(100)]
    assert table.clear() == [8, *range(100)]
    assert len(table) == table.first == 0


def test_decodes_and_prompt_chunks_mix_in_one_step():
    scheduler = scheduler_of(100, 8, 10)
    short, long = request(4), request(23, 1000)
    scheduler.add(short)
    assert step(scheduler).tokens == {short: 4}
    scheduler.add(long)
    assert step(scheduler).tokens == {short: 1, long: 9}
    assert step(scheduler).tokens == {short: 1, long: 9}
    assert step(scheduler).tokens == {short: 1, long: 5}
    assert step(scheduler).tokens == {short: 1, long: 1}


def test_the_first_in_line_gets_half_and_the_others_the_rest_shortest_first():
    scheduler = scheduler_of(1000, 8, 40)
    long, longer, short = add(scheduler, request(200), request(300, 1000), request(7, 2000))
    assert step(scheduler).tokens == {long: 20, longer: 13, short: 7}
    assert step(scheduler).tokens == {short: 1, long: 20, longer: 19}
    scheduler.remove(long)
    # what nobody else needs goes to the first
    assert step(scheduler).tokens == {short: 1, longer: 39}
    tiny = request(3, 3000)
    scheduler.add(tiny)
    assert step(scheduler).tokens == {short: 1, longer: 36, tiny: 3}


def test_a_long_prompt_holds_up_neither_streams_nor_short_prompts():
    scheduler = scheduler_of(10_000, 64, 256)
    stream = request(5)
    scheduler.add(stream)
    step(scheduler)
    long = request(9000, 10_000)
    scheduler.add(long)
    for number in range(30):
        short = request(40, 100_000 * (number + 1))
        scheduler.add(short)
        tokens = step(scheduler).tokens
        assert tokens[stream] == 1
        assert tokens[short] == 40
        assert tokens[long] >= 100
        assert sum(tokens.values()) <= 256
        scheduler.remove(short)


def test_without_chunks_every_prompt_is_one_piece():
    scheduler = scheduler_of(10_000, 8, 0)
    prompts = add(scheduler, request(5000), request(9000, 10_000), request(2000, 20_000))
    assert step(scheduler).tokens == {prompts[0]: 5000, prompts[2]: 2000}
    assert step(scheduler).tokens == {prompts[0]: 1, prompts[2]: 1, prompts[1]: 9000}


def test_spans_are_not_cut():
    scheduler = scheduler_of(1000, 8, 10)
    (one,) = add(scheduler, request(60, spans=((4, 12), (12, 18), (20, 45))))
    counts = [step(scheduler).tokens[one] for _ in range(5)]
    # before a span, a span, a span with what follows it, one longer than a step, the rest
    assert counts == [4, 8, 8, 25, 10]


def test_a_span_that_does_not_fit_beside_others_waits_for_its_turn():
    scheduler = scheduler_of(1000, 8, 10)
    first, second = add(scheduler, request(30), request(9, 1000, spans=((0, 9),)))
    for _ in range(3):
        tokens = step(scheduler).tokens
        assert second not in tokens
        assert tokens[first] == 10
    assert step(scheduler).tokens == {first: 1, second: 9}


def test_the_prefix_cache_gives_no_part_of_a_span():
    scheduler = scheduler_of(1000)
    first, second = request(30, spans=((6, 14),)), request(15, spans=((6, 14),))
    scheduler.add(first)
    step(scheduler)
    scheduler.add(second)
    # three blocks are known, but the third ends inside of the span, and so does the second
    assert step(scheduler).tokens[second] == 11
    assert second.num_cached == 4
    other = request(15, spans=((6, 13),))
    scheduler.add(other)
    assert step(scheduler).tokens[other] == 11


def test_first_come_first_served_within_max_running():
    scheduler = scheduler_of(100, 2, 100)
    requests = [request(5, 100 * k) for k in range(4)]
    add(scheduler, *requests)
    assert list(step(scheduler).tokens) == requests[:2]
    scheduler.remove(requests[0])
    assert list(step(scheduler).tokens) == [requests[1], requests[2]]


def test_a_request_without_room_waits_and_nobody_overtakes_it():
    scheduler = scheduler_of(5)
    first, large, small = add(scheduler, request(8), request(16, 100), request(3, 200))
    assert list(step(scheduler).tokens) == [first]
    scheduler.remove(first)
    assert list(step(scheduler).tokens) == [large, small]


def test_the_last_one_gives_way_and_comes_back():
    scheduler = scheduler_of(4)
    first, second = add(scheduler, request(8), request(7, 100))
    assert step(scheduler).tokens == {first: 8, second: 7}
    plan = step(scheduler)
    # the first needs a third block: the second, whose output stays, loses its two
    assert plan.preempted == (second,)
    assert plan.tokens == {first: 1}
    assert second.output_ids == [1]
    assert scheduler.waiting == [second]
    for _ in range(3):
        assert step(scheduler).tokens == {first: 1}
    scheduler.remove(first)
    # one block of it was still known
    assert step(scheduler).tokens in ({second: 8}, {second: 4})
    assert second.num_known == 9


def test_a_preempted_request_is_the_next_in_the_queue():
    scheduler = scheduler_of(4)
    _, second, third = add(scheduler, request(8), request(7, 100), request(3, 200))
    step(scheduler)
    assert scheduler.waiting == [third]
    assert step(scheduler).preempted == (second,)
    assert scheduler.waiting == [second, third]


def test_a_token_that_is_in_flight_when_its_request_is_preempted_is_kept():
    scheduler = scheduler_of(4)
    first, second = add(scheduler, request(8), request(7, 100))
    one = scheduler.plan()
    two = scheduler.plan()
    assert two.preempted == (second,)
    assert two.tokens == {first: 1}
    assert two.work[0].late
    # it cannot come back before its newest token is known
    assert second.in_flight
    scheduler.remove(first)
    assert not scheduler.plan().work
    for work in one.work:
        if not work.request.done and work.request is second:
            second.append(1)
            scheduler.commit(work, work.count)
    scheduler.check()
    assert second.num_computed == 0
    # what it computed in the blocks that it lost is known to nobody
    assert scheduler.plan().tokens == {second: 8}


def test_higher_priorities_come_first_and_take_the_place_of_lower_ones():
    scheduler = scheduler_of(100, 2)
    low, lower, normal, high = (request(5, 100 * k, priority=p) for k, p in enumerate((-1, -2, 0, 3)))
    add(scheduler, low, lower)
    step(scheduler)
    add(scheduler, normal, high)
    plan = step(scheduler)
    assert plan.preempted == (lower, low)
    assert list(plan.tokens) == [high, normal]
    assert scheduler.waiting == [low, lower]
    same = request(5, 900, priority=3)
    scheduler.add(same)
    # one of the same priority gives way to nobody
    assert step(scheduler).preempted == (normal,)
    assert scheduler.running == [high, same]


def test_the_oldest_of_a_priority_is_never_starved():
    scheduler = scheduler_of(12, 8, 16)
    oldest = request(20, max_tokens=20)
    scheduler.add(oldest)
    for number in range(25):
        if oldest.num_known == oldest.limit:
            break
        scheduler.add(request(12, 1000 * (number + 1)))
        plan = step(scheduler)
        assert oldest in plan.tokens
        assert oldest not in plan.preempted
    assert oldest.num_known == oldest.limit


def test_as_many_run_as_can_decode_in_one_step():
    scheduler = scheduler_of(100, 8, 4)
    requests = [request(3, 100 * k) for k in range(6)]
    add(scheduler, *requests)
    for _ in range(60):
        assert sum(step(scheduler).tokens.values()) <= 4
    assert [one.num_pending for one in requests[:4]] == [1] * 4
    assert not requests[4].output_ids
    scheduler.remove(requests[1])
    for _ in range(3):
        step(scheduler)
    assert requests[4].output_ids


def test_a_known_prefix_is_not_computed_again():
    scheduler = scheduler_of(100)
    first = request(10)
    scheduler.add(first)
    step(scheduler)
    same, whole = add(scheduler, request(10), request(8))
    plan = step(scheduler)
    assert plan.tokens == {first: 1, same: 2, whole: 4}
    assert same.tables[0].held[:2] == first.tables[0].held[:2]
    # the last token's logits are needed, so its block is computed although it is known
    assert whole.num_cached == 4
    for one in (first, same, whole):
        scheduler.remove(one)
    scheduler.check()


def test_a_prompt_that_waited_for_its_turn_finds_what_was_computed_since():
    scheduler = scheduler_of(100, 8, 8)
    first, second = add(scheduler, request(16), request(17))
    assert step(scheduler).tokens == {first: 4, second: 4}
    scheduler.remove(second)
    third = request(18)
    scheduler.add(third)
    fourth = request(19)
    scheduler.add(fourth)
    step(scheduler)
    step(scheduler)
    while not fourth.started:
        step(scheduler)
    assert fourth.num_cached >= 8


def test_window_groups_give_back_what_nobody_sees_and_still_serve_prefixes():
    scheduler = scheduler_of((40, 12), 8, 16, windows=(None, 6))
    first = request(60, groups=2)
    scheduler.add(first)
    for _ in range(4):
        step(scheduler)
    full, window = first.tables
    assert len(full.held) == 15
    # the next token sees 6 tokens with itself
    assert len(window.held) == 2
    assert window.first == (60 - 5) // 4
    scheduler.remove(first)
    again = request(60, groups=2)
    scheduler.add(again)
    # of the window's group only the last blocks are there, which is enough
    assert step(scheduler).tokens == {again: 4}
    assert again.num_cached == 56
    assert again.tables[1].first >= 12
    scheduler.remove(again)
    part = request(30, groups=2)
    scheduler.add(part)
    step(scheduler)
    # here they were overwritten, so nothing can be skipped in spite of the full group
    assert part.num_cached < 28


def test_salts_and_the_switch_keep_prefixes_apart():
    scheduler = scheduler_of(100)
    for options in ({"salt": "a"}, {"salt": "b"}, {"cacheable": False}, {"cacheable": False}):
        one = request(10, **options)
        scheduler.add(one)
        step(scheduler)
        assert one.num_cached == 0
    one = request(10, salt="a")
    scheduler.add(one)
    step(scheduler)
    assert one.num_cached == 8


def test_impossible_pools_and_spans_are_refused():
    with pytest.raises(ValueError, match="2 blocks of 4 tokens are too few for a window of 9: 3"):
        config((100, 2), windows=(None, 9))
    with pytest.raises(TriptychError, match=r"20 tokens can never fit.*window of 9"):
        config((100, 6), windows=(None, 9)).check_span(20)
    config((100, 8), windows=(None, 9)).check_span(20)
    # no request is as long as that window
    config((4, 4), windows=(None, 100)).check_span(16)


def test_blocks_with_other_positions_are_other_blocks():
    prompt = Prompt(np.arange(8, dtype=np.int64), np.arange(8, dtype=np.int64)[None])
    moved = Prompt(prompt.token_ids, prompt.position_ids + 1)
    one, other = Request("", prompt, 9, 4), Request("", moved, 9, 4)
    assert set(one.block_keys(8)).isdisjoint(other.block_keys(8))


def test_blocks_after_another_beginning_are_other_blocks():
    positions = np.arange(8, dtype=np.int64)[None]
    one = request(8)
    other = Request("", Prompt(np.array([99, 1, 2, 3, 4, 5, 6, 7]), positions), 9, 4)
    assert one.prompt.token_ids[4:].tolist() == other.prompt.token_ids[4:].tolist()
    assert set(one.block_keys(8)).isdisjoint(other.block_keys(8))


def test_the_check_finds_a_lost_block():
    scheduler = scheduler_of(10)
    one = request(10)
    scheduler.add(one)
    step(scheduler)
    one.tables[0].drop_before(1)
    with pytest.raises(AssertionError, match="block tables"):
        scheduler.check()
