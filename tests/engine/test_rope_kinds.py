"""Rotary frequencies that depend on a request's length: each request has its own, as if it were alone.

The tiny decoders switch at 32 tokens. "phi3_longrope" computes an answer that crosses the switch anew, as transformers
has it for the Phi line; "llama_longrope" goes on with the keys it has, as transformers has it for the others.
"""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest
import torch

from triptych.python_models.contract.errors import TriptychError
from triptych.python_models.language_model.runner.executor import make_executor
from triptych.python_models.language_model.runner.options import RunnerOptions
from triptych.python_models.language_model.runner.rope import RopeSwitch

KINDS = ["phi3_longrope", "llama_longrope"]
SHORT, LONG = 20, 80


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return random.Random(seed * 1000 + length).choices(range(1, 290), k=length)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"chunked_prefill_size": 8}, {"overlap": "on"}])
def test_short_and_long_requests_in_one_batch(make_tiny: Any, device: str, kind: str, options: dict[str, Any]) -> None:
    tiny = make_tiny(kind, device)
    stage = tiny.stage(**options)
    prompts = [prompt_of(n) for n in (SHORT, LONG, 5, 32, 33)]
    # none of the short ones comes near the switch, but that of 32 tokens
    answers = [tiny.ask(stage, prompt, max_tokens=10) for prompt in prompts]
    assert [a.ok().token_ids for a in answers] == [tiny.generate(prompt, 10) for prompt in prompts]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("overlap", ["on", "off"])
@pytest.mark.parametrize("guesses", [0, 4])
def test_answers_that_cross_the_switch(make_tiny: Any, device: str, kind: str, overlap: str, guesses: int) -> None:
    tiny = make_tiny(kind, device)
    stage = tiny.stage(overlap=overlap, speculative_tokens=guesses)
    prompts = [prompt_of(n) for n in (12, 31, 32, 33, 60)]
    # that which repeats itself can be guessed
    prompts.append([*range(1, 9)] * 3)
    answers = [tiny.ask(stage, prompt, max_tokens=40) for prompt in prompts]
    assert [a.ok().token_ids for a in answers] == [tiny.generate(prompt, 40) for prompt in prompts]


@pytest.mark.parametrize("kind", KINDS)
def test_requests_that_cross_while_blocks_are_short(make_tiny: Any, kind: str) -> None:
    tiny = make_tiny(kind)
    stage = tiny.stage(kv_cache_tokens=96, context_length=96, overlap="on")
    prompts = [prompt_of(n) for n in (20, 25, 28, 30)]
    answers = [tiny.ask(stage, prompt, max_tokens=40) for prompt in prompts]
    assert [a.ok().token_ids for a in answers] == [tiny.generate(prompt, 40) for prompt in prompts]


def test_the_prefix_cache_knows_short_from_long(make_tiny: Any) -> None:
    tiny = make_tiny("phi3_longrope")
    stage = tiny.stage()
    long = prompt_of(60)
    cached = []
    for prompt in (long[:24], long, long[:24], [*long[:48], 7, 8]):
        answer = tiny.ask(stage, prompt, max_tokens=6).ok()
        assert answer.token_ids == tiny.generate(prompt, 6)
        cached.append(answer.usage.cached_tokens)
    assert cached == [0, 0, 20, 48]
    # what an answer computed anew is found again
    first = tiny.ask(stage, prompt_of(28), max_tokens=20).ok().token_ids
    again = tiny.ask(stage, [*prompt_of(28), *first], max_tokens=6).ok()
    assert again.token_ids == tiny.generate([*prompt_of(28), *first], 6)
    assert again.usage.cached_tokens == 44


def test_choices_of_one_prompt_cross_each_by_itself(make_tiny: Any) -> None:
    tiny = make_tiny("phi3_longrope")
    answer = tiny.ask(tiny.stage(), prompt_of(28), max_tokens=12, n=2).ok()
    expected = tiny.generate(prompt_of(28), 12)
    for index in range(2):
        assert [i for d in answer.deltas if d.index == index for i in d.token_ids] == expected


def test_padded_decode_steps(make_tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for CUDA graphs."""
    plain = RunnerOptions.of.__func__
    monkeypatch.setattr(
        RunnerOptions,
        "of",
        classmethod(lambda cls, *a, **k: dataclasses.replace(plain(cls, *a, **k), graph_batch=4)),
    )
    tiny = make_tiny("phi3_longrope")
    stage = tiny.stage()
    assert stage._runner._graphs is not None
    prompts = [prompt_of(n) for n in (20, 80, 29)]
    answers = [tiny.ask(stage, prompt, max_tokens=8) for prompt in prompts]
    assert [a.ok().token_ids for a in answers] == [tiny.generate(prompt, 8) for prompt in prompts]


def test_without_the_choice_by_request_tokens_would_differ(make_tiny: Any) -> None:
    """The short set is not the long one: the tests above can fail."""
    tiny = make_tiny("phi3_longrope")
    rotary = tiny.reference.base_model.rotary_emb
    x = torch.zeros(1, 1, 64)
    short, _ = rotary(x, torch.arange(SHORT)[None])
    long, _ = rotary(x, torch.arange(LONG)[None])
    assert float((short - long[:, :SHORT]).abs().max()) > 0.5


@pytest.mark.parametrize("backend", ["transformers", "fused"])
@pytest.mark.parametrize("overlap", ["on", "off"])
def test_dynamic_frequencies_stay_up_to_the_end_of_the_context(make_tiny: Any, backend: str, overlap: str) -> None:
    tiny = make_tiny("llama_dynamic")
    stage = tiny.stage(decoder_backend=backend, overlap=overlap)
    prompts = [prompt_of(n) for n in (500, 9)]
    answers = [tiny.ask(stage, prompt, max_tokens=count) for prompt, count in zip(prompts, (12, 40), strict=True)]
    assert answers[0].ok().token_ids == tiny.generate(prompts[0], 12)
    assert answers[1].ok().token_ids == tiny.generate(prompts[1], 40)


def test_fused_layers_decline_longrope(make_tiny: Any) -> None:
    tiny = make_tiny("phi3_longrope")
    with pytest.raises(TriptychError, match="rope_type longrope"):
        make_executor(tiny.decoder, "fused")


def test_which_decoders_compute_anew(make_tiny: Any) -> None:
    assert RopeSwitch.of(make_tiny("phi3_longrope").decoder.config) == RopeSwitch(32, True)
    assert RopeSwitch.of(make_tiny("llama_longrope").decoder.config) == RopeSwitch(32, False)
    assert RopeSwitch.of(make_tiny("llama_dynamic").decoder.config) is None
