"""What is told of requests: options of ``triptych serve`` for logs and traces. Their level and form are settings."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping

from triptych.python_models.contract import logs
from triptych.python_models.contract.settings import Settings

from .parser import CommandError

LOG_REQUESTS = ("off", "summary", "contents")
# as the specification of OpenTelemetry names them
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PATH = "/v1/traces"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    group = parser.add_argument_group("logs and traces")
    group.add_argument(
        "--log-requests",
        nargs="?",
        const="summary",
        default="off",
        choices=LOG_REQUESTS,
        help="a line for each request: its status, tokens and times (summary, also without a value), or prompts and "
        "answers too (contents); failures of the server are always told (default %(default)s)",
    )
    group.add_argument(
        "--otlp-traces-endpoint",
        metavar="URL",
        help="send OpenTelemetry traces there by OTLP over HTTP, such as http://127.0.0.1:4318 (the usual variables "
        f"OTEL_... hold too; default: that of {_ENDPOINTS[0]}, else none)",
    )
    group.add_argument(
        "--trace-config",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="passed on to tritonserver, for traces of its own, such as mode=opentelemetry (may be repeated)",
    )


def set_up_logs(settings: Settings) -> None:
    """The lines of this process as the settings want them."""
    from triptych.client.openai_api.observation import RequestIdFilter

    logs.configure("endpoint", settings.log_level, settings.log_format).addFilter(RequestIdFilter())


def traces_endpoint(args: argparse.Namespace, environment: Mapping[str, str] = os.environ) -> str:
    """Where traces go, as a whole URL; "" where nobody asks for them.

    Raises:
        CommandError: it is no URL.
    """
    given = args.otlp_traces_endpoint
    if given is None:
        if environment.get("OTEL_SDK_DISABLED", "").lower() == "true":
            return ""
        if environment.get("OTEL_TRACES_EXPORTER", "otlp") != "otlp":
            return ""
        # the first one is a whole URL, the second one that of the collector
        if environment.get(_ENDPOINTS[0]):
            return environment[_ENDPOINTS[0]]
        base = environment.get(_ENDPOINTS[1], "")
        return base.rstrip("/") + _PATH if base else ""
    if not given.startswith(("http://", "https://")):
        raise CommandError(
            f"--otlp-traces-endpoint must begin with http:// or https://, got {given!r}",
            "traces are sent by OTLP over HTTP; the usual port of a collector is 4318",
        )
    return str(given if "/" in given.split("://", 1)[1].rstrip("/") else given.rstrip("/") + _PATH)
