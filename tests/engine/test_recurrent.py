"""Decoders some of whose layers keep a state instead of keys and values: it follows its request through everything."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
import torch

from triptych.python_models.contract.errors import ErrorKind, TriptychError
from triptych.python_models.language_model.engine.config import EngineConfig
from triptych.python_models.language_model.engine.request import Prompt, Request
from triptych.python_models.language_model.engine.scheduler import Scheduler

KINDS = ["nemotron_h", "qwen3_5", "lfm2"]


def prompt_of(length, seed=0):
    return random.Random(seed * 1000 + length).choices(range(1, 290), k=length)


@pytest.mark.parametrize("overlap", ["off", "on"])
@pytest.mark.parametrize("kind", KINDS)
def test_together_and_at_different_times(make_tiny, device, kind, overlap):
    tiny = make_tiny(kind, device)
    prompts = [prompt_of(n) for n in (1, 5, 33, 90)]
    expected = [tiny.generate(p, 20) for p in prompts]
    stage = tiny.stage(overlap=overlap)
    assert len(stage._runner.kv_groups) == 1
    assert stage._runner.kv_groups[0].layers == {"nemotron_h": (2,)}.get(kind, (1,))
    together = [tiny.ask(stage, p, max_tokens=20) for p in prompts]
    assert [a.ok().token_ids for a in together] == expected
    staggered = []
    for prompt in prompts:
        staggered.append(tiny.ask(stage, prompt, max_tokens=20))
        staggered[-1].wait_first()
    assert [a.ok().token_ids for a in staggered] == expected


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_in_chunks_of_seven_tokens(make_tiny, device, kind):
    tiny = make_tiny(kind, device)
    prompts = [prompt_of(n) for n in (7, 8, 50, 64)]
    stage = tiny.stage(chunked_prefill_size=7)
    answers = [tiny.ask(stage, p, max_tokens=12) for p in prompts]
    expected = [tiny.generate(p, 12) for p in prompts]
    assert [a.ok().token_ids for a in answers] == expected
    # and once more, from what was saved
    answers = [tiny.ask(stage, p, max_tokens=12) for p in prompts]
    assert [a.ok().token_ids for a in answers] == expected


@pytest.mark.parametrize("overlap", ["off", "on"])
@pytest.mark.parametrize("kind", KINDS)
def test_preemption_by_a_tiny_pool(make_tiny, device, meter, kind, overlap):
    tiny = make_tiny(kind, device)
    prompts = [prompt_of(n) for n in (9, 17, 30, 12)]
    stage = tiny.stage(meter, kv_cache_tokens=72, context_length=72, overlap=overlap)
    answers = [tiny.ask(stage, p, max_tokens=30) for p in prompts]
    assert [a.ok().token_ids for a in answers] == [tiny.generate(p, 30) for p in prompts]
    assert meter("triptych_preemptions_total") > 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_prefix_is_taken_from_the_cache_with_its_state(make_tiny, device, kind):
    tiny = make_tiny(kind, device)
    stage = tiny.stage()
    head = prompt_of(50)
    found = []
    for tail in (head[42:], prompt_of(9, 1), prompt_of(9, 2), [*prompt_of(9, 2), 7]):
        prompt = [*head[:42], *tail]
        answer = tiny.ask(stage, prompt, max_tokens=9).ok()
        assert answer.token_ids == tiny.generate(prompt, 9)
        found.append(answer.usage.cached_tokens)
    # the second parts from the first in the middle, where no state was saved; the third finds what the second saved
    # there; the fourth goes on where the third ended
    assert found == [0, 0, 40, 48]
    # all blocks of the answer are known as well, but its state is that of the prompt's last full block
    turn = [*prompt, *answer.token_ids, 5, 6]
    again = tiny.ask(stage, turn, max_tokens=9).ok()
    assert again.token_ids == tiny.generate(turn, 9)
    assert again.usage.cached_tokens == 48


def test_without_a_prefix_cache_nothing_is_saved(make_tiny):
    tiny = make_tiny("nemotron_h")
    stage = tiny.stage(prefix_cache=False)
    assert stage._runner.saved_states == 0
    for _ in range(2):
        answer = tiny.ask(stage, prompt_of(40), max_tokens=5).ok()
        assert answer.token_ids == tiny.generate(prompt_of(40), 5)
        assert answer.usage.cached_tokens == 0


@pytest.mark.parametrize("prefix_cache", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_choices_share_a_prompt_and_go_their_own_ways(make_tiny, kind, prefix_cache):
    tiny = make_tiny(kind)
    stage = tiny.stage(prefix_cache=prefix_cache)
    prompt = prompt_of(30)
    alone = [tiny.ask(stage, prompt, temperature=1.0, seed=3, max_tokens=12).ok().token_ids]
    answer = tiny.ask(stage, prompt, temperature=1.0, seed=3, n=3, logprobs=True, max_tokens=12).ok()
    choices = [[t for d in answer.deltas if d.index == k for t in d.token_ids] for k in range(3)]
    assert choices[0] == alone[0]
    assert len({tuple(c) for c in choices}) == 3
    for k, choice in enumerate(choices):
        # what was drawn had the probability that the whole model gives it
        given = [one.logprob for d in answer.deltas if d.index == k for one in d.logprobs]
        logits = tiny.logits([*prompt, *choice])[len(prompt) - 1 : -1].log_softmax(-1)
        assert given == pytest.approx(logits.gather(1, torch.tensor(choice)[:, None])[:, 0].tolist(), abs=1e-3)


def test_cancelled_requests_leave_nothing_behind(make_tiny):
    tiny = make_tiny("nemotron_h")
    stage = tiny.stage(max_running_requests=2)
    expected = [tiny.generate(prompt_of(n), 10) for n in range(3, 9)]
    endless = [tiny.ask(stage, prompt_of(20, k), request_id=f"{k}", max_tokens=300) for k in range(2)]
    for answer in endless:
        answer.wait_first()
    later = [tiny.ask(stage, prompt_of(n), max_tokens=10) for n in range(3, 9)]
    stage.cancel(["0", "1"])
    assert [a.ok().token_ids for a in later] == expected


@pytest.mark.parametrize(("limit", "together"), [(0, 4), (3, 3), (9, 4)])
def test_the_number_of_states_limits_who_runs_together(make_tiny, meter, limit, together):
    tiny = make_tiny("nemotron_h")
    stage = tiny.stage(meter, max_running_requests=4, max_mamba_cache_size=limit)
    prompts = [prompt_of(n) for n in range(3, 10)]
    answers = [tiny.ask(stage, p, max_tokens=15) for p in prompts]
    assert [a.ok().token_ids for a in answers] == [tiny.generate(p, 15) for p in prompts]
    assert max(meter.observed["triptych_batch_size"]) == together
    assert stage._runner._states.num_slots == together


def test_the_number_of_states_means_nothing_to_others(make_tiny, meter):
    tiny = make_tiny("qwen2")
    stage = tiny.stage(meter, max_running_requests=4, max_mamba_cache_size=1)
    answers = [tiny.ask(stage, prompt_of(n), max_tokens=15) for n in range(3, 10)]
    assert all(len(a.ok().token_ids) == 15 for a in answers)
    assert max(meter.observed["triptych_batch_size"]) == 4


def test_guesses_are_refused(make_tiny):
    tiny = make_tiny("nemotron_h")
    with pytest.raises(TriptychError, match="speculative_tokens must be 0") as caught:
        tiny.stage(speculative_tokens=3)
    assert caught.value.param == "settings.speculative_tokens"
    error = tiny.ask(tiny.stage(), prompt_of(5), speculative_tokens=3, max_tokens=5).wait().error
    assert error.kind is ErrorKind.INVALID_REQUEST
    assert error.param == "speculative_tokens"


def test_decode_steps_are_eager_where_graphs_are_asked_for(make_tiny):
    tiny = make_tiny("nemotron_h")
    stage = tiny.stage()
    runner = stage._runner
    runner._options = type(runner._options)(graph_batch=8)
    runner.warm_up()
    assert runner._graphs is None
    assert tiny.ask(stage, prompt_of(9), max_tokens=9).ok().token_ids == tiny.generate(prompt_of(9), 9)


def test_a_fault_of_one_request_costs_the_others_no_token(make_tiny):
    """A step that failed half way has changed states; those who go on get theirs back."""
    tiny = make_tiny("qwen3_5")
    prompts = [prompt_of(n) for n in (6, 11, 19)]
    expected = [tiny.generate(p, 20) for p in prompts]
    for overlap in ("off", "on"):
        stage = tiny.stage(overlap=overlap)
        forward = stage._runner._executor.forward
        calls = itertools.count()

        def broken(*args, forward=forward, calls=calls):
            hidden = forward(*args)
            # several requests together, after all layers have moved on
            if len(hidden) > 1 and next(calls) % 4 == 3:
                raise RuntimeError("half way")
            return hidden

        stage._runner._executor.forward = broken
        answers = [tiny.ask(stage, p, max_tokens=20) for p in prompts]
        for answer in answers:
            answer.wait()
        # prompts and replays are several tokens too: a request that fails alone ends, the others are right
        for answer, tokens in zip(answers, expected, strict=True):
            assert answer.token_ids == tokens[: len(answer.token_ids)]
            assert answer.error is not None or answer.token_ids == tokens


VOCAB = 6


def toy_prompts():
    """Prompts that share beginnings, and end in and at the edges of blocks."""
    rng = random.Random(1)
    head = [rng.randrange(1, VOCAB) for _ in range(30)]
    out = [head[:k] for k in (1, 3, 4, 5, 17, 30)]
    out += [[*head, *([1, 2, 3] * k)] for k in (1, 4, 11)]
    return [*out, [rng.randrange(1, VOCAB) for _ in range(70)], head]


@pytest.fixture(scope="module")
def expected_of():
    return {}


@pytest.mark.parametrize("blocks", [10_000, 30])
@pytest.mark.parametrize("saved", [0, 1, 4])
@pytest.mark.parametrize("chunk", [16, 64, 0])
@pytest.mark.parametrize("overlap", [False, True])
def test_every_way_gives_the_same_tokens(make_toy, expected_of, overlap, chunk, saved, blocks):
    given = toy_prompts()
    options = [{"max_tokens": 25 + k, "temperature": 0.9 * (k % 2), "seed": k} for k in range(len(given))]
    if not expected_of:
        plain = make_toy(vocab_size=VOCAB, max_step_tokens=0, prefix_cache=False, saved_states=0)
        for k, (prompt, option) in enumerate(zip(given, options, strict=True)):
            expected_of[k] = plain.submit(prompt, **option).ok().token_ids
    toy = make_toy(blocks, vocab_size=VOCAB, overlap=overlap, max_step_tokens=chunk, saved_states=saved)
    for _ in range(2):
        toy.runner.gate.clear()
        answers = [toy.submit(p, **o) for p, o in zip(given, options, strict=True)]
        toy.runner.gate.set()
        assert [a.ok().token_ids for a in answers] == list(expected_of.values())
    assert (toy.meter("triptych_preemptions_total") > 0) == (blocks == 30)
    assert bool(toy.runner.loads) == bool(saved)


@pytest.mark.parametrize("seed", range(12))
def test_many_random_lives(make_toy, seed):
    """Requests come, share beginnings, are cancelled and preempted; steps fail before, in and after the model."""
    rng = random.Random(seed)
    heads = [[rng.randrange(1, VOCAB) for _ in range(20)] for _ in range(3)]
    given = []
    for _ in range(40):
        head = rng.choice(heads)[: rng.randrange(1, 21)]
        given.append([*head, *(rng.randrange(1, VOCAB) for _ in range(rng.choice((0, 1, 5, 40))))])
    counts = [rng.randrange(1, 30) for _ in given]
    plain = make_toy(vocab_size=VOCAB, eos=0, saved_states=0, prefix_cache=False)
    expected = [plain.submit(p, max_tokens=n).ok().token_ids for p, n in zip(given, counts, strict=True)]
    toy = make_toy(
        rng.choice((40, 80, 1000)),
        vocab_size=VOCAB,
        eos=0,
        overlap=bool(seed % 2),
        max_step_tokens=rng.choice((8, 20, 64)),
        max_running=rng.choice((2, 5, 8)),
        saved_states=rng.choice((1, 2, 6)),
    )
    sampler = toy.engine._pipeline._sampler
    launch = sampler.launch

    def fail(slices):
        if len(slices) > 1 and rng.random() < 0.08:
            raise RuntimeError("forward")

    class Broken:
        def result(self):
            raise RuntimeError("reading")

    def launch_broken(logits, rows, last_tokens):
        if len(rows) > 1 and rng.random() < 0.05:
            raise RuntimeError("sampling")
        pending = launch(logits, rows, last_tokens)
        return Broken() if len(rows) > 1 and rng.random() < 0.08 else pending

    toy.runner.fail, sampler.launch = fail, launch_broken
    answers = []
    for k, (prompt, count) in enumerate(zip(given, counts, strict=True)):
        answers.append(toy.submit(prompt, f"{k}", max_tokens=count))
        if k % 7 == 3:
            answers[rng.randrange(k)].wait()
    gone = {f"{rng.randrange(40)}" for _ in range(4)}
    toy.engine.cancel(list(gone))
    for k, (answer, tokens) in enumerate(zip(answers, expected, strict=True)):
        answer.wait()
        if answer.error is None:
            assert answer.token_ids == tokens
        else:
            assert f"{k}" in gone
            assert answer.error.kind is ErrorKind.CANCELLED
            assert answer.token_ids == tokens[: len(answer.token_ids)]


def test_a_request_with_broken_logits_takes_its_states_with_it(make_tiny):
    """NaN in a prompt must not reach those who begin alike, nor who comes into its slot."""
    tiny = make_tiny("qwen3_5")
    stage = tiny.stage(max_running_requests=1, chunked_prefill_size=8)
    prompt = prompt_of(20)
    forward = stage._runner._executor.forward
    stage._runner._executor.forward = lambda embeddings, *rest: forward(embeddings * torch.nan, *rest)
    assert tiny.ask(stage, prompt, max_tokens=5).wait().error.kind is ErrorKind.STAGE_FAILED
    stage._runner._executor.forward = forward
    # the second computes the same blocks as the broken one, the last one finds them
    for other, cached in ([7], 0), ([*prompt, 3], 0), (prompt_of(12), 0), ([*prompt[:18], 9, 9], 0):
        answer = tiny.ask(stage, other, max_tokens=8).ok()
        assert answer.token_ids == tiny.generate(other, 8)
        assert answer.usage.cached_tokens == cached


def test_work_that_is_undone_and_not_computed_again_at_once_starts_anew():
    config = EngineConfig((20,), 4, 100, 4, 10, 8, 1.0, 1.0, frozenset(), saved_states=2)
    scheduler = Scheduler(config)
    request = Request("", Prompt(np.arange(40), np.arange(40)[None]), 5, 4)
    scheduler.add(request)
    (first,) = scheduler.plan().work
    scheduler.commit(first, first.count)
    (second,) = scheduler.plan().work
    second.undo()
    scheduler.restart([second])
    assert (request.slot, request.num_scheduled) == (-1, 0)
    scheduler.check()
    scheduler.plan()
    assert request.slot >= 0
    scheduler.check()
