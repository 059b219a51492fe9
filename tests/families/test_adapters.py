"""Low-rank adapters: each token takes its own, and what is wrong with a folder is said."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from triptych.python_models.contract.errors import ErrorKind, TriptychError
from triptych.python_models.contract.settings import Settings
from triptych.python_models.families.adapters import AdaptedLinear, AdapterFolder, Switch, adapt, adapted
from triptych.python_models.families.registry import load_family

RANKS = {"vision": 3, "speech": 2}
SCALES = {"vision": 2.0, "speech": 0.5}


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({"wanted": nn.Linear(8, 6), "other": nn.Linear(8, 6)})])

    def forward(self, inputs_embeds: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.layers[0]["wanted"](inputs_embeds)
        return out


@pytest.fixture
def stack() -> tuple[Stack, Switch]:
    torch.manual_seed(0)
    made, switch = Stack().requires_grad_(False), Switch(RANKS)
    adapt(made.layers, frozenset({"wanted"}), switch)
    return made, switch


def test_each_token_takes_its_own(stack: tuple[Stack, Switch]) -> None:
    made, switch = stack
    ((path, layer),) = adapted(made)
    assert path == "layers.0.wanted"
    halves = {name: (layer.lora_A[name].weight, layer.lora_B[name].weight) for name in RANKS}
    layer.stack(SCALES)
    switch.follow(made)
    hidden = torch.randn(1, 5, 8)
    found = made(inputs_embeds=hidden, adapter=torch.tensor([[0, 1, 2, 1, 0]]))
    plain = nn.functional.linear(hidden, layer.weight, layer.bias)
    # nothing at all for tokens without one
    assert torch.equal(found[0, [0, 4]], plain[0, [0, 4]])
    for name, tokens in (("vision", [1, 3]), ("speech", [2])):
        down, up = halves[name]
        wanted = plain[0, tokens] + SCALES[name] * hidden[0, tokens] @ down.T @ up.T
        torch.testing.assert_close(found[0, tokens], wanted)


def test_a_layer_without_its_weights_fails() -> None:
    with pytest.raises(RuntimeError, match="not in place"):
        AdaptedLinear(nn.Linear(8, 6), Switch(RANKS))(torch.zeros(1, 2, 8))


def write(folder: Path, weights: dict[str, torch.Tensor], **config: Any) -> AdapterFolder:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"r": 3, "lora_alpha": 6, **config}))
    save_file(weights, folder / "adapter_model.safetensors")
    return AdapterFolder(folder)


@pytest.mark.parametrize("prefix", ["base_model.model.", ""])
def test_a_folder_of_peft(tmp_path: Path, stack: tuple[Stack, Switch], prefix: str) -> None:
    weights = {"lora_A": torch.randn(3, 8), "lora_B": torch.randn(6, 3)}
    named = {f"{prefix}model.layers.0.wanted.{half}.weight": value for half, value in weights.items()}
    folder = write(tmp_path / "vision-lora", named)
    assert (folder.rank, folder.scale) == (3, 2.0)
    folder.load("vision", stack[0], "model.")
    ((_, layer),) = adapted(stack[0])
    assert torch.equal(layer.lora_A["vision"].weight, weights["lora_A"])
    assert torch.equal(layer.lora_B["vision"].weight, weights["lora_B"])


def test_missing_and_foreign_weights_are_named(tmp_path: Path, stack: tuple[Stack, Switch]) -> None:
    weights = {
        "model.layers.0.wanted.lora_A.weight": torch.randn(3, 8),
        "model.layers.9.wanted.lora_A.weight": torch.randn(3, 8),
    }
    folder = write(tmp_path / "vision-lora", weights)
    with pytest.raises(TriptychError, match=r"layers\.0\.wanted\.lora_B.*layers\.9\.wanted\.lora_A"):
        folder.load("vision", stack[0], "model.")


@pytest.mark.parametrize("config", [{"use_dora": True}, {"bias": "all"}, {"rank_pattern": {"x": 4}}])
def test_other_kinds_are_refused(tmp_path: Path, config: dict[str, Any]) -> None:
    with pytest.raises(TriptychError, match=next(iter(config))) as caught:
        write(tmp_path / "vision-lora", {"x": torch.zeros(1)}, **config)
    assert caught.value.kind is ErrorKind.UNSUPPORTED


def test_one_adapter_of_two(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tmp_path / "phi4"
    folder.mkdir()
    for path in tiny_checkpoint("phi4_multimodal").iterdir():
        if path.name != "speech-lora":
            (folder / path.name).symlink_to(path)
    with pytest.raises(TriptychError, match="has vision-lora but not the other of vision-lora, speech-lora"):
        load_family(Settings(model=str(folder)))


def test_without_adapters(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tmp_path / "phi4"
    folder.mkdir()
    for path in tiny_checkpoint("phi4_multimodal").iterdir():
        if path.is_file():
            (folder / path.name).symlink_to(path)
    family = load_family(Settings(model=str(folder)))
    decoder = family.load_decoder("cpu", torch.float32)
    assert not decoder.token_extras
    assert not list(adapted(decoder.text_model))
