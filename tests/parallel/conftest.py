"""Groups of ranks on the CPU, and the proof that nothing of them is left."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from triptych.python_models.contract.errors import TriptychError
from triptych.python_models.language_model.runner.parallel.member import Recipe
from triptych.python_models.language_model.runner.parallel.runner import ParallelRunner

torch.set_num_threads(1)
# workers find the builders of these tests by module name
if str(Path(__file__).parent) not in sys.path:
    sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def faults() -> list[TriptychError]:
    """What groups that `make_group` made were lost of."""
    return []


@pytest.fixture
def make_group(faults: list[TriptychError], monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., ParallelRunner]]:
    """Makes groups of fakes; at the end they are closed, and no process of theirs may be left."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    made: list[ParallelRunner] = []
    before = {p.pid for p in psutil.Process().children(recursive=True)}

    def make(
        size: int = 2,
        build: str = "parallel_fakes:build",
        expert_parallel: bool = False,
        device: str = "cpu",
        one_shot: bool = True,
        **options: Any,
    ) -> ParallelRunner:
        recipe = Recipe(build, options, expert_parallel, "float32", one_shot)
        devices = ["cpu"] * size if device == "cpu" else [f"{device}:{rank}" for rank in range(size)]
        runner = ParallelRunner(recipe, devices, faults.append)
        made.append(runner)
        runner.allocate([64] * len(runner.kv_groups))
        return runner

    yield make
    for runner in made:
        runner.close()
    left = [p for p in psutil.Process().children(recursive=True) if p.pid not in before]
    assert not [p for p in left if p.status() != psutil.STATUS_ZOMBIE], left
