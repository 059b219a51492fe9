"""The engine gives the tokens of transformers' ``generate`` on the same weights."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from triptych.python_models.contract.plan import MediaItem

KINDS = ["qwen2", "gemma2", "gpt_oss", "qwen2_5_vl"]


def prompt_of(length, seed=0):
    return random.Random(seed * 1000 + length).choices(range(1, 290), k=length)


@pytest.mark.parametrize("kind", KINDS)
def test_single_text(make_tiny, device, kind):
    tiny = make_tiny(kind, device)
    prompt = prompt_of(21)
    answer = tiny.ask(tiny.stage(), prompt, max_tokens=30).ok()
    assert answer.token_ids == tiny.generate(prompt, 30)
    assert answer.finish == ("length", None)
    assert answer.usage.prompt_tokens == 21
    assert answer.usage.completion_tokens == 30


@pytest.mark.parametrize("kind", KINDS)
def test_three_lengths_together_and_at_different_times(make_tiny, device, kind):
    tiny = make_tiny(kind, device)
    prompts = [prompt_of(5), prompt_of(33), prompt_of(90)]
    expected = [tiny.generate(p, 25) for p in prompts]
    stage = tiny.stage()
    together = [tiny.ask(stage, p, max_tokens=25) for p in prompts]
    assert [a.ok().token_ids for a in together] == expected
    staggered = []
    for prompt in prompts:
        staggered.append(tiny.ask(stage, prompt, max_tokens=25))
        staggered[-1].wait_first()
    assert [a.ok().token_ids for a in staggered] == expected


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_in_chunks_of_seven_tokens(make_tiny, device, kind):
    tiny = make_tiny(kind, device)
    prompts = [prompt_of(n) for n in (7, 8, 50, 64)]
    stage = tiny.stage(chunked_prefill_size=7)
    answers = [tiny.ask(stage, p, max_tokens=20) for p in prompts]
    assert [a.ok().token_ids for a in answers] == [tiny.generate(p, 20) for p in prompts]
