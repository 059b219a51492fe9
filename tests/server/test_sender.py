"""What the sender of a stub merges and what it never delays, with a server's side that the test holds up."""

from __future__ import annotations

import importlib
import sys
import threading
import time
import types
from collections.abc import Iterator
from typing import Any

import pytest

from triptych.python_models.contract.delta import Delta, Usage
from triptych.python_models.contract.errors import ErrorKind, TriptychError
from triptych.python_models.contract.tensors import LANGUAGE_MODEL

MODULES = ("triton_python_backend_utils", "triptych.backends.triptych.io", "triptych.backends.triptych.responder")
DTYPES = {spec.name: spec.dtype for spec in LANGUAGE_MODEL.outputs}


class Wire:
    """A response sender that keeps what it is given, and waits for its gate before it does."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.sent: list[tuple[Any, bool]] = []
        self.times: list[float] = []

    def send(self, response: Any, flags: int) -> None:
        self.entered.set()
        assert self.gate.wait(30)
        self.sent.append((response, bool(flags)))
        self.times.append(time.monotonic())

    def deltas(self) -> list[Delta]:
        return [Delta.from_tensors(response.tensors) for response, _ in self.sent if response.error is None]

    def wait(self, count: int) -> None:
        until = time.monotonic() + 30
        while len(self.sent) < count:
            assert time.monotonic() < until, f"{len(self.sent)} of {count} responses"
            time.sleep(0.001)


class Response:
    def __init__(self, tensors: Any = (), error: Any = None) -> None:
        self.tensors = dict(tensors)
        self.error = error


class Error(Exception):
    INTERNAL = CANCELLED = INVALID_ARG = 1

    def __init__(self, text: str, code: int) -> None:
        super().__init__(text)


@pytest.fixture
def responder_module() -> Iterator[Any]:
    """The module as it is inside a stub, on a stand-in for the server's."""
    fake: Any = types.ModuleType(MODULES[0])
    fake.TRITONSERVER_RESPONSE_COMPLETE_FINAL = 1
    fake.InferenceResponse, fake.TritonError = Response, Error
    fake.Tensor = lambda name, value: (name, value)
    before = {name: sys.modules.pop(name, None) for name in MODULES}
    sys.modules[MODULES[0]] = fake
    yield importlib.import_module(MODULES[2])
    for name, module in before.items():
        sys.modules.pop(name, None)
        if module is not None:
            sys.modules[name] = module


@pytest.fixture
def pauses() -> threading.Event:
    event = threading.Event()
    event.set()
    return event


@pytest.fixture
def sender(responder_module: Any, pauses: threading.Event) -> Iterator[Any]:
    made = responder_module.Sender(LANGUAGE_MODEL, DTYPES, pauses)
    yield made
    made.close(30)
    assert not made._thread.is_alive()


def token(number: int, index: int = 0) -> Delta:
    return Delta(f"{number} ", (number,), index=index)


def test_answers_leave_while_the_worker_pauses_and_are_not_kept_for_long(
    sender: Any, pauses: threading.Event, responder_module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(responder_module, "_PATIENCE_S", 0.5)
    wire = Wire()
    responder = sender.responder(wire)
    pauses.clear()
    start = time.monotonic()
    responder.send(token(0), final=False)
    threading.Timer(0.1, pauses.set).start()
    wire.wait(1)
    assert 0.05 < time.monotonic() - start < 0.4
    pauses.clear()
    start = time.monotonic()
    responder.send(token(1), final=True)
    wire.wait(2)
    assert 0.4 < time.monotonic() - start < 5


def test_what_waits_is_one_delta_per_choice_and_the_last_is_final(sender: Any) -> None:
    wire = Wire()
    responder = sender.responder(wire)
    responder.send(Delta(usage=Usage(3)), final=False)
    wire.wait(1)
    wire.gate.clear()
    wire.entered.clear()
    responder.send(token(0), final=False)
    assert wire.entered.wait(30)
    for number in range(1, 50):
        responder.send(token(number), final=False)
        responder.send(token(number, 1), final=False)
    responder.send(Delta("", (50,), (), "length", None, Usage(3, 0, 101)), final=True)
    # behind the end there is nothing
    responder.send(token(99), final=True)
    responder.fail(TriptychError(ErrorKind.STAGE_FAILED, "late"))
    wire.gate.set()
    wire.wait(4)
    first, lone, other, last = wire.deltas()
    assert first.usage == Usage(3)
    assert lone.token_ids == (0,)
    assert (other.index, other.token_ids) == (1, tuple(range(1, 50)))
    assert (last.index, last.token_ids, last.finish_reason) == (0, tuple(range(1, 51)), "length")
    assert [final for _, final in wire.sent] == [False, False, False, True]
    sender.close(30)
    assert len(wire.sent) == 4


def test_a_lone_stream_is_not_merged(sender: Any) -> None:
    wire = Wire()
    responder = sender.responder(wire)
    for number in range(20):
        responder.send(token(number), final=False)
        wire.wait(number + 1)
    responder.fail(TriptychError(ErrorKind.CANCELLED, "end"))
    wire.wait(21)
    assert [delta.token_ids for delta in wire.deltas()] == [(number,) for number in range(20)]


def test_first_tokens_and_ends_do_not_wait_for_a_round(
    responder_module: Any, sender: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # a round of one response is followed by an hour
    monkeypatch.setattr(responder_module, "MERGE_ABOVE", 1 / 3600)
    old, new = Wire(), Wire()
    running = sender.responder(old)
    for number in range(3):
        running.send(token(number), final=False)
        # the first does not wait, the second begins the round, the third waits for the next
        if number < 2:
            old.wait(number + 1)
    fresh = sender.responder(new)
    fresh.send(Delta(usage=Usage(3)), final=False)
    fresh.send(token(7), final=False)
    new.wait(1)
    while sum(len(delta.token_ids) for delta in new.deltas()) < 1:
        time.sleep(0.001)
    assert len(old.sent) == 2
    running.send(Delta("", (3,), (), "stop"), final=True)
    old.wait(3)
    assert old.deltas()[-1].token_ids == (2, 3)
    fresh.fail(TriptychError(ErrorKind.CANCELLED, "gone"))
    new.wait(len(new.sent))
    sender.close(30)
    assert new.sent[-1][0].error is not None


def test_rounds_are_paced(responder_module: Any, sender: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(responder_module, "MERGE_ABOVE", 200)
    wires = [Wire() for _ in range(10)]
    responders = [sender.responder(wire) for wire in wires]
    start = time.monotonic()
    number = 0
    while time.monotonic() - start < 1.0:
        for responder in responders:
            responder.send(token(number), final=False)
        number += 1
        time.sleep(0.001)
    for responder in responders:
        responder.send(Delta("", (), (), "stop"), final=True)
    for wire in wires:
        while not (wire.sent and wire.sent[-1][1]):
            time.sleep(0.001)
        assert [t for delta in wire.deltas() for t in delta.token_ids] == list(range(number))
    # 200 a second, beside first tokens and ends
    assert sum(len(wire.sent) for wire in wires) <= 260


def test_closing_sends_what_waits(responder_module: Any, sender: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(responder_module, "MERGE_ABOVE", 1 / 3600)
    wire = Wire()
    responder = sender.responder(wire)
    for number in range(9):
        responder.send(token(number), final=False)
    sender.close(30)
    assert [t for delta in wire.deltas() for t in delta.token_ids] == list(range(9))
    assert wire.sent[-1][1]
    assert wire.sent[-1][0].error is not None


def test_a_failure_has_one_line_in_the_stage_where_it_happened(sender: Any, caplog: pytest.LogCaptureFixture) -> None:
    def fail(request_id: str, error: TriptychError) -> None:
        wire = Wire()
        responder = sender.responder(wire, request_id)
        responder.fail(error)
        responder.fail(error)
        wire.wait(1)

    fail("chatcmpl-1", TriptychError(ErrorKind.STAGE_FAILED, "RuntimeError: broken"))
    fail("chatcmpl-2", TriptychError(ErrorKind.STAGE_FAILED, "broken there", stage="vision_encoder"))
    fail("chatcmpl-3", TriptychError(ErrorKind.INVALID_REQUEST, "max_tokens is wrong", "max_tokens"))
    (record,) = [record for record in caplog.records if record.levelname == "ERROR"]
    assert record.getMessage().startswith("language_model failed (stage_failed): RuntimeError: broken; ")
    assert record.__dict__["request_id"] == "chatcmpl-1"
