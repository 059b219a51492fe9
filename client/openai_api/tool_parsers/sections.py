"""Formats whose calls stand between special tokens: DeepSeek V3, V3.1 and Kimi K2."""

from __future__ import annotations

from .cursor import Cursor, Steps
from .objects import One, Tools, call_of, closed, row, tried

_CALLS, _CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
_CALL, _SEP, _CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
_KIMI, _KIMI_END = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
_KIMI_CALL, _KIMI_SEP, _KIMI_CALL_END = "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"


def deepseek_v3(cursor: Cursor, tools: Tools) -> Steps[None]:
    """``<｜tool▁call▁begin｜>function<｜tool▁sep｜>name``, the arguments in a fence of ```` ```json ````."""
    yield from _section(cursor, tools, _CALLS, _v3, _CALLS_END)


def deepseek_v31(cursor: Cursor, tools: Tools) -> Steps[None]:
    """``<｜tool▁call▁begin｜>name<｜tool▁sep｜>{...}<｜tool▁call▁end｜>``."""
    yield from _section(cursor, tools, _CALLS, _v31, _CALLS_END)


def kimi_k2(cursor: Cursor, tools: Tools) -> Steps[None]:
    """``<|tool_call_begin|>functions.name:0<|tool_call_argument_begin|>{...}<|tool_call_end|>``."""
    yield from _section(cursor, tools, _KIMI, _kimi, _KIMI_END)


def _section(cursor: Cursor, tools: Tools, begin: str, one: One, end: str) -> Steps[None]:
    def calls(cursor: Cursor, tools: Tools) -> Steps[bool]:
        return (yield from row(cursor, tools, one, ""))

    while mark := (yield from cursor.until(begin)):
        if (yield from tried(cursor, tools, mark, calls)):
            yield from closed(cursor, end)


def _v3(cursor: Cursor, tools: Tools) -> Steps[bool]:
    if not (yield from cursor.has(_CALL)) or not (yield from cursor.has("function")):
        return False
    name = (yield from cursor.within("\n", "{")) if (yield from cursor.has(_SEP)) else None
    if name is None or name.strip() not in tools or not (yield from cursor.has("```json")):
        return False
    yield from cursor.space()
    if not (yield from call_of(cursor, name.strip())):
        return False
    yield from closed(cursor, "```")
    yield from closed(cursor, _CALL_END)
    return True


def _v31(cursor: Cursor, tools: Tools) -> Steps[bool]:
    name = (yield from cursor.within(_SEP, "{\n")) if (yield from cursor.has(_CALL)) else None
    if name is None or name.strip() not in tools:
        return False
    yield from cursor.space()
    if not (yield from call_of(cursor, name.strip())):
        return False
    yield from closed(cursor, _CALL_END)
    return True


def _kimi(cursor: Cursor, tools: Tools) -> Steps[bool]:
    found = (yield from cursor.within(_KIMI_SEP, "{\n")) if (yield from cursor.has(_KIMI_CALL)) else None
    if found is None:
        return False
    name = found.strip().removeprefix("functions.").partition(":")[0]
    if name not in tools:
        return False
    yield from cursor.space()
    if not (yield from call_of(cursor, name)):
        return False
    yield from closed(cursor, _KIMI_CALL_END)
    return True
