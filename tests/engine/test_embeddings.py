"""Embeddings: the hidden state of a prompt's last token, whatever else is in the batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

PROMPTS = [[5, 9, 13, 17, 21, 25, 29, 33, 37], [7], [3, 1, 4, 1, 5, 9, 2, 6], list(range(40, 90))]


def expected(tiny: Any, prompt: Sequence[int]) -> torch.Tensor:
    """By transformers: the decoder's last hidden state, of length 1."""
    with torch.no_grad():
        ids = torch.tensor([list(prompt)], device=tiny.device)
        state = tiny.reference.base_model(input_ids=ids, use_cache=False).last_hidden_state[0, -1].float().cpu()
    return state / state.norm()


def vector(recorder: Any) -> torch.Tensor:
    (delta,) = (delta for delta in recorder.ok().deltas if not delta.is_heartbeat)
    assert (delta.finish_reason, delta.text, delta.token_ids) == ("stop", "", ())
    return torch.from_numpy(np.frombuffer(delta.embedding, dtype="<f4").copy())


@pytest.mark.parametrize("kind", ["qwen2", "gemma3"])
@pytest.mark.parametrize("overlap", ["off", "on"])
@pytest.mark.parametrize("chunk", [0, 16])
def test_equals_transformers(make_tiny: Callable[..., Any], kind: str, overlap: str, chunk: int, device: str) -> None:
    tiny = make_tiny(kind, device)
    stage = tiny.stage(overlap=overlap, chunked_prefill_size=chunk)
    # answers beside them, before and after
    answers = [tiny.ask(stage, PROMPTS[2], max_tokens=12, ignore_eos=True)]
    asked = [tiny.ask(stage, prompt, embed=True) for prompt in PROMPTS]
    answers.append(tiny.ask(stage, PROMPTS[0], max_tokens=12, ignore_eos=True))
    for prompt, recorder in zip(PROMPTS, asked, strict=True):
        torch.testing.assert_close(vector(recorder), expected(tiny, prompt), rtol=0, atol=2e-4)
    assert answers[0].ok().token_ids == tiny.generate(PROMPTS[2], 12, eos_token_id=None)
    assert answers[1].ok().token_ids == tiny.generate(PROMPTS[0], 12, eos_token_id=None)


def test_cached_prompt_and_usage(make_tiny: Callable[..., Any], device: str) -> None:
    tiny = make_tiny("qwen2", device)
    stage = tiny.stage()
    first, again = (tiny.ask(stage, PROMPTS[3], embed=True).wait() for _ in range(2))
    assert again.usage.cached_tokens == len(PROMPTS[3]) // 4 * 4 - (0 if len(PROMPTS[3]) % 4 else 4) > 0
    for recorder in (first, again):
        assert (recorder.usage.prompt_tokens, recorder.usage.completion_tokens) == (len(PROMPTS[3]), 0)
    torch.testing.assert_close(vector(again), vector(first), rtol=0, atol=2e-5)
    stage.close()
    stage.engine.check()
