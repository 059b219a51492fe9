"""Responses: every field that the openai package sends works or is refused by name, and it finds what it reads.

The table is beside the package's own type hints, so a field of a later release that nobody thought of fails here.
"""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from openai.types.responses import Response, ResponseStreamEvent, ResponseUsage
from openai.types.responses.response_create_params import (
    ResponseCreateParamsNonStreaming,
    ResponseCreateParamsStreaming,
)
from pydantic import TypeAdapter

from triptych.client.openai_api.answers import Answers
from triptych.client.openai_api.responses.answer import Answer
from triptych.client.openai_api.responses.request import parse
from triptych.client.openai_api.responses.store import Store
from triptych.python_models.contract.answer import Syntax
from triptych.python_models.contract.delta import Delta, TokenLogprob, Usage
from triptych.python_models.contract.errors import TriptychError

DOCS = Path(__file__).parents[2] / "docs" / "openai.md"
Row = tuple[dict[str, Any], str | None]


def _hints() -> ModuleType:
    spec = importlib.util.spec_from_file_location("openai_hints", Path(__file__).with_name("openai_hints.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


HINTS = _hints()
STORE = Store(10_000)
STORE.put({"id": "resp_1", "output": []}, [{"role": "user", "content": "q"}], None, 10)
USER = {"role": "user", "content": "q"}
TOOL = {"type": "function", "name": "find"}
PICTURE = {"type": "input_image", "image_url": "data:,x"}
OUTPUT = {"type": "output_text", "text": "a", "annotations": []}
BREAKPOINT = {"prompt_cache_breakpoint": {"mode": "explicit"}}
CALL = {"type": "function_call", "call_id": "c", "name": "find", "arguments": "{}"}
RESULT = {"type": "function_call_output", "call_id": "c", "output": "4"}
THOUGHTS = {"type": "reasoning", "id": "rs", "summary": []}
STATES = ("in_progress", "completed", "incomplete")
PHASES = ("commentary", "final_answer")
# Items and tools that run on OpenAI's servers, or that steer them.
OTHER_ITEMS = (
    *("file_search_call", "computer_call", "computer_call_output", "web_search_call"),
    *("tool_search_call", "tool_search_output", "developer", "configuration_update"),
    *("compaction", "image_generation_call", "code_interpreter_call", "local_shell_call"),
    *("local_shell_call_output", "shell_call", "shell_call_output", "apply_patch_call"),
    *("apply_patch_call_output", "mcp_list_tools", "mcp_approval_request", "mcp_approval_response"),
    *("mcp_call", "custom_tool_call_output", "custom_tool_call", "compaction_trigger"),
    *("item_reference", "program", "program_output"),
)
OTHER_TOOLS = (
    *("file_search", "computer", "computer_use_preview", "WebSearchToolParam"),
    *("mcp", "code_interpreter", "programmatic_tool_calling", "image_generation"),
    *("local_shell", "shell", "custom", "namespace"),
    *("tool_search", "WebSearchPreviewToolParam", "apply_patch"),
)
OTHER_CHOICES = ("ToolChoiceTypesParam", "mcp", "custom", "programmatic_tool_calling", "apply_patch", "shell")


def rows(change: dict[str, Any], prefix: str, ends: str, param: str | None = None) -> dict[str, Row]:
    """The same row for several paths; "." is the prefix itself."""
    return {prefix + (end if end != "." else ""): (change, param) for end in ends.split()}


def words(field: str, good: str, bad: str = "") -> dict[str, Row]:
    """Rows of a field at the top that holds one of some words."""
    found = {f"{field}={word}": ({field: word}, None) for word in good.split()}
    found |= {f"{field}={word}": ({field: word}, field) for word in bad.split()}
    return {field: ({field: good.split()[0]}, None), **found}


def item(data: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"input": [USER, data | more]}


def part(data: dict[str, Any], **more: Any) -> dict[str, Any]:
    return item(USER, content=[data | more])


def assistant(*content: dict[str, Any], **more: Any) -> dict[str, Any]:
    return item({"type": "message", "id": "msg", "role": "assistant", "content": list(content), **more})


def states(prefix: str, data: dict[str, Any]) -> dict[str, Row]:
    return {f"{prefix}.status": (item(data, status="completed"), None)} | {
        f"{prefix}.status={state}": (item(data, status=state), None) for state in STATES
    }


def phases(prefix: str, data: dict[str, Any]) -> dict[str, Row]:
    return {f"{prefix}.phase": (item(data, phase="commentary"), None)} | {
        f"{prefix}.phase={phase}": (item(data, phase=phase), None) for phase in PHASES
    }


def parts_of(prefix: str, make: Any, where: str) -> dict[str, Row]:
    """Rows of parts that a message, and what a function gave, may hold."""
    text, picture = {"type": "input_text", "text": "a"}, PICTURE
    found: dict[str, Row] = rows(make(text), f"{prefix}.input_text", ". .text .type .type=input_text")
    found |= rows(make(picture), f"{prefix}.input_image", ". .type .type=input_image .image_url")
    found |= {f"{prefix}.input_image.detail": (make(picture | {"detail": "low"}), None)}
    for word in ("auto", "low", "high", "original"):
        found[f"{prefix}.input_image.detail={word}"] = (make(picture | {"detail": word}), None)
    found |= rows(make(picture | {"file_id": "f"}), f"{prefix}.input_image.file_id", ".", f"{where}.file_id")
    found |= rows(make({"type": "input_file", "file_id": "f"}), f"{prefix}.input_file", ".", f"{where}.type")
    for kind, data in (("input_text", text), ("input_image", picture)):
        mark = f"{prefix}.{kind}.prompt_cache_breakpoint"
        found |= rows(make(data | BREAKPOINT), mark, ". .mode .mode=explicit")
        late = {"prompt_cache_breakpoint": {"mode": "explicit", "ttl": "30m"}}
        found |= rows(make(data | late), f"{mark}.ttl", ".", f"{where}.prompt_cache_breakpoint.ttl")
    return found


def reasoning(**data: Any) -> dict[str, Any]:
    return {"reasoning": data}


SCHEMA = {"text": {"format": {"type": "json_schema", "name": "x", "schema": {}, "description": "d", "strict": True}}}
CACHE = "prompt_cache_options"

# path -> (change of a body that uses it, field that the refusal names or None where it works)
TABLE: dict[str, Row] = {
    **{
        name: ({name: value}, name)
        for name, value in {
            "access_programs": {},
            "background": True,
            "background_options": {},
            "context_management": [],
            "conversation": "c",
            "image": {},
            "moderation": {"model": "x"},
            "prompt": {"id": "p"},
        }.items()
    },
    **{
        name: ({name: value}, None)
        for name, value in {
            "instructions": "be brief",
            "max_output_tokens": 5,
            "max_tool_calls": 2,
            "metadata": {"a": "b"},
            "model": "m",
            "parallel_tool_calls": True,
            "previous_response_id": "resp_1",
            "prompt_cache_key": "k",
            "safety_identifier": "u",
            "store": True,
            "temperature": 0.5,
            "top_logprobs": 2,
            "top_p": 0.5,
            "user": "u",
        }.items()
    },
    "include": ({"include": []}, None),
    "include[]=message.output_text.logprobs": ({"include": ["message.output_text.logprobs"]}, None),
    "include[]=message.input_image.image_url": ({"include": ["message.input_image.image_url"]}, None),
    **{
        f"include[]={word}": ({"include": [word]}, "include[0]")
        for word in (
            "file_search_call.results",
            "web_search_call.results",
            "web_search_call.action.sources",
            "computer_call_output.output.image_url",
            "code_interpreter_call.outputs",
            "reasoning.encrypted_content",
        )
    },
    CACHE: ({CACHE: {}}, None),
    f"{CACHE}.mode": ({CACHE: {"mode": "implicit"}}, None),
    f"{CACHE}.mode=implicit": ({CACHE: {"mode": "implicit"}}, None),
    f"{CACHE}.mode=explicit": ({CACHE: {"mode": "explicit"}}, f"{CACHE}.mode"),
    f"{CACHE}.ttl": ({CACHE: {"ttl": "30m"}}, f"{CACHE}.ttl"),
    f"{CACHE}.prewarm": ({CACHE: {"prewarm": True}}, f"{CACHE}.prewarm"),
    f"{CACHE}.comparison_response_id": ({CACHE: {"comparison_response_id": "r"}}, f"{CACHE}.comparison_response_id"),
    **words("prompt_cache_retention", "in_memory 24h"),
    **words("service_tier", "auto default", "flex scale priority fast ultrafast"),
    **words("truncation", "disabled", "auto"),
    **rows(reasoning(effort="low"), "reasoning", ". .effort"),
    **{
        f"reasoning.effort={word}": (reasoning(effort=word), None)
        for word in ("none", "minimal", "low", "medium", "high", "xhigh", "max")
    },
    **rows(reasoning(context="auto"), "reasoning.context", ". =auto"),
    **rows(reasoning(context="all_turns"), "reasoning.context=all_turns", ".", "reasoning.context"),
    **rows(reasoning(context="current_turn"), "reasoning.context=current_turn", ".", "reasoning.context"),
    **rows(reasoning(mode="standard"), "reasoning.mode", ". =standard"),
    **rows(reasoning(mode="pro"), "reasoning.mode=pro", ".", "reasoning.mode"),
    **rows(reasoning(summary="auto"), "reasoning.summary", ".", "reasoning.summary"),
    **rows(reasoning(generate_summary="auto"), "reasoning.generate_summary", ".", "reasoning.generate_summary"),
    "stream_options": ({"stream": True, "stream_options": {}}, None),
    "stream_options.include_obfuscation": ({"stream": True, "stream_options": {"include_obfuscation": True}}, None),
    "stream": ({"stream": True}, None),
    "stream=True": ({"stream": True}, None),
    "stream=False": ({"stream": False}, None),
    **rows(SCHEMA, "text", ". .format"),
    **rows(SCHEMA, "text.format.json_schema", ". .name .schema .type .type=json_schema .description .strict"),
    **rows({"text": {"format": {"type": "text"}}}, "text.format.text", ". .type .type=text"),
    **rows({"text": {"format": {"type": "json_object"}}}, "text.format.json_object", ". .type .type=json_object"),
    **rows({"text": {"verbosity": "medium"}}, "text.verbosity", ". =medium"),
    **rows({"text": {"verbosity": "low"}}, "text.verbosity=low", ".", "text.verbosity"),
    **rows({"text": {"verbosity": "high"}}, "text.verbosity=high", ".", "text.verbosity"),
    "tool_choice": ({"tools": [TOOL], "tool_choice": "auto"}, None),
    **{f"tool_choice={word}": ({"tools": [TOOL], "tool_choice": word}, None) for word in ("none", "auto", "required")},
    **rows({"tools": [TOOL], "tool_choice": TOOL}, "tool_choice.function", ". .name .type .type=function"),
    **rows(
        {"tools": [TOOL], "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [TOOL]}},
        "tool_choice.allowed_tools",
        ". .type .type=allowed_tools .mode .mode=auto .tools",
    ),
    **rows(
        {"tools": [TOOL], "tool_choice": {"type": "allowed_tools", "mode": "required", "tools": [TOOL]}},
        "tool_choice.allowed_tools.mode=required",
        ".",
    ),
    **{f"tool_choice.{kind}": ({"tool_choice": {"type": kind}}, "tool_choice.type") for kind in OTHER_CHOICES},
    **rows({"tools": [TOOL]}, "tools", ". [].function [].function.name [].function.type [].function.type=function"),
    "tools[].function.parameters": ({"tools": [TOOL | {"parameters": {"type": "object"}}]}, None),
    "tools[].function.strict": ({"tools": [TOOL | {"parameters": {"type": "object"}, "strict": True}]}, None),
    "tools[].function.description": ({"tools": [TOOL | {"description": "d"}]}, None),
    **{
        f"tools[].function.{name}": ({"tools": [TOOL | {name: value}]}, f"tools[0].{name}")
        for name, value in (
            ("async", True),
            ("allowed_callers", ["direct"]),
            ("defer_loading", True),
            ("output_schema", {}),
        )
    },
    **{f"tools[].{kind}": ({"tools": [{"type": kind}]}, "tools[0].type") for kind in OTHER_TOOLS},
    "input": ({"input": "hi"}, None),
    **rows(item(USER, type="message"), "input[].message", ". .content .type .type=message .role"),
    **{
        f"input[].message.role={role}": (item({"role": role, "content": "a"}), None)
        for role in ("user", "assistant", "system", "developer")
    },
    **states("input[].message", USER),
    **phases("input[].message", USER),
    **parts_of("input[].message.content[]", part, "input[1].content[0]"),
    **rows(assistant(OUTPUT), "input[].assistant", ". .id .content .role .role=assistant .type .type=message"),
    **states("input[].assistant", {"role": "assistant", "content": [OUTPUT]}),
    **phases("input[].assistant", {"role": "assistant", "content": [OUTPUT]}),
    **rows(assistant(OUTPUT), "input[].assistant.content[].output_text", ". .text .type .type=output_text"),
    "input[].assistant.content[].output_text.annotations": (assistant(OUTPUT), None),
    "input[].assistant.content[].output_text.logprobs": (assistant(OUTPUT | {"logprobs": []}), None),
    **rows(
        assistant({"type": "refusal", "refusal": "no"}),
        "input[].assistant.content[].refusal",
        ". .refusal .type .type=refusal",
    ),
    **rows(item(CALL, id="fc"), "input[].function_call", ". .arguments .call_id .name .id .type .type=function_call"),
    **states("input[].function_call", CALL),
    **{
        f"input[].function_call.{name}": (item(CALL, **{name: value}), f"input[1].{name}")
        for name, value in (("async", True), ("caller", {"type": "direct"}), ("namespace", "n"))
    },
    **rows(
        item(RESULT, id="fo"),
        "input[].function_call_output",
        ". .output .call_id .id .type .type=function_call_output",
    ),
    **states("input[].function_call_output", RESULT),
    **{
        f"input[].function_call_output.{name}": (item(RESULT, **{name: value}), f"input[1].{name}")
        for name, value in (("caller", {"type": "direct"}), ("name", "n"), ("namespace", "n"))
    },
    **parts_of(
        "input[].function_call_output.output[]",
        lambda data: item(RESULT, output=[data]),
        "input[1].output[0]",
    ),
    **rows(item(THOUGHTS), "input[].reasoning", ". .id .type .type=reasoning"),
    **rows(
        item(THOUGHTS, content=[{"type": "reasoning_text", "text": "a"}]),
        "input[].reasoning.content",
        ". [].text [].type [].type=reasoning_text",
    ),
    **rows(
        item(THOUGHTS, summary=[{"type": "summary_text", "text": "a"}]),
        "input[].reasoning.summary",
        ".",
        "input[1].summary",
    ),
    "input[].reasoning.encrypted_content": (item(THOUGHTS, encrypted_content="x"), "input[1].encrypted_content"),
    **states("input[].reasoning", THOUGHTS),
    **{f"input[].{kind}": (item({"type": kind}), "input[1].type") for kind in OTHER_ITEMS},
}
# What a client gives back of an answer and nobody looks into.
GIVEN_BACK = (
    "input[].assistant.content[].output_text.annotations",
    "input[].assistant.content[].output_text.logprobs",
)


def test_the_table_has_every_field_of_the_package() -> None:
    whole = {path for path, (_, param) in TABLE.items() if param} | {*GIVEN_BACK}
    found = HINTS.fields_of(ResponseCreateParamsStreaming, whole)
    found += HINTS.fields_of(ResponseCreateParamsNonStreaming, whole)
    missing = set(found) - set(TABLE)
    assert not missing, f"the openai package has fields that nobody has thought of: {sorted(missing)}"
    assert set(TABLE) <= set(found), sorted(set(TABLE) - set(found))


@pytest.mark.parametrize("path", TABLE)
def test_a_field_works_or_is_refused_by_name(path: str) -> None:
    change, param = TABLE[path]
    body = json.dumps({"model": "m", "input": "hi"} | change).encode()
    if param is None:
        parse(body, "m", 10.0, STORE)
        return
    with pytest.raises(TriptychError) as caught:
        parse(body, "m", 10.0, STORE)
    assert caught.value.kind.status == 400
    assert caught.value.param == param
    assert param in caught.value.message


def made() -> Answer:
    body = {"model": "m", "input": "hi", "tools": [TOOL]}
    call = parse(json.dumps(body).encode(), "m", 10.0, STORE)
    return Answer("resp-1", 17, "m", call.echo | {"store": True}, answers=Answers(call.chat.request.template.tools))


LOGPROB = TokenLogprob(1, "yes", -0.5, (97,), ((1, "yes", -0.5, (97,)),))
TEXT = '<think>hm</think>yes<tool_call>{"name": "find", "arguments": {}}</tool_call>'
DELTAS = [
    Delta(usage=Usage(3), syntax=Syntax("hermes", "qwen3")),
    Delta(TEXT, (1,), (LOGPROB,)),
    Delta("", (2,), (), "stop", None, Usage(3, 1, 5)),
]
# What only a request that is refused asks for, or an answer that failed has.
NEVER = re.compile(
    r"access_programs|conversation|image|input_transformations|moderation|prompt|prompt_cache_(diagnostics|options|retention)|tool_usage"
    r"|usage\.input_tokens_details\.cache_write_tokens_details.*"
)


def test_a_response_has_every_field_of_the_package() -> None:
    body = made().whole(DELTAS)
    Response.model_validate(body)
    known = {path for path, _ in HINTS.answer_fields(Response) if "." not in path}
    known |= {f"usage.{path}" for path, _ in HINTS.answer_fields(ResponseUsage)}
    found = set(body) | {f"usage.{name}" for name in body["usage"]}
    found |= {f"usage.{name}.{inner}" for name in body["usage"] if "details" in name for inner in body["usage"][name]}
    missing = {path for path in known - found if not NEVER.fullmatch(path)}
    assert not missing, f"the openai package reads fields that nobody has thought of: {sorted(missing)}"


def test_every_event_is_one_of_the_packages() -> None:
    answer = made()
    data = answer.first_chunks() + b"".join(answer.chunks(delta) for delta in DELTAS) + answer.end(DELTAS)
    adapter: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
    kinds = []
    for piece in data.split(b"\n\n")[:-1]:
        event = json.loads(piece.partition(b"\n")[2].removeprefix(b"data: "))
        found = adapter.validate_python(event)
        assert found.type == event["type"]
        # nothing that the package does not know is lost on its way
        assert not set(event) - {*type(found).model_fields}
        kinds.append(found.type)
    assert len(set(kinds)) == 13, sorted(set(kinds))


def test_the_documentation_has_every_field() -> None:
    text = DOCS.read_text().partition("## Responses")[2]
    names = {path for path in TABLE if not re.search(r"[.=\[]", path)}
    missing = {name for name in names if f"`{name}`" not in text}
    assert not missing, sorted(missing)
