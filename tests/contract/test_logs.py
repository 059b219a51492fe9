"""Log lines: the same facts as text and as JSON, whatever they are about."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest

from triptych.python_models.contract import logs
from triptych.python_models.contract.errors import ErrorKind, TriptychError


@pytest.fixture
def root() -> Iterator[logging.Logger]:
    """The root logger, put back as it was."""
    found = logging.getLogger()
    handlers, level = found.handlers[:], found.level
    yield found
    found.handlers[:] = handlers
    found.setLevel(level)


def said(form: str, level: str = "info") -> tuple[logging.Logger, io.StringIO]:
    stream = io.StringIO()
    logs.configure("preprocess", level, form, stream)
    return logging.getLogger("triptych.test"), stream


def test_text_ends_with_the_fields(root: logging.Logger) -> None:
    log, stream = said("text")
    log.info("took %d", 3, extra=logs.about("chatcmpl-1", route="/a b", count=2))
    line = stream.getvalue()
    assert ' preprocess INFO triptych.test: took 3 request_id=chatcmpl-1 route="/a b" count=2\n' in line


def test_json_is_one_object_a_line(root: logging.Logger) -> None:
    log, stream = said("json")
    log.warning("first\nsecond", extra=logs.about("chatcmpl-1", seconds=0.5))
    try:
        raise ValueError("broken\nindeed")
    except ValueError:
        log.exception("failed", extra=logs.about("chatcmpl-2"))
    first, second = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert first["message"] == "first\nsecond"
    assert (first["level"], first["source"], first["logger"]) == ("warning", "preprocess", "triptych.test")
    assert (first["request_id"], first["seconds"]) == ("chatcmpl-1", 0.5)
    assert first["time"].endswith("+00:00")
    assert second["request_id"] == "chatcmpl-2"
    assert "ValueError: broken" in second["traceback"]


def test_what_is_below_the_level_is_not_said(root: logging.Logger) -> None:
    log, stream = said("text", "warning")
    log.info("no")
    log.warning("yes")
    assert stream.getvalue().count("\n") == 1


def test_a_failure_names_stage_cause_and_remedy() -> None:
    line = logs.failure(TriptychError(ErrorKind.STAGE_FAILED, "CUDA out of memory"), "vision_encoder")
    assert line.startswith("vision_encoder failed (stage_failed): CUDA out of memory; lower ")
    elsewhere = TriptychError(ErrorKind.STAGE_DEAD, "gone", stage="language_model")
    assert logs.failure(elsewhere, "preprocess").startswith("language_model failed (stage_dead): gone; ")
    assert logs.advice(TriptychError(ErrorKind.INVALID_MEDIA, "no picture")) == ""
