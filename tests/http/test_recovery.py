"""A stage killed with kill -9: its requests end with an error, it is loaded again, and nobody else notices."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import Any

import httpx
import pytest

NAME = "tiny-omni"
STAGES = ("preprocess", "vision_encoder", "audio_encoder", "language_model")
IN_FLIGHT_S = 10.0
# Importing torch and loading a model anew, on a busy machine.
HEAL_S = 90.0


def post(server: Any, content: Any, **change: Any) -> httpx.Response:
    body = {"model": NAME, "messages": [{"role": "user", "content": content}], "temperature": 0, "max_tokens": 4}
    return httpx.post(f"{server.url}/v1/chat/completions", json=body | change, timeout=60, trust_env=False)


def health(server: Any) -> httpx.Response:
    return httpx.get(f"{server.url}/health", trust_env=False, timeout=30)


def wait_healthy(server: Any) -> None:
    until = time.monotonic() + HEAL_S
    while health(server).status_code != 200:
        assert time.monotonic() < until, health(server).text
        time.sleep(0.2)


@pytest.fixture(autouse=True)
def healthy(server: Any) -> None:
    wait_healthy(server)


class InFlight(threading.Thread):
    """A request in a thread, and when it ended."""

    def __init__(self, server: Any, content: Any, **change: Any) -> None:
        super().__init__()
        self.arguments = (server, content, change)
        self.answer: httpx.Response | None = None
        self.ended = 0.0
        self.start()

    def run(self) -> None:
        server, content, change = self.arguments
        self.answer = post(server, content, **change)
        self.ended = time.monotonic()


def kill(server: Any, stage: str, *requests: InFlight) -> None:
    """Kill the stage; the requests must end soon after, and the stage must come back."""
    restarts = server.metric("triptych_stage_restarts_total", stage=stage)
    pid = server.stage_pid(stage)
    os.kill(pid, signal.SIGKILL)
    killed = time.monotonic()
    until = killed + IN_FLIGHT_S
    while (seen := health(server)).status_code == 200:
        assert time.monotonic() < until, "/health did not notice"
        time.sleep(0.05)
    assert seen.status_code == 503
    assert seen.json()["stages"] == {name: name != stage for name in STAGES}
    assert stage in seen.json()["error"]["message"]
    for request in requests:
        request.join(30)
        assert not request.is_alive(), "the request hangs"
        assert request.ended - killed < IN_FLIGHT_S
    wait_healthy(server)
    assert server.metric("triptych_stage_restarts_total", stage=stage) == restarts + 1
    assert server.metric("triptych_stage_up", stage=stage) == 1
    assert server.stage_pid(stage) != pid


def error_of(request: InFlight) -> dict[str, Any]:
    assert request.answer is not None
    assert request.answer.status_code == 503, request.answer.text
    found: dict[str, Any] = request.answer.json()["error"]
    return found


def test_language_model(server: Any, parts: Any) -> None:
    plain = InFlight(server, "hello", max_tokens=1900, ignore_eos=True)
    stream = InFlight(server, "hello", max_tokens=1900, ignore_eos=True, stream=True)
    until = time.monotonic() + 30
    while server.metric("triptych_requests_running", stage="language_model") < 2:
        assert time.monotonic() < until
        time.sleep(0.02)
    kill(server, "language_model", plain, stream)
    assert error_of(plain)["code"] == "stage_dead"
    assert stream.answer is not None
    assert stream.answer.status_code == 200
    events = [event for event in stream.answer.text.split("\n\n") if event]
    assert '"error"' in events[-1]
    assert "stage_dead" in events[-1]
    assert post(server, [parts.image(), parts.text()]).status_code == 200
    time.sleep(0.5)
    assert server.metric("triptych_requests_running", stage="language_model") == 0


def test_preprocess(server: Any, files: str, parts: Any) -> None:
    slow = InFlight(server, [{"type": "image_url", "image_url": {"url": f"{files}/slow.png"}}])
    time.sleep(1.0)
    generating = InFlight(server, "hello", max_tokens=300, ignore_eos=True)
    time.sleep(0.5)
    kill(server, "preprocess", slow)
    assert error_of(slow)["code"] == "stage_dead"
    # what had left the stage goes on undisturbed
    generating.join(60)
    assert generating.answer is not None
    assert generating.answer.status_code == 200
    assert post(server, [parts.image(), parts.text()]).status_code == 200


@pytest.mark.parametrize(("stage", "kind"), [("vision_encoder", "image"), ("audio_encoder", "audio")])
def test_encoders(server: Any, parts: Any, stage: str, kind: str) -> None:
    # stopped first, so that the request is certainly inside when the process dies
    os.kill(server.stage_pid(stage), signal.SIGSTOP)
    inside = InFlight(server, [getattr(parts, kind)(77), parts.text()])
    time.sleep(1.5)
    text = post(server, "hello")
    assert text.status_code == 200, "a blocked encoder holds up text"
    kill(server, stage, inside)
    assert error_of(inside)["code"] == "stage_dead"
    assert post(server, [getattr(parts, kind)(77), parts.text()]).status_code == 200
