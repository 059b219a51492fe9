"""``return_timings``: where the time of an answer went, in whole answers and streams."""

from __future__ import annotations

import json
from typing import Any

import pytest

PARTS = ("fetch_ms", "decode_ms", "preprocess_ms", "encode_ms", "queue_ms", "prefill_ms", "generate_ms")


def timings_of(answer: Any) -> dict[str, Any]:
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()["timings"]
    assert set(found) == {*PARTS, "total_ms", "tokens_per_second"}
    assert all(found[name] >= 0 for name in PARTS)
    # the parts are apart from each other, within the whole, up to rounding
    assert sum(found[name] for name in PARTS) <= found["total_ms"] + 1
    return found


def test_of_text(server: Any) -> None:
    found = timings_of(server.ask(return_timings=True, max_tokens=8, ignore_eos=True))
    assert [found[name] for name in PARTS[:2]] == [0, 0]
    assert found["encode_ms"] == 0
    for name in ("preprocess_ms", "queue_ms", "prefill_ms", "generate_ms", "tokens_per_second"):
        assert found[name] > 0, name


def test_of_media(server: Any, parts: Any, files: str) -> None:
    by_url = {"type": "image_url", "image_url": {"url": f"{files}/picture.png"}}
    content = [by_url, parts.image(41), parts.audio(41), parts.text()]
    found = timings_of(
        server.ask(messages=[{"role": "user", "content": content}], return_timings=True, max_tokens=1, n=2)
    )
    for name in (*PARTS[:6], "total_ms"):
        assert found[name] > 0, name
    # each of the two answers is one token
    assert found["tokens_per_second"] is None


@pytest.mark.parametrize("usage", [False, True])
def test_of_a_stream_are_in_its_last_chunk(server: Any, usage: bool) -> None:
    options = {"stream_options": {"include_usage": True}} if usage else {}
    answer = server.ask(stream=True, return_timings=True, **options)
    *chunks, last = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
    assert last["timings"]["total_ms"] > 0
    assert last["choices"] == []
    assert ("usage" in last) is usage
    assert not any("timings" in chunk for chunk in chunks)


def test_are_not_told_unasked(server: Any) -> None:
    assert "timings" not in server.ask().json()
    assert "timings" not in server.ask(stream=True).text


def test_must_be_asked_for_with_a_boolean(server: Any) -> None:
    answer = server.ask(return_timings=1)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "return_timings"
