"""Every way of running gives the same tokens."""

from __future__ import annotations

import itertools
import random
import threading

import pytest

from triptych.python_models.contract.errors import ErrorKind

VOCAB = 6


def prompts():
    """Prompts that share beginnings, repeat themselves, and end in and at the edges of blocks."""
    rng = random.Random(1)
    head = [rng.randrange(1, VOCAB) for _ in range(30)]
    out = [head[:k] for k in (1, 3, 4, 5, 17, 30)]
    out += [[*head, *([1, 2, 3] * k)] for k in (1, 4, 11)]
    return [*out, [rng.randrange(1, VOCAB) for _ in range(70)]]


WAYS = list(
    itertools.product(
        (False, True),  # overlap
        (16, 64, 0),  # chunks
        (True, False),  # prefix cache
        (False, True),  # preemption
        (0, 3),  # guesses
        ((None,), (None, 7)),  # windows
    )
)


@pytest.fixture(scope="module")
def expected_of():
    return {}


@pytest.mark.parametrize("mixed", [False, True], ids=["greedy", "drawn"])
@pytest.mark.parametrize(("overlap", "chunk", "cache", "preempt", "guesses", "windows"), WAYS)
def test_the_same_tokens(make_toy, expected_of, mixed, overlap, chunk, cache, preempt, guesses, windows):
    given = prompts()
    options = [
        {"max_tokens": 25 + k, "temperature": 0.9 if mixed and k % 2 else 0, "seed": k} for k in range(len(given))
    ]
    # ends that nobody knows ahead
    options[3]["stop"] = ("bb", "cd")
    options[7]["stop_token_ids"] = (4,)
    if mixed:
        # rows that need the host's history among others
        options[2]["repetition_penalty"] = 1.5
        options[5]["presence_penalty"] = 1.0
    key = (mixed, windows)
    if key not in expected_of:
        plain = make_toy(vocab_size=VOCAB, windows=windows, max_step_tokens=0, prefix_cache=False)
        expected_of[key] = []
        for prompt, option in zip(given, options, strict=True):
            # alone
            answer = plain.submit(prompt, **option).ok()
            expected_of[key].append((answer.token_ids, answer.text, answer.finish))
    toy = make_toy(
        num_blocks=(28, 20)[: len(windows)] if preempt else 10_000,
        vocab_size=VOCAB,
        windows=windows,
        overlap=overlap,
        max_step_tokens=chunk,
        prefix_cache=cache,
        speculative_tokens=guesses,
    )
    toy.runner.gate.clear()
    answers = [toy.submit(p, **o) for p, o in zip(given, options, strict=True)]
    toy.runner.gate.set()
    got = [(a.ok().token_ids, a.text, a.finish) for a in answers]
    assert got == expected_of[key]
    assert (toy.meter("triptych_preemptions_total") > 0) == preempt
    assert (toy.meter("triptych_draft_tokens_total") > 0) == bool(guesses)
    assert (toy.runner.late > 0) == overlap
    if not cache:
        assert all(a.usage.cached_tokens == 0 for a in answers)
    if chunk:
        assert all(sum(step) <= chunk for step in toy.runner.steps)


def test_a_step_is_queued_before_the_tokens_of_the_last_are_read(make_toy):
    toy = make_toy(overlap=True)
    order = []
    forward, sampler = toy.runner.forward, toy.engine._pipeline._sampler
    launch = sampler.launch

    class Watched:
        def __init__(self, pending, number):
            self.pending, self.number = pending, number

        def result(self):
            order.append(f"read {self.number}")
            return self.pending.result()

    def forward_watched(slices):
        order.append(f"forward {len([o for o in order if o.startswith('forward')])}")
        return forward(slices)

    def launch_watched(*args):
        number = len([o for o in order if o.startswith("sample")])
        order.append(f"sample {number}")
        return Watched(launch(*args), number)

    toy.runner.forward, sampler.launch = forward_watched, launch_watched
    toy.submit([1, 2, 3], max_tokens=3).ok()
    assert order == [
        "forward 0",
        "sample 0",
        "forward 1",
        "sample 1",
        "read 0",
        "forward 2",
        "sample 2",
        "read 1",
        # the third token is the last, known ahead
        "read 2",
    ]
    order.clear()
    toy.submit([1, 2, 3], max_tokens=3, presence_penalty=1.0).ok()
    # the penalty needs the tokens before, the forward pass does not
    assert order[:5] == ["forward 0", "sample 0", "forward 1", "read 0", "sample 1"]


def test_tokens_of_a_step_are_heard_while_the_next_one_computes(make_toy, recorder):
    """A step that takes for ever must not keep back the tokens of the one before."""
    toy = make_toy(overlap=True)
    held, heard = threading.Event(), threading.Event()
    sampler = toy.engine._pipeline._sampler
    launch = sampler.launch
    count = iter(range(1000))

    class Slow:
        def __init__(self, pending, number):
            self.pending, self.number = pending, number

        def result(self):
            if self.number == 3:
                assert held.wait(60)
            return self.pending.result()

    sampler.launch = lambda *args: Slow(launch(*args), next(count))
    answer = toy.submit([1, 2], recorder=recorder(lambda d: heard.set() if d.token_ids else None), max_tokens=6)
    assert heard.wait(60)
    while len(answer.token_ids) < 3:
        assert not answer.ends
    held.set()
    assert len(answer.ok().token_ids) == 6


@pytest.mark.parametrize("overlap", [False, True])
def test_faults_with_a_step_in_flight_harm_nobody_else(make_toy, overlap):
    """Steps that raise in the forward pass, in sampling and in reading; NaN; ends and cancels all the while."""
    rng = random.Random(overlap)
    given = [[k % 5 + 1, *(rng.randrange(1, VOCAB) for _ in range(k))] for k in range(24)]
    roomy = make_toy(vocab_size=VOCAB, eos=0)
    expected = [roomy.submit(p, max_tokens=30).ok().token_ids for p in given]
    toy = make_toy(num_blocks=60, vocab_size=VOCAB, eos=0, overlap=overlap, max_step_tokens=20)
    sampler = toy.engine._pipeline._sampler
    launch, calls = sampler.launch, iter(range(10**6))

    def fail(slices):
        if len(slices) > 1 and rng.random() < 0.1:
            raise RuntimeError("forward")

    class Broken:
        def __init__(self, pending):
            self.pending = pending

        def result(self):
            raise RuntimeError("reading")

    def launch_broken(logits, rows, last_tokens):
        if len(rows) > 1 and next(calls) % 11 == 5:
            raise RuntimeError("sampling")
        pending = launch(logits, rows, last_tokens)
        return Broken(pending) if len(rows) > 1 and rng.random() < 0.1 else pending

    toy.runner.fail, sampler.launch = fail, launch_broken
    answers = [toy.submit(p, f"{k}", max_tokens=30) for k, p in enumerate(given)]
    toy.engine.cancel(["3", "9"])
    for k, (answer, tokens) in enumerate(zip(answers, expected, strict=True)):
        answer.wait()
        if answer.error is None:
            assert answer.token_ids == tokens
        else:
            assert k in (3, 9)
            assert answer.error.kind is ErrorKind.CANCELLED


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("where", ["forward", "sampling", "reading"])
def test_only_the_guilty_one_ends(make_toy, overlap, where):
    toy = make_toy(vocab_size=VOCAB, overlap=overlap)
    good = [toy.submit([k, k + 1], max_tokens=30).ok().token_ids for k in (1, 2, 3)]
    sampler = toy.engine._pipeline._sampler
    launch = sampler.launch

    def guilty(slot):
        return any(r.slot == slot and r.request_id == "bad" for r in toy.engine._scheduler.running)

    def fail(slices):
        if where == "forward" and any(part.start >= 12 and guilty(part.slot) for part in slices):
            raise RuntimeError("thirteen")

    class Broken:
        def result(self):
            raise RuntimeError("thirteen")

    def launch_broken(logits, rows, last_tokens):
        bad = any(row.number > 9 and guilty(row.slot) for row in rows)
        if where == "sampling" and bad:
            raise RuntimeError("thirteen")
        pending = launch(logits, rows, last_tokens)
        return Broken() if where == "reading" and bad else pending

    toy.runner.fail, sampler.launch = fail, launch_broken
    toy.runner.gate.clear()
    answers = [toy.submit([k, k + 1], max_tokens=30) for k in (1, 2)]
    bad = toy.submit([4, 1], "bad", max_tokens=30)
    answers.append(toy.submit([3, 4], max_tokens=30))
    toy.runner.gate.set()
    assert bad.wait().error.kind is ErrorKind.STAGE_FAILED
    assert "thirteen" in bad.error.message
    assert 9 <= len(bad.token_ids) <= 12
    assert [a.ok().token_ids for a in answers] == good
