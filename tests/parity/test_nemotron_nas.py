"""Llama Nemotron Super through the engine: layers of which some keep nothing, others their own number of heads."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from triptych.python_models.contract.errors import ErrorKind, TriptychError
from triptych.python_models.contract.plan import Plan
from triptych.python_models.contract.sampling import SamplingParams
from triptych.python_models.contract.settings import Settings
from triptych.python_models.families.registry import load_family
from triptych.python_models.language_model.stage import LanguageModelStage
from triptych.python_models.stage import NoTelemetry

TEXTS = ("hello world, what is shown?", "numbers 0123456789 " * 5, "hi", "the quick brown fox jumps. " * 6)
NEW_TOKENS = 12


@pytest.fixture(scope="module")
def parts(make_parts: Callable[[str], Any]) -> Any:
    return make_parts("nemotron_nas")


@pytest.fixture(params=[0, 16], ids=["whole", "chunked"])
def stage(parts: Any, request: pytest.FixtureRequest) -> Iterator[LanguageModelStage]:
    settings = dataclasses.replace(parts.settings, chunked_prefill_size=request.param, block_size=4)
    made = LanguageModelStage(settings, NoTelemetry(), "cpu")
    yield made
    made.close()
    made.engine.check()


def start(parts: Any, stage: LanguageModelStage, text: str, answer: Any) -> Any:
    prepared = parts.prepare(parts.make.chat(text))
    plan = Plan(sampling=SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS))
    inputs = {
        "input_ids": prepared.input_ids,
        "position_ids": prepared.position_ids,
        "plan": [plan.to_json().encode()],
    }
    stage.submit(text[:8], inputs, answer)
    return answer


def tokens(answer: Any) -> list[int]:
    return [token for delta in answer.result() for token in delta.token_ids]


def test_requests_together_and_again(parts: Any, stage: LanguageModelStage, new_answer: Callable[[], Any]) -> None:
    answers = [start(parts, stage, text, new_answer()) for text in TEXTS]
    expected = [parts.reference_tokens(parts.make.chat(text), NEW_TOKENS) for text in TEXTS]
    ends = parts.decoder.eos_token_ids
    assert [[t for t in tokens(a) if t not in ends] for a in answers] == [
        [t for t in found if t not in ends] for found in expected
    ]
    again = start(parts, stage, TEXTS[1], new_answer())
    assert tokens(again) == tokens(answers[1])
    assert again.result()[-1].usage.cached_tokens > 0


def test_pages_are_those_of_the_layers_that_attend(parts: Any, stage: LanguageModelStage) -> None:
    layers = stage._runner._executor.layers
    assert [shape.key for shape in layers] == [(2, 16), (0, 1), (0, 1), (1, 16), (4, 16)]
    assert stage._runner.kv_groups[0].layers == (0, 3, 4)
    # float32 keys and values of seven heads
    assert stage._runner.bytes_per_token == (4 * 2 * 7 * 16,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_configs": None}, "no 'block_configs'"),
        ({"num_hidden_layers": 4}, "5 block_configs for 4 layers"),
        ({"window_length": 8}, "layer 3 has attention with window_length"),
    ],
)
def test_what_is_not_supported(parts: Any, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    config = json.loads((parts.folder / "config.json").read_text())
    if "window_length" in change:
        config["block_configs"][3]["attention"] |= change
    else:
        config = {key: value for key, value in (config | change).items() if value is not None}
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(parts.folder / name, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(TriptychError, match=message) as caught:
        load_family(Settings(model=str(tmp_path))).load_preprocessor()
    assert caught.value.kind is ErrorKind.UNSUPPORTED
