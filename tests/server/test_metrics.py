"""The thread that owns a stub's metrics, with a server's side that keeps what it is told."""

from __future__ import annotations

import importlib
import sys
import time
import types
from collections.abc import Iterator
from typing import Any

import pytest

MODULES = ("triton_python_backend_utils", "triptych.backends.triptych.metrics")


class Family:
    """A metric family that keeps the last value."""

    COUNTER = GAUGE = HISTOGRAM = 0
    values: dict[str, float]

    def __init__(self, name: str, description: str, kind: int) -> None:
        self.name = name

    def Metric(self, labels: dict[str, str]) -> Any:
        assert labels["stage"] == "vision_encoder"
        return types.SimpleNamespace(set=lambda value: self.values.update({self.name: value}))


@pytest.fixture
def metrics(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The module, on a server that is not there."""
    for name in MODULES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    Family.values = {}
    server = types.SimpleNamespace(MetricFamily=Family)
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", server)
    yield importlib.import_module("triptych.backends.triptych.metrics")
    sys.modules.pop("triptych.backends.triptych.metrics", None)


def _reported(metrics: Any) -> dict[str, float]:
    """What a thread has told the server after its first heartbeat."""
    thread = metrics.MetricsThread({"stage": "vision_encoder"}, lambda: None)
    until = time.monotonic() + 30
    while metrics.HEARTBEAT not in Family.values:
        assert time.monotonic() < until
        time.sleep(0.01)
    thread.close(30)
    return Family.values


def test_gpu_memory_is_reported_of_all_devices(metrics: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = types.SimpleNamespace(
        is_initialized=lambda: True, device_count=lambda: 2, memory_reserved=lambda device: 100 + device
    )
    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(cuda=cuda))
    assert _reported(metrics)["triptych_gpu_memory_bytes"] == 201


@pytest.mark.parametrize("torch", [None, types.SimpleNamespace()], ids=["not imported", "being imported"])
def test_without_a_gpu_there_is_nothing_to_report(metrics: Any, monkeypatch: pytest.MonkeyPatch, torch: Any) -> None:
    monkeypatch.setitem(sys.modules, "torch", torch)
    assert "triptych_gpu_memory_bytes" not in _reported(metrics)


def test_where_nothing_is_to_be_measured_the_thread_only_beats(metrics: Any) -> None:
    beats: list[None] = []
    thread = metrics.MetricsThread({"stage": "vision_encoder"}, lambda: beats.append(None), enabled=False)
    until = time.monotonic() + 30
    while not beats:
        thread.set(metrics.HEARTBEAT, 1.0)
        thread.add("triptych_encoder_cache_hits_total")
        assert time.monotonic() < until
        time.sleep(0.01)
    thread.close(30)
    assert Family.values == {}
