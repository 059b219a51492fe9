"""Stages without a model, for benchmarks/delivery.py: a steady engine whose steps give every request a token."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from triptych.python_models.contract.delta import Delta, Usage
from triptych.python_models.contract.plan import Plan
from triptych.python_models.contract.request import ChatRequest
from triptych.python_models.contract.settings import Settings
from triptych.python_models.stage import Responder, Stage, Telemetry

# calls into torch in a step of the language model
_CALLS = 60


class Preprocess(Stage):
    """Hands sampling parameters on; every prompt has four tokens."""

    def submit(self, request_id: str, inputs: Mapping[str, Any], responder: Responder) -> None:
        if "request" not in inputs:
            responder.send({}, final=True)
            return
        request = ChatRequest.from_json(inputs["request"][0], 0)
        tensors = {
            "input_ids": np.arange(4, dtype=np.int32),
            "position_ids": np.zeros((1, 4), dtype=np.int32),
            "plan": [Plan(sampling=request.sampling, stream=request.stream).to_json()],
        }
        responder.send(tensors, final=True)

    def cancel(self, request_ids: Sequence[str]) -> None:
        """Nothing here takes long enough."""

    def close(self) -> None:
        """Nothing runs."""


class Encoder(Preprocess):
    """Never asked for anything."""


class LanguageModel(Stage):
    """Steps at the rate of ``settings.request_timeout_s`` per second, each with ``settings.heartbeat_s`` ms of Python.

    What the thread that steps spent is appended to the file ``settings.model``, a line of JSON each time all requests
    have ended.
    """

    def __init__(self, settings: Settings, telemetry: Telemetry, device: str) -> None:
        super().__init__(settings, telemetry, device)
        self._new: list[tuple[Responder, int]] = []
        self._closed = False
        torch.set_num_threads(1)
        self._scratch = torch.zeros(8)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def submit(self, request_id: str, inputs: Mapping[str, Any], responder: Responder) -> None:
        if "plan" not in inputs:
            responder.send({}, final=True)
            return
        plan = Plan.from_json(inputs["plan"][0])
        responder.send(Delta(usage=Usage(4)), final=False)
        self._new.append((responder, plan.sampling.max_tokens or 1))

    def cancel(self, request_ids: Sequence[str]) -> None:
        """Every request ends by itself."""

    def close(self) -> None:
        self._closed = True
        self._thread.join()

    def _run(self) -> None:
        interval, work = 1 / self.settings.request_timeout_s, self.settings.heartbeat_s / 1000
        running: list[list[Any]] = []
        steps: list[float] = []
        sending, start = 0.0, 0.0
        while not self._closed:
            began = time.perf_counter()
            while self._new:
                responder, count = self._new.pop()
                running.append([responder, count, 0])
                start = start or began
            if not running:
                if steps:
                    self._report(steps, sending, began - start)
                    steps, sending, start = [], 0.0, 0.0
                self.pauses.set()
                time.sleep(0.001)
                continue
            for request in running:
                request[2] += 1
                end = request[2] == request[1]
                usage = Usage(4, 0, request[2]) if end else None
                delta = Delta(" token", (request[2],), (), "length" if end else "", None, usage)
                request[0].send(delta, final=end)
                self.telemetry.observe("triptych_inter_token_seconds", interval)
            sent = time.perf_counter()
            # stands for scheduling and the preparation of the next step, which come right after
            for _ in range(_CALLS):
                # each lets go of the interpreter lock for a moment
                self._scratch.add_(1)
            while time.perf_counter() - sent < work:
                pass
            running = [request for request in running if request[2] < request[1]]
            ended = time.perf_counter()
            sending += sent - began
            steps.append(ended - began)
            # stands for waiting for the GPU
            self.pauses.set()
            time.sleep(max(0.0, began + interval - ended))
            self.pauses.clear()

    def _report(self, steps: list[float], sending: float, seconds: float) -> None:
        ordered = sorted(steps)
        report = {
            "steps_s": len(steps) / seconds,
            "step_ms_p50": 1000 * ordered[len(ordered) // 2],
            "step_ms_p99": 1000 * ordered[int(len(ordered) * 0.99)],
            "send_ms_mean": 1000 * sending / len(steps),
        }
        with Path(self.settings.model).open("a") as file:
            file.write(json.dumps(report) + "\n")
