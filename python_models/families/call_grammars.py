"""Grammars that hold answers to calls that parse and fit their schemas, as xgrammar's structural tags.

One form for each way in which a model writes calls; client/openai_api/tool_parsers reads what they allow.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from ..contract.answer import Marks
from ..contract.errors import TriptychError, invalid
from ..contract.sampling import Grammar
from ..contract.tools import Tool

Format = dict[str, Any]
"""A format of xgrammar's structural tags, as JSON."""

# in a row between two tokens of JSON, see language_model/engine/grammar.py
_MAX_WHITESPACE = 1


@dataclass(frozen=True)
class Form:
    """How calls stand in a text; NAME is the function's name.

    Attributes:
        begin, end: around the arguments of one call.
        between: two calls.
        before, after: all of them.
        style: of arguments, as xgrammar calls it.
        numbered: their number stands between the name and the arguments, and this behind it.
    """

    begin: str
    end: str
    between: str = ""
    before: str = ""
    after: str = ""
    style: str = "json"
    numbered: str = ""


_V3, _SEP, _END = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
_CALLS, _CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
_OBJECT = '{"name": "NAME", "arguments": '

FORMS: Mapping[str, Form] = MappingProxyType(
    {
        "deepseek_v3": Form(
            f"{_V3}function{_SEP}NAME\n```json\n", f"\n```{_END}", "\n", before=_CALLS, after=_CALLS_END
        ),
        "deepseek_v31": Form(f"{_V3}NAME{_SEP}", _END, before=_CALLS, after=_CALLS_END),
        "glm45": Form("<tool_call>NAME\n", "</tool_call>", "\n", style="glm_xml"),
        "hermes": Form(f"<tool_call>\n{_OBJECT}", "}\n</tool_call>", "\n"),
        "json": Form(_OBJECT, "}", ", ", before="[", after="]"),
        "kimi_k2": Form(
            "<|tool_call_begin|>functions.NAME:",
            "<|tool_call_end|>",
            before="<|tool_calls_section_begin|>",
            after="<|tool_calls_section_end|>",
            numbered="<|tool_call_argument_begin|>",
        ),
        "llama3_json": Form('{"name": "NAME", "parameters": ', "}", "; "),
        "mistral": Form(_OBJECT, "}", ", ", before="[TOOL_CALLS][", after="]"),
        "mistral_args": Form("[TOOL_CALLS]NAME[ARGS]", ""),
        "phi4": Form(_OBJECT, "}", ", ", before="functools[", after="]"),
        "phi4_token": Form(_OBJECT, "}", ", ", before="<|tool_call|>[", after="]<|/tool_call|>"),
        "qwen3_coder": Form("<tool_call>\n<function=NAME>\n", "\n</function>\n</tool_call>", "\n", style="qwen_xml"),
    }
)
_ALONE = frozenset({"json"})
"""Forms that nothing tells from a text that is no call."""


def calls(form: str, tools: Sequence[Tool], parallel: bool, strict: bool = False) -> Format:
    """One call or more, and nothing else.

    Args:
        form: a key of :data:`FORMS`.
        tools: what may be called.
        parallel: more than one.
        strict: all arguments fit their schemas, not only those of functions that are strict.
    """
    own = FORMS[form]
    row = {
        "type": "tags_with_separator",
        "tags": [_tag(own, tool, strict) for tool in tools],
        "separator": own.between,
        "at_least_one": True,
        "stop_after_first": not parallel,
    }
    if not own.before:
        return row
    return {"type": "sequence", "elements": [_text(own.before), row, _text(own.after)]}


def text_and_calls(form: str, tools: Sequence[Tool], parallel: bool) -> Format:
    """Any text with calls in it."""
    own = FORMS[form]
    if own.before:
        row = calls(form, tools, parallel)["elements"][1]
        tags = [{"type": "tag", "begin": own.before, "content": row, "end": own.after}]
        return {"type": "triggered_tags", "triggers": [own.before], "tags": tags, "stop_after_first": not parallel}
    tags = [_tag(own, tool, False) for tool in tools]
    trigger = own.begin.partition("NAME")[0]
    return {"type": "triggered_tags", "triggers": [trigger], "tags": tags, "stop_after_first": not parallel}


def write(form: str, made: Sequence[tuple[str, str]]) -> str:
    """Calls as a model writes them, "" where that cannot be told. Args: (name, arguments as JSON text) of each."""
    own = FORMS.get(form)
    if own is None or own.style != "json" or own.numbered:
        return ""
    return own.before + own.between.join(own.begin.replace("NAME", n) + text + own.end for n, text in made) + own.after


def constrainable(form: str) -> bool:
    """Whether calls can be told from free text around them."""
    return form in FORMS and form not in _ALONE


def of_text(grammar: Grammar) -> Format:
    """A grammar of a request as a format."""
    if grammar.type == "structural_tag":
        tag = json.loads(grammar.value)
        if not isinstance(tag, dict) or not isinstance(tag.get("format"), dict):
            raise invalid("grammar: a structural_tag must be an object with a format, which is an object", "grammar")
        found: Format = tag["format"]
        return found
    if grammar.type == "regex":
        return {"type": "regex", "pattern": grammar.value}
    if grammar.type == "ebnf":
        return {"type": "grammar", "grammar": grammar.value}
    schema = {"type": "object", "additionalProperties": True} if grammar.type == "json_object" else None
    return _json(json.loads(grammar.value) if schema is None else schema)


def after_reasoning(marks: Marks, begun: bool, body: Format) -> Format:
    """Reasoning, then what is asked for. Args: ``begun``: the prompt ends inside reasoning; else there may be none."""
    begin = "" if begun else marks.start
    thought: Format = {"type": "tag", "begin": begin, "content": {"type": "any_text"}, "end": marks.end}
    thought = {"type": "sequence", "elements": [thought, {"type": "regex", "pattern": "\\n{0,2}"}]}
    if not begun:
        thought = {"type": "optional", "content": thought}
    return {"type": "sequence", "elements": [thought, body]}


def whole(body: Format) -> Grammar:
    """The grammar of an answer.

    Raises:
        TriptychError: TOO_LARGE or INVALID_REQUEST where the schemas are too much for one.
    """
    try:
        return Grammar.from_json(
            {"type": "structural_tag", "value": {"type": "structural_tag", "format": body}}, "tools"
        )
    except TriptychError as error:
        # too large, or nested too deep
        raise replace(error, message=f"the grammar of the answer: {error.message}", param="tools") from None


def _tag(form: Form, tool: Tool, strict: bool) -> Format:
    function = tool["function"]
    schema = _schema(function) if strict or function.get("strict") else {"type": "object", "additionalProperties": True}
    content = _json(schema, form.style)
    if form.numbered:
        number = {"type": "regex", "pattern": "[0-9]{1,3}"}
        content = {"type": "sequence", "elements": [number, _text(form.numbered), content]}
    begin = form.begin.replace("NAME", function["name"])
    return {"type": "tag", "begin": begin, "content": content, "end": form.end}


def _schema(function: Mapping[str, Any]) -> dict[str, Any]:
    schema = function.get("parameters")
    if schema is None:
        return {"type": "object", "properties": {}}
    if schema.keys() & {"type", "properties", "$ref", "anyOf", "oneOf", "allOf"}:
        return dict(schema)
    return {**schema, "type": "object", "additionalProperties": True}


def _json(schema: Any, style: str = "json") -> Format:
    return {"type": "json_schema", "json_schema": schema, "style": style, "max_whitespace_cnt": _MAX_WHITESPACE}


def _text(value: str) -> Format:
    return {"type": "const_string", "value": value}
