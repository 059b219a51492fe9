"""The openai package's own helpers on chat completions, and what its streams hold, against the running server."""

from __future__ import annotations

import asyncio
import json
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel

NAME = "tiny-omni"
HELLO: list[Any] = [{"role": "user", "content": "hello"}]


class Colour(BaseModel):
    name: Literal["red", "green"]
    strength: Literal[1, 2, 3]


def test_parse_gives_an_object(server: Any, client: openai.OpenAI, parts: Any) -> None:
    content = [parts.image(3), parts.text("which colour?")]
    arguments: dict[str, Any] = {
        "model": NAME,
        "messages": [{"role": "user", "content": content}],
        "response_format": Colour,
        "max_completion_tokens": 300,
        "temperature": 0,
    }
    found = client.chat.completions.parse(**arguments).choices[0].message
    assert isinstance(found.parsed, Colour)
    assert found.refusal is None

    async def run() -> Any:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as made:
            return (await made.chat.completions.parse(**arguments)).choices[0].message.parsed

    assert asyncio.run(run()) == found.parsed


def test_the_stream_helper_builds_the_completion(server: Any, client: openai.OpenAI) -> None:
    # the helper wants answers that end by themselves
    arguments: dict[str, Any] = {
        "model": NAME,
        "messages": HELLO,
        "temperature": 0,
        "logprobs": True,
        "max_tokens": 100,
        "extra_body": {"regex": "[a-z]{12}"},
    }
    whole = client.chat.completions.create(**arguments)
    with client.chat.completions.stream(stream_options={"include_usage": True}, **arguments) as stream:
        kinds = [event.type for event in stream]
        built = stream.get_final_completion()
    assert kinds.count("content.delta") > 0
    assert kinds.count("content.done") == 1
    assert built.choices[0].message.content == whole.choices[0].message.content
    assert built.choices[0].finish_reason == whole.choices[0].finish_reason
    assert built.choices[0].logprobs is not None
    assert built.choices[0].logprobs.model_dump() == whole.choices[0].logprobs.model_dump()
    assert built.usage is not None
    assert built.usage.completion_tokens == whole.usage.completion_tokens

    async def run() -> str:
        async with (
            openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as made,
            made.chat.completions.stream(**arguments) as found,
        ):
            return (await found.get_final_completion()).choices[0].message.content or ""

    assert asyncio.run(run()) == whole.choices[0].message.content


def test_a_stream_of_several_choices_is_in_openais_order(server: Any) -> None:
    answer = server.ask(
        n=2,
        stream=True,
        stream_options={"include_usage": True, "include_obfuscation": True},
        service_tier="auto",
        max_tokens=4,
        temperature=1,
        seed=3,
    )
    events = answer.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
    assert all(chunk["service_tier"] == "default" for chunk in chunks)
    assert all((len(event) + 2) % 64 == 0 for event in events[:-2] if event.isascii())
    *told, last = chunks
    assert all(chunk["usage"] is None for chunk in told)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 8 or any(
        choice["finish_reason"] == "stop" for chunk in told for choice in chunk["choices"]
    )
    for index in range(2):
        own = [choice for chunk in told for choice in chunk["choices"] if choice["index"] == index]
        assert own[0]["delta"] == {"role": "assistant", "content": "", "refusal": None}
        assert all(choice["finish_reason"] is None for choice in own[:-1])
        assert (own[-1]["delta"], own[-1]["finish_reason"] in ("stop", "length")) == ({}, True)
        assert "matched_stop" in own[-1]
        assert all("role" not in choice["delta"] for choice in own[1:])


def test_roles_and_names(client: openai.OpenAI) -> None:
    def tokens(*messages: Any) -> int:
        found = client.chat.completions.create(model=NAME, messages=list(messages), max_tokens=1)
        assert found.usage is not None
        return found.usage.prompt_tokens

    brief = {"role": "developer", "content": "be brief"}
    assert tokens(brief, *HELLO) == tokens(brief | {"role": "system"}, *HELLO)
    assert tokens(brief, *HELLO) > tokens(*HELLO)
    refused = {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]}
    assert tokens(*HELLO, refused, *HELLO) == tokens(*HELLO, {"role": "assistant", "content": "no"}, *HELLO)


@pytest.mark.parametrize("field", ["prediction", "moderation", "web_search_options"])
def test_a_refusal_reaches_the_client_by_name(client: openai.OpenAI, field: str) -> None:
    values: dict[str, Any] = {
        "prediction": {"type": "content", "content": "a"},
        "moderation": {"model": "x"},
        "web_search_options": {},
    }
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=NAME, messages=HELLO, extra_body={field: values[field]})
    assert (caught.value.param, caught.value.code) == (field, "unsupported")
