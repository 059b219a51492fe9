"""Prompt lookup: what is guessed, and that guesses never change an answer."""

from __future__ import annotations

import random

import pytest

from triptych.python_models.language_model.engine.speculation import PromptLookup

VOCAB = 50


def rescan(tokens, most, vocab_size=VOCAB):
    """The guess by its definition: the latest earlier place of the longest suffix, 4 to 2 tokens."""
    for size in (4, 3, 2):
        if len(tokens) <= size:
            continue
        suffix = tokens[-size:]
        for start in range(len(tokens) - size - 1, -1, -1):
            if tokens[start : start + size] == suffix:
                longer = list(tokens)
                draft = []
                for k in range(most):
                    draft.append(longer[start + size + k])
                    longer.append(draft[-1])
                    if not 0 <= draft[-1] < vocab_size:
                        return draft[:-1]
                return draft
    return []


def test_the_index_finds_what_a_search_finds():
    rng = random.Random(0)
    for _ in range(200):
        tokens = [rng.randrange(-1, 4) for _ in range(rng.randrange(0, 12))]
        lookup = PromptLookup(tokens, 5, 4)
        for _ in range(30):
            assert lookup.propose(5) == rescan(tokens, 5, 4)
            tokens.append(rng.randrange(4))
            lookup.append(tokens[-1])


def test_repetitions_are_guessed_in_full_length():
    assert PromptLookup([9, 1, 2, 3, 1, 2, 3, 1, 2], 8, VOCAB).propose(8) == [3, 1, 2, 3, 1, 2, 3, 1]
    assert PromptLookup([7, 7, 7], 4, VOCAB).propose(3) == [7, 7, 7]


def test_placeholders_of_media_are_not_guessed():
    assert PromptLookup([1, 2, 3, 99, 1, 2], 4, VOCAB).propose(4) == [3]


def test_guesses_get_shorter_then_pause_then_come_back():
    lookup = PromptLookup([1, 2] * 10, 8, VOCAB)
    lengths = []
    while lookup.active:
        lengths.append(len(lookup.propose(8)))
        lookup.report(lengths[-1], 0)
    assert lengths == [8, 4, 2, 1]
    assert lookup.propose(8) == []
    pause = 0
    while not lookup.active:
        lookup.append(1 + pause % 2)
        pause += 1
    assert pause == 16
    # failing once more it pauses for longer
    lookup.report(1, 0)
    pause = 0
    while not lookup.active:
        lookup.append(1 + pause % 2)
        pause += 1
    assert pause == 32
    for expected in (1, 2, 4, 8):
        draft = lookup.propose(8)
        assert len(draft) == expected
        lookup.report(len(draft), len(draft))


PERIODIC = [5, 6, 7, 8] * 12


@pytest.fixture
def parrot(make_toy):
    """Makes toys whose model mostly repeats what followed its last token before."""

    def make(**options):
        toy = make_toy(**options)
        plain = toy.runner._hashes

        def hashes(part):
            seeds = plain(part)
            return [s if s % 5 == 0 else 0 for s in seeds]

        toy.runner._hashes = hashes
        return toy

    return make


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 3}, {"logprobs": True, "top_logprobs": 2}])
def test_guesses_change_no_token(parrot, overlap, options):
    toy = parrot(overlap=overlap, vocab_size=6)
    prompts = [[*PERIODIC, k] for k in range(4)]
    plain = [toy.submit(p, max_tokens=80, **options).ok() for p in prompts]
    before = toy.meter("triptych_draft_tokens_total")
    assert before == 0
    answers = [toy.submit(p, max_tokens=80, speculative_tokens=4, **options) for p in prompts]
    for one, other in zip(answers, plain, strict=True):
        assert one.ok().token_ids == other.token_ids
        assert one.text == other.text
        assert one.usage.completion_tokens == 80
        assert [x.token_id for x in one.logprobs] == [x.token_id for x in other.logprobs]
        for x, y in zip(one.logprobs, other.logprobs, strict=True):
            assert x.logprob == pytest.approx(y.logprob, abs=1e-5)
    assert toy.meter("triptych_draft_tokens_total") > toy.meter("triptych_accepted_draft_tokens_total") > 0


def test_right_guesses_save_steps(make_toy):
    toy = make_toy(vocab_size=6, speculative_tokens=6)
    toy.runner._hashes = lambda part: [0] * part.num_logits
    answer = toy.submit([1, 2, 3], max_tokens=200).ok()
    assert len(answer.token_ids) == 200
    assert len(toy.runner.steps) < 80
    assert max(len(delta.token_ids) for delta in answer.deltas) == 7


def test_wrong_guesses_are_given_up(make_toy):
    toy = make_toy(speculative_tokens=8)
    answer = toy.submit([1, 2] * 20, max_tokens=300).ok()
    assert len(answer.token_ids) == 300
    assert toy.meter("triptych_draft_tokens_total") < 60


def test_an_end_among_right_guesses_ends_there(make_toy):
    toy = make_toy(vocab_size=6, speculative_tokens=6)
    toy.runner._hashes = lambda part: [0] * part.num_logits
    plain = toy.submit([1, 2, 3], max_tokens=50, speculative_tokens=0).ok()
    token = plain.token_ids[0]
    stop = chr(97 + token % 26) * 11
    cut = toy.submit([1, 2, 3], max_tokens=50, stop=(stop,)).ok()
    assert cut.finish == ("stop", stop)
    assert cut.text == ""
    assert cut.usage.completion_tokens == 11
    assert len(cut.token_ids) == 11
    exact = toy.submit([1, 2, 3], max_tokens=13).ok()
    assert len(exact.token_ids) == exact.usage.completion_tokens == 13


def test_penalties_are_not_guessed_over(make_toy):
    toy = make_toy(speculative_tokens=4)
    answer = toy.submit([1, 2] * 20, max_tokens=30, repetition_penalty=1.3).ok()
    assert len(answer.token_ids) == 30
    assert toy.meter("triptych_draft_tokens_total") == 0


@pytest.mark.parametrize("kind", ["qwen2", "gemma2"])
def test_a_real_decoder_gives_the_tokens_of_generate(make_tiny, meter, kind):
    tiny = make_tiny(kind)
    stage = tiny.stage(meter, speculative_tokens=5)
    prompts = [[3, 4, 5, 6, 7] * 6, [9, 8, 9, 8, 9, 8, 9], list(range(1, 40))]
    answers = [tiny.ask(stage, p, max_tokens=40) for p in prompts]
    for answer, prompt in zip(answers, prompts, strict=True):
        assert answer.ok().token_ids == tiny.generate(prompt, 40)
    assert meter("triptych_draft_tokens_total") > 0
