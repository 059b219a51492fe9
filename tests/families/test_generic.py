"""The generic adapter asks a checkpoint's processor before it serves it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from triptych.python_models.contract.errors import ErrorKind, TriptychError
from triptych.python_models.contract.settings import Settings
from triptych.python_models.families import generic_rules
from triptych.python_models.families.registry import load_family


def test_a_processor_whose_placeholder_is_another_is_refused(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = tmp_path / "other"
    shutil.copytree(tiny_checkpoint("idefics3"), folder)
    config = json.loads((folder / "config.json").read_text())
    config["image_token_id"] += 1
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(TriptychError, match="leaves no token '<image>' in the prompt for its image") as caught:
        load_family(Settings(model=str(folder))).load_preprocessor()
    assert caught.value.kind is ErrorKind.UNSUPPORTED


class Head(nn.Module):
    """What a class does with its logits, by its code."""

    def __init__(self, **config: Any) -> None:
        super().__init__()
        self.lm_head = nn.Linear(2, 2, bias=False)
        self.logit_scale = 0.5
        self.config = type("Config", (), {**config, "get_text_config": lambda own: own})()


class Capped(Head):
    def forward(self, outputs: Any) -> Any:
        hidden_states = outputs.last_hidden_state
        logits = self.lm_head(hidden_states)
        logits = logits / self.config.final_logit_softcapping
        logits = torch.tanh(logits)
        logits = logits * self.config.final_logit_softcapping
        return (logits,)


class Scaled(Head):
    def forward(self, outputs: Any) -> Any:
        hidden_states = outputs[0]
        logits = self.lm_head(hidden_states)
        logits = logits * self.logit_scale
        return (logits,)


class Before(Head):
    def forward(self, outputs: Any) -> Any:
        hidden_states = outputs.last_hidden_state
        hidden_states = hidden_states / self.config.logits_scaling
        logits = self.lm_head(hidden_states)
        return (logits,)


class Masked(Head):
    def forward(self, outputs: Any) -> Any:
        hidden_states = outputs.last_hidden_state
        logits = self.lm_head(hidden_states)
        logits = logits[..., :1]
        return (logits,)


@pytest.mark.parametrize(
    "model", [Capped(final_logit_softcapping=3.0), Scaled(), Before(logits_scaling=4.0)], ids=["cap", "scale", "before"]
)
def test_what_becomes_of_logits_is_done(model: Any) -> None:
    hidden = torch.randn(3, 2)
    output = type("Output", (tuple,), {"last_hidden_state": hidden})((hidden,))
    finish = generic_rules.head_of(model)
    assert finish is not None
    torch.testing.assert_close(finish(model.lm_head(hidden)), model(output)[0])


def test_what_is_not_known_of_logits_is_refused() -> None:
    with pytest.raises(generic_rules.UnfitError, match="it changes its logits"):
        generic_rules.head_of(Masked())
