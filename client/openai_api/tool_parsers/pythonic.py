"""Formats whose calls are written as in Python: Llama 4, Gemma 3, and others that follow them."""

from __future__ import annotations

import ast
import json
from typing import Any

from .cursor import Cursor, Steps
from .objects import Tools, closed, row, tried

_PAIRS = {"(": ")", "[": "]", "{": "}"}
_WORDS = {"true": True, "false": False, "null": None}


def pythonic(cursor: Cursor, tools: Tools) -> Steps[None]:
    """``[name(key=value), ...]``, also between ``<|python_start|>`` and ``<|python_end|>``."""
    while mark := (yield from cursor.until("<|python_start|>", "[")):
        if mark == "[":
            cursor.unread(mark)
            if not (yield from tried(cursor, tools, "", _array)):
                yield from cursor.skip(mark)
        elif (yield from tried(cursor, tools, mark, _array, _row)):
            yield from closed(cursor, "<|python_end|>")


def gemma(cursor: Cursor, tools: Tools) -> Steps[None]:
    """Calls in a fence of ```` ```tool_code ````, one in each line or in an array; or an array by itself."""
    while mark := (yield from cursor.until("```tool_code", "[")):
        if mark == "[":
            cursor.unread(mark)
            if not (yield from tried(cursor, tools, "", _array)):
                yield from cursor.skip(mark)
        elif (yield from tried(cursor, tools, mark, _array, _row)):
            yield from closed(cursor, "```")


def _array(cursor: Cursor, tools: Tools) -> Steps[bool]:
    if not (yield from cursor.has("[")):
        return False
    yield from cursor.space()
    if not (yield from row(cursor, tools, _call, ",")):
        return False
    yield from closed(cursor, "]")
    return True


def _row(cursor: Cursor, tools: Tools) -> Steps[bool]:
    return (yield from row(cursor, tools, _call, ";", ""))


def _call(cursor: Cursor, tools: Tools) -> Steps[bool]:
    """One call, given on when it is complete."""
    printed = yield from cursor.has("print(")
    name = yield from cursor.name("_-")
    if name not in tools or (yield from cursor.look(1)) != "(":
        return False
    text = yield from _bracketed(cursor)
    arguments = None if text is None else _arguments(text)
    if arguments is None:
        return False
    if printed and not (yield from closed(cursor, ")")):
        return False
    cursor.call(name)
    cursor.arguments(arguments)
    return True


def _bracketed(cursor: Cursor) -> Steps[str | None]:
    """Take from an opening bracket to the one that closes it."""
    out: list[str] = []
    open_: list[str] = []
    quote = ""
    while char := (yield from cursor.look(1)):
        cursor.take(char)
        out.append(char)
        if quote:
            if char == "\\":
                following = yield from cursor.look(1)
                cursor.take(following)
                out.append(following)
            elif char == quote:
                quote = ""
        elif char in "\"'":
            quote = char
        elif char in _PAIRS:
            open_.append(_PAIRS[char])
        elif char in ")]}":
            if open_.pop() != char:
                return None
            if not open_:
                return "".join(out)
    return None


def _arguments(text: str) -> str | None:
    """The JSON text of ``(key=value, ...)``."""
    try:
        call = ast.parse(f"f{text}", mode="eval").body
        if not isinstance(call, ast.Call) or call.args:
            return None
        return json.dumps({str(item.arg): _value(item.value) for item in call.keywords if _named(item)})
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return None


def _named(item: ast.keyword) -> bool:
    if item.arg is None:
        raise ValueError("**kwargs")
    return True


def _value(node: ast.expr) -> Any:
    """A literal, also with JSON's words in it."""
    if isinstance(node, ast.Name) and node.id in _WORDS:
        return _WORDS[node.id]
    if isinstance(node, (ast.List, ast.Tuple)):
        return [_value(item) for item in node.elts]
    if isinstance(node, ast.Dict):
        return {str(ast.literal_eval(k)): _value(v) for k, v in zip(node.keys, node.values, strict=True) if k}
    return ast.literal_eval(node)
