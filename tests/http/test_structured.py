"""Several choices and structured output, on the built-in model through the whole path."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest

from triptych.client.sdk import Client
from triptych.python_models.contract.errors import TriptychError

SCHEMA = {
    "type": "object",
    "properties": {
        "colour": {"enum": ["red", "green", "blue"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
        "tags": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3},
    },
    "required": ["colour", "count", "tags"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA, "strict": True}}


@pytest.fixture(scope="module")
def server(start: Callable[..., Any]) -> Iterator[Any]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with start("builtin", "--device=cpu", "--port=0", f"--grpc-port={port}") as served:
        served.url = served.wait_for("ready: ").split()[1]
        served.grpc_port = port
        yield served


@pytest.fixture
def client(server: Any) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120) as made:
        yield made


def ask(client: openai.OpenAI, **change: Any) -> Any:
    body: dict[str, Any] = {"messages": [{"role": "user", "content": "What is 2 plus 3?"}], "max_tokens": 100}
    return client.chat.completions.create(model="default", **(body | change))


def streamed(client: openai.OpenAI, n: int, **change: Any) -> tuple[list[str], list[str], Any]:
    """(texts, finish reasons, usage) of a streamed answer's choices."""
    texts, ends, usage = [""] * n, [""] * n, None
    for chunk in ask(client, n=n, stream=True, stream_options={"include_usage": True}, **change):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            assert not ends[choice.index]
            texts[choice.index] += choice.delta.content or ""
            ends[choice.index] = choice.finish_reason or ""
    return texts, ends, usage


def check(text: str) -> None:
    value = json.loads(text)
    assert list(value) == ["colour", "count", "tags"]
    assert value["colour"] in ("red", "green", "blue")
    assert 0 <= value["count"] <= 99
    assert 1 <= len(value["tags"]) <= 3
    assert all(isinstance(item, bool) for item in value["tags"])


@pytest.mark.parametrize("temperature", [0, 1.5])
def test_a_schema_gives_json_that_keeps_to_it(client: openai.OpenAI, temperature: float) -> None:
    answer = ask(client, response_format=FORMAT, temperature=temperature, seed=3)
    assert answer.choices[0].finish_reason == "stop"
    check(answer.choices[0].message.content)
    [text], [end], _ = streamed(client, 1, response_format=FORMAT, temperature=temperature, seed=3)
    assert end == "stop"
    assert text == answer.choices[0].message.content


def test_any_object(client: openai.OpenAI) -> None:
    answer = ask(client, response_format={"type": "json_object"}, temperature=1.0, seed=1, max_tokens=200)
    assert answer.choices[0].message.content.lstrip().startswith("{")
    if answer.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(answer.choices[0].message.content), dict)


def test_regex_and_ebnf(client: openai.OpenAI) -> None:
    for seed in range(3):
        answer = ask(client, extra_body={"regex": "(yes|no), [0-9]{3}"}, temperature=1.0, seed=seed)
        assert re.fullmatch("(yes|no), [0-9]{3}", answer.choices[0].message.content)
        assert answer.choices[0].finish_reason == "stop"
        answer = ask(client, extra_body={"ebnf": 'root ::= ("left" | "right") "!"'}, temperature=1.0, seed=seed)
        assert answer.choices[0].message.content in ("left!", "right!")


def test_choices_with_a_schema_logprobs_and_a_seed(client: openai.OpenAI) -> None:
    options = {"n": 3, "response_format": FORMAT, "temperature": 1.2, "seed": 5, "logprobs": True, "top_logprobs": 2}
    one, two = ask(client, **options), ask(client, **options)
    texts = [choice.message.content for choice in one.choices]
    assert [choice.index for choice in one.choices] == [0, 1, 2]
    assert texts == [choice.message.content for choice in two.choices]
    for choice in one.choices:
        check(choice.message.content)
        assert choice.finish_reason == "stop"
        assert choice.logprobs.content
    assert one.usage.completion_tokens == sum(len(choice.logprobs.content) for choice in one.choices)


def test_choice_zero_is_the_answer_of_one_and_others_differ(client: openai.OpenAI) -> None:
    options = {"temperature": 1.5, "seed": 11, "max_tokens": 24, "extra_body": {"ignore_eos": True}}
    alone = ask(client, **options)
    whole = ask(client, n=2, **options)
    texts = [choice.message.content for choice in whole.choices]
    assert texts[0] == alone.choices[0].message.content
    assert texts[1] != texts[0]
    assert whole.usage.completion_tokens == 48
    assert whole.usage.prompt_tokens == alone.usage.prompt_tokens
    found, ends, usage = streamed(client, 2, **options)
    assert found == texts
    assert ends == ["length", "length"]
    assert usage.completion_tokens == 48


def test_greedy_choices_are_the_same(client: openai.OpenAI) -> None:
    texts = [choice.message.content for choice in ask(client, n=4, temperature=0).choices]
    assert len(texts) == 4
    assert len(set(texts)) == 1


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("change", "param", "words"),
    [
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "objet"}}}},
            "response_format.json_schema.schema",
            "objet",
        ),
        ({"regex": "(a"}, "regex", "parenthesis"),
        ({"ebnf": "root ::= a"}, "ebnf", '"a" is not defined'),
    ],
)
def test_what_cannot_be_compiled_is_a_400(
    server: Any, change: dict[str, Any], param: str, words: str, stream: bool
) -> None:
    body = {"model": "default", "messages": [{"role": "user", "content": "x"}], "stream": stream} | change
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60, trust_env=False)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["code"]) == (400, param, "invalid_request")
    assert words in error["message"]
    assert error["message"].startswith(param)


def test_grammars_beside_free_requests(client: openai.OpenAI) -> None:
    plain = ask(client, temperature=0).choices[0].message.content

    def one(k: int) -> Any:
        pattern = f"[a-f]{{{k % 5 + 1}}}-{k}"
        if k % 3 == 0:
            return ask(client, temperature=0).choices[0].message.content == plain
        if k % 3 == 1:
            text = ask(client, temperature=1.0, extra_body={"regex": pattern}).choices[0].message.content
            return re.fullmatch(pattern, text)
        check(ask(client, temperature=1.0, response_format=FORMAT).choices[0].message.content)
        return True

    with ThreadPoolExecutor(6) as threads:
        assert all(threads.map(one, range(18)))


def test_the_sdk_takes_the_same_fields(server: Any) -> None:
    grammar = {"type": "regex", "value": "[xyz]{4}"}
    with Client(f"127.0.0.1:{server.grpc_port}") as client:
        deltas = list(
            client.stream_chat(
                [{"role": "user", "content": "hello"}],
                n=2,
                temperature=1.0,
                seed=4,
                grammar=grammar,
                speculative_tokens=2,
                priority=5,
                cache_salt="mine",
            )
        )
        texts = ["".join(delta.text for delta in deltas if delta.index == index) for index in range(2)]
        assert all(re.fullmatch("[xyz]{4}", text) for text in texts)
        assert [delta.index for delta in deltas if delta.finish_reason == "stop"] in ([0, 1], [1, 0])
        assert re.fullmatch("[xyz]{4}", client.chat("hello", regex="[xyz]{4}", temperature=0).text)
        with pytest.raises(TriptychError, match="parenthesis") as caught:
            client.chat("x", regex="(a")
    assert caught.value.param == "regex"


def test_another_salt_does_not_share_the_cache(client: openai.OpenAI) -> None:
    def cached(salt: str) -> int:
        question = "What is 7 plus 8? " * 12
        answer = ask(
            client,
            messages=[{"role": "user", "content": question}],
            max_tokens=1,
            extra_body={"cache_salt": salt, "priority": 1},
        )
        return int(answer.usage.prompt_tokens_details.cached_tokens)

    assert cached("a") == 0
    assert cached("a") > 0
    assert cached("b") == 0
