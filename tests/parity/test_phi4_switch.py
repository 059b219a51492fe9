"""Phi-4-multimodal beyond the length at which its rotary frequencies change, with adapters and media.

The truth is the decoder without any cache, every token computed from the whole conversation. It is not ``generate``:
in transformers 5.23 that of this family goes on with the newest token alone when an answer crosses the switch.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from triptych.python_models.contract.plan import Plan
from triptych.python_models.contract.sampling import SamplingParams
from triptych.python_models.language_model.stage import LanguageModelStage
from triptych.python_models.stage import NoTelemetry

NEW_TOKENS = 12


@pytest.fixture
def parts_at(make_parts: Callable[[str], Any], tmp_path: Path) -> Callable[[int], Any]:
    """Switch -> the tiny checkpoint with it."""

    def make(switch: int) -> Any:
        parts = make_parts("phi4_multimodal")
        folder = tmp_path / f"{switch}"
        shutil.copytree(parts.folder, folder)
        config = json.loads((folder / "config.json").read_text())
        config["original_max_position_embeddings"] = switch
        config["rope_parameters"] |= {
            "rope_type": "longrope",
            "short_factor": [1.0] * 6,
            "long_factor": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0],
            "original_max_position_embeddings": switch,
            "factor": 2048 / switch,
        }
        (folder / "config.json").write_text(json.dumps(config))
        return type(parts)(folder, parts.tiny)

    return make


def start(parts: Any, stage: LanguageModelStage, chat: Any, answer: Any) -> Any:
    prepared = parts.prepare(chat)
    sampling = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS)
    plan = Plan(prepared.items, sampling, prepared.rope_delta, extras=prepared.extras)
    inputs = {
        "input_ids": prepared.input_ids,
        "position_ids": prepared.position_ids,
        "plan": [plan.to_json().encode()],
        **{f"{name}_embeddings": rows for name, rows in parts.encode(prepared).items()},
    }
    stage.submit("", inputs, answer)
    return answer


def tokens(answer: Any) -> list[int]:
    return [token for delta in answer.result() for token in delta.token_ids]


# prompts of 6 to 16 tokens, or one with a picture, of 481
@pytest.mark.parametrize("switch", [14, 485])
def test_requests_on_both_sides_and_across(
    parts_at: Callable[[int], Any], new_answer: Callable[[], Any], switch: int
) -> None:
    parts = parts_at(switch)
    make = parts.make
    chats = [make.chat(make.image(1), "x")]
    if switch < 100:
        others = make.chat("hello world"), make.chat("numbers 0123456789 " * 5), make.chat(make.audio(3), "transcribe")
        chats = [*others, make.chat("hi there, what is it?")]
    lengths = [len(parts.prepare(chat).input_ids) for chat in chats]
    assert any(length <= switch < length + NEW_TOKENS - 1 for length in lengths), "no answer crosses"
    stage = LanguageModelStage(parts.settings, NoTelemetry(), "cpu")
    try:
        answers = [start(parts, stage, chat, new_answer()) for chat in chats]
        ends = parts.decoder.eos_token_ids
        found = [[t for t in tokens(answer) if t not in ends] for answer in answers]
    finally:
        stage.close()
    assert found == [[t for t in parts.tokens(chat, NEW_TOKENS) if t not in ends] for chat in chats]
