"""``--json-model-override-args``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from triptych.python_models.contract.errors import ErrorKind, TriptychError
from triptych.python_models.contract.settings import Settings
from triptych.python_models.families.checkpoint import find_checkpoint
from triptych.python_models.families.registry import load_family


def family_of(folder: Path, overrides: Any) -> Any:
    text = overrides if isinstance(overrides, str) else json.dumps(overrides)
    return load_family(Settings(model=str(folder), json_model_override_args=text))


def test_every_stage_sees_the_same_values(tiny_checkpoint: Callable[[str], Path]) -> None:
    folder = tiny_checkpoint("qwen2_5_vl")
    before = json.loads((folder / "config.json").read_text())
    changes = {"text_config": {"rms_norm_eps": 0.5}, "vision_config": {"fullatt_block_indexes": [0]}}
    family = family_of(folder, changes)
    decoder = family.load_decoder("cpu", torch.float32)
    assert decoder.config.rms_norm_eps == 0.5
    assert decoder.text_model.norm.variance_epsilon == 0.5
    assert family.load_encoder("vision", "cpu", torch.float32).base.visual.fullatt_block_indexes == [0]
    assert family.load_preprocessor().config.text_config.rms_norm_eps == 0.5
    checkpoint = find_checkpoint(family.settings)
    assert checkpoint.config["text_config"] == before["text_config"] | {"rms_norm_eps": 0.5}
    assert checkpoint.original == before


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"text_config": {"rms_norm_epsilon": 1}}, r"no 'text_config.rms_norm_epsilon'; did you mean 'rms_norm_eps'\?"),
        ({"video_prunning": 0.5}, "no 'video_prunning'"),
        ({"no_config": {"x": 1}}, "no 'no_config.x'"),
        ("[1]", "must be a JSON object"),
        ("{", "is not JSON"),
    ],
)
def test_what_is_refused(tiny_checkpoint: Callable[[str], Path], overrides: Any, message: str) -> None:
    with pytest.raises(TriptychError, match=message) as caught:
        family_of(tiny_checkpoint("qwen2_5_vl"), overrides).load_preprocessor()
    assert caught.value.kind is ErrorKind.INVALID_REQUEST
    assert caught.value.param == "settings.json_model_override_args"
