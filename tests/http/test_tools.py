"""Calls of tools through the real server: random weights that a grammar makes call as they should."""

from __future__ import annotations

import json
import re
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

MODEL = "tiny-tools"
TEMPLATE = Path(__file__).parents[1] / "families" / "chat_templates" / "qwen3.jinja"
TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": "paint",
            "description": "paints",
            "parameters": {
                "type": "object",
                "properties": {"colour": {"enum": ["red", "green"]}, "times": {"type": "integer", "maximum": 9}},
                "required": ["colour", "times"],
                "additionalProperties": False,
            },
        },
    },
    {"type": "function", "function": {"name": "stop", "description": "stops"}},
]
CALM = {"chat_template_kwargs": {"enable_thinking": False}}


@pytest.fixture(scope="module")
def server(start: Callable[..., Any], checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The tiny checkpoint with a template that takes tools and can reason."""
    folder = tmp_path_factory.mktemp("tools") / "model"
    shutil.copytree(checkpoint, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE.read_text())
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with start(str(folder), "--served-model-name", MODEL, "--port=0", f"--grpc-port={port}") as served:
        served.url = served.wait_for("ready: ").split()[1]
        yield served


def ask(client: openai.OpenAI, **fields: Any) -> Any:
    extra = {"extra_body": CALM} | fields
    messages = [{"role": "user", "content": "paint it"}]
    return client.chat.completions.create(**({"model": MODEL, "messages": messages, "max_tokens": 300} | extra))


def streamed(client: openai.OpenAI, **fields: Any) -> tuple[dict[str, Any], list[Any]]:
    """(the message that the chunks make, the chunks)."""
    chunks = list(ask(client, stream=True, **fields))
    message: dict[str, Any] = {"content": "", "reasoning_content": "", "calls": []}
    for chunk in chunks:
        for choice in chunk.choices:
            message["content"] += choice.delta.content or ""
            message["reasoning_content"] += getattr(choice.delta, "reasoning_content", None) or ""
            message["finish_reason"] = choice.finish_reason
            for piece in choice.delta.tool_calls or []:
                if piece.id is not None:
                    assert piece.index == len(message["calls"])
                    assert (piece.type, piece.function.arguments) == ("function", "")
                    message["calls"].append([piece.id, piece.function.name, ""])
                else:
                    assert piece.index == len(message["calls"]) - 1
                    message["calls"][-1][2] += piece.function.arguments
    return message, chunks


def check_call(name: str, arguments: str) -> None:
    given = json.loads(arguments)
    if name == "paint":
        assert given["colour"] in ("red", "green")
        assert given["times"] <= 9
    else:
        assert (name, given) == ("stop", {})


def test_a_named_function_is_called(client: openai.OpenAI) -> None:
    for name in ("paint", "stop"):
        choice = {"type": "function", "function": {"name": name}}
        answer = ask(client, tools=TOOLS, tool_choice=choice, parallel_tool_calls=False)
        message = answer.choices[0].message
        assert answer.choices[0].finish_reason == "tool_calls"
        assert message.content is None
        (call,) = message.tool_calls
        assert (call.type, call.function.name) == ("function", name)
        assert call.id.startswith("call_")
        check_call(name, call.function.arguments)


def test_a_call_is_required(client: openai.OpenAI) -> None:
    for seed in range(3):
        answer = ask(client, tools=TOOLS, tool_choice="required", seed=seed, parallel_tool_calls=False)
        (call,) = answer.choices[0].message.tool_calls
        check_call(call.function.name, call.function.arguments)
        assert answer.choices[0].finish_reason == "tool_calls"


def test_a_stream_says_the_same(client: openai.OpenAI) -> None:
    fields = {"tools": TOOLS, "tool_choice": "required", "seed": 5, "parallel_tool_calls": False}
    whole = ask(client, **fields).choices[0].message
    found, chunks = streamed(client, **fields)
    assert found["calls"][0][1:] == [whole.tool_calls[0].function.name, whole.tool_calls[0].function.arguments]
    assert (found["content"], found["finish_reason"]) == ("", "tool_calls")
    assert sum(bool(choice.finish_reason) for chunk in chunks for choice in chunk.choices) == 1
    pieces = [p for c in chunks for p in c.choices[0].delta.tool_calls or []]
    assert len(pieces) > 2, "arguments come while they are written"


def test_the_openai_package_joins_the_stream(client: openai.OpenAI) -> None:
    from openai.types.chat import ChatCompletionToolParam

    tools: list[ChatCompletionToolParam] = [
        {"type": "function", "function": {**tool["function"], "strict": True}} for tool in TOOLS[:1]
    ]
    messages: Any = [{"role": "user", "content": "x"}]
    with client.chat.completions.stream(
        model=MODEL,
        messages=messages,
        tools=tools,
        tool_choice="required",
        parallel_tool_calls=False,
        max_tokens=300,
        extra_body=CALM,
    ) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_completion()
    assert "tool_calls.function.arguments.done" in kinds
    (call,) = final.choices[0].message.tool_calls or []
    check_call(call.function.name, call.function.arguments)


def test_several_calls_and_several_choices(client: openai.OpenAI, checkpoint: Path) -> None:
    import transformers

    (line_end,) = transformers.AutoTokenizer.from_pretrained(checkpoint).encode("\n", add_special_tokens=False)
    # what stands between calls is more likely than the answer's end
    fields = {"tools": TOOLS[1:], "tool_choice": "required", "n": 2, "max_tokens": 120}
    answer = ask(client, logit_bias={str(line_end): 100}, **fields)
    for choice in answer.choices:
        made = choice.message.tool_calls
        assert choice.finish_reason == "length"
        assert len(made) > 1
        assert len({call.id for call in made}) == len(made)
        assert {call.function.name for call in made} == {"stop"}
        # max_tokens cut the last one
        assert {call.function.arguments.replace("\n", "") for call in made[:-1]} == {"{}"}


def test_a_call_that_max_tokens_cuts(client: openai.OpenAI) -> None:
    choice = {"type": "function", "function": {"name": "paint"}}
    fields = {"tools": TOOLS, "tool_choice": choice, "seed": 3, "temperature": 0}
    whole = ask(client, parallel_tool_calls=False, **fields)
    answer = ask(client, **fields | {"max_tokens": whole.usage.completion_tokens - 14})
    assert answer.choices[0].finish_reason == "length"
    message = answer.choices[0].message
    written = message.tool_calls[0].function.arguments if message.tool_calls else message.content
    assert written
    assert answer.usage.completion_tokens == whole.usage.completion_tokens - 14


def test_auto_leaves_the_model_its_way(client: openai.OpenAI) -> None:
    plain = ask(client, tools=TOOLS, tool_choice="auto", max_tokens=12, temperature=0).choices[0]
    assert plain.message.tool_calls is None
    assert plain.message.content
    assert plain.finish_reason == "length"
    found, _ = streamed(client, tools=TOOLS, max_tokens=12, temperature=0)
    assert found["content"].strip() == plain.message.content.strip()
    # not told of any, the model reads a shorter prompt
    told = ask(client, tools=TOOLS, max_tokens=1).usage.prompt_tokens
    untold = ask(client, tools=TOOLS, tool_choice="none", max_tokens=1).usage.prompt_tokens
    assert untold == ask(client, max_tokens=1).usage.prompt_tokens < told


def test_logprobs_of_all_tokens(client: openai.OpenAI) -> None:
    choice = {"type": "function", "function": {"name": "stop"}}
    fields = {"tools": TOOLS, "tool_choice": choice, "logprobs": True, "seed": 2, "parallel_tool_calls": False}
    answer = ask(client, **fields)
    tokens = [entry.token for entry in answer.choices[0].logprobs.content]
    assert len(tokens) == answer.usage.completion_tokens
    _, chunks = streamed(client, **fields)
    found = [e.token for c in chunks if c.choices and c.choices[0].logprobs for e in c.choices[0].logprobs.content]
    assert found == tokens


def test_the_conversation_goes_on_with_the_result(client: openai.OpenAI, parts: Any) -> None:
    choice = {"type": "function", "function": {"name": "paint"}}
    content = [parts.text("like this"), parts.image(1)]
    messages: list[Any] = [{"role": "user", "content": content}]
    message = ask(client, messages=messages, tools=TOOLS, tool_choice=choice, parallel_tool_calls=False)
    messages.append(message.choices[0].message)
    call = message.choices[0].message.tool_calls[0]
    messages.append({"role": "tool", "tool_call_id": call.id, "content": "done"})
    before = message.usage.prompt_tokens
    answer = ask(client, messages=messages, tools=TOOLS, max_tokens=4)
    assert answer.usage.prompt_tokens > before + len(call.function.arguments) // 4
    messages[-1] = {"role": "tool", "tool_call_id": call.id, "content": [{"type": "text", "text": "done"}]}
    assert ask(client, messages=messages, tools=TOOLS, max_tokens=4).usage.prompt_tokens == answer.usage.prompt_tokens


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"tool_choice": "required"}, "tool_choice", "no tools"),
        (
            {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "fly"}}},
            "tool_choice.function.name",
            "paint, stop",
        ),
        (
            {
                "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "colour"}}}],
                "tool_choice": "required",
            },
            "tools",
            "colour",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
            "messages[0].tool_calls[0].function.arguments",
            "JSON object",
        ),
        ({"reasoning_effort": "low", "extra_body": CALM}, "reasoning_effort", "one of them"),
    ],
)
def test_a_wrong_field_is_refused_by_name(client: openai.OpenAI, fields: Any, param: str, words: str) -> None:
    with pytest.raises(openai.BadRequestError, match=words) as caught:
        ask(client, **fields)
    assert caught.value.param == param


def test_allowed_tools(client: openai.OpenAI) -> None:
    allowed = {"mode": "required", "tools": [{"type": "function", "function": {"name": "stop"}}]}
    choice = {"type": "allowed_tools", "allowed_tools": allowed}
    answer = ask(client, tools=TOOLS, tool_choice=choice, parallel_tool_calls=False)
    assert [call.function.name for call in answer.choices[0].message.tool_calls] == ["stop"]


def test_reasoning_that_never_ends(client: openai.OpenAI) -> None:
    """Random weights do not close it: all is reasoning, however it is asked for."""
    opened = {"chat_template_kwargs": {"enable_thinking": True}}
    fields: dict[str, Any] = {"max_tokens": 10, "temperature": 0}
    answer = ask(client, **fields, extra_body=opened)
    message = answer.choices[0].message
    assert message.content is None
    assert message.reasoning_content
    assert answer.usage.completion_tokens_details.reasoning_tokens == answer.usage.completion_tokens == 10
    found, chunks = streamed(client, **fields, extra_body=opened, stream_options={"include_usage": True})
    assert found["content"] == ""
    assert found["reasoning_content"] == message.reasoning_content
    assert chunks[-1].usage.completion_tokens_details.reasoning_tokens == 10
    late, chunks = streamed(client, **fields, extra_body=opened | {"stream_reasoning": False})
    assert late["reasoning_content"] == message.reasoning_content
    assert sum(bool(getattr(c.choices[0].delta, "reasoning_content", None)) for c in chunks) == 1
    plain = ask(client, **fields, extra_body=opened | {"separate_reasoning": False}).choices[0].message
    assert plain.content.strip() == message.reasoning_content
    by_effort = ask(client, **fields, reasoning_effort="high", extra_body={}).choices[0].message
    assert by_effort.reasoning_content == message.reasoning_content
    none = ask(client, **fields, reasoning_effort="none", extra_body={})
    assert none.choices[0].message.content
    assert none.usage.completion_tokens_details.reasoning_tokens == 0


def test_a_format_where_reasoning_is_over(client: openai.OpenAI) -> None:
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    body = {"regex": "[ab]{3}", "chat_template_kwargs": {"enable_thinking": False}}
    assert set(ask(client, extra_body=body, max_tokens=20).choices[0].message.content) <= set("ab")
    answer = ask(client, response_format=form, max_tokens=60, extra_body=CALM)
    assert isinstance(json.loads(answer.choices[0].message.content)["ok"], bool)


def test_examples_of_the_documentation(server: Any, capsys: pytest.CaptureFixture[str]) -> None:
    text = (Path(__file__).parents[2] / "docs" / "tools.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        exec(compile(block.replace("http://127.0.0.1:8000", server.url), "docs/tools.md", "exec"), {})
    assert capsys.readouterr().out.startswith("weather {'unit': '")


def test_calls_in_responses(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {
        "model": MODEL,
        "tools": [{"type": "function", **TOOLS[0]["function"]}],
        "tool_choice": {"type": "function", "name": "paint"},
        "parallel_tool_calls": False,
        "max_output_tokens": 300,
        "extra_body": CALM | {"seed": 3},
    }
    found = client.responses.create(input="paint it", **fields)
    assert found.status == "completed"
    (call,) = found.output
    assert (call.type, call.name) == ("function_call", "paint")
    assert json.loads(call.arguments)["colour"] in ("red", "green")
    events = list(client.responses.create(input="paint it", stream=True, **fields))
    pieces = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
    assert len(pieces) > 1
    assert "".join(pieces) == call.arguments
    assert events[-1].response.output[0].arguments == call.arguments
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "done"}
    plain = fields | {"tool_choice": "none", "max_output_tokens": 4, "temperature": 0}
    continued = client.responses.create(input=[result], previous_response_id=found.id, **plain)
    given = client.responses.create(input=[{"role": "user", "content": "paint it"}, call, result], **plain)
    assert continued.output_text == given.output_text
    assert continued.usage.input_tokens == given.usage.input_tokens
