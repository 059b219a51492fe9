"""The engine gives the same tokens with decode steps replayed as CUDA graphs; on a CPU, padded as they would be."""

from __future__ import annotations

import dataclasses
import random

import pytest

from triptych.python_models.language_model.runner.options import RunnerOptions


def prompt_of(length, seed=0):
    return random.Random(seed * 1000 + length).choices(range(1, 290), k=length)


@pytest.fixture(params=[3, 16])
def padded(request, device, monkeypatch):
    """Options of a stage with graphs of up to so many requests: fewer than run, and more."""
    if device == "cpu":
        plain = RunnerOptions.of.__func__
        monkeypatch.setattr(
            RunnerOptions,
            "of",
            classmethod(lambda cls, *a, **k: dataclasses.replace(plain(cls, *a, **k), graph_batch=request.param)),
        )
    return {"max_running_requests": 16}


@pytest.mark.parametrize("overlap", ["on", "off"])
@pytest.mark.parametrize("kind", ["qwen2", "gemma2"])
def test_requests_of_all_lengths_that_come_and_go(make_tiny, device, padded, kind, overlap):
    tiny = make_tiny(kind, device)
    stage = tiny.stage(overlap=overlap, chunked_prefill_size=16, **padded)
    assert stage._runner._graphs is not None
    prompts = [prompt_of(n) for n in (5, 40, 17, 1, 26, 9)]
    counts = [12, 30, 4, 25, 8, 19]
    answers = [tiny.ask(stage, p, max_tokens=n) for p, n in zip(prompts, counts, strict=True)]
    expected = [tiny.generate(p, n) for p, n in zip(prompts, counts, strict=True)]
    assert [a.ok().token_ids for a in answers] == expected


def test_preempted_and_guessed(make_tiny, device, padded):
    tiny = make_tiny("qwen2", device)
    stage = tiny.stage(kv_cache_tokens=72, context_length=72, speculative_tokens=3, **padded)
    prompts = [prompt_of(n) for n in (9, 17, 30, 12)]
    answers = [tiny.ask(stage, p, max_tokens=40) for p in prompts]
    assert [a.ok().token_ids for a in answers] == [tiny.generate(p, 40) for p in prompts]
