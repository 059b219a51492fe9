"""The life of requests in the engine, with a toy model whose answers depend on every token in its pages."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from triptych.python_models.contract.errors import ErrorKind, TriptychError


def until(condition, timeout_s=30.0):
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "it did not become true"
        time.sleep(0.005)


def test_stream_begins_with_usage_and_ends_with_all_of_it(make_toy):
    answer = make_toy().submit([5, 6, 7], max_tokens=9).ok()
    first, *middle, last = answer.deltas
    assert first.is_heartbeat
    assert first.usage.prompt_tokens == 3
    assert all(len(d.token_ids) == 1 and d.usage is None and not d.finish_reason for d in middle)
    assert last.finish_reason == "length"
    assert last.usage.completion_tokens == 9
    assert len(answer.token_ids) == 9


def test_without_streaming_there_is_one_answer(make_toy):
    toy = make_toy()
    streamed = toy.submit([5, 6, 7], max_tokens=9, logprobs=True, top_logprobs=2).ok()
    whole = toy.submit([5, 6, 7], max_tokens=9, logprobs=True, top_logprobs=2, stream=False).ok()
    assert len(whole.deltas) == 2
    assert whole.deltas[1].text == streamed.text
    assert list(whole.deltas[1].token_ids) == streamed.token_ids
    assert list(whole.deltas[1].logprobs) == streamed.logprobs
    assert len(streamed.logprobs) == 9


def test_end_of_sequence_min_tokens_and_ignore_eos(make_toy):
    toy = make_toy(eos=0)
    answers = [toy.submit([k], max_tokens=500) for k in range(1, 9)]
    lengths = []
    for answer in answers:
        assert answer.ok().finish == ("stop", 0)
        assert answer.token_ids[-1] == 0
        assert 0 not in answer.token_ids[:-1]
        assert len(answer.text) == len(answer.token_ids) - 1
        assert answer.usage.completion_tokens == len(answer.token_ids)
        lengths.append(len(answer.token_ids))
    k = int(np.argmin(lengths))
    more = toy.submit([k + 1], max_tokens=500, min_tokens=lengths[k] + 3).ok()
    assert len(more.token_ids) >= lengths[k] + 3
    beyond = toy.submit([k + 1], max_tokens=lengths[k] + 5, ignore_eos=True).ok()
    assert beyond.finish == ("length", None)
    assert beyond.token_ids[: lengths[k]] == answers[k].token_ids


def test_stop_token_ids_and_stop_strings(make_toy):
    toy = make_toy()
    plain = toy.submit([3, 1, 4], max_tokens=30).ok()
    fifth = plain.token_ids[4]
    at = plain.token_ids.index(fifth)
    stopped = toy.submit([3, 1, 4], max_tokens=30, stop_token_ids=[fifth]).ok()
    assert stopped.finish == ("stop", fifth)
    assert stopped.token_ids == plain.token_ids[: at + 1]
    word = plain.text[6:9]
    cut = toy.submit([3, 1, 4], max_tokens=30, stop=(word,)).ok()
    assert cut.finish == ("stop", word)
    assert cut.text == plain.text[: plain.text.index(word)]
    kept = toy.submit([3, 1, 4], max_tokens=30, stop=(plain.text[-1] + "?",)).ok()
    assert kept.text == plain.text


def test_cancel_ends_a_running_and_a_waiting_request(make_toy):
    toy = make_toy(max_running=1)
    running = toy.submit([1, 2], "run", max_tokens=9000).wait_first
    waiting = toy.submit([1, 2], "wait", max_tokens=5)
    one = running()
    until(lambda: toy.meter("triptych_requests_waiting") == 1)
    toy.engine.cancel(["wait", "unknown", ""])
    assert waiting.wait().error.kind is ErrorKind.CANCELLED
    assert one.error is None
    toy.engine.cancel(["run"])
    assert one.wait().error.kind is ErrorKind.CANCELLED
    until(lambda: toy.meter("triptych_kv_cache_usage_ratio") == 0)
    assert toy.meter("triptych_requests_total", "cancelled") == 2
    assert toy.submit([1, 2], max_tokens=3).ok()


def test_a_cancel_takes_effect_within_a_step(make_toy):
    toy = make_toy()
    toy.runner.gate.clear()
    answer = toy.submit([1, 2], "a", max_tokens=9000)
    until(lambda: len(toy.engine._answers) == 1)
    toy.engine.cancel(["a"])
    toy.runner.gate.set()
    assert answer.wait().error.kind is ErrorKind.CANCELLED
    assert len(answer.token_ids) <= 1


def test_a_lease_that_is_not_renewed_ends_the_request(make_toy):
    toy = make_toy()
    toy.runner.fail = lambda slices: time.sleep(0.002)
    kept = toy.submit([1], "kept", max_tokens=9000, lease_s=0.4)
    left = toy.submit([2], "left", max_tokens=9000, lease_s=0.4)
    end = time.monotonic() + 30
    while left.error is None and time.monotonic() < end:
        toy.engine.renew(["kept"])
        time.sleep(0.05)
    assert left.wait().error.kind is ErrorKind.CANCELLED
    assert "lease of 0.4 s" in left.error.message
    assert kept.error is None
    assert kept.wait().error.kind is ErrorKind.CANCELLED


def test_timeouts_of_request_and_server(make_toy):
    toy = make_toy(timeout_s=0.3)
    toy.runner.fail = lambda slices: time.sleep(0.002)
    own, server = toy.submit([1], max_tokens=9000, timeout_s=0.1), toy.submit([2], max_tokens=9000, timeout_s=99.0)
    assert own.wait().error.kind is ErrorKind.TIMEOUT
    assert "0.1 s" in own.error.message
    assert server.wait().error.kind is ErrorKind.TIMEOUT
    assert "0.3 s" in server.error.message


def test_heartbeats_while_there_is_nothing_to_say(make_toy):
    toy = make_toy(heartbeat_s=0.05, max_running=1)
    toy.runner.fail = lambda slices: time.sleep(0.002)
    running = toy.submit([1], "a", max_tokens=9000, stream=False)
    waiting = toy.submit([2], "b", max_tokens=9000)
    for answer in (running, waiting):
        until(lambda answer=answer: len(answer.deltas) >= 3)
        assert all(d.is_heartbeat for d in answer.deltas)
        assert [d.usage is not None for d in answer.deltas[:3]] == [True, False, False]
    toy.engine.cancel(["a", "b"])


def test_one_too_many_is_refused(make_toy):
    toy = make_toy(max_running=2, max_queued=1)
    answers = [toy.submit([k], f"{k}", max_tokens=9000) for k in (1, 2, 3)]
    refused = toy.submit([4]).wait()
    assert refused.error.kind is ErrorKind.OVERLOADED
    assert "2 requests may run and 1 wait" in refused.error.message
    assert refused.deltas == []
    toy.engine.cancel(["1"])
    answers[0].wait()
    assert toy.submit([5], "5", max_tokens=9000).wait_first().error is None
    toy.engine.cancel(["2", "3", "5"])
    until(lambda: toy.engine._in_flight == 0)
    assert toy.submit([4], max_tokens=2).ok()
    assert toy.meter("triptych_requests_total", "overloaded") == 1


@pytest.mark.parametrize(
    ("length", "options", "kind", "message"),
    [
        (0, {}, ErrorKind.INVALID_REQUEST, "empty"),
        (100, {}, ErrorKind.CONTEXT_LENGTH_EXCEEDED, "100 tokens.*context length is 100"),
        (60, {"max_tokens": 41}, ErrorKind.CONTEXT_LENGTH_EXCEEDED, "60.*41.*101.*100.*may be 40"),
        (82, {}, ErrorKind.CONTEXT_LENGTH_EXCEEDED, "82 tokens can never fit.*80"),
        (60, {"max_tokens": 22}, ErrorKind.CONTEXT_LENGTH_EXCEEDED, "60 tokens and max_tokens 22.*80"),
        (3, {"logit_bias": {40: 1.0}}, ErrorKind.INVALID_REQUEST, "logit_bias names token 40"),
        (3, {"stop_token_ids": [99]}, ErrorKind.INVALID_REQUEST, "stop_token_ids names token 99"),
    ],
)
def test_what_can_never_run_is_refused(make_toy, length, options, kind, message):
    toy = make_toy(num_blocks=20, context_length=100)
    answer = toy.submit([1] * length, **options).wait()
    assert answer.error.kind is kind
    answer.error.message = answer.error.message.replace("\n", " ")
    with pytest.raises(type(answer.error), match=message):
        raise answer.error
    assert answer.deltas == []


def test_the_largest_request_that_fits_runs(make_toy):
    toy = make_toy(num_blocks=20, context_length=100)
    exact = toy.submit([1] * 60, max_tokens=21).ok()
    assert len(exact.token_ids) == 21
    open_end = toy.submit([2] * 60).ok()
    assert len(open_end.token_ids) == 21
    toy = make_toy(num_blocks=100, context_length=100)
    assert len(toy.submit([2] * 60).ok().token_ids) == 40


def test_a_request_that_breaks_a_step_harms_no_other(make_toy):
    toy = make_toy()
    alone = [toy.submit([k, k + 1], max_tokens=40).ok().token_ids for k in (1, 2, 3)]

    def fail(slices):
        if any(13 in part.token_ids[:1] and part.start == 0 for part in slices):
            raise RuntimeError("thirteen")

    toy.runner.fail = fail
    toy.runner.gate.clear()
    good = [toy.submit([k, k + 1], max_tokens=40) for k in (1, 2)]
    bad = toy.submit([13, 1], max_tokens=40)
    good.append(toy.submit([3, 4], max_tokens=40))
    toy.runner.gate.set()
    assert bad.wait().error.kind is ErrorKind.STAGE_FAILED
    assert bad.error.stage == "language_model"
    assert "thirteen" in bad.error.message
    assert [g.ok().token_ids for g in good] == alone
    assert toy.meter("triptych_requests_total", "stage_failed") == 1


def test_nan_logits_end_only_their_request_and_leave_clean_blocks(make_toy):
    toy = make_toy()
    expected = toy.submit([1, 2], max_tokens=20).ok().token_ids
    plain = toy.runner.forward
    blocks = []

    def run(slices):
        logits = plain(slices)
        for row, part in enumerate(slices):
            if part.start == 0 and part.token_ids[0] == 13:
                blocks.append(part.block_tables[0][0])
            elif part.start == 9 and blocks == [part.block_tables[0][0]]:
                logits[row] = torch.nan
        return logits

    toy.runner.forward = run
    good, bad = toy.submit([1, 2], max_tokens=20), toy.submit([13, 2], max_tokens=20)
    assert bad.wait().error.kind is ErrorKind.STAGE_FAILED
    assert "NaN" in bad.error.message
    assert good.ok().token_ids == expected
    assert toy.runner.scrubbed[0] == blocks[0]


def test_a_responder_that_raises_harms_no_other(make_toy, recorder):
    toy = make_toy()

    def raise_later(delta):
        if delta.token_ids:
            raise OSError("gone")

    broken = toy.submit([1], "broken", recorder(raise_later), max_tokens=9000)
    assert len(toy.submit([2], max_tokens=50).ok().token_ids) == 50
    assert broken.wait().error.kind is ErrorKind.CANCELLED


def test_a_fault_of_the_engine_itself_ends_all_and_it_goes_on(make_toy, monkeypatch):
    toy = make_toy()
    toy.runner.gate.clear()
    answers = [toy.submit([k], max_tokens=9000) for k in (1, 2)]
    until(lambda: len(toy.engine._answers) + len(toy.engine._inbox) == 2)

    def broken(*_):
        monkeypatch.undo()
        raise ValueError("bug")

    monkeypatch.setattr(toy.engine._scheduler, "plan", broken)
    toy.runner.gate.set()
    for answer in answers:
        assert answer.wait().error.kind is ErrorKind.STAGE_FAILED
        assert "bug" in answer.error.message
    assert toy.submit([1], max_tokens=5).ok()


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: device-side assert triggered"),
        RuntimeError("CUBLAS_STATUS_EXECUTION_FAILED when calling cublasGemmEx"),
        TriptychError(ErrorKind.STAGE_DEAD, "rank 1 is gone"),
    ],
)
def test_a_lost_device_ends_every_request_then_the_engine_then_the_process(make_toy, overlap, error):
    ends = []
    toy = make_toy(overlap=overlap, max_running=1, on_fatal=lambda: ends.append([a.ends for a in answers]))
    answers = [toy.submit([1], max_tokens=9000), toy.submit([2], max_tokens=9000)]
    answers[0].wait_first()

    def lost(slices):
        raise error

    toy.runner.fail = lost
    for answer in answers:
        assert answer.wait().error.kind is ErrorKind.STAGE_DEAD
        assert str(error) in answer.error.message
    until(lambda: not toy.engine._thread.is_alive())
    assert not toy.engine.alive
    # called once, when everybody had heard
    assert ends == [[1, 1]]
    assert toy.submit([1]).wait().error.kind is ErrorKind.STAGE_DEAD


@pytest.mark.parametrize("message", ["CUDA error: out of memory", "CUDA out of memory. Tried to allocate 2 GiB"])
def test_running_out_of_memory_is_survived(make_toy, message):
    ends = []
    toy = make_toy(on_fatal=lambda: ends.append(1))

    def full(slices):
        if any(13 in part.token_ids for part in slices):
            raise RuntimeError(message)

    toy.runner.fail = full
    assert toy.submit([13, 1], max_tokens=5).wait().error.kind is ErrorKind.STAGE_FAILED
    assert toy.submit([1, 2], max_tokens=5, logit_bias={13: -100}).ok()
    assert toy.engine.alive
    assert not ends


def test_close_ends_every_request(make_toy):
    toy = make_toy(max_running=1)
    running, waiting = toy.submit([1], max_tokens=9000), toy.submit([2], max_tokens=9000)
    running.wait_first()
    toy.engine.close()
    for answer in (running, waiting):
        assert answer.wait().error.kind is ErrorKind.STAGE_DEAD
    late = toy.submit([1]).wait()
    assert late.error.kind is ErrorKind.STAGE_DEAD
    assert not any(t.name == "triptych-engine" and t is toy.engine._thread for t in threading.enumerate())
    toy.engine.check()


def test_a_request_that_comes_while_closing_is_answered(make_toy, recorder):
    toy = make_toy()

    def close(delta):
        toy.engine.close()

    answer = toy.submit([1], recorder=recorder(close), max_tokens=5).wait()
    assert answer.error.kind is ErrorKind.STAGE_DEAD
    assert toy.engine._in_flight == 0


def test_metrics(make_toy):
    toy = make_toy()
    answers = [toy.submit([k] * 10, max_tokens=6) for k in (1, 2, 3)]
    for answer in answers:
        answer.ok()
    until(lambda: toy.meter("triptych_requests_running") == 0 and toy.meter("triptych_kv_cache_usage_ratio") == 0)
    assert toy.meter("triptych_requests_total", "ok") == 3
    assert toy.meter("triptych_prompt_tokens_total", "text") == 30
    until(lambda: toy.meter("triptych_generation_tokens_total") == 18)
    assert len(toy.meter.observed["triptych_time_to_first_token_seconds"]) == 3
    assert len(toy.meter.observed["triptych_inter_token_seconds"]) == 15
    assert len(toy.meter.observed["triptych_stage_seconds"]) == 3
    for name in ("queue", "prefill", "request"):
        assert len(toy.meter.observed[f"triptych_{name}_seconds"]) == 3
        assert min(toy.meter.observed[f"triptych_{name}_seconds"]) >= 0
    assert toy.meter.observed["triptych_request_prompt_tokens"] == [10] * 3
    assert toy.meter.observed["triptych_request_generation_tokens"] == [6] * 3
    assert toy.meter("triptych_answers_total", "length") == 3
    assert sum(toy.meter.observed["triptych_batch_tokens"]) == 30 + 15
    assert 0 < toy.meter("triptych_prefix_cache_usage_ratio") <= 1
    assert toy.meter.observed["triptych_batch_size"]
    assert abs(toy.meter("triptych_heartbeat_timestamp_seconds") - time.time()) < 60


LIVES = st.lists(
    st.tuples(
        # prompts that differ in their first token or not at all, so that the prefix cache is used
        st.integers(1, 3),
        st.integers(1, 30),
        st.integers(1, 20),
        st.sampled_from(["", "", "", "cancel", "cancel soon"]),
        st.sampled_from([0.0, 1.0]),
    ),
    min_size=1,
    max_size=14,
)


@given(lives=LIVES, num_blocks=st.integers(13, 30), max_running=st.integers(1, 6), step_tokens=st.integers(1, 40))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_random_lives_lose_no_block_and_change_no_answer(make_toy, lives, num_blocks, max_running, step_tokens):
    """Arrivals, cancels, preemptions and cache hits in tiny pools; answers equal those of a roomy engine."""
    roomy = make_toy(num_blocks=600, max_running=1, eos=0)
    tight = make_toy(num_blocks=num_blocks, max_running=max_running, max_step_tokens=step_tokens, eos=0)
    answers = []
    for number, (family, length, count, fate, temperature) in enumerate(lives):
        prompt = [family, *((i * i) % 40 for i in range(1, length))]
        options = {"max_tokens": count, "temperature": temperature, "seed": number}
        answer = tight.submit(prompt, f"{number}", **options)
        answers.append((prompt, options, answer, fate))
        if fate == "cancel":
            tight.engine.cancel([f"{number}"])
        elif fate == "cancel soon":
            time.sleep(0.001)
            tight.engine.cancel([f"{number}"])
    for prompt, options, answer, fate in answers:
        answer.wait()
        expected = roomy.submit(prompt, **options).ok()
        if answer.error is None:
            assert answer.token_ids == expected.token_ids
            assert answer.text == expected.text
            assert answer.finish == expected.finish
        else:
            assert fate
            assert answer.error.kind is ErrorKind.CANCELLED
            assert expected.token_ids[: len(answer.token_ids)] == answer.token_ids
    tight.engine.close()
    tight.engine.check()
    assert tight.engine._scheduler.idle
    roomy.engine.close()
