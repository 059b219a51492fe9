"""Fused parts of vision towers beside transformers' own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from triptych.python_models.contract.settings import Settings
from triptych.python_models.families.registry import load_family
from triptych.python_models.families.tower_fusion import fuse_tower

NOTHING: dict[str, int] = {}
EXPECTED = {
    "qwen2_5_vl": {"norms": 5, "gated layers": 2, "attention layers": 2, "patch embeddings": 1},
    "qwen2_vl": {"attention layers": 2, "patch embeddings": 1},
    "gemma3": NOTHING,
}


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("name", EXPECTED)
def test_a_fused_tower_gives_the_same_rows(name: str, device: str, tiny_checkpoint: Callable[[str], Path]) -> None:
    family = load_family(Settings(model=str(tiny_checkpoint(name))))
    # on a GPU it would come fused
    encoder: Any = family.load_encoder("vision", "cpu", torch.float32)
    tower = encoder.base.get_submodule(family.towers["vision"][0]).to(device)  # type: ignore[attr-defined]
    if name == "gemma3":
        assert fuse_tower(tower) == NOTHING
        return
    generator = torch.Generator().manual_seed(0)
    for parameter in tower.parameters():
        # norms of ones would hide a lost weight
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator).to(device)
    whole = copy.deepcopy(tower)
    assert fuse_tower(tower) == EXPECTED[name]
    grid = torch.tensor([[1, 6, 4], [2, 4, 10]], device=device)
    patches = torch.randn(int(grid.prod(-1).sum()), 3 * 2 * 8 * 8, generator=generator).to(device)
    with torch.inference_mode():
        expected, found = (model(patches, grid).pooler_output for model in (whole, tower))
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


class _RMSNormOfAnotherKind(torch.nn.Module):
    """Adds 1 to its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(0.1 * torch.randn(16))
        self.eps = 1e-6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * (1 + self.weight)


def test_what_computes_something_else_stays(caplog: pytest.LogCaptureFixture) -> None:
    norm = _RMSNormOfAnotherKind()
    tower = torch.nn.Sequential(norm)
    with caplog.at_level("INFO"):
        assert fuse_tower(tower) == NOTHING
    assert tower[0] is norm
    assert "1 norms compute something else and stay" in caplog.text


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl"])
def test_a_replayed_tower_gives_the_same_rows(name: str, tiny_checkpoint: Callable[[str], Path]) -> None:
    family = load_family(Settings(model=str(tiny_checkpoint(name))))
    encoder: Any = family.load_encoder("vision", "cuda", torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        for _ in range(4):
            for grids in (((1, 6, 4),), ((2, 4, 10), (1, 8, 8))):
                patches = torch.randn(sum(t * h * w for t, h, w in grids), 3 * 2 * 8 * 8, generator=generator).cuda()
                found, expected = encoder._graphs(patches, grids), encoder.run(patches, grids)
                torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert len(encoder._graphs._captured) == 2
