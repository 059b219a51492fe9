"""Observations of requests without a server: whose they are, what is told of failures, what the options mean."""

from __future__ import annotations

import argparse
import builtins
import logging
from typing import Any

import pytest
from starlette.testclient import TestClient

from triptych.client.cli import observing
from triptych.client.cli.parser import CommandError
from triptych.client.openai_api import Service, ShimOptions, create_app
from triptych.client.openai_api.metrics import ShimMetrics
from triptych.client.openai_api.observation import Observer, RequestIdFilter, current, part_of
from triptych.client.openai_api.tracing import Tracing
from triptych.python_models.contract.delta import Delta, Usage
from triptych.python_models.contract.errors import ErrorKind, TriptychError
from triptych.python_models.contract.request import ChatRequest, Message, TextPart
from triptych.python_models.contract.settings import Settings

REQUEST = ChatRequest((Message("user", (TextPart("the secret word"),), plain=True),))
ROUTE = "/v1/chat/completions"


def observer(**options: Any) -> tuple[Observer, ShimMetrics]:
    metrics = ShimMetrics()
    return Observer(metrics, ShimOptions("m", **options), None), metrics


def counted(metrics: ShimMetrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(name, labels)


def test_a_request_belongs_to_the_code_that_runs_for_it() -> None:
    watching, metrics = observer()
    assert current() is None
    token = watching.begin("POST", ROUTE, "mine", {})
    seen = current()
    assert seen is not None
    part = part_of("chatcmpl-1", REQUEST)
    assert seen.parts == [part]
    assert part.text is None
    watching.end(token, 200, {}, ROUTE)
    assert current() is None
    assert part_of("chatcmpl-2", REQUEST) not in seen.parts
    assert counted(metrics, "triptych_http_requests_total", route=ROUTE, code="200") == 1


def test_lines_said_meanwhile_carry_its_id() -> None:
    watching, _ = observer()
    record = logging.makeLogRecord({"msg": "x"})
    token = watching.begin("GET", "/", "mine", {})
    RequestIdFilter().filter(record)
    assert record.__dict__["request_id"] == "mine"
    own = logging.makeLogRecord({"msg": "x", "request_id": "own"})
    RequestIdFilter().filter(own)
    assert own.__dict__["request_id"] == "own"
    watching.end(token, 200, {}, "/")


@pytest.mark.parametrize(
    ("given", "passed_on"),
    [
        ("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", True),
        ("00-0AF7651916CD43DD8448EB211C80319C-b7ad6b7169203331-01", False),
        ("nonsense\x00", False),
        ("", False),
    ],
)
def test_a_trace_is_passed_on_where_it_is_one(given: str, passed_on: bool) -> None:
    watching, _ = observer()
    token = watching.begin("POST", ROUTE, "mine", {"traceparent": given, "tracestate": "a=b"})
    expected = {"traceparent": given, "tracestate": "a=b"} if passed_on else {}
    assert part_of("chatcmpl-1", REQUEST).headers == expected
    watching.end(token, 200, {}, ROUTE)


def test_a_failure_of_a_stage_always_has_a_line(caplog: pytest.LogCaptureFixture) -> None:
    watching, metrics = observer()
    token = watching.begin("POST", ROUTE, "mine", {})
    part_of("chatcmpl-1", REQUEST).error = TriptychError(
        ErrorKind.STAGE_FAILED, "ValueError: broken", stage="vision_encoder"
    )
    # a stream, whose status was sent before
    watching.end(token, 200, {}, ROUTE)
    (record,) = caplog.records
    assert record.levelname == "ERROR"
    assert record.getMessage().startswith("vision_encoder failed (stage_failed): ValueError: broken; ")
    assert record.__dict__["request_id"] == "mine"
    assert record.__dict__["ids"] == ["chatcmpl-1"]
    assert "secret" not in str(vars(record))
    assert counted(metrics, "triptych_http_errors_total", route=ROUTE, kind="stage_failed") == 1


@pytest.mark.parametrize("kind", [ErrorKind.INVALID_REQUEST, ErrorKind.OVERLOADED, ErrorKind.CANCELLED])
def test_what_is_no_failure_is_counted_without_a_line(kind: ErrorKind, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    watching, metrics = observer()
    token = watching.begin("POST", ROUTE, "mine", {})
    watching.end(token, kind.status, {"error": TriptychError(kind, "no")}, ROUTE)
    assert caplog.records == []
    assert counted(metrics, "triptych_http_errors_total", route=ROUTE, kind=kind.value) == 1


@pytest.mark.parametrize(("asked", "told"), [("off", None), ("summary", False), ("contents", True)])
def test_contents_are_told_only_where_that_was_asked_for(
    asked: str, told: bool | None, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    watching, _ = observer(log_requests=asked)
    token = watching.begin("POST", ROUTE, "mine", {})
    part = part_of("chatcmpl-1", REQUEST)
    if part.text is not None:
        part.text += ["an ", "answer"]
    part.end_choice(Delta(finish_reason="stop", usage=Usage(5, 2, 3)))
    watching.end(token, 200, {}, ROUTE)
    if told is None:
        assert caplog.records == []
        return
    (record,) = caplog.records
    facts = vars(record)
    assert (facts["prompt_tokens"], facts["cached_tokens"], facts["completion_tokens"]) == (5, 2, 3)
    assert facts["finish_reasons"] == ["stop"]
    assert ("secret" in str(facts)) is told
    assert facts.get("answers") == (["an answer"] if told else None)


def test_what_goes_wrong_in_telling_harms_nobody(caplog: pytest.LogCaptureFixture) -> None:
    watching, metrics = observer()
    del metrics.requests
    watching.end(watching.begin("GET", "/", "mine", {}), 200, {}, "/")
    assert caplog.records[0].exc_info is not None


def test_traces_without_the_sdk_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("opentelemetry.exporter"):
            raise ImportError("no", name=name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(TriptychError, match=r"pip install 'triptych\[otel\]'"):
        Tracing.to("http://127.0.0.1:1/v1/traces", "m")
    assert Tracing.to("", "m") is None


@pytest.mark.parametrize(
    ("option", "environment", "endpoint"),
    [
        (None, {}, ""),
        ("http://c:4318", {}, "http://c:4318/v1/traces"),
        ("http://c:4318/", {}, "http://c:4318/v1/traces"),
        ("https://c/other/path", {}, "https://c/other/path"),
        (None, {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318"}, "http://c:4318/v1/traces"),
        (None, {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://c/t", "OTEL_EXPORTER_OTLP_ENDPOINT": "x"}, "http://c/t"),
        (None, {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318", "OTEL_SDK_DISABLED": "true"}, ""),
        (None, {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318", "OTEL_TRACES_EXPORTER": "none"}, ""),
    ],
)
def test_where_traces_go(option: str | None, environment: dict[str, str], endpoint: str) -> None:
    assert observing.traces_endpoint(argparse.Namespace(otlp_traces_endpoint=option), environment) == endpoint


def test_an_endpoint_that_is_no_url_is_refused() -> None:
    with pytest.raises(CommandError, match="must begin with http"):
        observing.traces_endpoint(argparse.Namespace(otlp_traces_endpoint="c:4317"), {})


def test_without_metrics_there_is_no_page() -> None:
    service = Service(ShimOptions("m"))
    service.settings = Settings(enable_metrics=False)
    with TestClient(create_app(service)) as client:
        answer = client.get("/metrics")
        assert answer.status_code == 404
        assert "--no-enable-metrics" in answer.json()["error"]["message"]
        service.settings = Settings()
        assert client.get("/metrics").status_code == 200
