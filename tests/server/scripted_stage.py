"""Stages that do what a request tells them to: they try the Triton adapter in the real server, without any model.

A request is a JSON object {step: {...}} in tensor ``request``; ``preprocess`` hands it on in ``plan`` and
``vision_features``. Used by the tests through the server's own way to host a class of the user
(``stage_classes={"preprocess": ".../scripted_stage.py:Preprocess"}``).
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from triptych.python_models.contract.delta import Delta, Usage
from triptych.python_models.contract.errors import ErrorKind, TriptychError
from triptych.python_models.contract.settings import Settings
from triptych.python_models.stage import Responder, Stage, Telemetry


class Scripted(Stage):
    """Every request gets a thread; ``cancel`` is seen within a few milliseconds."""

    def __init__(self, settings: Settings, telemetry: Telemetry, device: str) -> None:
        super().__init__(settings, telemetry, device)
        if os.environ.get("SCRIPTED_REFUSES") == type(self).__name__:
            raise TriptychError(ErrorKind.UNSUPPORTED, "this stage was told not to load; tell it otherwise")
        if os.environ.get("SCRIPTED_BREAKS") == type(self).__name__:
            raise ZeroDivisionError("broken as told")
        self.cancelled: set[str] = set()
        self.renewed: list[str] = []

    def submit(self, request_id: str, inputs: Mapping[str, Any], responder: Responder) -> None:
        if not inputs:
            responder.send({}, final=True)
            return
        threading.Thread(target=self._run, args=(request_id, inputs, responder), daemon=True).start()

    def cancel(self, request_ids: Sequence[str]) -> None:
        self.cancelled.update(request_ids)

    def renew(self, request_ids: Sequence[str]) -> None:
        self.renewed.extend(request_ids)

    def close(self) -> None:
        pass

    def _run(self, request_id: str, inputs: Mapping[str, Any], responder: Responder) -> None:
        try:
            self.work(request_id, inputs, responder)
        except TriptychError as error:
            responder.fail(error)

    def work(self, request_id: str, inputs: Mapping[str, Any], responder: Responder) -> None:
        raise NotImplementedError

    def wait(self, request_id: str, seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if request_id in self.cancelled:
                raise TriptychError(ErrorKind.CANCELLED, "cancelled as asked")
            time.sleep(0.002)


class Preprocess(Scripted):
    """{"preprocess": {"fail": bool, "wrong": str, "two": bool}}; features go to the encoders named in the script."""

    def work(self, request_id: str, inputs: Mapping[str, Any], responder: Responder) -> None:
        script = json.loads(inputs["request"][0])
        mine = script.get("preprocess", {})
        if mine.get("fail"):
            raise TriptychError(ErrorKind.INVALID_MEDIA, "no picture: ü", "messages[0].content[1]")
        # what arrived, for the test to compare: lengths and bytes of every blob
        script["media"] = [blob.hex() for blob in inputs.get("media", [])]
        plan = json.dumps(script)
        wrong = mine.get("wrong")
        tensors: dict[str, Any] = {
            "input_ids": np.arange(4, dtype=np.int64 if wrong == "dtype" else np.int32),
            "position_ids": np.zeros(4 if wrong == "shape" else (3, 4), dtype=np.int32),
            "plan": plan if wrong == "string" else [plan],
        }
        if wrong == "name":
            tensors["colour"] = ["red"]
        for encoder in ("vision", "audio"):
            if encoder in script:
                tensors[f"{encoder}_features"] = np.frombuffer(plan.encode(), dtype=np.uint8)
        if mine.get("two"):
            responder.send(tensors, final=False)
        responder.send(tensors, final=True)


class Encoder(Scripted):
    """{"vision": {"sleep": seconds, "rows": n, "width": n}}: embeddings of a known pattern."""

    key = ""
    modality = ""

    def submit(self, request_id: str, inputs: Mapping[str, Any], responder: Responder) -> None:
        features = inputs.get(f"{self.key}_features")
        if features is not None and json.loads(features.tobytes())[self.key].get("raise"):
            raise ZeroDivisionError("as told")
        super().submit(request_id, inputs, responder)

    def work(self, request_id: str, inputs: Mapping[str, Any], responder: Responder) -> None:
        mine = json.loads(inputs[f"{self.key}_features"].tobytes())[self.key]
        self.telemetry.add("triptych_media_items_total", 1, modality=self.modality)
        if "beat" in mine:
            self.telemetry.set("triptych_heartbeat_timestamp_seconds", mine["beat"])
        self.wait(request_id, mine.get("sleep", 0))
        rows = pattern(mine["rows"], mine["width"])
        responder.send({f"{self.key}_embeddings": rows}, final=True)


class VisionEncoder(Encoder):
    key = "vision"
    modality = "image"


class AudioEncoder(Encoder):
    key = "audio"
    modality = "audio"


class LanguageModel(Scripted):
    """{"language_model": {"count": n, "interval": seconds, "fail_at": n, "text": "...", "threads": n, "choices": n}}.

    Streams ``count`` deltas; the last one's ``info`` tells what arrived. With ``threads`` it counts generated tokens
    from that many threads at once, 1,000 each, before it answers. With ``choices`` it sends ``count`` Delta objects for
    each choice as fast as it can, and breaks off with an error at ``fail_at``.
    """

    def work(self, request_id: str, inputs: Mapping[str, Any], responder: Responder) -> None:
        script = json.loads(inputs["plan"][0])
        mine = script.get("language_model", {})
        self.telemetry.add("triptych_requests_running", 1)
        try:
            if mine.get("misspell"):
                self.telemetry.add("triptych_misspelt", 1)
            if threads := mine.get("threads"):
                self._count(threads)
            count = mine.get("count", 1)
            if choices := mine.get("choices"):
                self._burst(responder, count, choices, mine.get("fail_at"))
                return
            for index in range(count):
                self.wait(request_id, mine.get("interval", 0))
                if mine.get("fail_at") == index:
                    responder.fail(TriptychError(ErrorKind.STAGE_FAILED, "told to fail here"))
                    # a stage that goes on after its end must not disturb anything
                    responder.send(delta("late"), final=False)
                    responder.send(delta("late"), final=True)
                    return
                last = index == count - 1
                report = json.dumps(self._report(inputs, script)) if last else ""
                responder.send(delta(mine.get("text", "x"), [index], "stop" if last else "", report), final=last)
        finally:
            self.telemetry.add("triptych_requests_running", -1)

    def _burst(self, responder: Responder, count: int, choices: int, fail_at: int | None) -> None:
        responder.send(Delta(usage=Usage(4)), final=False)
        for number in range(count):
            if number == fail_at:
                raise TriptychError(ErrorKind.STAGE_FAILED, "told to fail here")
            for index in range(choices):
                end = number == count - 1
                usage = Usage(4, 0, count * (index + 1)) if end else None
                delta = Delta(f"{number} ", (number,), (), "length" if end else "", None, usage, index)
                responder.send(delta, final=end and index == choices - 1)

    def _count(self, threads: int) -> None:
        def count() -> None:
            for _ in range(1000):
                self.telemetry.add("triptych_generation_tokens_total", 1)
                self.telemetry.observe("triptych_inter_token_seconds", 0.004)
                self.telemetry.set("triptych_kv_cache_usage_ratio", 0.25)

        workers = [threading.Thread(target=count) for _ in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()

    def _report(self, inputs: Mapping[str, Any], script: Mapping[str, Any]) -> dict[str, Any]:
        report: dict[str, Any] = {"inputs": sorted(inputs), "media": script["media"], "renewed": self.renewed}
        report["model"] = self.settings.model
        for key in ("vision", "audio"):
            rows = inputs.get(f"{key}_embeddings")
            if rows is not None:
                report[key] = {
                    "dtype": str(rows.dtype),
                    "shape": list(rows.shape),
                    "exact": bool(torch.equal(rows, pattern(*rows.shape).to(rows.dtype))),
                }
        return report


def delta(text: str, ids: Sequence[int] = (), finish_reason: str = "", info: str = "") -> dict[str, Any]:
    return {
        "text": [text],
        "token_ids": np.asarray(ids, dtype=np.int32),
        "finish_reason": [finish_reason],
        "index": np.zeros(1, dtype=np.int32),
        "info": [info],
    }


def pattern(rows: int, width: int) -> torch.Tensor:
    """Values that BF16 holds exactly."""
    return ((torch.arange(rows * width) % 251) / 8).reshape(rows, width)
