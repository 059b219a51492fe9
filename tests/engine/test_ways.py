"""With real decoders every way of running gives the tokens of transformers' ``generate``."""

from __future__ import annotations

import itertools
import random
import threading

import pytest

KINDS = ["qwen2", "gemma2", "qwen2_5_vl"]
LENGTHS = (5, 16, 33, 70)


def prompt_of(length):
    rng = random.Random(length)
    # it repeats itself, so that there is something to guess
    return (rng.choices(range(1, 290), k=9) * 8)[:length]


WAYS = list(itertools.product(("on", "off"), (16, 64, 0), (True, False), (0, 4)))


@pytest.fixture(scope="module")
def expected_of():
    return {}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("overlap", "chunk", "cache", "guesses"), WAYS)
def test_the_tokens_of_generate(make_tiny, device, expected_of, kind, overlap, chunk, cache, guesses):
    tiny = make_tiny(kind, device)
    prompts = [prompt_of(length) for length in LENGTHS]
    key = (kind, device)
    if key not in expected_of:
        expected_of[key] = [tiny.generate(prompt, 24) for prompt in prompts]
    stage = tiny.stage(overlap=overlap, chunked_prefill_size=chunk, prefix_cache=cache, speculative_tokens=guesses)
    # side by side, then again with what the cache kept
    for _ in range(2):
        answers = [tiny.ask(stage, prompt, max_tokens=24) for prompt in prompts]
        assert [answer.ok().token_ids for answer in answers] == expected_of[key]
    assert all((answer.usage.cached_tokens > 0) == cache for answer in answers if answer.usage.prompt_tokens > 5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("overlap", ["on", "off"])
@pytest.mark.parametrize("guesses", [0, 4])
def test_preempted_again_and_again(make_tiny, device, meter, expected_of, kind, overlap, guesses):
    tiny = make_tiny(kind, device)
    # their 24 blocks leave one of 25 to grow into
    prompts = [prompt_of(length) for length in (20, 21, 22, 23)]
    key = (kind, device, "alike")
    if key not in expected_of:
        expected_of[key] = [tiny.generate(prompt, 24) for prompt in prompts]
    stage = tiny.stage(meter, overlap=overlap, speculative_tokens=guesses, kv_cache_tokens=100, context_length=100)
    # nobody starts before all are there
    together = threading.Event()
    stage.engine._post(together.wait)
    answers = [tiny.ask(stage, prompt, max_tokens=24) for prompt in prompts]
    together.set()
    assert [answer.ok().token_ids for answer in answers] == expected_of[key]
    assert meter("triptych_preemptions_total") > 0
