"""Two GPUs: NCCL or symmetric memory inside CUDA graphs; a rank that is killed under them."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from parallel_decoders import generate, greedy, prompts
from test_decoders import CHECKPOINTS, saved

from triptych.python_models.contract.errors import ErrorKind, TriptychError

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]


@pytest.mark.parametrize("one_shot", [True, False])
@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_two_gpus_compute_what_transformers_does(make_group: Any, tmp_path: Path, kind: str, one_shot: bool) -> None:
    cls, config, values, whole = CHECKPOINTS[kind]
    model = saved(cls, config, values, tmp_path)
    asked = prompts(4)
    expected = [generate(model, prompt, 10) for prompt in asked]
    group = make_group(
        build="parallel_decoders:build",
        expert_parallel=whole,
        device="cuda",
        one_shot=one_shot,
        folder=str(tmp_path),
        cls=cls,
    )
    group.warm_up(64)
    with torch.inference_mode():
        assert greedy(group, asked, 10) == expected
        assert greedy(group, asked, 10, chunk=7) == expected


def test_a_killed_rank_lets_go_of_the_device(make_group: Any, tmp_path: Path, faults: list[TriptychError]) -> None:
    cls, config, values, _ = CHECKPOINTS["one key head, tied head"]
    saved(cls, config, values, tmp_path)
    # a kernel that waits for a peer's memory can only be ended with the process
    group = make_group(build="parallel_decoders:build", device="cuda", one_shot=False, folder=str(tmp_path), cls=cls)
    group.warm_up(64)
    threading.Timer(0.5, os.kill, (group.pids[0], signal.SIGKILL)).start()
    began = time.monotonic()
    with pytest.raises(TriptychError, match=r"rank 1 .*signal SIGKILL") as caught, torch.inference_mode():
        _run(group)
    assert caught.value.kind is ErrorKind.STAGE_DEAD
    assert time.monotonic() - began < 10
    assert len(faults) == 1


def _run(group: Any) -> None:
    while True:
        greedy(group, prompts(3), 10)
