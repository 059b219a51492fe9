"""Every tool parser: what models write becomes calls, everything else stays text, however the text is cut."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from triptych.client.openai_api.tool_parsers import TOOL_PARSERS, AnswerParser, Arguments, Call, Event, Reasoning, Text
from triptych.python_models.contract import answer
from triptych.python_models.contract.answer import Syntax

TOOLS: dict[str, dict[str, Any]] = {
    "weather": {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer"},
            "units": {"enum": ["C", "F"]},
            "places": {"type": "array", "items": {"type": "string"}},
            "note": {"type": ["string", "null"]},
        },
    },
    "now": {},
}
V3, V31 = "<｜tool▁call▁begin｜>function<｜tool▁sep｜>", "<｜tool▁call▁begin｜>"
SEP, CALL_END = "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
CALLS, CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
# by parser: a call of weather in Rome for two days, and one of now, as a model writes them
TWO = {
    "hermes": '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome", "days": 2}}\n</tool_call>\n<tool_call>\n'
    '{"name": "now", "arguments": {}}\n</tool_call>',
    "qwen3_coder": "<tool_call>\n<function=weather>\n<parameter=city>\nRome\n</parameter>\n<parameter=days>\n2\n"
    "</parameter>\n</function>\n</tool_call>\n<tool_call>\n<function=now>\n</function>\n</tool_call>",
    "glm45": "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Rome</arg_value>\n<arg_key>days</arg_key>\n"
    "<arg_value>2</arg_value>\n</tool_call>\n<tool_call>now\n</tool_call>",
    "llama3_json": '<|python_tag|>{"name": "weather", "parameters": {"city": "Rome", "days": 2}}; '
    '{"name": "now", "parameters": {}}',
    "pythonic": "[weather(city='Rome', days=2), now()]",
    "mistral": '[TOOL_CALLS][{"name": "weather", "arguments": {"city": "Rome", "days": 2}}, '
    '{"name": "now", "arguments": {}}]',
    "deepseek_v3": f'{CALLS}{V3}weather\n```json\n{{"city": "Rome", "days": 2}}\n```{CALL_END}\n{V3}now\n```json\n{{}}'
    f"\n```{CALL_END}{CALLS_END}",
    "deepseek_v31": f'{CALLS}{V31}weather{SEP}{{"city": "Rome", "days": 2}}{CALL_END}{V31}now{SEP}{{}}{CALL_END}'
    f"{CALLS_END}",
    "gemma": '```tool_code\nweather(city="Rome", days=2)\nnow()\n```',
    "functiongemma": "<start_function_call>call:weather{city:<escape>Rome<escape>,days:2}<end_function_call>"
    "<start_function_call>call:now{}<end_function_call>",
    "gemma4": '<|tool_call>call:weather{city:<|"|>Rome<|"|>,days:2}<tool_call|><|tool_call>call:now{}<tool_call|>',
    "phi4": '<|tool_call|>[{"name": "weather", "arguments": {"city": "Rome", "days": 2}}, '
    '{"name": "now", "arguments": {}}]<|/tool_call|>',
    "kimi_k2": "<|tool_calls_section_begin|><|tool_call_begin|>functions.weather:0<|tool_call_argument_begin|>"
    '{"city": "Rome", "days": 2}<|tool_call_end|><|tool_call_begin|>functions.now:1<|tool_call_argument_begin|>{}'
    "<|tool_call_end|><|tool_calls_section_end|>",
    "json": '[{"name": "weather", "arguments": {"city": "Rome", "days": 2}}, {"name": "now", "arguments": {}}]',
}
CALLED = [("weather", {"city": "Rome", "days": 2}), ("now", {})]
# other ways to write them: (parser, text, calls, content)
OTHERS: list[tuple[str, str, list[Any], str]] = [
    ("hermes", '<tool_call>{"arguments": {"city": "}\\""}, "name": "weather"}', [("weather", {"city": '}"'})], ""),
    (
        "hermes",
        '<tool_call>{"name": "weather", "arguments": "{\\"days\\": 1}"}</tool_call>',
        [("weather", {"days": 1})],
        "",
    ),
    ("hermes", '<tool_call>{"name": "now"}</tool_call> and so on', [("now", {})], " and so on"),
    ("hermes", '<tool_call>[{"name": "now"}, {"name": "now"}]</tool_call>', [("now", {})] * 2, ""),
    ("hermes", '<tool_call>{"name": "now"}\n{"id": 7, "name": "now"}</tool_call>', [("now", {})] * 2, ""),
    (
        "hermes",
        '<tool_call>\n{"name": "weather", "arguments": {"city": "a\nb\tc"}}',
        [("weather", {"city": "a\nb\tc"})],
        "",
    ),
    ("llama3_json", ' {"name": "now", "parameters": {}}', [("now", {})], ""),
    ("llama3_json", 'So: {"name": "now", "parameters": {}}', [("now", {})], "So:"),
    ("llama3_json", '{"type": "function", "name": "now", "parameters": null}', [("now", {})], ""),
    (
        "mistral",
        '[TOOL_CALLS]weather[ARGS]{"days": 1}[TOOL_CALLS]now[CALL_ID]ab[ARGS]{}',
        [("weather", {"days": 1}), CALLED[1]],
        "",
    ),
    ("mistral", 'Look. [TOOL_CALLS] [{"name": "now", "arguments": {}}]', [("now", {})], "Look."),
    ("phi4", 'functools[{"name": "now", "arguments": {}}]', [("now", {})], ""),
    (
        "pythonic",
        "<|python_start|>[weather(places=['a', \"b)\"], note=None)]<|python_end|>",
        [("weather", {"places": ["a", "b)"], "note": None})],
        "",
    ),
    ("pythonic", "See [1] and [now()] there", [("now", {})], "See [1] and there"),
    ("gemma", "[weather(days=true)]", [("weather", {"days": True})], ""),
    ("gemma", "```tool_code\nprint(now())\n```", [("now", {})], ""),
    (
        "qwen3_coder",
        '<function=weather>\n<parameter=city>\n two\n"lines"\n</parameter>\n<parameter=note>\nnull\n'
        "</parameter>\n<parameter=places>\n['a']\n</parameter>\n</function>",
        [("weather", {"city": ' two\n"lines"', "note": None, "places": ["a"]})],
        "",
    ),
    (
        "glm45",
        "<tool_call>weather<arg_key>units</arg_key><arg_value>C</arg_value><arg_key>x</arg_key><arg_value>[1]"
        "</arg_value></tool_call>",
        [("weather", {"units": "C", "x": [1]})],
        "",
    ),
    (
        "gemma4",
        '<|tool_call>call:weather{places:[<|"|>a,}<|"|>,<|"|>b<|"|>],x:{y:true,z:-1.5}}<tool_call|>',
        [("weather", {"places": ["a,}", "b"], "x": {"y": True, "z": -1.5}})],
        "",
    ),
    ("json", '{"name": "now", "parameters": {}}', [("now", {})], ""),
]
# what is nearly a call stays text, all of it
BROKEN: list[tuple[str, str]] = [
    ("hermes", "<tool_call>now()</tool_call>"),
    ("hermes", '<tool_call>{"name": "nobody", "arguments": {}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "weather", "arguments": 7}</tool_call>'),
    ("hermes", "<tool_call"),
    ("hermes", "a < b <tool_call>"),
    ("hermes", '<tool_call>{"name": "now"'),
    ("llama3_json", '{"name": "Ada", "age": 7}'),
    ("llama3_json", "<|python_tag|>print(1)"),
    ("llama3_json", ' {"a": 1'),
    ("mistral", "[TOOL_CALLS] nothing"),
    ("mistral", '[TOOL_CALLS][{"name": 1}]'),
    ("mistral", "[TOOL_"),
    ("phi4", "functools[1]"),
    ("pythonic", "[weather(city=x)]"),
    ("pythonic", "[weather(*a)] [now(1)] [now("),
    ("gemma", "```tool_code\n1 + 1\n```"),
    ("qwen3_coder", "<tool_call>\n<function=nobody>\n</function>"),
    ("qwen3_coder", "<tool_call><function=now"),
    ("glm45", "<tool_call>now and then</tool_call>"),
    ("glm45", "<tool_call>nobody</tool_call>"),
    ("deepseek_v3", f"{CALLS}{V3}now\n{{}}{CALL_END}"),
    ("deepseek_v31", f"{CALLS}{V31}now{CALL_END}"),
    ("kimi_k2", "<|tool_calls_section_begin|>x"),
    ("functiongemma", "<start_function_call>call:now{x}<end_function_call>"),
    ("gemma4", "<|tool_call>call:now{"),
    ("json", " [1, 2]"),
    ("json", "no"),
]


def parse(syntax: Syntax, pieces: Sequence[str], **options: Any) -> list[Event]:
    parser = AnswerParser(syntax, TOOLS, **options)
    events = [event for piece in pieces for event in parser.feed(piece)]
    return events + parser.finish()


def content(events: Sequence[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, Text))


def reasoning(events: Sequence[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, Reasoning))


def raw_calls(events: Sequence[Event]) -> list[tuple[str, str]]:
    calls: list[tuple[str, str]] = []
    for event in events:
        if isinstance(event, Call):
            calls.append((event.name, ""))
        elif isinstance(event, Arguments):
            calls[-1] = calls[-1][0], calls[-1][1] + event.text
    return calls


def calls(events: Sequence[Event]) -> list[tuple[str, Any]]:
    return [(name, json.loads(text)) for name, text in raw_calls(events)]


def said(events: Sequence[Event]) -> Any:
    """What a list of events says, with pieces joined."""
    return reasoning(events), content(events), raw_calls(events)


def cut(text: str, places: Sequence[int]) -> list[str]:
    at = [0, *sorted(place % (len(text) + 1) for place in places), len(text)]
    return [text[a:b] for a, b in pairwise(at)]


def test_there_is_a_parser_for_each_name_and_an_example_for_each_parser() -> None:
    assert set(TOOL_PARSERS) == set(answer.TOOL_PARSERS) == set(TWO)
    assert set(answer.TOOL_PARSER_ALIASES.values()) <= set(TOOL_PARSERS)
    assert set(answer.REASONING_PARSER_ALIASES.values()) <= set(answer.REASONING_PARSERS)


@pytest.mark.parametrize("name", TWO)
def test_two_calls(name: str) -> None:
    events = parse(Syntax(name), [TWO[name]])
    assert calls(events) == CALLED
    assert content(events) == ""


@pytest.mark.parametrize("name", [name for name in TWO if name != "json"])
def test_text_before_and_after_calls_is_content(name: str) -> None:
    events = parse(Syntax(name), [f"Let me see.\n\n{TWO[name]} That was it.\n"])
    assert calls(events) == CALLED
    assert content(events) == "Let me see. That was it."


@pytest.mark.parametrize(("name", "text", "expected", "rest"), OTHERS)
def test_other_ways_to_write_calls(name: str, text: str, expected: list[Any], rest: str) -> None:
    events = parse(Syntax(name), [text])
    assert calls(events) == expected
    assert content(events) == rest
    assert said(parse(Syntax(name), list(text))) == said(events)


@pytest.mark.parametrize(("name", "text"), BROKEN)
def test_what_is_no_call_stays_text(name: str, text: str) -> None:
    for pieces in ([text], list(text), [text, " \n"]):
        events = parse(Syntax(name), pieces)
        assert calls(events) == []
        assert content(events) == "".join(pieces)


@pytest.mark.parametrize("name", TWO)
def test_a_broken_call_does_not_hide_the_next(name: str) -> None:
    if name == "json":
        return
    text = TWO[name]
    events = parse(Syntax(name), [text[: len(text) // 5], "\n", text])
    assert [item[0] for item in raw_calls(events)][-2:] == ["weather", "now"]


@settings(max_examples=40, deadline=None)
@given(name=st.sampled_from(sorted(TWO)), places=st.lists(st.integers(0, 500), max_size=12), end=st.integers(0, 500))
def test_cuts_do_not_matter(name: str, places: list[int], end: int) -> None:
    """Neither those of pieces, nor where a limit of tokens ends the answer."""
    text = f"{TWO[name]} {TWO[name]} so" if name != "json" else TWO[name]
    text = text[: end % (len(text) + 1)]
    assert said(parse(Syntax(name), cut(text, places))) == said(parse(Syntax(name), [text]))


PIECES = st.sampled_from(
    sorted(
        {"{", "}", "[", "]", '"', "\\", ":", ",", " ", "\n", "(", ")", "=", "now", "weather", '{"name": "now"'}
        | {
            '"name"',
            '"arguments"',
            "</think>",
            "<think>",
            "é",
            "functools",
            "function",
            "```json",
            "```",
            "<parameter=a>",
        }
        | {"<function=now>", "</function>", "<｜tool▁call▁begin｜>"}
        | {t for marks in answer.TOOL_PARSERS.values() for t in marks}
    )
)


@settings(max_examples=150, deadline=None)
@given(
    name=st.sampled_from(sorted(TWO)),
    parts=st.lists(PIECES, max_size=30),
    places=st.lists(st.integers(0, 400), max_size=8),
    thinks=st.sampled_from(["", "qwen3"]),
)
def test_whatever_is_written_cuts_do_not_matter_and_plain_text_is_kept(
    name: str, parts: list[str], places: list[int], thinks: str
) -> None:
    text = "".join(parts)
    syntax = Syntax(name, thinks, bool(thinks) and len(parts) % 2 == 0)
    whole = parse(syntax, [text])
    assert said(parse(syntax, cut(text, places))) == said(whole)
    assert said(parse(syntax, list(text), stream_reasoning=False)) == said(whole)
    if not thinks and not raw_calls(whole):
        assert content(whole) == text


def test_arguments_come_while_they_are_written() -> None:
    parser = AnswerParser(Syntax("hermes"), TOOLS)
    assert parser.feed('<tool_call>{"name": "weather", "argum') == []
    assert parser.feed('ents": {"ci') == [Call("weather"), Arguments('{"ci')]
    assert parser.feed('ty": "Ro') == [Arguments('ty": "Ro')]
    assert parser.feed('me"}}</tool') == [Arguments('me"}')]
    assert parser.finish() == [Text("</tool")]


def test_long_strings_of_tagged_formats_come_while_they_are_written() -> None:
    parser = AnswerParser(Syntax("qwen3_coder"), TOOLS)
    assert parser.feed("<tool_call><function=weather><parameter=city>a\nb") != []
    assert parser.feed("cd") == [Arguments("cd")]
    assert parser.finish() == []


def test_text_without_calls_is_not_held() -> None:
    parser = AnswerParser(Syntax("hermes"), TOOLS)
    assert parser.feed("Hello <b") == [Text("Hello <b")]
    assert parser.feed(" you <") == [Text(" you")]
    assert parser.feed("tool_cat>") == [Text(" <tool_cat>")]
    assert parser.finish() == []


THINK = [
    ("qwen3", False, "<think>\nhm\n</think>\n\nyes", "hm", "yes"),
    ("qwen3", True, "hm\n</think>\n\nyes", "hm", "yes"),
    ("qwen3", True, "<think>hm</think>yes", "hm", "yes"),
    ("qwen3", True, "never ends\n", "never ends", ""),
    ("qwen3", False, " yes <think>no</think>", "", " yes <think>no</think>"),
    ("qwen3", False, "<thin", "", "<thin"),
    ("kimi", False, "◁think▷hm ◁/think▷yes", "hm", "yes"),
    ("mistral", False, "[THINK]hm[/THINK]yes", "hm", "yes"),
    ("gemma4", False, "<|channel>thought\nhm\n<channel|>yes", "hm", "yes"),
]


@pytest.mark.parametrize(("name", "reasons", "text", "thought", "rest"), THINK)
def test_reasoning(name: str, reasons: bool, text: str, thought: str, rest: str) -> None:
    for pieces in ([text], list(text)):
        events = parse(Syntax("", name, reasons), pieces)
        assert (reasoning(events), content(events)) == (thought, rest)


def test_a_call_after_reasoning() -> None:
    text = f"I must <tool_call> now.</think>\n\n{TWO['hermes']}"
    events = parse(Syntax("hermes", "qwen3", True), list(text))
    assert (reasoning(events), content(events), calls(events)) == ("I must <tool_call> now.", "", CALLED)


def test_reasoning_that_is_not_to_be_streamed_comes_in_one_piece() -> None:
    events = parse(Syntax("", "qwen3", True), list("one two\nthree</think>yes"), stream_reasoning=False)
    assert events[0] == Reasoning("one two\nthree")
    assert content(events) == "yes"
    assert parse(Syntax("", "qwen3", True), list("never ends"), stream_reasoning=False) == [Reasoning("never ends")]
