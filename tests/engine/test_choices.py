"""Several answers to one prompt, priorities, salts and the limits of media."""

from __future__ import annotations

import logging
import time

import numpy as np
import pytest
import torch

from triptych.python_models.contract.errors import ErrorKind
from triptych.python_models.contract.plan import MediaItem
from triptych.python_models.language_model.engine.request import seed_of_choice
from triptych.python_models.language_model.runner.step import MediaRows


def until(condition, timeout_s=30.0):
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "it did not become true"
        time.sleep(0.005)


def by_choice(answer):
    out = {}
    for delta in answer.deltas[1:]:
        out.setdefault(delta.index, []).extend(delta.token_ids)
    return [out[k] for k in sorted(out)]


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("prefix_cache", [False, True])
def test_choices_share_the_prompt_and_draw_apart(make_toy, overlap, prefix_cache):
    toy = make_toy(overlap=overlap, prefix_cache=prefix_cache)
    prompt = [1 + k % 7 for k in range(30)]
    options = {"max_tokens": 12, "temperature": 1.0}
    single = [toy.submit([*prompt], seed=seed_of_choice(5, k), **options).ok().token_ids for k in range(4)]
    toy.runner.steps.clear()
    answer = toy.submit([0, *prompt[1:]], n=4, seed=5, **options).ok()
    computed = sum(map(sum, toy.runner.steps))
    # the prompt once, of the others what does not fill a block, and all but the last of the tokens
    assert computed <= 30 + 3 * 2 + 4 * 12
    answer = toy.submit(prompt, n=4, seed=5, **options).ok()
    assert by_choice(answer) == single
    assert len({tuple(tokens) for tokens in single}) == 4
    assert seed_of_choice(5, 0) == 5
    ends = [delta for delta in answer.deltas if delta.finish_reason]
    assert sorted(delta.index for delta in ends) == [0, 1, 2, 3]
    assert [d.usage is not None for d in answer.deltas] == [
        k == 0 or bool(d.finish_reason) for k, d in enumerate(answer.deltas)
    ]
    assert answer.usage.completion_tokens == 48
    assert answer.usage.prompt_tokens == 30
    again = toy.submit(prompt, max_tokens=1).ok()
    assert (again.usage.cached_tokens > 0) == prefix_cache


def test_choices_without_streaming_are_one_delta_each(make_toy):
    toy = make_toy(max_running=2)
    streamed = toy.submit([1, 2, 3], n=3, seed=1, temperature=1.0, max_tokens=9).ok()
    whole = toy.submit([1, 2, 3], n=3, seed=1, temperature=1.0, max_tokens=9, stream=False).ok()
    assert len(whole.deltas) == 4
    assert by_choice(whole) == by_choice(streamed)
    assert whole.usage.completion_tokens == 27
    until(lambda: toy.meter("triptych_kv_cache_usage_ratio") == 0)
    assert toy.meter("triptych_requests_total", "ok") == 2
    assert toy.meter("triptych_prompt_tokens_total", "text") == 6


def test_a_cancel_or_a_fault_ends_all_choices(make_toy):
    toy = make_toy()
    running = toy.submit([1, 2], "many", n=3, seed=1, temperature=1.0, max_tokens=5000)
    until(lambda: len(toy.engine._scheduler.running) == 3)
    toy.engine.cancel(["many"])
    assert running.wait().error.kind is ErrorKind.CANCELLED
    until(lambda: not toy.engine._scheduler.running)
    broken = toy.submit([1, 2], "broken", n=3, seed=1, temperature=1.0, max_tokens=5000)
    until(lambda: len(toy.engine._scheduler.running) == 3)
    slot = toy.engine._scheduler.running[1].slot

    def fail(slices):
        if any(part.slot == slot for part in slices):
            raise RuntimeError("choice 1")

    toy.runner.fail = fail
    assert broken.wait().error.kind is ErrorKind.STAGE_FAILED
    toy.runner.fail = lambda slices: None
    assert toy.submit([1, 2], max_tokens=3).ok()
    assert toy.engine._in_flight == 0


def test_each_choice_takes_a_place_in_the_queue(make_toy):
    toy = make_toy(max_running=2, max_queued=2)
    assert toy.submit([1], n=5).wait().error.kind is ErrorKind.OVERLOADED
    assert toy.submit([1], n=4, max_tokens=3).ok().usage.completion_tokens == 12


def test_higher_priorities_are_answered_first(make_toy):
    toy = make_toy(max_running=1)
    toy.runner.gate.clear()
    ends = []
    answers = []
    for name, priority in (("a", 0), ("b", 0), ("c", 5), ("d", 1)):
        answer = toy.submit([1, 2], name, priority=priority, max_tokens=5)
        answer.on_delta = lambda d, name=name: d.finish_reason and ends.append(name)
        answers.append(answer)
    toy.runner.gate.set()
    for answer in answers:
        answer.ok()
    assert ends == ["c", "d", "a", "b"]


def test_salts_keep_prefixes_apart(make_toy):
    toy = make_toy()
    prompt = list(range(1, 30))
    cached = [
        toy.submit(prompt, cache_salt=salt, max_tokens=2).ok().usage.cached_tokens for salt in ("", "x", "y", "x", "")
    ]
    assert cached == [0, 0, 0, 28, 28]


class Rows:
    """Media rows that count how often they are looked at."""

    def __init__(self, count, width=8):
        self.rows = torch.rand(count, width)
        self.taken = []

    @property
    def nbytes(self):
        return self.rows.nbytes

    def __getitem__(self, index):
        self.taken.append(index)
        return self.rows[index]


def test_rows_of_media_are_not_touched_where_the_prefix_is_known(make_toy):
    toy = make_toy()
    places = np.arange(3, 11)
    first, second = Rows(8), Rows(8)
    second.rows = first.rows
    prompt = list(range(1, 21))
    answers = [
        toy.submit([*prompt, last], media=(MediaRows(places, rows),), max_tokens=5).ok()
        for rows, last in ((first, 1), (second, 2))
    ]
    assert len(first.taken) == 1
    assert answers[1].usage.cached_tokens == 20
    assert second.taken == []


def test_bytes_of_media_are_bounded(make_toy):
    toy = make_toy(max_media_bytes=3 * 2**20, max_running=1)
    media = (MediaRows(np.arange(4), torch.zeros(4, 2**16)),)
    toy.runner.gate.clear()
    running = [toy.submit([1] * 5, media=media, max_tokens=5) for _ in range(3)]
    refused = toy.submit([1] * 5, media=media).wait()
    assert refused.error.kind is ErrorKind.OVERLOADED
    assert "hold 3.0 MiB" in refused.error.message
    assert "max_media_mb 3" in refused.error.message
    text = toy.submit([1] * 5, max_tokens=5)
    large = toy.submit([1] * 20, media=(MediaRows(np.arange(16), torch.zeros(16, 2**16)),)).wait()
    assert large.error.kind is ErrorKind.TOO_LARGE
    assert "4.0 MiB" in large.error.message
    toy.runner.gate.set()
    for answer in (*running, text):
        answer.ok()
    assert toy.submit([1] * 5, media=media, max_tokens=5).ok()
    assert toy.engine._media_bytes == 0


def test_a_span_that_can_never_be_computed_is_refused(make_toy):
    toy = make_toy(num_blocks=(100, 6), windows=(None, 9))
    assert toy.submit([1] * 40, spans=((2, 8),), max_tokens=4).ok()
    error = toy.submit([1] * 40, spans=((2, 32),), max_tokens=4).wait().error
    assert error.kind is ErrorKind.CONTEXT_LENGTH_EXCEEDED
    assert "30 tokens can never fit" in error.message


@pytest.mark.parametrize("overlap", [False, True])
def test_a_runner_out_of_slots_or_with_other_groups_is_refused(make_toy, overlap):
    with pytest.raises(ValueError, match="256 slots are too few for 257"):
        make_toy(max_running=257, overlap=overlap)


def test_operators_read_what_was_computed(make_toy, caplog):
    toy = make_toy(log_s=0.0)
    with caplog.at_level(logging.INFO):
        toy.submit([1] * 10, max_tokens=3).ok()
        toy.submit([1] * 10, max_tokens=30).ok()
    prefill = [r.getMessage() for r in caplog.records if r.getMessage().startswith("Prefill batch.")]
    decode = [r.getMessage() for r in caplog.records if r.getMessage().startswith("Decode batch.")]
    assert any("#new-seq: 1, #new-token: 10, #cached-token: 0" in line for line in prefill)
    assert any("#new-seq: 1, #new-token: 2, #cached-token: 8" in line for line in prefill)
    assert any("#running-req: 1, #token: " in line and "gen throughput (token/s): " in line for line in decode)


def test_media_of_another_content_are_other_blocks(make_tiny):
    tiny = make_tiny("qwen2_5_vl")
    stage = tiny.stage()
    prompt = list(range(1, 31))
    cached = []
    for digest in ("a", "a", "b"):
        rows = torch.full((8, 64), float(ord(digest) % 3))
        item = MediaItem("image", digest, ((4, 12),), "vision")
        answer = tiny.ask(stage, prompt, items=(item,), tensors={"vision_embeddings": rows}, max_tokens=3).ok()
        cached.append(answer.usage.cached_tokens)
    # the block before the picture is the same
    assert cached == [0, 28, 4]
