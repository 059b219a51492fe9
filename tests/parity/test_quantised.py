"""Quantised decoders shared by two ranks, each of which turns its slices of the weights into plain ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from triptych.python_models.contract.plan import Plan
from triptych.python_models.contract.sampling import SamplingParams
from triptych.python_models.language_model.stage import LanguageModelStage
from triptych.python_models.stage import NoTelemetry

NEW_TOKENS = 12


@pytest.mark.parametrize("name", ["qwen2_5_vl_awq", "qwen2_5_vl_gptq", "qwen2_vl_nf4", "qwen3_vl_moe_fp8"])
def test_two_ranks(make_parts: Callable[[str], Any], new_answer: Callable[[], Any], name: str) -> None:
    parts = make_parts(name)
    stage = LanguageModelStage(replace(parts.settings, tp=2, torch_threads=1), NoTelemetry(), "cpu")
    try:
        chats = [parts.make.chat("what is shown here? " * count) for count in (1, 3)]
        answers = []
        for k, chat in enumerate(chats):
            prepared = parts.prepare(chat)
            plan = Plan(
                prepared.items,
                SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True),
                prepared.rope_delta,
                extras=prepared.extras,
            )
            answers.append(new_answer())
            inputs = {"input_ids": prepared.input_ids, "position_ids": prepared.position_ids}
            stage.submit(f"r{k}", {**inputs, "plan": [plan.to_json().encode()]}, answers[-1])
        for chat, answer in zip(chats, answers, strict=True):
            found = [token for delta in answer.result() for token in delta.token_ids]
            expected = parts.reference_tokens(chat, NEW_TOKENS)
            assert expected
            assert found[: len(expected)] == expected
    finally:
        stage.close()
