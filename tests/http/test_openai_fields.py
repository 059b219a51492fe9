"""Chat completions: every field that the openai package sends works or is refused by name, and it finds what it reads.

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
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.chat.completion_create_params import (
    CompletionCreateParamsNonStreaming,
    CompletionCreateParamsStreaming,
)

from triptych.client.openai_api import fields
from triptych.client.openai_api.sse import Completion
from triptych.python_models.contract.delta import Delta, TokenLogprob, Usage
from triptych.python_models.contract.errors import TriptychError

DOCS = Path(__file__).parents[2] / "docs" / "openai.md"


def _hints() -> ModuleType:
    spec = importlib.util.spec_from_file_location("openai_hints", Path(__file__).with_name("openai_hints.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


HINTS = _hints()
PICTURE = {"type": "image_url", "image_url": {"url": "data:,x"}}
SOUND = {"type": "input_audio", "input_audio": {"data": "b25l", "format": "wav"}}
TEXT = {"type": "text", "text": "a"}
FUNCTION = {"type": "function", "function": {"name": "find"}}
CALL = {"id": "c", "type": "function", "function": {"name": "find", "arguments": "{}"}}


def said(role: str, content: Any = "a", **more: Any) -> dict[str, Any]:
    """Change of a body: a conversation with such a message at its end."""
    return {"messages": [{"role": "user", "content": "q"}, {"role": role, "content": content, **more}]}


def part(data: dict[str, Any], **more: Any) -> dict[str, Any]:
    return said("user", [data | more])


def picture(**more: Any) -> dict[str, Any]:
    return part(PICTURE | {"image_url": PICTURE["image_url"] | more})  # type: ignore[operator]


def cached(data: dict[str, Any], **more: Any) -> dict[str, Any]:
    return part(data, prompt_cache_breakpoint={"mode": "explicit"} | more)


def schema(**more: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {}} | more}}


ROLES = ("developer", "system", "user", "assistant")
CALLED = said("assistant", None, tool_calls=[CALL])
TOLD = said("tool", "4", tool_call_id="c")
WHERE = "messages[1].content[0]"
BREAKPOINT = f"{WHERE}.prompt_cache_breakpoint"
TOOLS = {"tools": [FUNCTION]}


def allowed(mode: str) -> dict[str, Any]:
    choice = {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": [FUNCTION]}}
    return TOOLS | {"tool_choice": choice}


# path -> (change of a body that uses it, field that the refusal names or None where it works)
CHAT: dict[str, tuple[dict[str, Any], str | None]] = {
    "messages": (said("user"), None),
    **{f"messages[].{role}": (said(role), None) for role in ROLES},
    **{f"messages[].{role}.content": (said(role), None) for role in ROLES},
    **{f"messages[].{role}.role": (said(role), None) for role in ROLES},
    **{f"messages[].{role}.role={role}": (said(role), None) for role in ROLES},
    **{f"messages[].{role}.name": (said(role, name="n"), None) for role in ROLES},
    "messages[].developer.content[].text": (said("developer", [TEXT]), None),
    "messages[].developer.content[].type": (said("developer", [TEXT]), None),
    "messages[].developer.content[].type=text": (said("developer", [TEXT]), None),
    "messages[].developer.content[].prompt_cache_breakpoint": (cached(TEXT), None),
    "messages[].developer.content[].prompt_cache_breakpoint.mode": (cached(TEXT), None),
    "messages[].developer.content[].prompt_cache_breakpoint.mode=explicit": (cached(TEXT), None),
    "messages[].developer.content[].prompt_cache_breakpoint.ttl": (cached(TEXT, ttl="30m"), f"{BREAKPOINT}.ttl"),
    "messages[].user.content[].text": (part(TEXT), None),
    "messages[].user.content[].image_url": (picture(), None),
    "messages[].user.content[].image_url.image_url": (picture(), None),
    "messages[].user.content[].image_url.image_url.url": (picture(), None),
    "messages[].user.content[].image_url.image_url.detail": (picture(detail="low"), None),
    **{
        f"messages[].user.content[].image_url.image_url.detail={word}": (picture(detail=word), None)
        for word in ("auto", "low", "high", "original")
    },
    "messages[].user.content[].image_url.type": (picture(), None),
    "messages[].user.content[].image_url.type=image_url": (picture(), None),
    "messages[].user.content[].image_url.prompt_cache_breakpoint": (cached(PICTURE), None),
    "messages[].user.content[].image_url.prompt_cache_breakpoint.mode": (cached(PICTURE), None),
    "messages[].user.content[].image_url.prompt_cache_breakpoint.mode=explicit": (cached(PICTURE), None),
    "messages[].user.content[].image_url.prompt_cache_breakpoint.ttl": (
        cached(PICTURE, ttl="12h"),
        f"{BREAKPOINT}.ttl",
    ),
    "messages[].user.content[].input_audio": (part(SOUND), None),
    "messages[].user.content[].input_audio.input_audio": (part(SOUND), None),
    "messages[].user.content[].input_audio.input_audio.data": (part(SOUND), None),
    "messages[].user.content[].input_audio.input_audio.format": (part(SOUND), None),
    **{
        f"messages[].user.content[].input_audio.input_audio.format={word}": (
            part({"type": "input_audio", "input_audio": {"data": "b25l", "format": word}}),
            None,
        )
        for word in ("wav", "mp3")
    },
    "messages[].user.content[].input_audio.type": (part(SOUND), None),
    "messages[].user.content[].input_audio.type=input_audio": (part(SOUND), None),
    "messages[].user.content[].input_audio.prompt_cache_breakpoint": (cached(SOUND), None),
    "messages[].user.content[].input_audio.prompt_cache_breakpoint.mode": (cached(SOUND), None),
    "messages[].user.content[].input_audio.prompt_cache_breakpoint.mode=explicit": (cached(SOUND), None),
    "messages[].user.content[].input_audio.prompt_cache_breakpoint.ttl": (
        cached(SOUND, ttl="30m"),
        f"{BREAKPOINT}.ttl",
    ),
    "messages[].user.content[].file": (part({"type": "file", "file": {"file_id": "x"}}), f"{WHERE}.type"),
    "messages[].assistant.audio": (said("assistant", audio={"id": "x"}), "messages[1].audio"),
    "messages[].assistant.content[].text": (said("assistant", [TEXT]), None),
    "messages[].assistant.content[].refusal": (said("assistant", [{"type": "refusal", "refusal": "no"}]), None),
    "messages[].assistant.content[].refusal.refusal": (said("assistant", [{"type": "refusal", "refusal": "no"}]), None),
    "messages[].assistant.content[].refusal.type": (said("assistant", [{"type": "refusal", "refusal": "no"}]), None),
    "messages[].assistant.content[].refusal.type=refusal": (
        said("assistant", [{"type": "refusal", "refusal": "no"}]),
        None,
    ),
    "messages[].assistant.function_call": (
        said("assistant", function_call={"name": "f", "arguments": "{}"}),
        "messages[1].function_call",
    ),
    "messages[].assistant.refusal": (said("assistant", refusal="no"), "messages[1].refusal"),
    **{f"messages[].assistant.tool_calls{end}": (CALLED, None) for end in ("", "[].function")},
    **{
        f"messages[].assistant.tool_calls[].function.{end}": (CALLED, None)
        for end in ("id", "type", "type=function", "function", "function.arguments", "function.name")
    },
    "messages[].assistant.tool_calls[].custom": (
        said("assistant", tool_calls=[{"id": "c", "type": "custom", "custom": {"name": "f", "input": "x"}}]),
        "messages[1].tool_calls[0]",
    ),
    "messages[].tool": (TOLD, None),
    **{f"messages[].tool.{end}": (TOLD, None) for end in ("content", "role", "role=tool", "tool_call_id")},
    "messages[].function": (said("function", name="f"), "messages[1].role"),
    "model": ({"model": "m"}, None),
    "audio": ({"audio": {"voice": "alloy", "format": "wav"}}, "audio"),
    "frequency_penalty": ({"frequency_penalty": 0.5}, None),
    "function_call": ({"function_call": "auto"}, None),
    "function_call=none": ({"function_call": "none"}, None),
    "function_call=auto": ({"function_call": "auto"}, None),
    "function_call.name": ({"function_call": {"name": "f"}}, "function_call"),
    "functions": ({"functions": [{"name": "f"}]}, "functions"),
    "logit_bias": ({"logit_bias": {"5": -100}}, None),
    "logprobs": ({"logprobs": True}, None),
    "max_completion_tokens": ({"max_completion_tokens": 5}, None),
    "max_tokens": ({"max_tokens": 5}, None),
    "metadata": ({"metadata": {"a": "b"}}, None),
    "modalities": ({"modalities": ["text"]}, None),
    "modalities[]=text": ({"modalities": ["text"]}, None),
    "modalities[]=audio": ({"modalities": ["text", "audio"]}, "modalities"),
    "moderation": ({"moderation": {"model": "x"}}, "moderation"),
    "n": ({"n": 2}, None),
    "parallel_tool_calls": ({"parallel_tool_calls": True}, None),
    "prediction": ({"prediction": {"type": "content", "content": "a"}}, "prediction"),
    "presence_penalty": ({"presence_penalty": 0.5}, None),
    "prompt_cache_key": ({"prompt_cache_key": "k"}, None),
    "prompt_cache_options": ({"prompt_cache_options": {}}, None),
    "prompt_cache_options.mode": ({"prompt_cache_options": {"mode": "implicit"}}, None),
    "prompt_cache_options.mode=implicit": ({"prompt_cache_options": {"mode": "implicit"}}, None),
    "prompt_cache_options.mode=explicit": ({"prompt_cache_options": {"mode": "explicit"}}, "prompt_cache_options.mode"),
    "prompt_cache_options.ttl": ({"prompt_cache_options": {"ttl": "30m"}}, "prompt_cache_options.ttl"),
    "prompt_cache_retention": ({"prompt_cache_retention": "24h"}, None),
    "prompt_cache_retention=in_memory": ({"prompt_cache_retention": "in_memory"}, None),
    "prompt_cache_retention=24h": ({"prompt_cache_retention": "24h"}, None),
    "reasoning_effort": ({"reasoning_effort": "none"}, None),
    "reasoning_effort=none": ({"reasoning_effort": "none"}, None),
    **{
        f"reasoning_effort={word}": ({"reasoning_effort": word}, None)
        for word in ("minimal", "low", "medium", "high", "xhigh", "max")
    },
    "response_format": (schema(), None),
    "response_format.text": ({"response_format": {"type": "text"}}, None),
    "response_format.text.type": ({"response_format": {"type": "text"}}, None),
    "response_format.text.type=text": ({"response_format": {"type": "text"}}, None),
    "response_format.json_schema": (schema(), None),
    "response_format.json_schema.json_schema": (schema(), None),
    "response_format.json_schema.json_schema.name": (schema(), None),
    "response_format.json_schema.json_schema.description": (schema(description="d"), None),
    "response_format.json_schema.json_schema.schema": (schema(), None),
    "response_format.json_schema.json_schema.strict": (schema(strict=True), None),
    "response_format.json_schema.type": (schema(), None),
    "response_format.json_schema.type=json_schema": (schema(), None),
    "response_format.json_object": ({"response_format": {"type": "json_object"}}, None),
    "response_format.json_object.type": ({"response_format": {"type": "json_object"}}, None),
    "response_format.json_object.type=json_object": ({"response_format": {"type": "json_object"}}, None),
    "safety_identifier": ({"safety_identifier": "u"}, None),
    "seed": ({"seed": 1}, None),
    "service_tier": ({"service_tier": "auto"}, None),
    "service_tier=auto": ({"service_tier": "auto"}, None),
    "service_tier=default": ({"service_tier": "default"}, None),
    **{
        f"service_tier={word}": ({"service_tier": word}, "service_tier")
        for word in ("flex", "scale", "priority", "fast")
    },
    "stop": ({"stop": ["a", "b"]}, None),
    "store": ({"store": True}, "store"),
    "stream_options": ({"stream": True, "stream_options": {}}, None),
    "stream_options.include_obfuscation": ({"stream": True, "stream_options": {"include_obfuscation": True}}, None),
    "stream_options.include_usage": ({"stream": True, "stream_options": {"include_usage": True}}, None),
    "temperature": ({"temperature": 0.5}, None),
    "tool_choice": (TOOLS | {"tool_choice": "auto"}, None),
    "tool_choice=none": (TOOLS | {"tool_choice": "none"}, None),
    "tool_choice=auto": (TOOLS | {"tool_choice": "auto"}, None),
    "tool_choice=required": (TOOLS | {"tool_choice": "required"}, None),
    **{
        f"tool_choice.allowed_tools{end}": (allowed("auto"), None)
        for end in ("", ".type", ".type=allowed_tools", ".allowed_tools", ".allowed_tools.mode", ".allowed_tools.tools")
    },
    **{f"tool_choice.allowed_tools.allowed_tools.mode={word}": (allowed(word), None) for word in ("auto", "required")},
    **{
        f"tool_choice.function{end}": (TOOLS | {"tool_choice": FUNCTION}, None)
        for end in ("", ".type", ".type=function", ".function", ".function.name")
    },
    "tool_choice.custom": (TOOLS | {"tool_choice": {"type": "custom", "custom": {"name": "find"}}}, "tool_choice"),
    "tools": (TOOLS, None),
    "tools[].function": (TOOLS, None),
    "tools[].function.function": (TOOLS, None),
    "tools[].function.function.name": (TOOLS, None),
    "tools[].function.function.description": (
        {"tools": [{"type": "function", "function": {"name": "f", "description": "d"}}]},
        None,
    ),
    "tools[].function.function.parameters": (
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]},
        None,
    ),
    "tools[].function.function.strict": (
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}, "strict": True}}]},
        None,
    ),
    "tools[].function.type": (TOOLS, None),
    "tools[].function.type=function": (TOOLS, None),
    "tools[].custom": ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools[0]"),
    "top_logprobs": ({"logprobs": True, "top_logprobs": 2}, None),
    "top_p": ({"top_p": 0.5}, None),
    "user": ({"user": "u"}, None),
    "verbosity": ({"verbosity": "medium"}, None),
    "verbosity=low": ({"verbosity": "low"}, "verbosity"),
    "verbosity=medium": ({"verbosity": "medium"}, None),
    "verbosity=high": ({"verbosity": "high"}, "verbosity"),
    "web_search_options": ({"web_search_options": {}}, "web_search_options"),
    "stream": ({"stream": True}, None),
    "stream=True": ({"stream": True}, None),
    "stream=False": ({"stream": False}, None),
}


def test_the_table_has_every_field_of_the_package() -> None:
    whole = {path for path, (_, param) in CHAT.items() if param}
    found = HINTS.fields_of(CompletionCreateParamsStreaming, whole)
    found += HINTS.fields_of(CompletionCreateParamsNonStreaming, whole)
    missing = set(found) - set(CHAT)
    assert not missing, f"the openai package has fields that nobody has thought of: {sorted(missing)}"
    # where a field has words, rows for them all; rows of fields that are gone mean that a name changed
    assert set(CHAT) <= set(found), sorted(set(CHAT) - set(found))


@pytest.mark.parametrize("path", CHAT)
def test_a_field_works_or_is_refused_by_name(path: str) -> None:
    change, param = CHAT[path]
    body = json.dumps({"model": "m", "messages": [{"role": "user", "content": "hi"}]} | change).encode()
    if param is None:
        fields.parse(body, "m", 10.0)
        return
    with pytest.raises(TriptychError) as caught:
        fields.parse(body, "m", 10.0)
    assert caught.value.kind.status == 400
    assert (caught.value.param or "").startswith(param)
    assert param in caught.value.message


# Fields of answers that nothing here can have, or that only a request which is refused asks for.
NEVER = (
    "choices.message.audio",
    "choices.message.function_call",
    "choices.message.tool_calls",
    "choices.delta.audio",
    "choices.delta.function_call",
    "choices.delta.tool_calls",
    "choices.message.annotations.",
    "choices.logprobs.refusal.",
    "metadata",
    "moderation",
    "usage.prompt_tokens_details.cache_write_tokens",
)


def paths(data: Any, path: str = "") -> set[str]:
    if isinstance(data, list):
        return {found for item in data for found in paths(item, path)}
    if not isinstance(data, dict):
        return set()
    found = {f"{path}.{name}" if path else name for name in data}
    return found | {inner for name, item in data.items() for inner in paths(item, f"{path}.{name}" if path else name)}


LAST = Delta("a", (1,), (TokenLogprob(1, "a", -0.5, (97,), ((1, "a", -0.5, (97,)),)),), "stop", None, Usage(3, 1, 1))


def writer() -> Completion:
    return Completion("chatcmpl-1", 17, "m", "fp_1", True, include_obfuscation=True, service_tier="default")


def test_a_completion_has_every_field_of_the_package() -> None:
    body = writer().whole([LAST])
    check_answer(ChatCompletion, body, paths(body))


def test_a_stream_has_every_field_of_the_package() -> None:
    made = writer()
    data = made.first_chunks() + made.chunks(LAST) + made.end([LAST])
    chunks = [json.loads(piece.removeprefix(b"data: ")) for piece in data.split(b"\n\n")[:-2]]
    for chunk in chunks:
        ChatCompletionChunk.model_validate(chunk, strict=True)
    check_answer(ChatCompletionChunk, chunks[-1], paths(chunks))


def check_answer(model: Any, body: dict[str, Any], found: set[str]) -> None:
    assert model.model_validate(body, strict=True)
    known = {path for path, _ in HINTS.answer_fields(model)}
    missing = {path for path in known - found if not path.startswith(NEVER)}
    assert not missing, f"the openai package reads fields that nobody has thought of: {sorted(missing)}"


def test_the_documentation_has_every_field() -> None:
    text = DOCS.read_text()
    names = {path for path in CHAT if not re.search(r"[.=\[]", path)}
    missing = {name for name in names if f"`{name}`" not in text}
    assert not missing, sorted(missing)
