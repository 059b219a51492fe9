"""Request bodies: what they become, and how a wrong one is refused. No server."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from triptych.client.openai_api.errors import answer_to, in_openai_words
from triptych.client.openai_api.fields import _OWN, _SAMPLING, NEUTRAL, ChatCall, parse
from triptych.python_models.contract.errors import TriptychError, invalid
from triptych.python_models.contract.request import ChatRequest, MediaOptions, MediaPart, TextPart
from triptych.python_models.contract.sampling import Grammar

BODY: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


def body(**change: Any) -> bytes:
    return json.dumps(BODY | change).encode()


def user(*parts: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(parts)}]


def image(url: Any, **more: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url, **more}}


def json_schema(schema: Any, **more: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, **more}}


def function(name: str, **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **more}}


def call(**change: Any) -> ChatCall:
    return parse(body(**change), "m", 10.0)


def test_sampling_fields_arrive() -> None:
    found = call(
        max_tokens=5,
        temperature=0,
        top_p=0.5,
        top_k=3,
        min_p=0.1,
        seed=7,
        stop="x",
        stop_token_ids=[4],
        logprobs=True,
        top_logprobs=2,
        logit_bias={"9": -5},
        presence_penalty=1,
        frequency_penalty=-1,
        repetition_penalty=1.1,
        min_tokens=1,
        ignore_eos=True,
        skip_special_tokens=False,
        no_repeat_ngram_size=30,
        no_repeat_ngram_window_size=90,
        no_repeat_ngram_allowed_ids=[128821, 128822],
    ).request.sampling
    assert (found.max_tokens, found.temperature, found.top_p, found.top_k, found.min_p) == (5, 0, 0.5, 3, 0.1)
    assert (found.seed, found.stop, found.stop_token_ids, found.logit_bias) == (7, ("x",), (4,), {9: -5.0})
    assert (found.logprobs, found.top_logprobs, found.min_tokens, found.ignore_eos) == (True, 2, 1, True)
    assert (found.presence_penalty, found.frequency_penalty, found.repetition_penalty) == (1, -1, 1.1)
    assert not found.skip_special_tokens
    assert (found.no_repeat_ngram_size, found.no_repeat_ngram_window_size) == (30, 90)
    assert found.no_repeat_ngram_allowed_ids == (128821, 128822)


def test_defaults_are_those_of_openai() -> None:
    found = call()
    assert found.request.sampling.temperature == 1
    assert found.request.sampling.max_tokens is None
    assert not found.request.stream
    assert found.request.lease_s == 10
    assert found.request.messages[0].plain


def test_the_newer_token_limit_wins() -> None:
    found = call(max_tokens=5, max_completion_tokens=6)
    assert found.request.sampling.max_tokens == 6
    assert found.names == {"max_tokens": "max_completion_tokens"}


@pytest.mark.parametrize(
    ("change", "grammar"),
    [
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, Grammar("json_object")),
        (
            {"response_format": json_schema({"type": "array"}, strict=True, description="d")},
            Grammar("json_schema", '{"type":"array"}'),
        ),
        ({"regex": "a|b", "ebnf": None, "response_format": {"type": "text"}}, Grammar("regex", "a|b")),
        ({"ebnf": 'root ::= "a"'}, Grammar("ebnf", 'root ::= "a"')),
    ],
)
def test_what_the_text_must_look_like(change: dict[str, Any], grammar: Grammar | None) -> None:
    assert call(**change).request.sampling.grammar == grammar


def test_errors_of_the_engine_name_the_field_of_the_body() -> None:
    error = invalid("grammar: the json_schema cannot be compiled: no grammar", "grammar")
    found = in_openai_words(error, call(response_format=json_schema({})).names)
    assert found.param == "response_format.json_schema.schema"
    assert found.message == "response_format.json_schema.schema: the json_schema cannot be compiled: no grammar"


def test_choices_priority_and_salt_arrive() -> None:
    request = call(n=3, speculative_tokens=4, priority=-2, cache_salt="ü").request
    assert (request.sampling.n, request.sampling.speculative_tokens) == (3, 4)
    assert (request.priority, request.cache_salt) == (-2, "ü")
    assert call(priority=None, cache_salt=None, n=None).request.priority == 0


def test_media_become_blobs_in_order() -> None:
    encoded = base64.b64encode(b"three").decode()
    found = call(
        messages=[
            {"role": "user", "content": [image("data:image/png;base64,b25l"), {"type": "text", "text": "a"}]},
            {"role": "assistant", "content": "b", "refusal": None, "tool_calls": None},
            {
                "role": "user",
                "content": [
                    {"type": "video_url", "video_url": {"url": "HTTPS://example.com/v.mp4"}},
                    {"type": "audio_url", "audio_url": {"url": "data:audio/x-any,tw%6F"}},
                    {"type": "input_audio", "input_audio": {"data": encoded, "format": "mp3"}},
                    image("data:;base64,Zm91\nci4%3d"),
                ],
            },
        ]
    )
    assert found.media == (b"one", b"two", b"three", b"four.")
    assert [part for _, part in found.request.media()] == [
        MediaPart("image", blob=0),
        MediaPart("video", url="HTTPS://example.com/v.mp4"),
        MediaPart("audio", blob=1),
        MediaPart("audio", blob=2),
        MediaPart("image", blob=3),
    ]
    assert found.request.messages[0].parts[1] == TextPart("a")


def test_options_of_media() -> None:
    clip = {"type": "video_url", "video_url": {"url": "https://example.com/v.mp4", "fps": 0.5, "max_frames": 8}}
    found = call(messages=user(image("data:image/png;base64,b25l", detail="low", max_pixels=4096), clip)).request
    assert [part.options for part in found.messages[0].parts if isinstance(part, MediaPart)] == [
        MediaOptions(detail="low", max_pixels=4096),
        MediaOptions(fps=0.5, max_frames=8),
    ]


def test_tools_and_variables_of_the_template() -> None:
    tools = [function("find", description="d", parameters={"type": "object"}, strict=True)]
    variables = {"enable_thinking": False, "budget": 3}
    found = call(tools=tools, tool_choice="auto", chat_template_kwargs=variables).request
    assert list(found.template.tools) == tools
    assert found.template.variables == variables
    assert ChatRequest.from_json(found.to_json(), 0) == found
    assert call(tools=tools, tool_choice="none").request.template.tools == ()


@pytest.mark.parametrize(
    "change",
    [
        {"n": 1, "user": "u", "metadata": {"a": "b"}, "store": False, "service_tier": "auto", "tools": []},
        {"tool_choice": "none", "response_format": {"type": "text"}, "parallel_tool_calls": True, "seed": None},
        {"modalities": ["text"], "reasoning_effort": None, "stop": None, "temperature": None, "max_tokens": None},
        {"stream": True, "stream_options": {"include_usage": True, "include_obfuscation": False}},
        {"stream": True, "stream_options": None},
        {"messages": [{"role": "developer", "content": "x", "name": "n"}]},
        {"messages": user(image("data:image/png;base64,b25l", detail="high"))},
        {"model": "default"},
    ],
)
def test_fields_that_ask_for_nothing_more_are_accepted(change: dict[str, Any]) -> None:
    call(**change)


@pytest.mark.parametrize(
    ("change", "param", "status", "words"),
    [
        ({"model": None}, "model", 400, "missing"),
        ({"model": 3}, "model", 400, "string"),
        ({"model": "other"}, "model", 404, "'m'"),
        ({"messages": None}, "messages", 400, "list"),
        ({"messages": []}, "messages", 400, "at least one"),
        ({"messages": ["x"]}, "messages[0]", 400, "object"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role", 400, "system, developer, user"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", 400, "string or a list"),
        ({"messages": [{"role": "user", "content": []}]}, "messages[0].content", 400, "at least one"),
        ({"messages": [{"role": "user", "content": "x", "colour": 1}]}, "messages[0].colour", 400, "unknown"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages[0].content", 400, "surrogate"),
        (
            {"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}]},
            "messages[0].tool_calls[0].function",
            400,
            "object",
        ),
        ({"messages": user({"type": "smell"})}, "messages[0].content[0].type", 400, "input_audio"),
        ({"messages": user({"type": "text", "text": 3})}, "messages[0].content[0].text", 400, "string"),
        (
            {"messages": user({"type": "image_url", "image_url": "http://a/b"})},
            "messages[0].content[0].image_url",
            400,
            "object",
        ),
        ({"messages": user(image("data:image/png;base64,@@@"))}, "messages[0].content[0].image_url.url", 400, "base64"),
        ({"messages": user(image("data:image/png;base64,abc"))}, "messages[0].content[0].image_url.url", 400, "base64"),
        ({"messages": user(image("data:image/png;base64"))}, "messages[0].content[0].image_url.url", 400, "comma"),
        ({"messages": user(image("data:image/png;base64,"))}, "messages[0].content[0].image_url.url", 400, "empty"),
        ({"messages": user(image("file:///etc/passwd"))}, "messages[0].content[0].image_url.url", 400, "'file'"),
        ({"messages": user(image("/etc/passwd"))}, "messages[0].content[0].image_url.url", 400, "no files by path"),
        ({"messages": user(image(None))}, "messages[0].content[0].image_url.url", 400, "string"),
        ({"messages": user(image("data:,x", detail="huge"))}, "messages[0].content[0].image_url.detail", 400, "auto"),
        (
            {"messages": user({"type": "input_audio", "input_audio": {"data": "b25l", "format": "aac"}})},
            "messages[0].content[0].input_audio.format",
            400,
            "wav, mp3, flac, ogg",
        ),
        (
            {"messages": user({"type": "input_audio", "input_audio": {"data": "%", "format": "wav"}})},
            "messages[0].content[0].input_audio.data",
            400,
            "base64",
        ),
        ({"temperature": 3}, "temperature", 400, "between 0 and 2"),
        ({"temperature": "hot"}, "temperature", 400, "number"),
        ({"temperature": 10**400}, "temperature", 400, "between 0 and 2"),
        ({"top_p": 0}, "top_p", 400, "greater than 0"),
        ({"max_tokens": 0}, "max_tokens", 400, "between 1 and 2147483647"),
        ({"max_completion_tokens": -1}, "max_completion_tokens", 400, "between 1"),
        ({"seed": 2**64}, "seed", 400, "between"),
        ({"stop": ["a"] * 17}, "stop", 400, "16"),
        ({"stop": "\udfff"}, "stop", 400, "surrogate"),
        ({"top_logprobs": 2}, "top_logprobs", 400, "logprobs: true"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", 400, "20"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5", 400, "100"),
        ({"stream": "yes"}, "stream", 400, "true or false"),
        ({"stream_options": {"include_usage": True}}, "stream_options", 400, "stream: true"),
        ({"stream": True, "stream_options": {"usage": True}}, "stream_options.usage", 400, "unknown"),
        ({"n": 129}, "n", 400, "between 1 and 128"),
        ({"n": True}, "n", 400, "integer"),
        ({"speculative_tokens": 17}, "speculative_tokens", 400, "between 0 and 16"),
        ({"priority": 1.5}, "priority", 400, "integer"),
        ({"cache_salt": 1}, "cache_salt", 400, "string"),
        ({"cache_salt": "\ud800"}, "cache_salt", 400, "surrogate"),
        ({"regex": 1}, "regex", 400, "string"),
        ({"regex": ""}, "regex", 400, "regex must not be empty"),
        ({"regex": "\udfff"}, "regex", 400, "surrogate"),
        ({"ebnf": "x" * 200_000}, "ebnf", 413, "131072"),
        ({"regex": "a", "ebnf": "b"}, "ebnf", 400, "only one of regex, ebnf"),
        ({"response_format": {"type": "json_object"}, "regex": "a"}, "regex", 400, "only one of"),
        ({"grammar": {"type": "json_object"}}, "grammar", 400, "unknown field"),
        (
            {"messages": user(image("data:image/png;base64,b25l", max_pixels=-1))},
            "messages[0].content[0].image_url.max_pixels",
            400,
            "1",
        ),
        (
            {"messages": user({"type": "video_url", "video_url": {"url": "https://a.b/c", "fps": "x"}})},
            "messages[0].content[0].video_url.fps",
            400,
            "number",
        ),
        ({"tools": {}}, "tools", 400, "list"),
        ({"tools": [{"type": "function"}]}, "tools[0].function", 400, "object"),
        ({"tools": [{"type": "web"}]}, "tools[0].type", 400, "function"),
        ({"tools": [function("a b")]}, "tools[0].function.name", 400, "letters"),
        ({"tools": [function("a", parameters=[])]}, "tools[0].function.parameters", 400, "object"),
        ({"tools": [function("a", colour=1)]}, "tools[0].function.colour", 400, "unknown"),
        ({"tools": [function("a")] * 129}, "tools", 400, "at most 128"),
        ({"tools": [function("a", description="\ud800")]}, "tools", 400, "surrogate"),
        ({"chat_template_kwargs": [1]}, "chat_template_kwargs", 400, "object"),
        ({"chat_template_kwargs": {"a": "\ud800"}}, "chat_template_kwargs", 400, "surrogate"),
        ({"tool_choice": "required"}, "tool_choice", 400, "no tools"),
        ({"tool_choice": "any"}, "tool_choice", 400, "auto, none, required"),
        ({"tool_choice": {"type": "web"}}, "tool_choice", 400, "auto, none, required"),
        ({"tool_choice": {"type": "function"}}, "tool_choice.function", 400, "object"),
        (
            {"tools": [function("a")], "tool_choice": {"type": "function", "function": {"name": "b"}}},
            "tool_choice.function.name",
            400,
            "one of tools (a)",
        ),
        ({"parallel_tool_calls": "no"}, "parallel_tool_calls", 400, "true or false"),
        ({"reasoning_effort": "huge"}, "reasoning_effort", 400, "none, minimal, low"),
        ({"separate_reasoning": 1}, "separate_reasoning", 400, "true or false"),
        ({"stream_reasoning": 1}, "stream_reasoning", 400, "true or false"),
        (
            {"messages": [{"role": "user", "content": "x", "tool_call_id": "a"}]},
            "messages[0].tool_call_id",
            400,
            "tool",
        ),
        (
            {"messages": [{"role": "user", "content": "x", "reasoning_content": "a"}]},
            "messages[0].reasoning_content",
            400,
            "assistant",
        ),
        ({"messages": [{"role": "assistant", "content": None}]}, "messages[0].content", 400, "string or a list"),
        ({"response_format": "json"}, "response_format", 400, "object"),
        ({"response_format": {"type": "xml"}}, "response_format.type", 400, "json_schema"),
        ({"response_format": {"type": "text", "x": 1}}, "response_format.x", 400, "unknown"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", 400, "object"),
        ({"response_format": json_schema(None)}, "response_format.json_schema.schema", 400, "object"),
        ({"response_format": json_schema({}, strict=3)}, "response_format.json_schema.strict", 400, "true or false"),
        ({"response_format": json_schema({}, colour=3)}, "response_format.json_schema.colour", 400, "unknown"),
        ({"response_format": json_schema({"title": "\ud800"})}, "response_format.json_schema.schema", 400, "surrogate"),
        ({"store": True}, "store", 400, "false"),
        ({"audio": {"voice": "x"}}, "audio", 400, "null"),
        ({"temprature": 1}, "temprature", 400, "did you mean 'temperature'"),
        ({"zzz": 1}, "zzz", 400, "unknown field"),
    ],
)
def test_a_wrong_field_is_refused_by_name(change: dict[str, Any], param: str, status: int, words: str) -> None:
    with pytest.raises(TriptychError) as caught:
        call(**change)
    assert caught.value.param == param
    assert caught.value.kind.status == status
    assert words in caught.value.message


@pytest.mark.parametrize(
    "raw", [b"", b"{", b"[1]", b"null", b'"text"', b"42", b"\xff\xfe\x00", b"[" * 100_000, b"1" * 9999]
)
def test_a_body_that_is_no_object_is_refused(raw: bytes) -> None:
    with pytest.raises(TriptychError, match="JSON") as caught:
        parse(raw, "m", 10.0)
    assert caught.value.kind.status == 400


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)
NAMES = sorted({*_SAMPLING, *NEUTRAL, *_OWN})
PART = st.fixed_dictionaries(
    {"type": st.sampled_from(["text", "image_url", "video_url", "audio_url", "input_audio", "x"])},
    optional={
        "text": JSON,
        "image_url": JSON | st.fixed_dictionaries({"url": JSON | st.just("data:,a")}, optional={"detail": JSON}),
        "video_url": JSON | st.fixed_dictionaries({"url": JSON}),
        "input_audio": JSON | st.fixed_dictionaries({"data": JSON}, optional={"format": JSON}),
    },
)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "x"]), "content": JSON | st.lists(PART, max_size=2)}
    ),
    max_size=2,
)


@settings(deadline=None, max_examples=300)
@given(change=st.dictionaries(st.sampled_from(NAMES), JSON, max_size=3), messages=JSON | MESSAGES)
def test_whatever_the_body_holds_it_is_read_or_refused(change: dict[str, Any], messages: Any) -> None:
    raw = json.dumps(BODY | {"messages": messages} | change).encode()
    try:
        found = parse(raw, "m", 10.0)
    except TriptychError as error:
        answer = answer_to(error)
    else:
        # what goes on to the ensemble is understood there
        assert ChatRequest.from_json(found.request.to_json().encode(), len(found.media)) == found.request
        return
    assert answer.status_code in (400, 404, 413)
    assert json.loads(answer.body)["error"]["message"]


def test_a_field_that_is_no_unicode_is_refused() -> None:
    with pytest.raises(TriptychError) as caught:
        parse(b'{"\\ud800": 1}', "m", 10.0)
    assert b"unknown field" in answer_to(caught.value).body
