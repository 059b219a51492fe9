"""Fixtures for every test area: tiny checkpoints, and the ``gpu`` mark."""

from __future__ import annotations

import functools
import importlib.util
import json
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
    if path := config.getoption("--report"):
        config.pluginmanager.register(_Report(Path(path)))


def pytest_addoption(parser: pytest.Parser) -> None:
    """Of the parity tests: for which families they run (those marked quick where it is not given), and their report."""
    parser.addoption("--families", default="", help="names of tests/tiny, comma-separated, or all")
    parser.addoption("--report", default="", metavar="FILE", help="write how the parity tests ended to this JSON file")


class _Report:
    """How each parity test ended: what docs/models.md is made from.

    Rows that the file already has stay, but those of a family and test file that ran anew.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.outcomes: dict[tuple[str, str, str], str] = {}

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        for item in session.items:
            given = getattr(getattr(item, "callspec", None), "params", {})
            if family := given.get("model_type") or given.get("parts"):
                kinds = ("case", "modality", "medium_kind") if "parts" in given else ()
                detail = next((str(given[name]) for name in kinds if name in given), "")
                # with several workers only reports reach the process that writes
                item.user_properties.append(("row", (family, detail)))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        properties = dict(report.user_properties)
        if "row" not in properties or (report.when != "call" and report.passed):
            return
        family, detail = properties["row"]
        place, _, name = report.nodeid.partition("[")[0].rpartition("::")
        key = family, f"{Path(place).stem}.{name}", detail
        if self.outcomes.get(key, "passed") in ("passed", "skipped"):
            refused = properties.get("refused")
            self.outcomes[key] = f"refused: {refused}" if refused else report.outcome

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if hasattr(session.config, "workerinput"):
            return
        ran = {(family, test.partition(".")[0]) for family, test, _ in self.outcomes}
        known = json.loads(self.path.read_text()) if self.path.is_file() else []
        rows = [row for row in known if (row[0], row[1].partition(".")[0]) not in ran]
        rows += [[*key, outcome] for key, outcome in self.outcomes.items()]
        # a row in a line
        self.path.write_text("[\n" + ",\n".join(json.dumps(row) for row in sorted(rows)) + "\n]\n")


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
