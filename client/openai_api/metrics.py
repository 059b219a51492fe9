"""The shim's own measurements, and one scrape for them and the Triton server's."""

from __future__ import annotations

import httpx
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest

from triptych.python_models.contract.metrics import LONG_SECONDS, SECONDS

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class ShimMetrics:
    """Counters, gauges and histograms of one shim, in a registry of its own."""

    def __init__(self) -> None:
        # Creation times would double the number of samples.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "triptych_http_requests",
            "HTTP requests by route and status (499: the client went away)",
            ("route", "code"),
            registry=self.registry,
        )
        self.errors = Counter(
            "triptych_http_errors",
            "HTTP requests that ended with an error, also inside a stream, by its kind",
            ("route", "kind"),
            registry=self.registry,
        )
        self.running = Gauge(
            "triptych_http_requests_running", "Requests sent to the Triton server and not ended", registry=self.registry
        )
        self.body_bytes = Gauge("triptych_http_inflight_bytes", "Bytes of request bodies held", registry=self.registry)
        self.first_token = Histogram(
            "triptych_http_time_to_first_token_seconds",
            "Arrival of a request to its first token",
            ("route",),
            buckets=SECONDS,
            registry=self.registry,
        )
        self.duration = Histogram(
            "triptych_http_request_seconds",
            "Arrival of a request that generates to the end of its answer",
            ("route",),
            buckets=LONG_SECONDS,
            registry=self.registry,
        )
        self.cancelled = Counter(
            "triptych_http_cancelled", "Requests that generate whose client went away", registry=self.registry
        )
        self.stage_up = Gauge("triptych_stage_up", "1 while a stage answers probes", ("stage",), registry=self.registry)
        self.stage_restarts = Counter(
            "triptych_stage_restarts", "Times a dead stage was loaded again", ("stage",), registry=self.registry
        )
        self.server_restarts = Counter(
            "triptych_server_restarts", "Times the whole Triton server was started again", registry=self.registry
        )

    def text(self) -> str:
        """The shim's metrics in Prometheus' text format."""
        return generate_latest(self.registry).decode()


async def triton_metrics(url: str) -> str:
    """The Triton server's metrics in the same format; a comment that says why where they cannot be had."""
    try:
        async with httpx.AsyncClient(trust_env=False, timeout=5.0) as client:
            answer = await client.get(url)
            answer.raise_for_status()
    except httpx.HTTPError as error:
        return f"# the Triton server's metrics at {url} cannot be read: {type(error).__name__} {error}\n"
    return answer.text
