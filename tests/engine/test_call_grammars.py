"""Grammars of calls: what they allow is what the parsers read, and it fits the schemas."""

from __future__ import annotations

import json
import random
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from triptych.client.openai_api.answers import Answers
from triptych.python_models.contract.answer import Syntax
from triptych.python_models.contract.delta import Delta
from triptych.python_models.contract.errors import TriptychError
from triptych.python_models.contract.request import TemplateInputs
from triptych.python_models.contract.sampling import Grammar
from triptych.python_models.contract.tools import Calling
from triptych.python_models.families.answers import Written
from triptych.python_models.families.call_grammars import FORMS, constrainable

CHECKPOINT = Path(__file__).parents[2] / "python_models" / "builtin" / "checkpoint"


def function(name: str, strict: bool = False, **properties: Any) -> dict[str, Any]:
    schema = {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }
    return {"type": "function", "function": {"name": name, "parameters": schema, "strict": strict}}


COLOUR = {"enum": ["red", "green"]}
TOOLS = (function("paint", colour=COLOUR, times={"type": "integer", "minimum": 1, "maximum": 9}), function("stop"))


@pytest.fixture(scope="module")
def compiler() -> Any:
    import transformers
    import xgrammar

    tokenizer = transformers.AutoTokenizer.from_pretrained(CHECKPOINT)
    return xgrammar.GrammarCompiler(xgrammar.TokenizerInfo.from_huggingface(tokenizer), max_threads=1), tokenizer


def matcher(compiler: Any, grammar: Grammar) -> Any:
    import xgrammar

    assert Grammar.from_json({"type": grammar.type, "value": grammar.value}, "grammar").type == "structural_tag"
    return xgrammar.GrammarMatcher(compiler[0].compile_structural_tag(grammar.value))


def sample(compiler: Any, grammar: Grammar, seed: int, limit: int = 600) -> str:
    """A text that the grammar allows, of tokens chosen by chance; ends are taken where they are allowed."""
    state, tokenizer = matcher(compiler, grammar), compiler[1]
    bits = np.empty((1, -(-len(tokenizer) // 32)), np.int32)
    rng, ids = random.Random(seed), list[int]()
    while not state.is_terminated() and len(ids) < limit:
        state.fill_next_token_bitmask(bits)
        allowed = np.flatnonzero(np.unpackbits(bits.view(np.uint8), bitorder="little")).tolist()
        end = [token for token in allowed if token == tokenizer.eos_token_id]
        token = end[0] if end else rng.choice(allowed)
        assert state.accept_token(token)
        if token != tokenizer.eos_token_id:
            ids.append(token)
    assert state.is_terminated(), tokenizer.decode(ids)
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def allowed(compiler: Any, grammar: Grammar, text: str) -> bool:
    """Whether it is a whole answer."""
    state = matcher(compiler, grammar)
    return bool(state.accept_string(text) and state.is_completed())


def message(syntax: Syntax, text: str) -> dict[str, Any]:
    answers = Answers(TOOLS)
    answers.syntax = syntax
    return answers.message(Delta(text, (1,), (), "stop"))


def parser_of(form: str) -> str:
    return form.removesuffix("_args").removesuffix("_token")


@pytest.mark.parametrize("form", FORMS)
def test_required_calls_parse_and_fit(compiler: Any, form: str) -> None:
    inputs = TemplateInputs(TOOLS, calling=Calling(True, False))
    syntax = Syntax(parser_of(form))
    grammar = Written(syntax, form).constrain(inputs, None)
    assert grammar is not None
    names = set()
    for seed in range(12):
        found = message(syntax, sample(compiler, grammar, seed))
        assert found["content"] is None
        for call in found["tool_calls"]:
            names.add(call["function"]["name"])
            arguments = json.loads(call["function"]["arguments"])
            if call["function"]["name"] == "paint":
                assert arguments["colour"] in COLOUR["enum"]
                assert arguments["times"] in range(1, 10)
            else:
                assert arguments == {}
    assert names == {"paint", "stop"}


@pytest.mark.parametrize("form", FORMS)
def test_several_calls_only_where_they_are_allowed(compiler: Any, form: str) -> None:
    own = FORMS[form]
    number = f"0{own.numbered}" if own.numbered else ""
    arguments = "{}" if own.style == "json" else ""
    one = own.begin.replace("NAME", "stop") + number + arguments + own.end
    for count in (0, 1, 2):
        text = own.before + own.between.join([one] * count) + own.after
        for parallel in (False, True):
            inputs = TemplateInputs(TOOLS, calling=Calling(True, parallel))
            grammar = Written(Syntax(parser_of(form)), form).constrain(inputs, None)
            assert grammar is not None
            assert allowed(compiler, grammar, text) is (count == 1 or (count == 2 and parallel))
        if count:
            assert len(message(Syntax(parser_of(form)), text)["tool_calls"]) == count


@pytest.mark.parametrize("form", [form for form in FORMS if constrainable(form)])
def test_free_text_with_strict_calls(compiler: Any, form: str) -> None:
    tools = (function("paint", True, colour=COLOUR), function("stop"))
    own = FORMS[form]
    number = f"0{own.numbered}" if own.numbered else ""

    def call(colour: str, count: int = 1) -> str:
        arguments = {
            "json": f'{{"colour": "{colour}"}}',
            "qwen_xml": f"<parameter=colour>{colour}</parameter>",
            "glm_xml": f"<arg_key>colour</arg_key><arg_value>{colour}</arg_value>",
        }[own.style]
        one = own.begin.replace("NAME", "paint") + number + arguments + own.end
        return own.before + own.between.join([one] * count) + own.after

    for parallel in (True, False):
        written = Written(Syntax(parser_of(form)), form)
        grammar = written.constrain(TemplateInputs(tools, calling=Calling(False, parallel)), None)
        assert grammar is not None
        fits = partial(allowed, compiler, grammar)
        assert fits("Just text, é.")
        assert fits("First " + call("red"))
        assert not fits("First " + call("black"))
        assert fits(call("red", 2)) is parallel


def test_a_call_or_what_the_response_format_asks_for(compiler: Any) -> None:
    grammar = Written(Syntax("hermes"), "hermes").constrain(
        TemplateInputs(TOOLS), Grammar("json_schema", '{"type":"object","properties":{"a":{"type":"null"}}}')
    )
    assert grammar is not None
    assert allowed(compiler, grammar, '{"a": null}')
    assert allowed(compiler, grammar, '<tool_call>\n{"name": "stop", "arguments": {}}\n</tool_call>')
    assert not allowed(compiler, grammar, "free")


@pytest.mark.parametrize(
    ("kind", "value", "good"),
    [
        ("json_object", "", '{"b": [1]}'),
        ("json_schema", '{"enum":["x"]}', '"x"'),
        ("regex", "[ab]{2}", "ab"),
        ("ebnf", 'root ::= "yes" | "no"', "no"),
        ("structural_tag", '{"type": "structural_tag", "format": {"type": "regex", "pattern": "z+"}}', "zz"),
    ],
)
def test_a_grammar_begins_behind_reasoning(compiler: Any, kind: str, value: str, good: str) -> None:
    inputs = TemplateInputs(separate_reasoning=True)
    open_ = Written(Syntax("", "qwen3", True)).constrain(inputs, Grammar(kind, value))
    closed = Written(Syntax("", "qwen3", False)).constrain(inputs, Grammar(kind, value))
    assert open_ is not None
    assert closed is not None
    assert allowed(compiler, open_, f"I think {{so}}.</think>\n\n{good}")
    assert not allowed(compiler, open_, good)
    assert allowed(compiler, closed, good)
    assert allowed(compiler, closed, f"<think>\nhm\n</think>\n\n{good}")
    assert not allowed(compiler, closed, "no reasoning at all")


@pytest.mark.parametrize("value", ["true", "{}", '{"format": 1}'])
def test_a_structural_tag_that_is_none(value: str) -> None:
    with pytest.raises(TriptychError, match="structural_tag") as caught:
        Written(Syntax("", "qwen3", True)).constrain(
            TemplateInputs(separate_reasoning=True), Grammar("structural_tag", value)
        )
    assert caught.value.param == "grammar"
