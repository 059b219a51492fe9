"""/v1/responses of the running server, asked with the official client: answers, streams, media, conversations."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from typing import Any, Literal

import httpx
import openai
import pytest
from pydantic import BaseModel

NAME = "tiny-omni"


def create(client: openai.OpenAI, value: Any, **change: Any) -> Any:
    arguments = {"model": NAME, "max_output_tokens": 6, "temperature": 0} | change
    return client.responses.create(input=value, **arguments)


def picture_part(parts: Any, seed: int) -> dict[str, Any]:
    url = parts.data_url(parts.picture(seed), "image/png")
    return {"type": "input_image", "image_url": url, "detail": "auto"}


def sound_part(parts: Any, seed: int) -> dict[str, Any]:
    data = base64.b64encode(parts.sound(seed)).decode()
    return {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}


def said(server: Any, messages: list[dict[str, Any]]) -> str:
    """What the same question gives as a chat completion."""
    answer = server.ask(messages=messages, max_tokens=6)
    assert answer.status_code == 200, answer.text
    text: str = answer.json()["choices"][0]["message"]["content"]
    return text


def test_a_response_is_what_a_chat_completion_says(server: Any, client: openai.OpenAI) -> None:
    found = create(client, "hello world", instructions="be brief", metadata={"a": "b"})
    assert found.id.startswith("resp_")
    assert found.object == "response"
    assert found.model == NAME
    assert found.output_text == said(
        server, [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello world"}]
    )
    [item] = found.output
    assert (item.type, item.role, item.content[0].type) == ("message", "assistant", "output_text")
    assert (found.error, found.instructions, found.metadata) == (None, "be brief", {"a": "b"})
    assert found.usage.total_tokens == found.usage.input_tokens + found.usage.output_tokens
    assert found.usage.output_tokens_details.reasoning_tokens == 0
    if found.status == "incomplete":
        assert found.incomplete_details.reason == "max_output_tokens"
        assert found.usage.output_tokens == 6
    else:
        assert found.status == "completed"


def test_pictures_and_sounds_in_any_order(server: Any, client: openai.OpenAI, files: str, parts: Any) -> None:
    content = [
        {"type": "input_text", "text": "what is this?"},
        picture_part(parts, 3),
        sound_part(parts, 4),
        {"type": "input_image", "image_url": f"{files}/picture.png", "detail": "high"},
        {"type": "video_url", "video_url": {"url": parts.data_url(parts.film(1), "video/mp4")}},
    ]
    found = create(client, [{"role": "user", "content": content}])
    assert found.output_text == said(
        server,
        [
            {
                "role": "user",
                "content": [
                    parts.text("what is this?"),
                    parts.image(3),
                    parts.input_audio(4),
                    {"type": "image_url", "image_url": {"url": f"{files}/picture.png", "detail": "high"}},
                    parts.video(1),
                ],
            }
        ],
    )
    details = found.usage.input_tokens_details.model_dump()
    assert min(details["image_tokens"], details["audio_tokens"], details["video_tokens"]) > 0


def test_a_stream_has_openais_events(client: openai.OpenAI, parts: Any) -> None:
    value = [{"role": "user", "content": [picture_part(parts, 3), {"type": "input_text", "text": "what?"}]}]
    whole = create(client, value, top_logprobs=2)
    events = list(create(client, value, stream=True, top_logprobs=2, stream_options={"include_obfuscation": True}))
    kinds = [event.type.removeprefix("response.") for event in events]
    assert kinds[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert kinds[-4:] == ["output_text.done", "content_part.done", "output_item.done", whole.status]
    assert set(kinds[4:-4]) == {"output_text.delta"}
    assert [event.sequence_number for event in events] == list(range(len(events)))
    deltas = events[4:-4]
    assert "".join(event.delta for event in deltas) == events[-4].text == whole.output_text
    assert [item.token for event in deltas for item in event.logprobs] == [
        item.token for item in whole.output[0].content[0].logprobs
    ]
    assert all(len(item.top_logprobs) == 2 for item in whole.output[0].content[0].logprobs)
    assert all(event.obfuscation for event in deltas)
    last = events[-1].response
    assert last.usage.output_tokens == whole.usage.output_tokens
    assert last.output_text == whole.output_text
    assert len({event.response.id for event in (events[0], events[1], events[-1])}) == 1


def test_the_stream_helper_and_the_async_client(server: Any, client: openai.OpenAI) -> None:
    arguments = {"model": NAME, "input": "hello", "max_output_tokens": 4, "temperature": 0}
    text = create(client, "hello", max_output_tokens=4).output_text
    with client.responses.stream(**arguments) as stream:
        events = list(stream)
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == text
    assert events[-2].item.content[0].text == text

    async def run() -> str:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as made:
            found = await made.responses.create(**arguments)
            return found.output_text

    assert asyncio.run(run()) == text


class Colour(BaseModel):
    name: Literal["red", "green"]
    strength: Literal[1, 2, 3]


def test_an_answer_of_a_given_form(client: openai.OpenAI) -> None:
    found = client.responses.parse(
        model=NAME, input="a colour", text_format=Colour, max_output_tokens=400, temperature=0, extra_body={"seed": 1}
    )
    assert found.status == "completed", found.output_text
    assert isinstance(found.output_parsed, Colour)
    bias = {"regex": r'\{"a": [0-9]\}'}
    assert json.loads(create(client, "a", max_output_tokens=100, extra_body=bias).output_text).keys() == {"a"}


def test_a_conversation_goes_on(server: Any, client: openai.OpenAI, parts: Any) -> None:
    first = create(client, [{"role": "user", "content": [picture_part(parts, 3)]}], instructions="look")
    second = create(client, "and now?", previous_response_id=first.id)
    assert second.previous_response_id == first.id
    # instructions are not carried over
    assert second.output_text == said(
        server,
        [
            {"role": "user", "content": [parts.image(3)]},
            {"role": "assistant", "content": first.output_text},
            {"role": "user", "content": "and now?"},
        ],
    )
    again = create(
        client,
        [
            {"role": "user", "content": [picture_part(parts, 3)]},
            *[item.model_dump() for item in first.output],
            {"role": "user", "content": "and now?"},
        ],
    )
    assert again.output_text == second.output_text
    streamed = list(create(client, "and now?", previous_response_id=first.id, stream=True))[-1].response
    assert client.responses.retrieve(streamed.id).output_text == second.output_text


def test_stored_responses_are_found_and_forgotten(server: Any, client: openai.OpenAI) -> None:
    made = create(client, [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}])
    assert client.responses.retrieve(made.id).model_dump() == made.model_dump()
    assert [item.content for item in client.responses.input_items.list(made.id)] == ["b", "a"]
    page = client.responses.input_items.list(made.id, order="asc", limit=1)
    assert [item.content for item in page.data] == ["a"]
    assert [item.content for item in page] == ["a", "b"]
    client.responses.delete(made.id)
    gone = create(client, "x", store=False)
    for name in (made.id, gone.id, "resp_none"):
        with pytest.raises(openai.NotFoundError, match="there is no response"):
            client.responses.retrieve(name)
    with pytest.raises(openai.NotFoundError):
        client.responses.delete(made.id)
    with pytest.raises(openai.BadRequestError) as caught:
        create(client, "x", previous_response_id=made.id)
    assert caught.value.param == "previous_response_id"
    for query in ("limit=0", "order=up", "after=none"):
        found = create(client, "x")
        answer = httpx.get(f"{server.url}/v1/responses/{found.id}/input_items?{query}", trust_env=False)
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == query.partition("=")[0]


@pytest.mark.parametrize("stream", [False, True])
def test_errors_name_the_item(client: openai.OpenAI, server: Any, stream: bool) -> None:
    bad = {"type": "input_image", "image_url": "data:image/png;base64,aGVsbG8=", "detail": "auto"}
    cases: list[tuple[dict[str, Any], str]] = [
        ({"input": [{"role": "user", "content": [{"type": "input_text", "text": "a"}, bad]}]}, "input[0].content[1]"),
        ({"input": "a", "instructions": "x", "max_output_tokens": 100_000}, "max_output_tokens"),
        ({"input": "word " * 3000}, "input"),
        ({"input": "a", "unknown": 1}, "unknown"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_file", "file_id": "x"}]}]},
            "input[0].content[0].type",
        ),
    ]
    for change, param in cases:
        answer = httpx.post(
            f"{server.url}/v1/responses", json={"model": NAME, "stream": stream} | change, trust_env=False, timeout=60
        )
        assert answer.status_code == 400, answer.text
        error = answer.json()["error"]
        assert error["param"] == param, error
        assert "messages" not in error["message"]
    with pytest.raises(openai.NotFoundError):
        create(client, "a", model="other")
    assert create(client, "hello").output_text


def test_a_client_that_leaves_a_stream_leaves_nothing_behind(server: Any, client: openai.OpenAI) -> None:
    with create(client, "hello", max_output_tokens=400, stream=True, extra_body={"ignore_eos": True}) as stream:
        next(iter(stream))
    assert server.metric("triptych_http_time_to_first_token_seconds_count") > 0
    until = time.monotonic() + 30
    while server.metric("triptych_http_requests_running") and time.monotonic() < until:
        time.sleep(0.05)
    assert server.metric("triptych_http_requests_running") == 0


def test_what_a_stored_response_holds_counts_until_it_ends(server: Any, client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {"max_output_tokens": 400, "stream": True, "extra_body": {"ignore_eos": True}}
    for store in (False, True):
        with create(client, "hello", store=store, **fields) as stream:
            next(iter(stream))
            held = server.metric("triptych_http_inflight_bytes")
        assert (held > 0) == store
    until = time.monotonic() + 30
    while server.metric("triptych_http_inflight_bytes") and time.monotonic() < until:
        time.sleep(0.05)
    assert server.metric("triptych_http_inflight_bytes") == 0
