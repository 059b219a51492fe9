"""Sampling: every field of SamplingParams does what it says, alone and in a batch."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
import transformers

from triptych.python_models.contract.sampling import SamplingParams
from triptych.python_models.language_model.engine.sampler import Sampled, Sampler, SampleRow, SamplerState

V = 50
SAMPLER = Sampler(V, "cpu")


def prompt_of(length, seed=0):
    return random.Random(seed * 1000 + length).choices(range(1, 290), k=length)


def state(prompt=(1, 2, 3), seed=7, stop_ids=(), generated=(), **options):
    made = SamplerState(SamplingParams(**options), np.array(prompt), seed, frozenset(stop_ids), V)
    made.told = list(generated)
    for token in generated:
        made.accept(token)
    return made


def sample(logits: torch.Tensor, states: list[SamplerState]) -> list[Sampled]:
    """One token for each row."""
    return SAMPLER.launch(logits, at_once(states), torch.zeros(0, dtype=torch.int64)).result()


def at_once(states):
    return [SampleRow(one, -1, one.num_generated) for one in states]


def adjusted(logits: torch.Tensor, *states: SamplerState) -> torch.Tensor:
    """Scores [N, V] from which the tokens are chosen."""
    rows = at_once(states)
    sent = {name: torch.from_numpy(value) for name, value in SAMPLER._adjustments(rows).items()}
    return SAMPLER._adjust(logits, rows, sent)


def draws(logits, count=4000, **options):
    """Frequencies of tokens over many draws of one row."""
    one = state(**options)
    seen = np.zeros(V)
    for _ in range(count):
        token = sample(logits[None], [one])[0].token_id
        seen[token] += 1
        one.accept(token)
    return seen / count


@pytest.fixture
def logits():
    return torch.randn(V, generator=torch.Generator().manual_seed(3)) * 2


def test_temperature_zero_is_argmax(logits):
    assert sample(logits[None], [state(temperature=0)])[0].token_id == int(logits.argmax())


def test_draws_follow_the_distribution(logits):
    for temperature in (0.5, 1.0, 1.7):
        expected = (logits / temperature).softmax(-1).numpy()
        # total variation of 4000 draws over 50 tokens is about 0.04
        assert np.abs(draws(logits, temperature=temperature) - expected).sum() / 2 < 0.08


@pytest.mark.parametrize(
    ("options", "warper"),
    [
        ({"top_k": 5}, transformers.TopKLogitsWarper(5)),
        ({"top_p": 0.6}, transformers.TopPLogitsWarper(0.6)),
        ({"min_p": 0.2}, transformers.MinPLogitsWarper(0.2)),
    ],
)
def test_filters_keep_what_transformers_keeps(logits, options, warper):
    expected = warper(None, logits[None].clone())[0].softmax(-1).numpy()
    seen = draws(logits, **options)
    assert set(np.flatnonzero(seen)) == set(np.flatnonzero(expected))
    assert np.abs(seen - expected).sum() / 2 < 0.08


def test_filters_combine_in_the_order_of_transformers(logits):
    chain = [
        transformers.TemperatureLogitsWarper(1.5),
        transformers.TopKLogitsWarper(12),
        transformers.TopPLogitsWarper(0.8),
        transformers.MinPLogitsWarper(0.1),
    ]
    scores = logits[None].clone()
    for warper in chain:
        scores = warper(None, scores)
    seen = draws(logits, temperature=1.5, top_k=12, top_p=0.8, min_p=0.1)
    assert set(np.flatnonzero(seen)) == set(np.flatnonzero(scores[0].softmax(-1).numpy()))


def test_filters_that_keep_all_change_no_draw(logits):
    plain = [sample(logits[None], [state(seed=s)])[0].token_id for s in range(200)]
    open_filters = {"top_k": V + 10, "top_p": 1.0, "min_p": 0.0}
    assert [sample(logits[None], [state(seed=s, **open_filters)])[0].token_id for s in range(200)] == plain
    assert len(set(plain)) > 5


def test_top_k_one_is_greedy(logits):
    tokens = {sample(logits[None], [state(top_k=1, seed=s)])[0].token_id for s in range(20)}
    assert tokens == {int(logits.argmax())}


def test_a_row_is_the_same_alone_and_in_any_batch():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(40, V, generator=generator) * 2
    kinds = [{}, {"top_p": 0.7}, {"top_k": 3}, {"temperature": 0}, {"min_p": 0.1}, {"repetition_penalty": 1.5}]
    states = [state(seed=i, generated=(4, 4, 9), **kinds[i % len(kinds)]) for i in range(40)]
    alone = [sample(row[None], [own])[0].token_id for row, own in zip(rows, states, strict=True)]
    assert [s.token_id for s in sample(rows, states)] == alone
    order = torch.randperm(40, generator=generator).tolist()
    mixed = sample(rows[order], [states[i] for i in order])
    assert [s.token_id for s in mixed] == [alone[i] for i in order]


def test_repetition_penalty_is_that_of_transformers(logits):
    prompt, generated = [3, 8, 8, 21], [30, 3]
    processor = transformers.RepetitionPenaltyLogitsProcessor(1.7)
    expected = processor(torch.tensor([prompt + generated]), logits[None].clone())
    own = state(prompt, generated=generated, repetition_penalty=1.7)
    assert torch.equal(adjusted(logits[None], own), expected)


def test_presence_and_frequency_penalties_count_generated_tokens_only(logits):
    own = state((5, 6), generated=(9, 9, 9, 10), presence_penalty=0.5, frequency_penalty=0.25)
    expected = logits.clone()
    expected[9] -= 0.5 + 3 * 0.25
    expected[10] -= 0.5 + 0.25
    torch.testing.assert_close(adjusted(logits[None], own)[0], expected)


def test_logit_bias_forces_and_bans(logits):
    best = int(logits.argmax())
    ban = state(temperature=0, logit_bias={best: -100.0})
    force = state(logit_bias={17: 100.0})
    tokens = [s.token_id for s in sample(logits.repeat(2, 1), [ban, force])]
    assert tokens == [int(logits.topk(2).indices[1]), 17]


def test_stop_tokens_wait_for_min_tokens(logits):
    best = int(logits.argmax())
    options = {"temperature": 0, "min_tokens": 2, "stop_ids": (best,)}
    early, late = state(generated=(1,), **options), state(generated=(1, 2), **options)
    tokens = [s.token_id for s in sample(logits.repeat(2, 1), [early, late])]
    assert tokens == [int(logits.topk(2).indices[1]), best]


def test_logprobs_are_of_the_raw_distribution(logits):
    raw = logits.log_softmax(-1)
    own = state(temperature=0.3, top_k=2, logit_bias={4: 50.0}, repetition_penalty=2.0, logprobs=True, top_logprobs=3)
    with_none = state(temperature=0)
    out, other = sample(logits.repeat(2, 1), [own, with_none])
    assert out.token_id == 4
    assert out.logprob == pytest.approx(float(raw[4]), abs=1e-5)
    values, ids = raw.topk(3)
    assert [i for i, _ in out.top] == ids.tolist()
    assert [v for _, v in out.top] == pytest.approx(values.tolist(), abs=1e-5)
    assert other.logprob is None


def test_tokens_reach_the_slots_on_the_device(logits):
    rows = logits.repeat(4, 1)
    rows[2, 5] = torch.nan
    slots, last = [3, -1, 0, 5], torch.full((6,), 77)
    made = [SampleRow(state(temperature=0), slot, 0) for slot in slots]
    for _ in range(2):
        out = SAMPLER.launch(rows, made, last).result()
        best = int(logits.argmax())
        assert [s.token_id for s in out] == [best, best, -1, best]
        # what goes into the next step can be embedded, whatever it is
        assert 0 <= last[0] < V
        assert last.tolist()[1:] == [77, 77, best, 77, best]
        last.fill_(77)


def test_the_draw_depends_on_the_number_alone(logits):
    one = state(seed=3)
    numbers = list(range(50))
    rows = [SampleRow(one, -1, number) for number in numbers]
    together = [s.token_id for s in SAMPLER.launch(logits.repeat(50, 1), rows, torch.zeros(1)).result()]
    for number, token in zip(numbers, together, strict=True):
        alone = SAMPLER.launch(logits[None], [SampleRow(state(seed=3), -1, number)], torch.zeros(1)).result()
        assert alone[0].token_id == token
    assert len(set(together)) > 5


def test_penalties_follow_the_tokens_step_by_step(logits):
    """The table on the device is told of news only, and its rows are used again."""
    sampler = Sampler(V, "cpu")
    rng = random.Random(0)
    for life in range(40):
        prompt = rng.choices(range(-3, V + 3), k=rng.randrange(1, 30))
        options = {"repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.7}
        states = [state(prompt, **options) for _ in range(rng.randrange(1, 4))]
        for _ in range(5):
            rows = at_once(states)
            sent = {name: torch.from_numpy(value) for name, value in sampler._adjustments(rows).items()}
            scores = sampler._adjust(logits.repeat(len(states), 1), rows, sent)
            for one, score in zip(states, scores, strict=True):
                expected = logits.clone()
                for token in {t for t in prompt if 0 <= t < V} | set(one.told):
                    value = expected[token]
                    count = one.told.count(token)
                    expected[token] = (value * 1.3 if value < 0 else value / 1.3) - 0.7 * count - 0.4 * (count > 0)
                torch.testing.assert_close(score, expected)
            for one in states:
                token = rng.randrange(V)
                one.accept(token)
                one.told.append(token)
        if life % 2:
            for one in states:
                one.release()
        del states, one
    assert sampler._counts.table.shape[0] == 8


KINDS = [
    {"temperature": 0},
    {"temperature": 0.8, "top_p": 0.7},
    {"top_k": 3},
    {"temperature": 0, "repetition_penalty": 1.5, "presence_penalty": 0.3},
    {"temperature": 0, "logit_bias": {4: 9.0}, "logprobs": True, "top_logprobs": 2},
    {"min_p": 0.1, "min_tokens": 9, "stop_ids": (3, 8)},
    {"temperature": 0, "logprobs": True},
]


@pytest.mark.gpu
@pytest.mark.parametrize("kinds", [KINDS[:1], KINDS], ids=["greedy", "mixed"])
def test_a_gpu_chooses_the_same_and_is_never_waited_for(kinds):
    device = "cuda"
    generator = torch.Generator().manual_seed(5)
    samplers = [Sampler(V, "cpu"), Sampler(V, device)]
    lives = [[state(seed=i, **kinds[i % len(kinds)]) for i in range(21)] for _ in samplers]
    last = [torch.full((32,), -9), torch.full((32,), -9, device=device)]
    for step in range(6):
        logits = torch.randn(21, V, generator=generator) * 3
        logits[20] = torch.nan
        found = []
        for sampler, states, tokens in zip(samplers, lives, last, strict=True):
            rows = [SampleRow(one, (i + step) % 32 if i % 4 else -1, step) for i, one in enumerate(states)]
            given = logits.to(tokens.device)
            if step and tokens.is_cuda:
                torch.cuda.synchronize()
                torch.cuda.set_sync_debug_mode("error")
            try:
                pending = sampler.launch(given, rows, tokens)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            found.append(pending.result())
            for one, sampled in zip(states, found[-1], strict=True):
                one.accept(max(sampled.token_id, 0))
        ours, theirs = found
        assert [s.token_id for s in ours] == [s.token_id for s in theirs]
        assert theirs[20].token_id == -1
        for one, other in zip(ours[:20], theirs[:20], strict=True):
            assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
            assert [i for i, _ in one.top] == [i for i, _ in other.top]
        kept = last[0] != -9
        kept[(20 + step) % 32] = False
        assert torch.equal(last[0][kept], last[1].cpu()[kept])


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_unusable_logits_are_told(poison, logits):
    bad = logits.clone()
    if poison == -torch.inf:
        bad[:] = poison
    else:
        bad[3] = poison
    for options in ({"temperature": 0}, {"temperature": 1.0}):
        tokens = [s.token_id for s in sample(torch.stack([bad, logits]), [state(**options)] * 2)]
        assert tokens[0] == -1
        assert tokens[1] >= 0


def test_same_seed_same_tokens_alone_and_in_a_batch(make_tiny, device):
    tiny = make_tiny("qwen2", device)
    stage = tiny.stage()
    options = {"temperature": 0.9, "top_p": 0.95, "seed": 11, "max_tokens": 30}
    alone = tiny.ask(stage, prompt_of(12), **options).ok().token_ids
    crowd = [tiny.ask(stage, prompt_of(n), temperature=1.0, max_tokens=40) for n in (5, 20, 33)]
    assert tiny.ask(stage, prompt_of(12), **options).ok().token_ids == alone
    assert tiny.ask(stage, prompt_of(12), **(options | {"seed": 12})).ok().token_ids != alone
    for other in crowd:
        other.ok()
    unseeded = [tiny.ask(stage, prompt_of(12), temperature=1.0, max_tokens=20).ok().token_ids for _ in range(2)]
    assert unseeded[0] != unseeded[1]


def test_a_seed_survives_preemption(make_tiny, meter):
    tiny = make_tiny("qwen2")
    options = {"temperature": 1.0, "max_tokens": 40}
    roomy = tiny.stage()
    expected = [tiny.ask(roomy, prompt_of(n), seed=n, **options).ok().token_ids for n in (9, 17, 25)]
    tight = tiny.stage(meter, kv_cache_tokens=72, context_length=72)
    answers = [tiny.ask(tight, prompt_of(n), seed=n, **options) for n in (9, 17, 25)]
    assert [a.ok().token_ids for a in answers] == expected
    assert meter("triptych_preemptions_total") > 0


def test_logprobs_equal_those_of_a_forward_pass(make_tiny, device):
    tiny = make_tiny("qwen2", device)
    prompt = prompt_of(15)
    answer = tiny.ask(tiny.stage(), prompt, temperature=1.0, seed=1, max_tokens=20, logprobs=True, top_logprobs=4).ok()
    tokens = answer.token_ids
    reference = tiny.logits(prompt + tokens).log_softmax(-1)[14:-1].cpu()
    assert len(answer.logprobs) == 20
    for row, (token, item) in enumerate(zip(tokens, answer.logprobs, strict=True)):
        assert item.token_id == token
        assert item.logprob == pytest.approx(float(reference[row, token]), abs=1e-4)
        values, ids = reference[row].topk(4)
        assert [top[0] for top in item.top] == ids.tolist()
        assert [top[2] for top in item.top] == pytest.approx(values.tolist(), abs=1e-4)


def test_penalised_greedy_is_that_of_generate(make_tiny):
    tiny = make_tiny("qwen2")
    prompt = prompt_of(15)
    answer = tiny.ask(tiny.stage(), prompt, repetition_penalty=1.4, max_tokens=30).ok()
    assert answer.token_ids == tiny.generate(prompt, 30, repetition_penalty=1.4)
    assert answer.token_ids != tiny.generate(prompt, 30)


@pytest.mark.parametrize("window", [0, 7, 20])
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_runs_that_may_not_repeat_are_those_of_transformers(size: int, window: int) -> None:
    from transformers.generation.logits_process import NoRepeatNGramLogitsProcessor
    from transformers.models.unlimited_ocr.generation_unlimited_ocr import (
        UnlimitedOcrSlidingWindowNoRepeatNgramLogitsProcessor,
    )

    if 0 < window < size:
        pytest.skip("no run fits into the window")
    processor = (
        UnlimitedOcrSlidingWindowNoRepeatNgramLogitsProcessor(size, window)
        if window
        else NoRepeatNGramLogitsProcessor(size)
    )
    drawn = random.Random(size * 100 + window)
    known = drawn.choices(range(3), k=drawn.randrange(12))
    one = state(prompt=known, no_repeat_ngram_size=size, no_repeat_ngram_window_size=window)
    assert one.needs_history
    assert not one.plain
    scores, banned = torch.randn(V), 0
    for _ in range(60):
        expected = processor(torch.tensor([known], dtype=torch.int64), scores[None].clone())
        assert torch.equal(adjusted(scores[None], one), expected)
        banned += int(expected.isinf().sum())
        known.append(drawn.choices(range(3), [12, 3, 1])[0])
        one.accept(known[-1])
    assert banned


def test_a_run_may_repeat_with_a_token_that_is_allowed() -> None:
    # what may not be in the vocabulary is no token to forbid
    prompt = [1, 2, 1, V + 5, 1, 3, 1]
    scores = torch.zeros(1, V)
    plain = state(prompt=prompt, no_repeat_ngram_size=2)
    allowed = state(prompt=prompt, no_repeat_ngram_size=2, no_repeat_ngram_allowed_ids=(2, 9))
    other = state(prompt=prompt)
    found = adjusted(scores.expand(3, V), plain, allowed, other)
    assert [row.isinf().nonzero().flatten().tolist() for row in found] == [[2, 3], [3], []]
