"""Formats whose arguments are tags with plain text in them: Qwen3-Coder and GLM-4.5."""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from typing import Any

from .cursor import Cursor, Steps
from .objects import Tools, closed, tried


def qwen3_coder(cursor: Cursor, tools: Tools) -> Steps[None]:
    """``<tool_call><function=name><parameter=key>value</parameter></function></tool_call>``, lines between."""
    while mark := (yield from cursor.until("<tool_call>", "<function=")):
        if mark == "<function=":
            # some answers leave the outer tag out
            cursor.unread(mark)
            if not (yield from tried(cursor, tools, "", _function)):
                yield from cursor.skip(mark)
        elif (yield from tried(cursor, tools, mark, _function)):
            yield from closed(cursor, "</tool_call>")


def glm45(cursor: Cursor, tools: Tools) -> Steps[None]:
    """``<tool_call>name`` and ``<arg_key>key</arg_key><arg_value>value</arg_value>`` for each argument."""
    while mark := (yield from cursor.until("<tool_call>")):
        yield from tried(cursor, tools, mark, _glm_call)


def _function(cursor: Cursor, tools: Tools) -> Steps[bool]:
    name = (yield from cursor.within(">", "\n<{")) if (yield from cursor.has("<function=")) else None
    if name is None or name not in tools:
        return False
    cursor.call(name)
    cursor.arguments("{")
    count = 0
    while (yield from closed(cursor, "<parameter=")):
        key = yield from cursor.within(">", "\n<")
        if key is None:
            break
        if not (yield from _argument(cursor, tools[name], key, count, "</parameter>", True)):
            return True
        count += 1
    yield from _end(cursor, "</function>")
    return True


def _glm_call(cursor: Cursor, tools: Tools) -> Steps[bool]:
    name = yield from cursor.name()
    start = cursor.at
    begun = (yield from closed(cursor, "<arg_key>")) or (yield from closed(cursor, "</tool_call>"))
    if name not in tools or not begun:
        return False
    cursor.back(start)
    cursor.call(name)
    cursor.arguments("{")
    count = 0
    while (yield from closed(cursor, "<arg_key>")):
        key = yield from cursor.within("</arg_key>", "\n<")
        if key is None or not (yield from closed(cursor, "<arg_value>")):
            break
        if not (yield from _argument(cursor, tools[name], key.strip(), count, "</arg_value>", False)):
            return True
        count += 1
    yield from _end(cursor, "</tool_call>")
    return True


def _end(cursor: Cursor, mark: str) -> Steps[None]:
    """The end of the arguments; they stay open where the text was cut off before it."""
    if (yield from closed(cursor, mark)) or (yield from cursor.look(1)):
        cursor.arguments("}")


def _argument(cursor: Cursor, schema: Mapping[str, Any], key: str, count: int, end: str, trim: bool) -> Steps[bool]:
    """One argument up to its closing tag; False where the text ends before."""
    cursor.arguments(f"{', ' if count else ''}{json.dumps(key, ensure_ascii=False)}: ")
    properties = schema.get("properties")
    own = properties.get(key) if isinstance(properties, Mapping) else None
    types = types_of(own)
    # what a grammar holds to one of a few texts may have white space around it
    exact = isinstance(own, Mapping) and not own.keys().isdisjoint(("enum", "const", "pattern", "format"))
    if types == {"string"} and not exact:
        return (yield from cursor.pass_string(end, trim))
    raw = yield from cursor.within(end)
    if raw is None:
        cursor.pass_rest()
        return False
    if exact:
        raw = raw.strip()
    cursor.arguments(value_of(raw.removeprefix("\n").removesuffix("\n") if trim else raw, types))
    return True


def types_of(schema: Any) -> set[str]:
    """JSON types that a schema allows, as far as it says so."""
    if not isinstance(schema, Mapping):
        return set()
    if isinstance(kind := schema.get("type"), (str, list)):
        return {kind} if isinstance(kind, str) else {item for item in kind if isinstance(item, str)}
    if isinstance(allowed := schema.get("enum"), list) and all(isinstance(item, str) for item in allowed):
        return {"string"}
    ways = schema.get("anyOf", schema.get("oneOf"))
    return set[str]().union(*map(types_of, ways)) if isinstance(ways, list) else set()


def value_of(raw: str, types: set[str]) -> str:
    """The JSON text of a value that stands as plain text: of an allowed type where it is one, else a string."""
    value: Any = raw
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError):
        try:
            value = ast.literal_eval(raw.strip())
            json.dumps(value)
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            value = raw
    if "string" in types and not (value is None and "null" in types) and not isinstance(value, (dict, list)):
        value = raw
    return json.dumps(value, ensure_ascii=False)
