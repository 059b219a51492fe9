"""What the real server tells of its requests: metrics for the dashboards, traces by OTLP, lines in the logs."""

from __future__ import annotations

import gzip
import http.server
import json
import re
import shutil
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from triptych.client.openai_api.metrics import ShimMetrics
from triptych.python_models.contract.metrics import METRICS

ROOT = Path(__file__).parents[2]
NAME = "tiny-omni"
TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"
_METRIC = re.compile(r"\btriptych_[a-z_]+")


class Collector:
    """A local receiver of traces by OTLP over HTTP."""

    def __init__(self) -> None:
        spans: list[Any] = []
        resources: list[dict[str, str]] = []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                coding = self.headers.get("content-encoding", "")
                body = gzip.decompress(body) if coding == "gzip" else zlib.decompress(body) if coding else body
                for group in ExportTraceServiceRequest.FromString(body).resource_spans:
                    resources.append({item.key: item.value.string_value for item in group.resource.attributes})
                    for scope in group.scope_spans:
                        spans.extend(scope.spans)
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *args: Any) -> None:
                pass

        self.spans, self.resources = spans, resources
        self._web = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._web.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._web.server_port}"

    def close(self) -> None:
        self._web.shutdown()
        self._web.server_close()

    def trace(self, trace_id: str, count: int) -> list[Any]:
        """The spans of a trace, once there are so many."""
        until = time.monotonic() + 60
        while True:
            found = [span for span in self.spans if span.trace_id.hex() == trace_id]
            if len(found) >= count:
                return found
            assert time.monotonic() < until, [span.name for span in found]
            time.sleep(0.1)


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    made = Collector()
    yield made
    made.close()


@pytest.fixture(scope="module")
def telling(
    start: Callable[..., Any],
    checkpoint: Path,
    collector: Collector,
    files: str,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch_module: pytest.MonkeyPatch,
) -> Iterator[Any]:
    """A server that tells all it can."""
    monkeypatch_module.setenv("OTEL_BSP_SCHEDULE_DELAY", "200")
    monkeypatch_module.setenv("OTEL_SERVICE_NAME", "triptych-test")
    log = tmp_path_factory.mktemp("telling") / "server.log"
    with start(
        *(str(checkpoint), "--served-model-name", NAME, "--port=0", "--log-format=json", "--log-requests=contents"),
        *(f"--otlp-traces-endpoint={collector.url}", f"--server-log={log}"),
        f"--allowed-media-host={files.removeprefix('http://')}",
    ) as served:
        served.url = served.wait_for("ready: ").split()[1]
        served.log = log
        yield served


@pytest.fixture(scope="module")
def monkeypatch_module() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


def lines_of(text: str) -> list[dict[str, Any]]:
    """The JSON lines among others (of ``triptych serve`` itself, of the Triton server)."""
    return [json.loads(line) for line in text.splitlines() if line.startswith('{"time"')]


def ask(served: Any, headers: dict[str, str] | None = None, **change: Any) -> httpx.Response:
    body = {"model": NAME, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4, "temperature": 0}
    return httpx.post(
        f"{served.url}/v1/chat/completions", json=body | change, headers=headers, timeout=120, trust_env=False
    )


def media(parts: Any, files: str, seed: int) -> list[dict[str, Any]]:
    by_url = {"type": "image_url", "image_url": {"url": f"{files}/picture.png"}}
    return [{"role": "user", "content": [by_url, parts.video(seed), parts.audio(seed), parts.text("the secret word")]}]


def attributes(span: Any) -> dict[str, Any]:
    def value(item: Any) -> Any:
        kind = item.WhichOneof("value")
        return [value(one) for one in item.array_value.values] if kind == "array_value" else getattr(item, kind)

    return {item.key: value(item.value) for item in span.attributes}


@pytest.mark.parametrize("stream", [False, True])
def test_one_trace_joins_caller_endpoint_and_stages(
    telling: Any, collector: Collector, parts: Any, files: str, stream: bool
) -> None:
    trace_id = f"{int(TRACE, 16) + stream:032x}"
    headers = {"traceparent": f"00-{trace_id}-{PARENT}-01"}
    before = time.time()
    answer = ask(telling, headers, messages=media(parts, files, 70 + stream), stream=stream, seed=7)
    assert answer.status_code == 200, answer.text
    spans = collector.trace(trace_id, 13)
    after = time.time()
    by_name: dict[str, list[Any]] = {}
    for span in spans:
        by_name.setdefault(span.name, []).append(span)
        assert before <= span.start_time_unix_nano / 1e9 <= span.end_time_unix_nano / 1e9 <= after
    (root,) = by_name["POST /v1/chat/completions"]
    assert root.parent_span_id.hex() == PARENT
    assert attributes(root)["http.response.status_code"] == 200
    assert attributes(root)["http.route"] == "/v1/chat/completions"
    (chat,) = by_name[f"chat {NAME}"]
    assert chat.parent_span_id == root.span_id
    told = attributes(chat)
    assert told["gen_ai.operation.name"] == "chat"
    assert told["gen_ai.request.model"] == NAME
    assert told["gen_ai.request.max_tokens"] == 4
    assert told["gen_ai.request.seed"] == 7
    assert told["gen_ai.usage.output_tokens"] == 4
    assert told["gen_ai.response.finish_reasons"] == ["length"]
    assert told["gen_ai.usage.input_tokens"] > told["triptych.usage.image_tokens"] > 0
    parents = {
        "preprocess": chat,
        "encode": chat,
        "language_model": chat,
        "fetch": by_name["preprocess"][0],
        "decode_media": by_name["preprocess"][0],
        "process": by_name["preprocess"][0],
        "queue": by_name["language_model"][0],
        "prefill": by_name["language_model"][0],
        "decode": by_name["language_model"][0],
    }
    counts = {"decode_media": 3}
    for name, parent in parents.items():
        assert len(by_name[name]) == counts.get(name, 1), name
        assert all(span.parent_span_id == parent.span_id for span in by_name[name]), name
    assert by_name["prefill"][0].end_time_unix_nano == by_name["decode"][0].start_time_unix_nano
    assert "secret" not in str(spans)
    assert collector.resources[0]["service.name"] == "triptych-test"


def test_a_refused_request_has_a_span_that_says_so(telling: Any, collector: Collector) -> None:
    trace_id = f"{int(TRACE, 16) + 9:032x}"
    assert ask(telling, {"traceparent": f"00-{trace_id}-{PARENT}-01"}, max_tokens=-1).status_code == 400
    (span,) = collector.trace(trace_id, 1)
    assert attributes(span)["error.type"] == "invalid_request"
    # by convention no failure of the server
    assert span.status.code == 0


def test_a_request_has_a_line_with_its_ids_and_times(telling: Any, parts: Any, files: str) -> None:
    answer = ask(telling, {"x-request-id": "mine-1"}, messages=media(parts, files, 75))
    assert answer.status_code == 200, answer.text
    until = time.monotonic() + 30
    while not (found := [line for line in lines_of(telling.output()) if line.get("request_id") == "mine-1"]):
        assert time.monotonic() < until, telling.output()
        time.sleep(0.1)
    (line,) = found
    assert (line["level"], line["source"], line["status"]) == ("info", "endpoint", 200)
    assert line["ids"] == [answer.json()["id"]]
    assert line["prompt_tokens"] == answer.json()["usage"]["prompt_tokens"]
    assert line["media"] == 3
    assert line["fetch_ms"] > 0
    assert line["prefill_ms"] > 0
    assert "the secret word" in line["prompts"][0]
    assert line["answers"] == [answer.json()["choices"][0]["message"]["content"]]


def test_stages_tell_in_the_same_form(telling: Any) -> None:
    lines = lines_of(telling.log.read_text(errors="replace"))
    assert {line["source"] for line in lines} >= {"language_model"}
    assert any(line["message"].startswith("engine: ") for line in lines)


def samples(served: Any) -> set[str]:
    text = httpx.get(f"{served.url}/metrics", timeout=60, trust_env=False).text
    return {re.split(r"[{ ]", line, maxsplit=1)[0] for line in text.splitlines() if line.startswith("triptych_")}


def named() -> set[str]:
    """Metrics that dashboards and alerts ask for."""
    folder = ROOT / "docker"
    dashboards = (folder / "grafana" / "dashboards").glob("*.json")
    found: set[str] = set()
    for path in dashboards:
        for panel in json.loads(path.read_text())["panels"]:
            for target in panel.get("targets", ()):
                found.update(_METRIC.findall(target["expr"]))
    assert found
    for rule in rules():
        found.update(_METRIC.findall(rule["expr"]))
    return found


def rules() -> list[dict[str, Any]]:
    """The alerts."""
    (group,) = yaml.safe_load((ROOT / "docker" / "prometheus" / "rules.yml").read_text())["groups"]
    found: list[dict[str, Any]] = group["rules"]
    return found


def test_alerts_name_metrics_that_there_are() -> None:
    own = {metric.name for metric in ShimMetrics().registry.collect()}
    for rule in rules():
        for name in _METRIC.findall(rule["annotations"]["todo"]):
            assert name in METRICS or name.removesuffix("_total") in own, name


# what is counted only in trouble, or on a GPU
SELDOM = {
    "triptych_gpu_memory_bytes",
    "triptych_preemptions_total",
    "triptych_stage_restarts_total",
}


def test_dashboards_and_alerts_ask_for_what_there_is(telling: Any, parts: Any, files: str) -> None:
    wanted = named()
    assert ask(telling, messages=media(parts, files, 80), seed=80).status_code == 200
    assert ask(telling, messages=media(parts, files, 80), seed=80).status_code == 200
    assert ask(telling, max_tokens=-1).status_code == 400
    until = time.monotonic() + 60
    while missing := wanted - samples(telling) - SELDOM:
        assert time.monotonic() < until, missing
        time.sleep(0.3)
    declared = set(METRICS)
    stages = {re.sub("_(bucket|sum|count)$", "", name) for name in wanted & SELDOM}
    assert stages - declared <= {"triptych_stage_restarts_total"}


def test_one_page_is_valid_for_prometheus(telling: Any) -> None:
    page = httpx.get(f"{telling.url}/metrics", timeout=60, trust_env=False)
    from prometheus_client.parser import text_string_to_metric_families

    families = [family.name for family in text_string_to_metric_families(page.text)]
    assert len(families) == len(set(families))
    assert any(name.startswith("nv_inference_request") for name in families)
    kinds = {s.labels.get("kind") for f in text_string_to_metric_families(page.text) for s in f.samples}
    assert {"text", "image", "video", "audio"} <= kinds


def test_a_collector_that_is_gone_harms_no_request(telling: Any, collector: Collector) -> None:
    """Last in this file: traces of what follows are lost."""
    collector.close()
    assert all(ask(telling).status_code == 200 for _ in range(5))


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
@pytest.mark.parametrize(
    "order", [("check config", "docker/prometheus/prometheus.yml"), ("test rules", "tests/http/alerts.yml")]
)
def test_prometheus_takes_configuration_and_rules(order: tuple[str, str]) -> None:
    what, path = order
    found = subprocess.run(["promtool", *what.split(), str(ROOT / path)], check=False, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr


@pytest.mark.parametrize("script", ["docs/metrics_table.py", "docker/grafana/dashboards.py"])
def test_what_is_made_from_the_code_is_current(script: str, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / script)]
    if script.startswith("docs"):
        subprocess.run([*command, "--check"], check=True)
        return
    subprocess.run([*command, "--output", str(tmp_path)], check=True)
    for path in tmp_path.iterdir():
        assert path.read_text() == (ROOT / "docker/grafana/dashboards" / path.name).read_text(), "run `make metrics`"
