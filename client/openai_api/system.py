"""What those who run the server ask: is it well, does it take requests, what is it."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse, PlainTextResponse, Response

from triptych.python_models.contract.errors import TriptychError

from . import metrics
from .documentation import described
from .errors import RETRY_AFTER_S, body_of, error_object
from .service import Service

_TAG = "Server"
_HEALTH = "503 while the model loads, a stage is being restarted, or the server shuts down."
_READY = "As /health, and 503 too while as many requests run as it takes: for a load balancer."
_STATE = {
    "type": "object",
    "required": ["status", "stages"],
    "properties": {
        "status": {"enum": ["ok", "unavailable"]},
        "stages": {"type": "object", "additionalProperties": {"type": "boolean"}},
    },
}
_DOWN = {503: ("It does not; the body has `error` too, and says why", _STATE)}
_VERSION = {
    "type": "object",
    "required": ["version", "tritonserver"],
    "properties": {"version": {"type": "string"}, "tritonserver": {"type": ["string", "null"]}},
}


def router(service: Service) -> APIRouter:
    """GET /health, /ready, /live, /version and /metrics; none needs an API key."""
    routes = APIRouter()

    @routes.get("/health", **described("Can it answer?", _HEALTH, answer=_STATE, more=_DOWN, tag=_TAG))
    async def health() -> Response:
        return _state(service, service.traffic.why_not() or service.unavailable())

    @routes.get("/ready", **described("Does it take a request now?", _READY, answer=_STATE, more=_DOWN, tag=_TAG))
    async def ready() -> Response:
        return _state(service, service.traffic.why_not() or service.unavailable() or service.admission.why_full())

    @routes.get("/live", **described("Does the process answer?", "Always 200: for a liveness probe.", tag=_TAG))
    async def live() -> Response:
        return JSONResponse({"status": "ok"})

    @routes.get(
        "/version", **described("Versions", "`tritonserver` is null while it starts.", answer=_VERSION, tag=_TAG)
    )
    async def versions() -> Response:
        return JSONResponse({"version": version("triptych"), "tritonserver": service.triton_version})

    @routes.get(
        "/metrics",
        **described("Metrics for Prometheus", answer={"type": "string"}, answer_type="text/plain", tag=_TAG),
    )
    async def scrape() -> Response:
        if service.settings is not None and not service.settings.enable_metrics:
            message = "this server measures nothing: it was started with --no-enable-metrics"
            return JSONResponse(error_object(message, 404, None, "not_found"), 404)
        service.refresh_gauges()
        text = service.metrics.text()
        if service.metrics_url:
            text += await metrics.triton_metrics(service.metrics_url)
        return PlainTextResponse(text, media_type=metrics.CONTENT_TYPE)

    # for load balancers that ask with HEAD
    for path, endpoint in (("/health", health), ("/ready", ready), ("/live", live)):
        routes.add_api_route(path, endpoint, methods=["HEAD"], response_model=None, include_in_schema=False)
    return routes


def _state(service: Service, error: TriptychError | None) -> Response:
    states = service.monitor.states if service.monitor is not None else {}
    body: dict[str, Any] = {"status": "ok", "stages": {name: state.up for name, state in states.items()}}
    if error is None:
        return JSONResponse(body)
    return JSONResponse(body | {"status": "unavailable"} | body_of(error), 503, {"retry-after": str(RETRY_AFTER_S)})
