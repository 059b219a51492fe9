"""Deltas as OpenAI chunks and completions, errors as OpenAI error objects. No server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

import httpx
import pytest
from starlette.requests import Request

from triptych.client.openai_api import Service, ShimOptions, body, create_app, sse
from triptych.client.openai_api.admission import Admission
from triptych.client.openai_api.errors import body_of, in_openai_words
from triptych.client.openai_api.sse import Completion, error_event
from triptych.python_models.contract.delta import Delta, TokenLogprob, Usage
from triptych.python_models.contract.errors import ErrorKind, TriptychError, invalid

LOGPROB = TokenLogprob(5, "ä", -0.5, (195, 164), ((5, "ä", -0.5, (195, 164)), (6, "b", -1.0, None)))


def completion(include_usage: bool = False) -> Completion:
    return Completion("chatcmpl-1", 17, "m", "fp_1", include_usage)


def events(data: bytes) -> list[dict[str, Any]]:
    assert data.endswith(b"\n\n") or not data
    return [json.loads(piece.removeprefix(b"data: ")) for piece in data.split(b"\n\n")[:-1]]


def test_first_chunk_names_the_role() -> None:
    [chunk] = events(completion().first_chunks())
    assert chunk["object"] == "chat.completion.chunk"
    assert chunk["choices"] == [
        {
            "index": 0,
            "delta": {"role": "assistant", "content": "", "refusal": None},
            "logprobs": None,
            "finish_reason": None,
        }
    ]
    assert "usage" not in chunk


def test_a_heartbeat_makes_no_chunk() -> None:
    assert completion().chunks(Delta(usage=Usage(3))) == b""


def test_last_delta_gives_text_finish_and_usage_apart() -> None:
    last = Delta("end", (1, 2), (), "stop", "</s>", Usage(7, 3, 2, 1, 0, 4))
    made = completion(True)
    text, finish = events(made.chunks(last))
    ended = made.end([last])
    assert ended.endswith(b"data: [DONE]\n\n")
    [total] = events(ended.removesuffix(sse.DONE))
    assert text["choices"][0]["delta"] == {"content": "end"}
    assert text["choices"][0]["finish_reason"] is None
    assert text["usage"] is None
    assert finish["choices"][0] == {
        "index": 0,
        "delta": {},
        "logprobs": None,
        "finish_reason": "stop",
        "matched_stop": "</s>",
    }
    assert total["choices"] == []
    assert total["usage"] == {
        "prompt_tokens": 7,
        "completion_tokens": 2,
        "total_tokens": 9,
        "prompt_tokens_details": {
            "cached_tokens": 3,
            "text_tokens": 2,
            "audio_tokens": 4,
            "image_tokens": 1,
            "video_tokens": 0,
        },
        "completion_tokens_details": {
            "reasoning_tokens": 0,
            "text_tokens": 2,
            "audio_tokens": 0,
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        },
    }
    assert {(chunk["id"], chunk["created"], chunk["system_fingerprint"]) for chunk in (text, finish, total)} == {
        ("chatcmpl-1", 17, "fp_1")
    }


@pytest.mark.parametrize("include_usage", [False, True])
@pytest.mark.parametrize("text", ["a", 'quote " and \\', "图\n\u2028", "\x00", '"index":0,"delta":{"content":""'])
def test_the_short_way_to_write_a_chunk_is_the_same(include_usage: bool, text: str) -> None:
    made = completion(include_usage)
    [chunk] = events(made.chunks(Delta(text, (1,), index=7)))
    [other] = events(made._chunk([made._choice(7, {"content": text})]))
    assert chunk == other
    assert chunk["choices"][0]["delta"] == {"content": text}


def test_obfuscated_chunks_do_not_tell_the_length_of_their_text() -> None:
    made = Completion("chatcmpl-1", 17, "m", "fp_1", include_obfuscation=True)
    one, long = (made.chunks(Delta(text, (1,))) for text in ("a", "a" * 30))
    assert len(one) == len(long)
    assert len(made.chunks(Delta("ü" * 99, (1,)))) % 64 == 0
    [found] = events(one)
    assert found["choices"][0]["delta"] == {"content": "a"}
    assert found["obfuscation"] != events(made.chunks(Delta("a", (1,))))[0]["obfuscation"]
    assert "obfuscation" not in events(completion().chunks(Delta("a", (1,))))[0]


def test_the_service_tier_is_told_to_who_asked() -> None:
    made = Completion("chatcmpl-1", 17, "m", "fp_1", service_tier="default")
    assert [chunk["service_tier"] for chunk in events(made.first_chunks() + made.chunks(Delta("a", (1,))))] == [
        "default",
        "default",
    ]
    assert made.whole([Delta("a", (1,), (), "stop")])["service_tier"] == "default"
    assert "service_tier" not in completion().whole([Delta("a", (1,), (), "stop")])


def test_without_the_cache_report_nothing_is_told_of_the_cache() -> None:
    made = Completion("chatcmpl-1", 17, "m", "fp_1", True, cache_report=False)
    last = Delta("a", (1,), (), "stop", None, Usage(7, 3, 1))
    assert "cached_tokens" not in made.whole([last])["usage"]["prompt_tokens_details"]
    [total] = events(made.end([last]).removesuffix(sse.DONE))
    assert "cached_tokens" not in total["usage"]["prompt_tokens_details"]


def test_an_impossible_token_is_still_json() -> None:
    never = TokenLogprob(5, "a", -0.5, None, ((6, "b", float("-inf"), None),))
    [chunk] = events(completion().chunks(Delta("a", (5,), (never,))))
    assert chunk["choices"][0]["logprobs"]["content"][0]["top_logprobs"][0]["logprob"] == -9999.0


def test_choices_have_chunks_of_their_own_and_one_usage() -> None:
    made = Completion("chatcmpl-1", 17, "m", "fp_1", True, n=2)
    assert [chunk["choices"][0]["index"] for chunk in events(made.first_chunks())] == [0, 1]
    one = Delta("b", (2,), (), "stop", None, Usage(5, 0, 3), 1)
    zero = Delta("a", (1, 3), (), "length", None, Usage(5, 0, 5), 0)
    assert [c["choices"][0]["index"] for c in events(made.chunks(one) + made.chunks(zero))] == [1, 1, 0, 0]
    [total] = events(made.end([one, zero]).removesuffix(sse.DONE))
    assert total["usage"]["completion_tokens"] == 5
    whole = made.whole([Delta("x", (7,), index=1), one, zero])
    assert [(c["index"], c["message"]["content"], c["finish_reason"]) for c in whole["choices"]] == [
        (0, "a", "length"),
        (1, "xb", "stop"),
    ]
    assert whole["usage"]["completion_tokens"] == 5


def test_logprobs_have_openais_shape() -> None:
    [chunk] = events(completion().chunks(Delta("ä", (5,), (LOGPROB,))))
    assert chunk["choices"][0]["logprobs"] == {
        "content": [
            {
                "token": "ä",
                "logprob": -0.5,
                "bytes": [195, 164],
                "top_logprobs": [
                    {"token": "ä", "logprob": -0.5, "bytes": [195, 164]},
                    {"token": "b", "logprob": -1.0, "bytes": None},
                ],
            }
        ],
        "refusal": None,
    }


def test_whole_completion() -> None:
    whole = completion().whole(
        [Delta(usage=Usage(3)), Delta("a", (1,)), Delta("b", (2,), (), "length", None, Usage(3, 0, 2))]
    )
    assert whole["object"] == "chat.completion"
    [choice] = whole["choices"]
    assert choice["message"] == {"role": "assistant", "content": "ab", "refusal": None, "annotations": []}
    assert (choice["finish_reason"], choice["matched_stop"], choice["logprobs"]) == ("length", None, None)
    assert whole["usage"]["total_tokens"] == 5


def test_errors_speak_openai() -> None:
    error = invalid("sampling.max_tokens is 9 but at most 5 fit", "sampling.max_tokens")
    found = body_of(in_openai_words(error, {"max_tokens": "max_completion_tokens"}))["error"]
    assert found == {
        "message": "max_completion_tokens is 9 but at most 5 fit",
        "type": "invalid_request_error",
        "param": "max_completion_tokens",
        "code": "invalid_request",
    }
    dead = TriptychError(ErrorKind.STAGE_DEAD, "gone")
    [event] = events(error_event(dead))
    assert event["error"]["type"] == "server_error"
    assert event["error"]["code"] == "stage_dead"


def test_admission_counts_requests_and_bytes() -> None:
    admission = Admission(max_requests=2, max_bytes=10)
    first, second = admission.enter(), admission.enter()
    with pytest.raises(TriptychError, match="2 requests") as caught:
        admission.enter()
    assert caught.value.kind is ErrorKind.OVERLOADED
    first.grow(8)
    with pytest.raises(TriptychError, match="limit"):
        second.grow(3)
    first.release_bytes()
    second.grow(3)
    for _ in range(2):
        first.release()
        second.release()
    assert (admission.requests, admission.bytes) == (0, 0)


def test_a_client_that_takes_nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "WRITE_LIMIT_S", 0.05)
    closed = False
    ended: list[bool] = []

    async def events() -> AsyncGenerator[bytes, None]:
        nonlocal closed
        try:
            while True:
                yield b"data: {}"
        finally:
            closed = True

    async def run() -> None:
        async def send(message: Any) -> None:
            if message["type"] == "http.response.body":
                await asyncio.Event().wait()

        async def receive() -> Any:
            await asyncio.Event().wait()

        await asyncio.wait_for(
            sse.EventStream(events(), lambda: ended.append(True))({"type": "http"}, receive, send), 5
        )

    asyncio.run(run())
    assert closed
    assert ended == [True]


def test_a_body_that_stops_gives_its_place_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body, "_SILENCE_S", 0.05)
    monkeypatch.setattr(body, "_DISCARD_S", 0.05)
    admission = Admission(1, 100)

    async def run() -> None:
        first = True

        async def receive() -> Any:
            nonlocal first
            if first:
                first = False
                return {"type": "http.request", "body": b"{", "more_body": True}
            return await asyncio.Event().wait()

        request = Request({"type": "http", "headers": []}, receive)
        ticket = admission.enter()
        try:
            await body.read_body(request, ticket, 100)
        finally:
            ticket.release()

    with pytest.raises(TriptychError, match="did not go on"):
        asyncio.run(run())
    assert (admission.requests, admission.bytes) == (0, 0)


def test_a_fault_of_the_endpoint_itself_is_an_error_object(monkeypatch: pytest.MonkeyPatch) -> None:
    service = Service(ShimOptions("m"))

    def broken(*args: Any) -> None:
        raise RuntimeError("secret detail")

    monkeypatch.setattr(service, "unavailable", broken)

    async def run() -> httpx.Response:
        transport = httpx.ASGITransport(create_app(service), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            return await client.post("/v1/chat/completions", content=b"{}")

    answer = asyncio.run(run())
    assert answer.status_code == 500
    assert answer.json()["error"]["type"] == "server_error"
    assert "secret" not in answer.text
