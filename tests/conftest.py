"""Fixtures for every test area: tiny checkpoints, and the ``gpu`` mark."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

# Before torch is imported: small test models gain nothing from more threads, and machines that run tests are busy.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
# Before triton is imported: without a GPU, kernels run in its interpreter.
if not Path("/dev/nvidiactl").exists() or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_configure(config: Any) -> None:
    """``config.tiny_builder()`` gives tests/tiny/build.py where there are no fixtures yet."""
    config.tiny_builder = _tiny_builder


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--families a,b``: for which the parity tests run; those marked quick where it is not given."""
    parser.addoption("--families", default="", help="names of tests/tiny, comma-separated, or all")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked ``gpu`` where there is no NVIDIA GPU."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@functools.cache
def _tiny_builder() -> ModuleType:
    """tests/tiny/build.py, which is a script and no importable package."""
    spec = importlib.util.spec_from_file_location("tiny_build", Path(__file__).parent / "tiny" / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Family name (a key of FAMILIES in tests/tiny/build.py) -> folder of its tiny checkpoint, made once a session."""
    made: dict[str, Path] = {}

    def checkpoint(name: str) -> Path:
        if name not in made:
            folder = tmp_path_factory.mktemp(name, numbered=False)
            _tiny_builder().build(name, folder)
            made[name] = folder
        return made[name]

    return checkpoint
