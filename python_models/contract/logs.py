"""Log lines of the HTTP endpoint and of every stage, in one form: for people, or one JSON object a line for machines.

A line about a request carries the request's id in a field of its own: ``log.error("...", extra=about(request_id))``.
"""

from __future__ import annotations

import json
import logging
import sys
from datetime import datetime, timezone
from typing import Any, TextIO

from .errors import ErrorKind, TriptychError

FORMATS = ("text", "json")
LEVELS = ("debug", "info", "warning", "error")

_KNOWN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
_ADVICE = {
    ErrorKind.STAGE_DEAD: "its process is loaded again by itself; the last lines before this one in the server's log "
    "(--server-log) say why it ended",
    ErrorKind.TIMEOUT: "triptych_stage_seconds says which stage is slow; see --mm-per-request-timeout and "
    "--request-timeout-s",
    ErrorKind.OVERLOADED: "more instances, or --max-running-requests, --max-queued-requests, --max-inflight-requests",
    ErrorKind.STAGE_FAILED: "the traceback is above this line, or in the server's log (--server-log); other requests "
    "are not affected",
}
_OUT_OF_MEMORY = "lower --mem-fraction-static, --max-batch-rows or --chunked-prefill-size"


def about(request_id: str, **more: Any) -> dict[str, Any]:
    """The ``extra`` of a line about a request; ``more`` are further fields of it."""
    return {"request_id": request_id, **more}


def advice(error: TriptychError) -> str:
    """What an operator can do about an error that is no fault of the request; "" for one that is."""
    lowered = error.message.lower()
    if error.kind is ErrorKind.STAGE_FAILED and ("out of memory" in lowered or "memoryerror" in lowered):
        return _OUT_OF_MEMORY
    return _ADVICE.get(error.kind, "")


def failure(error: TriptychError, stage: str) -> str:
    """The line about a request that failed: which stage, why, what to do."""
    todo = advice(error)
    return f"{error.stage or stage} failed ({error.kind.value}): {error.message}" + (f"; {todo}" if todo else "")


def configure(source: str, level: str, form: str, stream: TextIO | None = None) -> logging.Handler:
    """Send all log lines of this process to a stream, in place of where they went before.

    Args:
        source: what speaks: "endpoint", or a stage's name.
        level: of :data:`LEVELS`, the least that is said.
        form: of :data:`FORMATS`.
        stream: standard error by default.
    """
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter(source) if form == "json" else TextFormatter(source))
    root = logging.getLogger()
    for old in root.handlers[:]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(level.upper())
    # a line for each connection of a probe or a scrape
    for noisy in ("httpx", "httpcore"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    return handler


class TextFormatter(logging.Formatter):
    """``time source level logger: message name=value ...``."""

    def __init__(self, source: str) -> None:
        super().__init__(f"%(asctime)s {source} %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - its name in the standard library
        """The line before a traceback."""
        line = super().formatMessage(record)
        return line + "".join(f" {name}={_shown(value)}" for name, value in _fields(record).items())


class JsonFormatter(logging.Formatter):
    """One JSON object a line: ``time`` (UTC), ``level``, ``source``, ``logger``, ``message``, the line's own fields."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self._source = source

    def format(self, record: logging.LogRecord) -> str:
        """The whole line."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "source": self._source,
            "logger": record.name,
            "message": record.getMessage(),
            **_fields(record),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    """What the line was given beside its message."""
    return {name: value for name, value in vars(record).items() if name not in _KNOWN}


def _shown(value: Any) -> str:
    if isinstance(value, str) and value and not any(c.isspace() or c == '"' for c in value):
        return value
    return json.dumps(value, ensure_ascii=False, default=str)
