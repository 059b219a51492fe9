"""Formats whose calls are JSON objects with a name and arguments."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from .cursor import Cursor, Steps

Tools = Mapping[str, Mapping[str, Any]]
"""Name of a function -> JSON schema of its arguments."""
One = Callable[[Cursor, Tools], Steps[bool]]
"""Reads one call: True where it gave one on; False, with nothing given on, where there is none."""

_ARGUMENTS = ("arguments", "parameters")


def hermes(cursor: Cursor, tools: Tools) -> Steps[None]:
    """``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``, one or more objects in each."""
    while mark := (yield from cursor.until("<tool_call>")):
        if (yield from tried(cursor, tools, mark, _objects, call_list)):
            yield from closed(cursor, "</tool_call>")


def llama3(cursor: Cursor, tools: Tools) -> Steps[None]:
    """``{"name": ..., "parameters": {...}}``, several with ``;`` between; behind ``<|python_tag|>``, or by itself."""
    start = cursor.at
    yield from cursor.space()
    if (yield from cursor.look(1)) != "{" or not (yield from tried(cursor, tools, "", _row)):
        cursor.back(start)
    objects = ('{"name"', '{"type": "function"')
    while mark := (yield from cursor.until("<|python_tag|>", *objects)):
        if mark in objects:
            cursor.unread(mark)
            if not (yield from tried(cursor, tools, "", _row)):
                yield from cursor.skip(mark)
        else:
            yield from tried(cursor, tools, mark, _row)


def mistral(cursor: Cursor, tools: Tools) -> Steps[None]:
    """``[TOOL_CALLS][{"name": ..., "arguments": {...}}, ...]``, or ``[TOOL_CALLS]name[ARGS]{...}`` for each call."""
    while mark := (yield from cursor.until("[TOOL_CALLS]")):
        yield from tried(cursor, tools, mark, call_list, _mistral_call)


def phi4(cursor: Cursor, tools: Tools) -> Steps[None]:
    """``functools[{...}, ...]`` or ``<|tool_call|>[{...}, ...]<|/tool_call|>``."""
    while mark := (yield from cursor.until("functools[", "<|tool_call|>")):
        if mark == "functools[":
            cursor.unread("[")
        if (yield from tried(cursor, tools, mark.removesuffix("["), call_list, call_object)):
            yield from closed(cursor, "<|/tool_call|>")


def plain(cursor: Cursor, tools: Tools) -> Steps[None]:
    """The whole answer is a JSON array of calls, or one call."""
    start = cursor.at
    if not (yield from tried(cursor, tools, "", call_list, call_object)):
        cursor.back(start)
    yield from cursor.until()


def tried(cursor: Cursor, tools: Tools, mark: str, *ways: One) -> Steps[bool]:
    """Read calls in the first way that finds any; where none does, the mark before them was content."""
    start = cursor.at
    for way in ways:
        yield from cursor.space()
        if (yield from way(cursor, tools)):
            return True
        cursor.back(start)
    cursor.text(mark)
    return False


def closed(cursor: Cursor, mark: str) -> Steps[bool]:
    """Take white space and a mark where that comes next; else nothing."""
    start = cursor.at
    yield from cursor.space()
    if (yield from cursor.has(mark)):
        return True
    cursor.back(start)
    return False


def row(cursor: Cursor, tools: Tools, one: One, *between: str) -> Steps[bool]:
    """One call or more, each with white space and one of ``between`` (which may be "") before it but the first."""
    if not (yield from one(cursor, tools)):
        return False
    while True:
        start = cursor.at
        yield from cursor.space()
        for mark in between:
            if (yield from cursor.has(mark)):
                break
        else:
            cursor.back(start)
            return True
        yield from cursor.space()
        if not (yield from one(cursor, tools)):
            cursor.back(start)
            return True


def _objects(cursor: Cursor, tools: Tools) -> Steps[bool]:
    return (yield from row(cursor, tools, call_object, ",", ""))


def call_list(cursor: Cursor, tools: Tools) -> Steps[bool]:
    """``[{...}, {...}]``."""
    if not (yield from cursor.has("[")):
        return False
    yield from cursor.space()
    if not (yield from row(cursor, tools, call_object, ",")):
        return False
    yield from closed(cursor, "]")
    return True


def _row(cursor: Cursor, tools: Tools) -> Steps[bool]:
    return (yield from row(cursor, tools, call_object, ";", ","))


def _mistral_call(cursor: Cursor, tools: Tools) -> Steps[bool]:
    name = yield from cursor.name()
    if name not in tools:
        return False
    if (yield from cursor.has("[CALL_ID]")):
        yield from cursor.name()
    yield from cursor.has("[ARGS]")
    yield from cursor.space()
    return (yield from call_of(cursor, name))


def call_of(cursor: Cursor, name: str) -> Steps[bool]:
    """The arguments of a call whose name is known, a JSON object."""
    if (yield from cursor.look(1)) != "{":
        return False
    cursor.call(name)
    yield from cursor.pass_object()
    return True


def call_object(cursor: Cursor, tools: Tools) -> Steps[bool]:
    """``{"name": ..., "arguments": {...}}``, whatever the order; other keys do not matter.

    A call is given on as soon as its name and the beginning of its arguments are there.
    """
    if not (yield from cursor.has("{")):
        return False
    name = early = None
    given = False
    while True:
        yield from cursor.space()
        key = yield from cursor.string()
        if key is None:
            return given
        yield from cursor.space()
        if not (yield from cursor.has(":")):
            return given
        yield from cursor.space()
        if key in _ARGUMENTS and name is not None and not given and (yield from cursor.look(1)) == "{":
            given = True
            cursor.call(name)
            if not (yield from cursor.pass_object()):
                return True
        else:
            value = yield from cursor.value()
            if value is None:
                return given
            if key == "name" and name is None:
                name = _name(value)
                if name not in tools:
                    return given
            elif key in _ARGUMENTS:
                early = value
        yield from cursor.space()
        if (yield from cursor.has("}")):
            break
        if not (yield from cursor.has(",")):
            return given
    if not given:
        arguments = "{}" if early is None else _object(early)
        if name is None or arguments is None:
            return False
        cursor.call(name)
        cursor.arguments(arguments)
    return True


def _name(value: str) -> str | None:
    try:
        found = json.loads(value, strict=False)
    except ValueError:
        return None
    return found if isinstance(found, str) else None


def _object(value: str) -> str | None:
    """The text of an object: given as such, as the text of one in a string, or as null for one without members."""
    try:
        found = json.loads(value, strict=False)
        if isinstance(found, str):
            found = json.loads(found, strict=False)
    except (ValueError, RecursionError):
        return None
    found = {} if found is None else found
    return json.dumps(found, ensure_ascii=False) if isinstance(found, dict) else None
