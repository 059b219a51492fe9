"""A client that goes away ends its work in every stage, by the stages' own metrics; too many clients are refused."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import httpx
import pytest

NAME = "tiny-omni"
# Nearly the whole context: it would take many seconds.
LONG = 1900
# One second is the promise; the rest is for machines where six other things run.
SOON_S = 4.0


def body(**change: Any) -> dict[str, Any]:
    base = {"model": NAME, "messages": [{"role": "user", "content": "hello"}], "temperature": 0}
    return base | {"max_tokens": LONG, "ignore_eos": True} | change


def running(server: Any, stage: str = "language_model") -> float:
    found: float = server.metric("triptych_requests_running", stage=stage)
    return found


def tokens(server: Any) -> float:
    found: float = server.metric("triptych_generation_tokens_total", stage="language_model")
    return found


def wait_for(condition: Callable[[], bool], timeout_s: float) -> float:
    """Seconds until the condition holds."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < timeout_s, f"not within {timeout_s} s"
        time.sleep(0.02)
    return time.monotonic() - began


@pytest.fixture(autouse=True)
def nothing_runs(server: Any) -> None:
    wait_for(lambda: running(server) == 0, 30)


def open_stream(server: Any, stack: ExitStack, **change: Any) -> None:
    """A stream whose first token has arrived."""
    client = stack.enter_context(httpx.Client(trust_env=False, timeout=60))
    answer = stack.enter_context(
        client.stream("POST", f"{server.url}/v1/chat/completions", json=body(stream=True, **change))
    )
    assert answer.status_code == 200
    lines = answer.iter_lines()
    while '"content":""' in next(line for line in lines if line):
        pass
    # the response closes with its iterator
    stack.callback(lines.close)


def test_leaving_a_stream_ends_the_generation(server: Any) -> None:
    before, cancelled = tokens(server), server.metric("triptych_http_cancelled_total")
    with ExitStack() as stack:
        open_stream(server, stack)
        wait_for(lambda: running(server) == 1, 5)
    wait_for(lambda: running(server) == 0, SOON_S)
    assert tokens(server) - before < LONG / 2, "it ran on to its end"
    assert server.metric("triptych_http_cancelled_total") == cancelled + 1
    wait_for(lambda: server.metric("triptych_requests_total", stage="language_model", outcome="cancelled") >= 1, 5)
    assert server.ask().status_code == 200


def test_leaving_a_plain_request_ends_the_generation(server: Any) -> None:
    before = tokens(server)
    seen = threading.Event()

    def watch() -> None:
        wait_for(lambda: running(server) == 1, 30)
        seen.set()

    watcher = threading.Thread(target=watch)
    watcher.start()
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/v1/chat/completions", json=body(), trust_env=False, timeout=1.0)
    watcher.join()
    assert seen.is_set()
    wait_for(lambda: running(server) == 0, SOON_S)
    assert tokens(server) - before < LONG
    assert server.metric("triptych_http_requests_total", code="499") >= 1


def test_leaving_while_media_are_fetched_ends_the_fetch(server: Any, files: str) -> None:
    content = [{"type": "image_url", "image_url": {"url": f"{files}/slow.png"}}]
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(
            f"{server.url}/v1/chat/completions",
            json=body(messages=[{"role": "user", "content": content}]),
            trust_env=False,
            timeout=1.0,
        )
    wait_for(lambda: running(server, "preprocess") == 0, SOON_S)
    assert server.ask().status_code == 200


def test_media_come_from_an_allowed_host(server: Any, files: str, parts: Any) -> None:
    def answer(url: str) -> Any:
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "what?"}]
        return server.ask(messages=[{"role": "user", "content": content}], max_tokens=5)

    fetched = answer(f"{files}/picture.png")
    assert fetched.status_code == 200, fetched.text
    inline = answer(parts.data_url(parts.picture(9), "image/png"))
    assert fetched.json()["choices"] == inline.json()["choices"]


def test_too_many_requests_are_refused_and_all_cancels_arrive(server: Any) -> None:
    limit = 8
    with ExitStack() as stack:
        for _ in range(limit):
            open_stream(server, stack)
        refused = server.ask()
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "overloaded"
        assert int(refused.headers["retry-after"]) > 0
    wait_for(lambda: running(server) == 0, SOON_S)
    wait_for(lambda: server.ask().status_code == 200, 5)


def test_a_generation_longer_than_its_lease_is_renewed(server: Any) -> None:
    lease_s = 2
    began = time.monotonic()
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: server.ask(max_tokens=LONG, ignore_eos=True), range(4)))
    assert time.monotonic() - began > lease_s, "too quick to need a renewal"
    assert [answer.status_code for answer in answers] == [200] * 4
    assert [answer.json()["usage"]["completion_tokens"] for answer in answers] == [LONG] * 4


def test_the_sdk_cancels_what_is_dropped(server: Any) -> None:
    from triptych.client.sdk import Client

    messages = [{"role": "user", "content": "hello"}]
    with Client(f"127.0.0.1:{server.grpc_port}") as client:
        stream = client.stream_chat(messages, max_tokens=LONG, ignore_eos=True, temperature=0)
        while not next(stream).token_ids:
            pass
        stream.close()
        wait_for(lambda: running(server) == 0, SOON_S)
        with pytest.raises(StopIteration):
            next(stream)
        # an iterator that is simply forgotten
        for delta in client.stream_chat(messages, max_tokens=LONG, ignore_eos=True, temperature=0):
            if delta.token_ids:
                break
        wait_for(lambda: running(server) == 0, SOON_S)
        # one that still runs when its client is closed
        left = client.stream_chat(messages, max_tokens=LONG, ignore_eos=True, temperature=0)
        assert next(left).token_ids
    wait_for(lambda: running(server) == 0, SOON_S)
