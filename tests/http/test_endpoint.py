"""The running endpoint: the official client, every kind of part, the same tokens as transformers, and its errors."""

from __future__ import annotations

import io
import itertools
import json
import socket
import wave
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from PIL import Image

NAME = "tiny-omni"


def ask(client: openai.OpenAI, content: Any, **change: Any) -> Any:
    arguments = {"model": NAME, "max_tokens": 6, "temperature": 0} | change
    return client.chat.completions.create(messages=[{"role": "user", "content": content}], **arguments)


def test_plain_and_streamed_answers_agree(client: openai.OpenAI) -> None:
    whole = ask(client, "hello world", max_tokens=12)
    assert whole.object == "chat.completion"
    assert whole.model == NAME
    assert whole.choices[0].message.role == "assistant"
    assert whole.choices[0].finish_reason in ("stop", "length")
    assert whole.usage.prompt_tokens > 5
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    chunks = list(ask(client, "hello world", max_tokens=12, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[0].choices[0].delta.content == ""
    assert all(chunk.choices[0].delta.role is None for chunk in chunks[1:-1])
    assert len({(chunk.id, chunk.created, chunk.system_fingerprint) for chunk in chunks}) == 1
    assert chunks[0].id.startswith("chatcmpl-")
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == whole.choices[0].message.content
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1] if chunk.choices[0].finish_reason] == [
        whole.choices[0].finish_reason
    ]
    assert chunks[-1].choices == []
    assert chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_a_stream_is_chunks_then_done(server: Any) -> None:
    answer = server.ask(stream=True)
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = answer.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(event.startswith("data: {") for event in events[:-2])
    assert "usage" not in json.loads(events[0].removeprefix("data: "))


def test_the_async_client_streams_too(server: Any) -> None:
    import asyncio

    async def run() -> str:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as client:
            stream = await client.chat.completions.create(
                model=NAME, messages=[{"role": "user", "content": "hello"}], max_tokens=4, temperature=0, stream=True
            )
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    assert asyncio.run(run()) == server.ask(max_tokens=4).json()["choices"][0]["message"]["content"]


def test_logprobs(client: openai.OpenAI) -> None:
    for stream in (False, True):
        answer = ask(client, "hello", logprobs=True, top_logprobs=3, max_tokens=5, stream=stream)
        if stream:
            found = [item for c in answer if c.choices[0].logprobs for item in c.choices[0].logprobs.content]
        else:
            found = answer.choices[0].logprobs.content
        assert len(found) == 5
        for item in found:
            assert item.logprob <= 0
            assert len(item.top_logprobs) == 3
            # greedy: the chosen token is the most likely one
            assert item.top_logprobs[0].logprob == pytest.approx(item.logprob)
            assert [top.logprob for top in item.top_logprobs] == sorted(
                (t.logprob for t in item.top_logprobs), reverse=True
            )


def test_a_stop_string_ends_the_answer(client: openai.OpenAI) -> None:
    text = ask(client, "hello world", max_tokens=12).choices[0].message.content
    stop = next(c for c in text[2:] if c.isalnum())
    answer = ask(client, "hello world", max_tokens=12, stop=[stop])
    assert answer.choices[0].message.content == text[: text.index(stop)]
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].matched_stop == stop


@pytest.mark.parametrize("order", list(itertools.permutations(["text", "image", "video", "audio"]))[::5])
def test_parts_in_any_order(client: openai.OpenAI, parts: Any, order: tuple[str, ...]) -> None:
    answer = ask(client, [getattr(parts, kind)() for kind in order])
    details = answer.usage.prompt_tokens_details.model_dump()
    assert answer.usage.completion_tokens == 6 or answer.choices[0].finish_reason == "stop"
    assert min(details["image_tokens"], details["video_tokens"], details["audio_tokens"]) > 0


def test_media_in_any_number_and_turn(client: openai.OpenAI, parts: Any) -> None:
    one = ask(client, [parts.image(0), parts.text()]).usage.prompt_tokens_details.model_dump()["image_tokens"]
    answer = client.chat.completions.create(
        model=NAME,
        messages=[
            {"role": "system", "content": "look"},
            {"role": "user", "content": [parts.image(0), parts.input_audio(), parts.image(1), parts.text("and")]},
            {"role": "assistant", "content": "a dog"},
            {"role": "user", "content": [parts.text("this?"), parts.audio(2), parts.image(2)]},
        ],
        max_tokens=3,
        temperature=0,
    )
    assert answer.usage.prompt_tokens_details.model_dump()["image_tokens"] == 3 * one
    assert answer.choices[0].message.content is not None


@pytest.fixture(scope="module")
def truth(checkpoint: Path) -> Callable[[list[Any], int], tuple[list[int], str]]:
    """(content of one user message, tokens) -> what transformers' ``generate`` answers."""
    import torch

    from triptych.python_models.families import torchvision_fix

    torchvision_fix.install()
    import transformers

    model = transformers.Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32)
    model.eval()
    processor = transformers.AutoProcessor.from_pretrained(checkpoint)

    def generate(content: list[Any], count: int) -> tuple[list[int], str]:
        kinds = {bytes: None, str: "text", Image.Image: "image", np.ndarray: "audio"}
        named = [{"type": kinds[type(c)], **({"text": c} if isinstance(c, str) else {})} for c in content]
        text = processor.apply_chat_template(
            [{"role": "user", "content": named}], add_generation_prompt=True, tokenize=False
        )
        media: dict[str, Any] = {}
        if pictures := [c for c in content if isinstance(c, Image.Image)]:
            media["images"] = pictures
        if sounds := [c for c in content if isinstance(c, np.ndarray)]:
            media["audio"] = sounds
        inputs = processor(text=[text], return_tensors="pt", **media)
        with torch.no_grad():
            out = model.generate(**inputs, max_new_tokens=count, do_sample=False)
        ids = out[0, inputs["input_ids"].shape[1] :].tolist()
        return ids, processor.tokenizer.decode(ids, skip_special_tokens=True)

    return generate


def test_the_same_tokens_as_transformers(server: Any, client: openai.OpenAI, parts: Any, truth: Any) -> None:
    picture = Image.open(io.BytesIO(parts.picture(3))).convert("RGB")
    with wave.open(io.BytesIO(parts.sound(4))) as file:
        sound = np.frombuffer(file.readframes(file.getnframes()), np.int16).astype(np.float32) / 32768
    cases: list[tuple[list[Any], list[Any]]] = [
        (["hello world"], [parts.text("hello world")]),
        (["see ", picture, " there"], [parts.text("see "), parts.image(3), parts.text(" there")]),
        ([sound, "what is said?"], [parts.input_audio(4), parts.text("what is said?")]),
        ([picture, sound, "both"], [parts.image(3), parts.audio(4), parts.text("both")]),
    ]
    expected = [truth(plain, 16)[1] for plain, _ in cases]
    # together, so that they share batches, and once more alone, so that caches answer
    with ThreadPoolExecutor(len(cases)) as pool:
        together = list(pool.map(lambda case: ask(client, case[1], max_tokens=16), cases))
    alone = [ask(client, content, max_tokens=16) for _, content in cases]
    for found in (together, alone):
        assert [answer.choices[0].message.content for answer in found] == expected
    assert len(set(expected)) == len(expected)


def test_the_sdk_gives_the_same_token_ids(server: Any, parts: Any, truth: Any) -> None:
    from triptych.client.sdk import Client

    picture = Image.open(io.BytesIO(parts.picture(5))).convert("RGB")
    expected, text = truth([picture, "what?"], 10)
    content = [{"type": "image", "image": parts.picture(5)}, {"type": "text", "text": "what?"}]
    messages = [{"role": "user", "content": content}]
    with Client(f"127.0.0.1:{server.grpc_port}") as client:
        assert client.settings().model.endswith("qwen2_5_omni")
        answer = client.chat(messages, max_tokens=10, temperature=0)
        assert list(answer.token_ids) == expected
        assert answer.text == text
        assert answer.finish_reason
        assert answer.usage.completion_tokens == len(expected)
        deltas = list(client.stream_chat(messages, max_tokens=10, temperature=0))
        assert len(deltas) > 1
        assert [token for delta in deltas for token in delta.token_ids] == expected
        assert "".join(delta.text for delta in deltas) == text


def test_models_and_health(server: Any, client: openai.OpenAI) -> None:
    assert [card.id for card in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).owned_by == "triptych"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other/model")
    health = httpx.get(f"{server.url}/health", trust_env=False)
    assert health.status_code == 200
    assert health.json() == {
        "status": "ok",
        "stages": dict.fromkeys(("preprocess", "vision_encoder", "audio_encoder", "language_model"), True),
    }


def test_one_scrape_has_the_shim_and_the_stages(server: Any) -> None:
    before = server.metric("triptych_http_requests_total", code="200", route="/v1/chat/completions")
    tokens = server.metric("triptych_generation_tokens_total", stage="language_model")
    server.ask(max_tokens=3, ignore_eos=True)
    assert server.metric("triptych_http_requests_total", code="200", route="/v1/chat/completions") == before + 1
    assert server.metric("triptych_http_time_to_first_token_seconds_count") > 0
    assert server.metric("triptych_http_request_seconds_count") > 0
    assert server.metric("triptych_stage_up", stage="preprocess") == 1
    wait_until(lambda: server.metric("triptych_generation_tokens_total", stage="language_model") == tokens + 3)
    assert server.metric("nv_inference_count", model="preprocess") > 0


def test_a_body_without_its_content_type_is_json(server: Any) -> None:
    body = {"model": "default", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
    for content_type in ("application/x-www-form-urlencoded", "text/plain", ""):
        answer = httpx.post(
            f"{server.url}/v1/chat/completions",
            content=json.dumps(body),
            headers={"content-type": content_type} if content_type else {},
            trust_env=False,
            timeout=60,
        )
        assert answer.status_code == 200, answer.text


def test_request_ids_are_taken_and_made(server: Any) -> None:
    def id_of(given: str | None) -> str:
        headers = {"x-request-id": given} if given is not None else {}
        found: str = httpx.get(f"{server.url}/v1/models", headers=headers, trust_env=False).headers["x-request-id"]
        return found

    assert id_of("mine-1") == "mine-1"
    made = {id_of(None), id_of("has spaces"), id_of("x" * 200)}
    assert len(made) == 3
    assert all(item.startswith("req_") for item in made)


BAD_REQUESTS: list[tuple[dict[str, Any], int, str | None, str]] = [
    ({"model": "gpt-4"}, 404, "model", "model_not_found"),
    ({"messages": []}, 400, "messages", "invalid_request"),
    ({"messages": [{"role": "robot", "content": "x"}]}, 400, "messages[0].role", "invalid_request"),
    ({"temperature": -1}, 400, "temperature", "invalid_request"),
    ({"unknown": 1}, 400, "unknown", "invalid_request"),
    ({"n": 129}, 400, "n", "invalid_request"),
    ({"tools": [{"type": "function"}]}, 400, "tools[0].function", "invalid_request"),
    ({"tools": [{"type": "function", "function": {"name": "find"}}]}, 400, "tools", "unsupported"),
    ({"chat_template_kwargs": {"colour": 1}}, 400, "chat_template_kwargs.colour", "invalid_request"),
    ({"max_tokens": 100_000}, 400, "max_tokens", "context_length_exceeded"),
    ({"max_completion_tokens": 100_000}, 400, "max_completion_tokens", "context_length_exceeded"),
    ({"messages": [{"role": "user", "content": "word " * 3000}]}, 400, "messages", "context_length_exceeded"),
    ({"logit_bias": {"1000000": 1}}, 400, None, "invalid_request"),
]
BAD_MEDIA: list[tuple[str, Any, int, str]] = [
    ("image_url", {"url": "data:image/png;base64,aGVsbG8="}, 400, "invalid_media"),
    ("image_url", {"url": "data:image/png;base64,####"}, 400, "invalid_request"),
    ("image_url", {"url": "file:///etc/hostname"}, 400, "invalid_request"),
    ("image_url", {"url": "http://127.0.0.1:1/a.png"}, 400, "invalid_request"),
    ("image_url", {"url": "http://169.254.169.254/latest"}, 400, "invalid_request"),
    ("video_url", {"url": "data:video/mp4;base64,aGVsbG8="}, 400, "invalid_media"),
    ("audio_url", {"url": "data:audio/wav;base64,aGVsbG8="}, 400, "invalid_media"),
    ("input_audio", {"data": "aGVsbG8=", "format": "wav"}, 400, "invalid_media"),
]


@pytest.mark.parametrize("stream", [False, True])
def test_every_error_is_an_error_object_and_the_next_request_succeeds(server: Any, stream: bool) -> None:
    cases = [(change, status, param, code) for change, status, param, code in BAD_REQUESTS]
    for kind, value, status, code in BAD_MEDIA:
        content = [{"type": "text", "text": "a"}, {"type": kind, kind: value}]
        cases.append(({"messages": [{"role": "user", "content": content}]}, status, "messages[0].content[1]", code))
    for change, status, param, code in cases:
        answer = server.ask(stream=stream, **change)
        label = f"{change}: {answer.text}"
        assert answer.status_code == status, label
        assert answer.headers["content-type"] == "application/json", label
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}, label
        assert error["type"] == "invalid_request_error", label
        assert error["code"] == code, label
        if param is not None:
            assert (error["param"] or "").startswith(param), label
        for leak in ("in ensemble", "[triptych", "sampling.", "Traceback"):
            assert leak not in error["message"], label
        assert server.ask().status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nowhere", 404, "not_found"),
        ("GET", "/v1/chat/completions", 405, "method_not_allowed"),
        ("POST", "/v1/models", 405, "method_not_allowed"),
        ("GET", "/v1/models/none", 404, "model_not_found"),
        ("POST", "/v1/files", 404, "not_found"),
    ],
)
def test_unknown_routes_and_methods(server: Any, method: str, path: str, status: int, code: str) -> None:
    answer = httpx.request(method, f"{server.url}{path}", trust_env=False)
    assert answer.status_code == status
    assert answer.json()["error"]["code"] == code
    if status == 405:
        assert answer.headers["allow"]


@pytest.mark.parametrize("raw", [b"", b"{", b"[1]", b"null", b'"text"', b"[" * 100_000, b"\x1f\x8b\x00"])
def test_bodies_that_are_no_json_object(server: Any, raw: bytes) -> None:
    answer = httpx.post(f"{server.url}/v1/chat/completions", content=raw, trust_env=False)
    assert answer.status_code == 400
    assert "JSON" in answer.json()["error"]["message"]
    assert server.ask().status_code == 200


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_over_the_limit(server: Any, chunked: bool) -> None:
    piece = b" " * 2**20
    content: Any = (piece for _ in range(6)) if chunked else piece * 6
    answer = httpx.post(f"{server.url}/v1/chat/completions", content=content, trust_env=False, timeout=60)
    assert answer.status_code == 413
    assert answer.json()["error"]["code"] == "too_large"
    assert server.metric("triptych_http_inflight_bytes") == 0
    assert server.ask().status_code == 200


def test_a_client_that_goes_away_in_the_middle_of_its_body(server: Any) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n"
    with socket.create_connection((host, int(port))) as raw:
        raw.sendall(head.encode() + b"x" * 100_000)
    wait_until(lambda: server.metric("triptych_http_inflight_bytes") == 0)
    assert server.ask().status_code == 200


def wait_until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    import time

    until = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < until, "it did not happen in time"
        time.sleep(0.05)
