"""A stage's measurements on their way to the server's /metrics.

A metric object of the Python backend must be used from one thread only: two at once crash the whole server. So one
thread owns them all. Stages only add to plain numbers under a lock, which the thread carries over a few times a
second: many small increments become one call to the server, and no count is ever lost.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import triton_python_backend_utils as pb_utils

from triptych.python_models.contract.metrics import METRICS

HEARTBEAT = "triptych_heartbeat_timestamp_seconds"
GPU_MEMORY = "triptych_gpu_memory_bytes"
FLUSH_S = 0.1
HEARTBEAT_S = 1.0
MAX_OBSERVATIONS = 100_000
_LOG = logging.getLogger(__name__)
_Key = tuple[str, tuple[tuple[str, str], ...]]


class MetricsThread:
    """Implements :class:`~triptych.python_models.stage.Telemetry` for one stub."""

    def __init__(self, labels: Mapping[str, str], on_heartbeat: Callable[[], None], enabled: bool = True) -> None:
        """Start the thread.

        Args:
            labels: what every sample carries.
            on_heartbeat: called by the thread with every heartbeat.
            enabled: False where nothing is to be measured: the thread only beats.
        """
        self._labels = dict(labels)
        self._on_heartbeat = on_heartbeat
        self._enabled = enabled
        self._lock = threading.Lock()
        self._sums: dict[_Key, float] = {}
        self._gauges: dict[_Key, float] = {}
        self._changed: set[_Key] = set()
        self._observations: list[tuple[_Key, float]] = []
        self._dropped = 0
        self._reported: set[str] = set()
        # until the stage reports heartbeats of its own, which say more: that its worker turns
        self._beats = True
        self._stop = threading.Event()
        # touched by the thread alone
        self._families: dict[str, Any] = {}
        self._metrics: dict[_Key, Any] = {}
        self._thread = threading.Thread(target=self._run, name="triptych-metrics", daemon=True)
        self._thread.start()

    def add(self, name: str, value: float = 1.0, **labels: str) -> None:
        """Increase a counter, or a gauge by a signed amount."""
        if (key := self._key(name, labels, "counter", "gauge")) is None:
            return
        with self._lock:
            if METRICS[name].kind == "counter":
                self._sums[key] = self._sums.get(key, 0.0) + value
            else:
                self._gauges[key] = self._gauges.get(key, 0.0) + value
                self._changed.add(key)

    def set(self, name: str, value: float, **labels: str) -> None:
        """Set a gauge."""
        if (key := self._key(name, labels, "gauge")) is None:
            return
        if name == HEARTBEAT and threading.current_thread() is not self._thread:
            self._beats = False
        with self._lock:
            self._gauges[key] = value
            self._changed.add(key)

    def observe(self, name: str, value: float, **labels: str) -> None:
        """Record one observation of a histogram."""
        if (key := self._key(name, labels, "histogram")) is None:
            return
        with self._lock:
            if len(self._observations) < MAX_OBSERVATIONS:
                self._observations.append((key, value))
            else:
                self._dropped += 1

    def close(self, timeout_s: float) -> None:
        """Carry over what is left and stop."""
        self._stop.set()
        self._thread.join(timeout_s)

    def _key(self, name: str, labels: Mapping[str, str], *kinds: str) -> _Key | None:
        """Where a measurement is kept; None (logged once) for one that the contract does not declare.

        Not an exception: a misspelt metric must not end the worker of a stage.
        """
        if not self._enabled:
            return None
        spec = METRICS.get(name)
        if spec is None or spec.kind not in kinds or sorted(labels) != sorted(spec.labels):
            if name not in self._reported:
                self._reported.add(name)
                _LOG.error("metric %s (%s) with labels %s is not in the contract", name, kinds[0], sorted(labels))
            return None
        return name, tuple(sorted(labels.items()))

    def _run(self) -> None:
        heartbeat = 0.0
        while True:
            stopping = self._stop.wait(FLUSH_S)
            if time.monotonic() >= heartbeat:
                heartbeat = time.monotonic() + HEARTBEAT_S
                if self._beats:
                    self.set(HEARTBEAT, time.time())
                if (used := _gpu_memory()) is not None:
                    self.set(GPU_MEMORY, used)
                self._on_heartbeat()
            self._flush()
            if stopping:
                # here, so that they are released by the thread that made them
                self._metrics.clear()
                self._families.clear()
                return

    def _flush(self) -> None:
        with self._lock:
            sums, self._sums = self._sums, {}
            gauges = [(key, self._gauges[key]) for key in self._changed]
            self._changed = set()
            observations, self._observations = self._observations, []
            dropped, self._dropped = self._dropped, 0
        for key, value in sums.items():
            self._apply(key, "increment", value)
        for key, value in gauges:
            self._apply(key, "set", value)
        for key, value in observations:
            self._apply(key, "observe", value)
        if dropped:
            _LOG.warning("%d observations of histograms were dropped: they came faster than the server takes", dropped)

    def _apply(self, key: _Key, operation: str, value: float) -> None:
        try:
            if key not in self._metrics:
                self._metrics[key] = self._metric(key)
            getattr(self._metrics[key], operation)(value)
        except Exception:  # noqa: BLE001 - measurements must never end what they measure
            if key[0] not in self._reported:
                self._reported.add(key[0])
                _LOG.exception("metric %s cannot be reported", key[0])

    def _metric(self, key: _Key) -> Any:
        name, labels = key
        spec = METRICS[name]
        if name not in self._families:
            kind = getattr(pb_utils.MetricFamily, spec.kind.upper())
            self._families[name] = pb_utils.MetricFamily(name=name, description=spec.help, kind=kind)
        arguments: dict[str, Any] = {"labels": self._labels | dict(labels)}
        if spec.buckets:
            arguments["buckets"] = list(spec.buckets)
        return self._families[name].Metric(**arguments)


def _gpu_memory() -> int | None:
    """Bytes that this process holds on its GPUs for tensors; None where it has not begun to use one."""
    cuda: Any = getattr(sys.modules.get("torch"), "cuda", None)
    if not getattr(cuda, "is_initialized", bool)():
        return None
    return sum(int(cuda.memory_reserved(device)) for device in range(cuda.device_count()))
