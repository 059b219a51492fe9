"""Functions that a model may call: how a request names them, which it asks for, and calls of earlier turns."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from . import _check as check
from .errors import invalid

MAX_TOOLS = 128
CHOICES = ("auto", "none", "required")
REASONING_EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
_TOOL_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")

Tool = Mapping[str, Any]
"""OpenAI's ``{"type": "function", "function": {"name": ..., "parameters": {...}}}``."""


@dataclass(frozen=True)
class ToolCall:
    """A call of an earlier turn; ``arguments`` is the text of a JSON object, as the model wrote it."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class Calling:
    """How functions may be called.

    Attributes:
        required: the answer is one call or more, and nothing else.
        parallel: it may be more than one.
    """

    required: bool = False
    parallel: bool = True


ANY_CALLS = Calling()
"""As the model likes."""


def tools(value: Any) -> tuple[Tool, ...]:
    """Field ``tools``, checked."""
    if not isinstance(value, list):
        raise invalid(f"tools must be a list, not {check.json_type(value)}", "tools")
    if len(value) > MAX_TOOLS:
        raise invalid(f"tools has {len(value)} entries; at most {MAX_TOOLS} are allowed", "tools")
    for index, item in enumerate(value):
        where = f"tools[{index}]"
        tool = check.mapping(item, where)
        check.known_keys(tool, ("type", "function"), where)
        if tool.get("type") != "function":
            raise invalid(f"{where}.type must be function, got {tool.get('type')!r}", f"{where}.type")
        where += ".function"
        function = check.mapping(tool.get("function"), where)
        check.known_keys(function, ("name", "description", "parameters", "strict"), where)
        if not _TOOL_NAME.fullmatch(check.string(function.get("name"), f"{where}.name")):
            raise invalid(f"{where}.name must be 1 to 64 letters, digits, underscores and dashes", f"{where}.name")
        if function.get("description") is not None:
            check.string(function["description"], f"{where}.description")
        if function.get("parameters") is not None:
            check.mapping(function["parameters"], f"{where}.parameters")
        if function.get("strict") is not None:
            check.boolean(function["strict"], f"{where}.strict")
    check_unicode(value, "tools")
    return tuple(value)


def calling(given: tuple[Tool, ...], choice: Any, parallel: Any) -> tuple[tuple[Tool, ...], Calling]:
    """Fields ``tool_choice`` and ``parallel_tool_calls``, checked; None is as if left out.

    Args:
        given: field ``tools``.
        choice: "auto", "none", "required", or an object that names one function or several.
        parallel: whether an answer may have several calls.

    Returns:
        The functions that may be called, and how. With "none" that is none of them: the model is not told of any.

    Raises:
        TriptychError: INVALID_REQUEST naming the field and what is allowed.
    """
    where = "tool_choice"
    several = parallel is None or check.boolean(parallel, "parallel_tool_calls")
    mode, names = _choice(choice, where)
    if mode == "none":
        return (), Calling(False, several)
    known = {tool["function"]["name"] for tool in given}
    for field, name in names:
        if name not in known:
            listed = ", ".join(sorted(known)) or "there are none"
            raise invalid(f"{field} must be the name of one of tools ({listed}), got {name!r}", field)
    if mode == "required" and not given:
        raise invalid(f"{where} asks for a call, but the request has no tools", where)
    if names:
        wanted = {name for _, name in names}
        given = tuple(tool for tool in given if tool["function"]["name"] in wanted)
    return given, Calling(mode == "required", several)


def _choice(value: Any, where: str) -> tuple[str, list[tuple[str, str]]]:
    """(mode, (field, name) of each function that it names)."""
    if value is None:
        return "auto", []
    if isinstance(value, str):
        if value not in CHOICES:
            raise _not_a_choice(value, where)
        return value, []
    data = check.mapping(value, where)
    kind = data.get("type")
    if kind == "function":
        check.known_keys(data, ("type", "function"), where)
        return "required", [_named(data, where)]
    if kind != "allowed_tools":
        raise _not_a_choice(value, where)
    check.known_keys(data, ("type", "allowed_tools"), where)
    where += ".allowed_tools"
    allowed = check.mapping(data.get("allowed_tools"), where)
    check.known_keys(allowed, ("mode", "tools"), where)
    if allowed.get("mode") not in ("auto", "required"):
        raise invalid(f"{where}.mode must be auto or required, got {allowed.get('mode')!r}", f"{where}.mode")
    items = allowed.get("tools")
    if not isinstance(items, list) or not items:
        raise invalid(f"{where}.tools must be a list with at least one function", f"{where}.tools")
    names = []
    for index, item in enumerate(items):
        own = f"{where}.tools[{index}]"
        tool = check.mapping(item, own)
        check.known_keys(tool, ("type", "function"), own)
        if tool.get("type") != "function":
            raise invalid(f"{own}.type must be function, got {tool.get('type')!r}", f"{own}.type")
        names.append(_named(tool, own))
    return str(allowed["mode"]), names


def _named(data: Mapping[str, Any], where: str) -> tuple[str, str]:
    where += ".function"
    function = check.mapping(data.get("function"), where)
    check.known_keys(function, ("name",), where)
    return f"{where}.name", check.string(function.get("name"), f"{where}.name")


def _not_a_choice(value: Any, where: str) -> Exception:
    form = '{"type": "function", "function": {"name": "..."}}'
    return invalid(f"{where} must be one of {', '.join(CHOICES)}, or an object such as {form}, got {value!r}", where)


def choice_json(given: tuple[Tool, ...], how: Calling) -> dict[str, Any]:
    """The fields ``tools``, ``tool_choice`` and ``parallel_tool_calls`` that say this, as far as they are needed."""
    data: dict[str, Any] = {"tools": given} if given else {}
    if how.required:
        data["tool_choice"] = "required"
    if given and not how.parallel:
        data["parallel_tool_calls"] = False
    return data


def reasoning_effort(value: Any) -> str:
    """Field ``reasoning_effort``, checked; "" for null. What a model can do with it, its chat template says."""
    if value is None:
        return ""
    if value not in REASONING_EFFORTS:
        allowed = ", ".join(REASONING_EFFORTS)
        raise invalid(f"reasoning_effort must be one of {allowed}, got {value!r}", "reasoning_effort")
    return str(value)


def tool_calls(value: Any, where: str) -> tuple[ToolCall, ...]:
    """Field ``tool_calls`` of a message, checked; null is as an empty list."""
    if value is None:
        return ()
    if not isinstance(value, list):
        raise invalid(f"{where} must be a list, not {check.json_type(value)}", where)
    return tuple(_tool_call(item, f"{where}[{index}]") for index, item in enumerate(value))


def _tool_call(value: Any, where: str) -> ToolCall:
    data = check.mapping(value, where)
    # clients that join the pieces of a stream leave the index in
    check.known_keys(data, ("id", "type", "function", "index"), where)
    if data.get("type", "function") != "function":
        raise invalid(f"{where}.type must be function, got {data['type']!r}", f"{where}.type")
    number = check.string(data.get("id") or "", f"{where}.id")
    where += ".function"
    function = check.mapping(data.get("function"), where)
    check.known_keys(function, ("name", "arguments"), where)
    name = check.string(function.get("name"), f"{where}.name")
    arguments = function.get("arguments")
    # templates take objects, and so do some clients
    text = json.dumps(arguments) if isinstance(arguments, Mapping) else check.string(arguments, f"{where}.arguments")
    check_unicode((number, name, text), where)
    return ToolCall(number, name, text)


def call_json(call: ToolCall) -> dict[str, Any]:
    """A call as a message has it."""
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


TURN_FIELDS = ("name", "reasoning_content", "tool_calls", "tool_call_id")
"""Of a message beside its role and content."""


def turn_fields(data: Mapping[str, Any], role: str, where: str) -> dict[str, Any]:
    """:data:`TURN_FIELDS` of a message as those of ``Message``, checked; null is as if left out.

    Raises:
        TriptychError: INVALID_REQUEST, also for one that the role does not have.
    """
    for name, owner in (("reasoning_content", "assistant"), ("tool_calls", "assistant"), ("tool_call_id", "tool")):
        if data.get(name) and role != owner:
            raise invalid(f"{where}.{name} is only allowed in a message of role {owner}", f"{where}.{name}")
    found: dict[str, Any] = {}
    for name in ("name", "reasoning_content", "tool_call_id"):
        if data.get(name) is not None:
            check_unicode(check.string(data[name], f"{where}.{name}"), f"{where}.{name}")
            found[name.removesuffix("_content")] = data[name]
    if calls := tool_calls(data.get("tool_calls"), f"{where}.tool_calls"):
        found["tool_calls"] = calls
    return found


def may_be_silent(turn: Mapping[str, Any]) -> bool:
    """Whether a message needs no content: it has calls or reasoning. Args: what :func:`turn_fields` gave."""
    return bool(turn.get("tool_calls") or turn.get("reasoning"))


def check_unicode(value: Any, where: str) -> None:
    """Refuse a JSON value that cannot be written as UTF-8."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise invalid(f"{where} is not valid Unicode: it has an unpaired surrogate", where) from None
