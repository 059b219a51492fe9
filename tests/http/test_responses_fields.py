"""Bodies of the Responses API as chat completions, its events and its store. No server."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from triptych.client.openai_api.answers import Answers
from triptych.client.openai_api.errors import answer_to
from triptych.client.openai_api.responses.answer import Answer
from triptych.client.openai_api.responses.request import _OWN, REFUSED, SAME, ResponseCall, parse
from triptych.client.openai_api.responses.store import Store
from triptych.python_models.contract.answer import Syntax
from triptych.python_models.contract.delta import Delta, TokenLogprob, Usage
from triptych.python_models.contract.errors import ErrorKind, TriptychError, invalid
from triptych.python_models.contract.request import ChatRequest, MediaPart, Message, TextPart
from triptych.python_models.contract.sampling import Grammar

LOGPROB = TokenLogprob(5, "ä", -0.5, None, ((5, "ä", -0.5, (195, 164)),))


def call(kept: Store | None = None, /, **change: Any) -> ResponseCall:
    body = {"model": "m", "input": "hi"} | change
    return parse(json.dumps(body).encode(), "m", 10.0, Store(10_000) if kept is None else kept)


def user(*parts: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(parts)}]


def events(data: bytes) -> list[dict[str, Any]]:
    found = []
    for piece in data.split(b"\n\n")[:-1]:
        kind, line = piece.split(b"\n")
        event = json.loads(line.removeprefix(b"data: "))
        assert kind == b"event: " + event["type"].encode()
        found.append(event)
    return found


def test_a_string_is_a_message_of_the_user() -> None:
    found = call(instructions="be brief").chat.request
    assert found.messages == (
        Message("system", (TextPart("be brief"),), plain=True),
        Message("user", (TextPart("hi"),), plain=True),
    )
    assert not found.stream
    assert found.lease_s == 10


def test_items_become_messages_and_media_blobs() -> None:
    found = call(
        input=[
            {"role": "developer", "content": "look", "type": "message"},
            *user(
                {"type": "input_image", "image_url": "data:image/png;base64,b25l", "detail": "low"},
                {"type": "input_text", "text": "a"},
                {"type": "input_audio", "input_audio": {"data": "dHdv", "format": "wav"}},
            ),
            {
                "type": "message",
                "id": "msg_1",
                "status": "completed",
                "role": "assistant",
                "content": [{"type": "output_text", "text": "b", "annotations": [], "logprobs": []}],
            },
            *user(
                {"type": "video_url", "video_url": {"url": "https://a.b/c.mp4", "fps": 1}},
                {"type": "input_image", "image_url": "https://a.b/c.png"},
            ),
        ]
    ).chat
    assert found.media == (b"one", b"two")
    assert [message.role for message in found.request.messages] == ["developer", "user", "assistant", "user"]
    kinds = [(part.modality, part.blob, part.url) for _, part in found.request.media()]
    assert kinds == [
        ("image", 0, None),
        ("audio", 1, None),
        ("video", None, "https://a.b/c.mp4"),
        ("image", None, "https://a.b/c.png"),
    ]
    picture = found.request.messages[1].parts[0]
    assert isinstance(picture, MediaPart)
    assert picture.options.detail == "low"


def test_sampling_and_form_arrive() -> None:
    found = call(
        max_output_tokens=5,
        temperature=0,
        top_p=0.5,
        top_logprobs=2,
        text={"format": {"type": "json_schema", "name": "x", "schema": {"type": "array"}, "strict": True}},
        seed=3,
        stop=["x"],
        top_k=4,
        priority=2,
    )
    sampling = found.chat.request.sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p) == (5, 0, 0.5)
    assert (sampling.logprobs, sampling.top_logprobs, sampling.seed, sampling.stop) == (True, 2, 3, ("x",))
    assert sampling.grammar == Grammar("json_schema", '{"type":"array"}')
    assert (sampling.top_k, found.chat.request.priority) == (4, 2)
    assert found.echo["text"]["format"]["name"] == "x"
    assert found.echo["max_output_tokens"] == 5
    assert call(include=["message.output_text.logprobs"]).chat.request.sampling.logprobs
    assert call(text={"format": {"type": "json_object"}}).chat.request.sampling.grammar == Grammar("json_object")


@pytest.mark.parametrize(
    "change",
    [
        {"metadata": {"a": "b"}, "user": "u", "service_tier": "auto", "truncation": "disabled", "background": False},
        {"include": ["message.input_image.image_url"], "max_tool_calls": 3, "tools": [], "tool_choice": "auto"},
        {"text": {"format": {"type": "text"}, "verbosity": "medium"}, "reasoning": {"effort": None, "summary": None}},
        {"stream": True, "stream_options": {"include_obfuscation": True}, "prompt_cache_key": "k"},
        {"prompt": None, "conversation": None, "instructions": None, "previous_response_id": None, "store": None},
    ],
)
def test_fields_that_ask_for_nothing_more_are_accepted(change: dict[str, Any]) -> None:
    call(**change)


@pytest.mark.parametrize(
    ("change", "param", "words"),
    [
        ({"input": None}, "input", "string or a list"),
        ({"input": []}, "input", "at least one"),
        ({"input": [3]}, "input[0]", "object"),
        ({"input": [{"type": "computer_call"}]}, "input[0].type", "function_call"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type", "message"),
        ({"input": [{"role": "robot", "content": "x"}]}, "input[0].role", "developer"),
        ({"input": [{"role": "user", "content": "\ud800"}]}, "input[0].content", "surrogate"),
        ({"input": [{"role": "user", "content": "x", "status": "odd"}]}, "input[0].status", "completed"),
        ({"input": [{"role": "user", "content": "x", "colour": 1}]}, "input[0].colour", "unknown"),
        ({"input": user({"type": "smell"})}, "input[0].content[0].type", "input_image"),
        ({"input": user({"type": "input_file", "file_id": "f"})}, "input[0].content[0].type", "input_file"),
        ({"input": user({"type": "input_image", "file_id": "f"})}, "input[0].content[0].file_id", "image_url"),
        ({"input": user({"type": "input_image"})}, "input[0].content[0].image_url", "string"),
        (
            {"input": user({"type": "input_image", "image_url": "file:///etc/passwd"})},
            "input[0].content[0].image_url",
            "'file'",
        ),
        (
            {"input": user({"type": "input_image", "image_url": "data:,x", "detail": "huge"})},
            "input[0].content[0].detail",
            "auto",
        ),
        (
            {"input": user({"type": "input_audio", "input_audio": {"data": "b25l", "format": "aac"}})},
            "input[0].content[0].input_audio.format",
            "wav",
        ),
        ({"input": "\ud800"}, "input", "input is not valid"),
        ({"instructions": 3}, "instructions", "string"),
        ({"instructions": "\ud800"}, "instructions", "instructions is not valid"),
        ({"max_output_tokens": 0}, "max_output_tokens", "max_output_tokens must be"),
        ({"max_tool_calls": 0}, "max_tool_calls", "1"),
        ({"max_tokens": 5}, "max_tokens", "unknown field"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type", "json_schema"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema", "object"),
        ({"text": {"format": {"type": "text", "x": 1}}}, "text.format.x", "unknown"),
        ({"text": {"verbosity": "low"}}, "text.verbosity", "medium"),
        ({"text": {"colour": "low"}}, "text.colour", "unknown"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "function"),
        ({"tools": [{"type": "function"}]}, "tools[0].name", "string"),
        ({"tool_choice": {"type": "file_search"}}, "tool_choice.type", "function"),
        ({"reasoning": {"summary": "auto"}}, "reasoning.summary", "null"),
        ({"include": ["reasoning.encrypted_content"]}, "include[0]", "logprobs"),
        ({"include": "all"}, "include", "list"),
        ({"truncation": "auto"}, "truncation", "disabled"),
        ({"background": True}, "background", "false"),
        ({"conversation": "c"}, "conversation", "null"),
        ({"prompt": {"id": "p"}}, "prompt", "null"),
        ({"previous_response_id": "resp_1"}, "previous_response_id", "resp_1"),
        ({"stream_options": {"include_obfuscation": True}}, "stream_options", "stream: true"),
        ({"stream": True, "stream_options": {"include_usage": True}}, "stream_options.include_usage", "unknown"),
        ({"n": 2}, "n", "unknown field"),
    ],
)
def test_a_wrong_field_is_refused_by_its_own_name(change: dict[str, Any], param: str, words: str) -> None:
    with pytest.raises(TriptychError) as caught:
        call(**change)
    assert caught.value.param == param
    assert caught.value.kind.status == 400
    assert words in caught.value.message
    assert "messages[" not in caught.value.message


def test_errors_of_the_stages_name_the_items_of_the_body() -> None:
    picture = {"type": "input_image", "image_url": "data:,x"}
    found = call(instructions="x", input=[*user({"type": "input_text", "text": "a"}), *user(picture)])
    error = found.in_its_words(
        TriptychError(ErrorKind.INVALID_MEDIA, "messages[2].content[0]: not an image", "messages[2].content[0]")
    )
    assert (error.param, error.message) == ("input[1].content[0]", "input[1].content[0]: not an image")
    error = found.in_its_words(invalid("sampling.max_tokens is 9 but at most 5 fit", "sampling.max_tokens"))
    assert (error.param, error.message) == ("max_output_tokens", "max_output_tokens is 9 but at most 5 fit")
    assert found.in_its_words(invalid("messages has 9 tokens", "messages")).message == "input has 9 tokens"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)
PART = st.fixed_dictionaries(
    {"type": st.sampled_from(["input_text", "input_image", "input_audio", "output_text", "refusal", "x"])},
    optional={"text": JSON, "image_url": JSON | st.just("data:,a"), "detail": JSON, "input_audio": JSON},
)
ITEM = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "x"]), "content": JSON | st.lists(PART, max_size=2)},
    optional={"type": st.sampled_from(["message", "function_call", "reasoning", "function_call_output"])},
)


@settings(deadline=None, max_examples=200)
@given(
    change=st.dictionaries(st.sampled_from(sorted({*SAME, *_OWN, *REFUSED})), JSON, max_size=3),
    given_input=JSON | st.lists(ITEM, max_size=3),
)
def test_whatever_the_body_holds_it_is_read_or_refused(change: dict[str, Any], given_input: Any) -> None:
    try:
        found = call(**({"input": given_input} | change))
    except TriptychError as error:
        answer = answer_to(error)
    else:
        request = found.chat.request
        assert ChatRequest.from_json(request.to_json().encode(), len(found.chat.media)) == request
        return
    assert answer.status_code in (400, 404, 413)


def writer(**more: Any) -> Answer:
    return Answer("resp-1", 17, "m", {"store": True}, **more)


def test_events_come_in_openais_order() -> None:
    kept: list[dict[str, Any]] = []
    made = writer(keep=kept.append)
    last = Delta("b", (2,), (), "stop", None, Usage(5, 3, 2, 1))
    data = made.first_chunks() + made.chunks(Delta(usage=Usage(5))) + made.chunks(Delta("a", (1,), (LOGPROB,)))
    found = events(data + made.chunks(last) + made.end([last]))
    assert [event["type"].removeprefix("response.") for event in found] == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]
    assert [event["sequence_number"] for event in found] == list(range(10))
    created, _, added, part, first, second, done, part_done, item_done, completed = found
    assert (created["response"]["status"], created["response"]["output"]) == ("in_progress", [])
    assert (added["item"]["status"], added["item"]["content"]) == ("in_progress", [])
    assert part["part"] == {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
    assert (first["delta"], second["delta"], done["text"]) == ("a", "b", "ab")
    assert first["logprobs"][0]["bytes"] == [195, 164]
    assert done["logprobs"] == first["logprobs"] == part_done["part"]["logprobs"]
    assert item_done["item"]["status"] == "completed"
    response = completed["response"]
    assert response["output"] == [item_done["item"]]
    assert response["usage"]["input_tokens_details"]["cached_tokens"] == 3
    assert (response["usage"]["input_tokens"], response["usage"]["output_tokens"]) == (5, 2)
    assert {event["item_id"] for event in found if "item_id" in event} == {added["item"]["id"]}
    assert kept == [response]


def test_an_answer_that_is_cut_off_is_incomplete() -> None:
    made = writer()
    last = Delta("a", (1,), (), "length", None, Usage(5, 0, 1))
    found = events(made.chunks(last) + made.end([last]))
    assert found[-1]["type"] == "response.incomplete"
    assert found[-1]["response"]["incomplete_details"] == {"reason": "max_output_tokens"}
    assert found[-1]["response"]["output"][0]["status"] == "incomplete"


def test_an_answer_that_the_server_was_told_to_end_is_incomplete() -> None:
    made = writer()
    last = Delta(finish_reason="abort")
    found = events(made.chunks(Delta("a", (1,), usage=Usage(5, 0, 1))) + made.chunks(last) + made.end([last]))
    assert found[-1]["type"] == "response.incomplete"
    assert found[-1]["response"]["incomplete_details"] is None
    assert found[-1]["response"]["output"][0]["content"][0]["text"] == "a"


def test_an_empty_answer_is_an_empty_text() -> None:
    whole = writer().whole([Delta("", (1,), (), "stop", 2, Usage(5, 0, 1))])
    assert whole["status"] == "completed"
    assert whole["output"][0]["content"][0]["text"] == ""


def test_a_failure_after_the_beginning_is_an_event() -> None:
    made = writer()
    made.first_chunks()
    [event] = events(made.failed(TriptychError(ErrorKind.STAGE_DEAD, "gone")))
    assert (event["type"], event["sequence_number"]) == ("response.failed", 2)
    assert event["response"]["error"] == {"code": "server_error", "message": "gone"}


def test_obfuscated_events_do_not_tell_the_length_of_their_text() -> None:
    one, other = (events(writer(include_obfuscation=True).chunks(Delta(text, (1,))))[-1] for text in ("a", "a" * 20))
    assert len(json.dumps(one)) == len(json.dumps(other))
    assert one["obfuscation"]


TOOL = {"type": "function", "name": "find", "parameters": {"type": "object", "properties": {"a": {}}}}


def test_reasoning_and_calls_are_items_of_their_own() -> None:
    [given] = call(tools=[TOOL]).chat.request.template.tools
    made = writer(answers=Answers((given,)))
    text = '<think>hm, so</think>yes<tool_call>{"name": "find", "arguments": {"a": [1, "b"]}}</tool_call>'
    data = made.first_chunks() + made.chunks(Delta(usage=Usage(5), syntax=Syntax("hermes", "qwen3")))
    for start in range(0, len(text), 5):
        data += made.chunks(Delta(text[start : start + 5], (1,)))
    last = Delta("", (2,), (), "stop", None, Usage(5, 0, 9, reasoning_tokens=4))
    found = events(data + made.chunks(last) + made.end([last]))
    thoughts, message, function_call = found[-1]["response"]["output"]
    assert thoughts["content"] == [{"type": "reasoning_text", "text": "hm, so"}]
    assert message["content"][0]["text"] == "yes"
    assert (function_call["name"], json.loads(function_call["arguments"])) == ("find", {"a": [1, "b"]})
    assert function_call["call_id"].startswith("call_")
    kinds = [event["type"].removeprefix("response.") for event in found]
    ends = ["reasoning_text.done", "output_text.done", "function_call_arguments.done"]
    assert [kind for kind in kinds if kind in ends] == ends
    assert [event["output_index"] for event in found if event["type"].endswith("output_item.added")] == [0, 1, 2]
    assert [event["item"] for event in found if event["type"].endswith("output_item.done")] == [
        thoughts,
        message,
        function_call,
    ]
    for name, whole in (("reasoning_text", "hm, so"), ("function_call_arguments", function_call["arguments"])):
        assert "".join(e["delta"] for e in found if e["type"] == f"response.{name}.delta") == whole
    assert found[-1]["response"]["usage"]["output_tokens_details"]["reasoning_tokens"] == 4
    # and what they are as messages of the next request
    again = call(
        input=[*found[-1]["response"]["output"], {"type": "function_call_output", "call_id": "c", "output": "4"}]
    )
    answer, result = again.chat.request.messages
    assert (answer.role, answer.reasoning, answer.parts[0].text) == ("assistant", "hm, so", "yes")  # type: ignore[union-attr]
    assert [(made.name, made.arguments) for made in answer.tool_calls] == [("find", function_call["arguments"])]
    assert (result.role, result.tool_call_id) == ("tool", "c")


def response(name: str, text: str = "x") -> dict[str, Any]:
    content = [{"type": "output_text", "text": text, "annotations": [], "logprobs": []}]
    item = {"id": "msg", "type": "message", "status": "completed", "role": "assistant", "content": content}
    return {"id": name, "output": [item]}


def question(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def test_a_conversation_goes_on_from_a_stored_response() -> None:
    store = Store(10_000)
    assert store.put(response("one"), question("q1"), None, 10)
    assert store.put(response("two"), question("q2"), store.get("one"), 10)
    found = call(store, previous_response_id="two", instructions="new")
    said = [(m.role, m.parts[0].text) for m in found.chat.request.messages if isinstance(m.parts[0], TextPart)]
    assert said == [
        ("system", "new"),
        ("user", "q1"),
        ("assistant", "x"),
        ("user", "q2"),
        ("assistant", "x"),
        ("user", "hi"),
    ]
    two = store.get("two")
    assert found.before is two
    assert two is not None
    assert list(two.input_items) == question("q2")


def test_the_store_keeps_what_was_used_last_within_its_limit() -> None:
    store = Store(8_000)
    for name in ("a", "b", "c"):
        assert store.put(response(name), question("q"), None, 10)
    store.get("a")
    assert store.put(response("d"), question("q"), None, 10)
    assert [name for name in "abcd" if store.get(name)] == ["a", "c", "d"]
    assert store.bytes <= 8_000
    assert not store.put(response("e"), question("q"), None, 9_000)
    assert len(store) == 3
    # with what it continues it would be too large
    assert not store.put(response("f"), question("q"), store.get("a"), 5_000)
    assert (store.bytes, len(store)) == (0, 0)


def test_a_turn_lives_as_long_as_one_that_continues_it() -> None:
    store = Store(100_000)
    store.put(response("one"), question("q1"), None, 10)
    alone = store.bytes
    store.put(response("two"), question("q2"), store.get("one"), 10)
    assert store.delete("one")
    assert not store.delete("one")
    two = store.get("two")
    assert two is not None
    assert len(two.conversation()) == 4
    assert store.bytes == 2 * alone
    store.delete("two")
    assert store.bytes == 0


def test_a_response_may_be_forgotten_while_one_that_continues_it_is_made() -> None:
    store = Store(100_000)
    store.put(response("one"), question("q1"), None, 10)
    alone, one = store.bytes, store.get("one")
    store.delete("one")
    assert store.bytes == 0
    for name in ("two", "three"):
        store.put(response(name), question("q2"), one, 10)
    assert store.bytes == 3 * alone + 2
    store.delete("two")
    assert store.bytes == 2 * alone + 2
    three = store.get("three")
    assert three is not None
    assert len(three.conversation()) == 4
    store.delete("three")
    assert store.bytes == 0


def test_without_a_store_nothing_is_kept() -> None:
    assert not call(Store(0)).store
    with pytest.raises(TriptychError, match="store"):
        call(Store(0), store=True)
    assert call().store
    assert not call(store=False).store
