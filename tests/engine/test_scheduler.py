"""The scheduler and the block pool, without any tensors."""

from __future__ import annotations

import numpy as np
import pytest

from triptych.python_models.contract.sampling import SamplingParams
from triptych.python_models.language_model.engine.blocks import BlockPool, OutOfBlocks
from triptych.python_models.language_model.engine.request import Limits, Prompt, Request
from triptych.python_models.language_model.engine.scheduler import Scheduler


def request(length, first=0, block_size=4):
    ids = np.arange(first, first + length, dtype=np.int64)
    return Request(
        request_id="",
        prompt=Prompt(ids, np.arange(length, dtype=np.int64)[None]),
        sampling=SamplingParams(),
        limits=Limits(100, None, 100.0),
        responder=None,
        detokenizer=None,
        sampler=None,
        block_size=block_size,
    )


def step(scheduler):
    """Plan and carry out one step: every request whose tokens are all computed gets one more."""
    plan = scheduler.plan()
    scheduler.check()
    for one, count in plan.tokens.items():
        scheduler.advance(one, count)
        if one.num_pending == 0:
            one.output_ids.append(1)
    scheduler.check()
    return plan


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
    assert pool.acquire([b"a", b"b", b"x"]) == table[:2]
    pool.release(table)
    pool.release(table[:2])
    pool.check()
    assert pool.num_free == 4
    # one blank block, then the end of the known prefix goes first
    taken = pool.allocate(2)
    assert table[2] in taken
    assert pool.acquire([b"a", b"b", b"c"]) == table[:2]
    pool.check([taken, table[:2]])


def test_pool_forgets_wrong_content():
    pool = BlockPool(4, 4)
    table = pool.allocate(2)
    pool.publish(table[0], b"a")
    pool.publish(table[1], b"b")
    shared = pool.acquire([b"a"])
    assert pool.unpublish(table) == [table[1]]
    pool.release(table)
    pool.release(shared)
    assert pool.acquire([b"a"]) == []
    pool.check()


def test_decodes_and_prompt_chunks_mix_in_one_step():
    scheduler = Scheduler(BlockPool(100, 4), 8, 10)
    short, long = request(4), request(23, 1000)
    scheduler.add(short)
    assert step(scheduler).tokens == {short: 4}
    scheduler.add(long)
    assert step(scheduler).tokens == {short: 1, long: 9}
    assert step(scheduler).tokens == {short: 1, long: 9}
    assert step(scheduler).tokens == {short: 1, long: 5}
    assert step(scheduler).tokens == {short: 1, long: 1}


def test_first_come_first_served_within_max_running():
    scheduler = Scheduler(BlockPool(100, 4), 2, 100)
    requests = [request(5, 100 * k) for k in range(4)]
    for one in requests:
        scheduler.add(one)
    assert list(step(scheduler).tokens) == requests[:2]
    scheduler.remove(requests[0])
    assert list(step(scheduler).tokens) == [requests[1], requests[2]]


def test_a_request_without_room_waits_and_nobody_overtakes_it():
    scheduler = Scheduler(BlockPool(5, 4), 8, 100)
    first, large, small = request(8), request(16, 100), request(3, 200)
    for one in (first, large, small):
        scheduler.add(one)
    assert list(step(scheduler).tokens) == [first]
    scheduler.remove(first)
    assert list(step(scheduler).tokens) == [large, small]


def test_the_last_one_gives_way_and_comes_back():
    scheduler = Scheduler(BlockPool(4, 4), 8, 100)
    first, second = request(8), request(7, 100)
    scheduler.add(first)
    scheduler.add(second)
    assert step(scheduler).tokens == {first: 8, second: 7}
    plan = step(scheduler)
    # the first needs a third block: the second, whose output stays, loses its two
    assert plan.preempted == (second,)
    assert plan.tokens == {first: 1}
    assert second.output_ids == [1]
    assert list(scheduler.waiting) == [second]
    for _ in range(3):
        assert step(scheduler).tokens == {first: 1}
    scheduler.remove(first)
    # one block of it was still known
    assert step(scheduler).tokens in ({second: 8}, {second: 4})
    assert second.num_tokens == 9


def test_a_preempted_request_is_the_next_in_the_queue():
    scheduler = Scheduler(BlockPool(4, 4), 8, 100)
    first, second, third = request(8), request(7, 100), request(3, 200)
    for one in (first, second, third):
        scheduler.add(one)
    step(scheduler)
    assert list(scheduler.waiting) == [third]
    assert step(scheduler).preempted == (second,)
    assert list(scheduler.waiting) == [second, third]


def test_decodes_that_fill_a_step_hold_back_the_next_prompt():
    scheduler = Scheduler(BlockPool(100, 4), 8, 4)
    requests = [request(3, 100 * k) for k in range(6)]
    for one in requests:
        scheduler.add(one)
    for _ in range(60):
        assert sum(step(scheduler).tokens.values()) <= 4
    assert [one.num_pending for one in requests[:4]] == [1] * 4
    assert not requests[4].output_ids
    scheduler.remove(requests[1])
    for _ in range(3):
        step(scheduler)
    assert requests[4].output_ids


def test_a_known_prefix_is_not_computed_again():
    scheduler = Scheduler(BlockPool(100, 4), 8, 100)
    first = request(10)
    scheduler.add(first)
    step(scheduler)
    same = request(10)
    whole = request(8)
    scheduler.add(same)
    scheduler.add(whole)
    plan = step(scheduler)
    assert plan.tokens == {first: 1, same: 2, whole: 4}
    assert same.block_table[:2] == first.block_table[:2]
    # the last token's logits are needed, so its block is computed although it is known
    assert whole.num_cached == 4
    for one in (first, same, whole):
        scheduler.remove(one)
    scheduler.check()


def test_blocks_with_other_positions_are_other_blocks():
    prompt = Prompt(np.arange(8, dtype=np.int64), np.arange(8, dtype=np.int64)[None])
    moved = Prompt(prompt.token_ids, prompt.position_ids + 1)
    one, other = request(8), request(8)
    one.prompt, other.prompt = prompt, moved
    assert set(one.block_keys(8)).isdisjoint(other.block_keys(8))


def test_blocks_after_another_beginning_are_other_blocks():
    positions = np.arange(8, dtype=np.int64)[None]
    one, other = request(8), request(8)
    other.prompt = Prompt(np.array([99, 1, 2, 3, 4, 5, 6, 7]), positions)
    assert one.prompt.token_ids[4:].tolist() == other.prompt.token_ids[4:].tolist()
    assert set(one.block_keys(8)).isdisjoint(other.block_keys(8))


def test_the_check_finds_a_lost_block():
    scheduler = Scheduler(BlockPool(10, 4), 8, 100)
    one = request(10)
    scheduler.add(one)
    step(scheduler)
    one.block_table.pop()
    with pytest.raises(AssertionError, match="block tables"):
        scheduler.check()
