"""Structured output: what grammars allow, how they are compiled, and that answers keep to them."""

from __future__ import annotations

import json
import random
import re
import threading

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from triptych.python_models.builtin import checkpoint as builtin_checkpoint
from triptych.python_models.contract.errors import ErrorKind, TriptychError
from triptych.python_models.contract.sampling import Grammar, SamplingParams
from triptych.python_models.language_model.engine.grammar import GrammarCompiler, GrammarState
from triptych.python_models.language_model.engine.sampler import Sampler, SampleRow, SamplerState
from triptych.python_models.stage import NoTelemetry

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 6}, "count": {"type": "integer"}, "ok": {"type": "boolean"}},
    "required": ["name", "count", "ok"],
    "additionalProperties": False,
}
EOS = 3


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(builtin_checkpoint())


@pytest.fixture(scope="module")
def vocab_size(tokenizer):
    # wider than the tokenizer, as checkpoints pad their heads
    return len(tokenizer) + 37


@pytest.fixture(scope="module")
def compiler(tokenizer, vocab_size):
    made = GrammarCompiler(tokenizer, vocab_size, frozenset({EOS}), NoTelemetry())
    yield made
    made.close()


def compiled(compiler, grammar):
    """The outcome of a compilation."""
    found, done = [], threading.Event()

    def then(outcome):
        found.append(outcome)
        done.set()

    compiler.compile(grammar, then)
    assert done.wait(60)
    assert len(found) == 1
    if isinstance(found[0], TriptychError):
        raise found[0]
    return found[0]


def generate(compiler, tokenizer, vocab_size, grammar, seed=0, limit=400, **options):
    """The text that random logits make of a grammar, and how the answer ended."""
    params = SamplingParams(temperature=1.0, grammar=grammar, **options)
    stop_ids = frozenset({EOS, *params.stop_token_ids})
    state = GrammarState(compiled(compiler, grammar), stop_ids, vocab_size)
    own = SamplerState(params, np.array([1]), seed, stop_ids, vocab_size, state)
    sampler = Sampler(vocab_size, "cpu")
    generator = torch.Generator().manual_seed(seed)
    ids = []
    while len(ids) < limit:
        logits = torch.randn(1, vocab_size, generator=generator) * 3
        # short numbers and blanks, so that answers end
        logits[0, [i for i in range(vocab_size) if i < len(tokenizer) and tokenizer.decode([i]).isspace()]] -= 8
        token = sampler.launch(logits, [SampleRow(own, -1, len(ids))], torch.zeros(1)).result()[0].token_id
        assert token >= 0
        if token in stop_ids:
            own.accept(token)
            return tokenizer.decode(ids), "stop token"
        ids.append(token)
        own.accept(token)
        if state.finished:
            return tokenizer.decode(ids), "complete"
    return tokenizer.decode(ids), "length"


@pytest.mark.parametrize("seed", range(5))
def test_a_schema_makes_json_that_keeps_to_it(compiler, tokenizer, vocab_size, seed):
    text, _ = generate(compiler, tokenizer, vocab_size, Grammar("json_schema", json.dumps(SCHEMA)), seed)
    value = json.loads(text)
    assert list(value) == ["name", "count", "ok"]
    assert isinstance(value["name"], str)
    assert len(value["name"]) <= 6
    assert isinstance(value["count"], int)
    assert isinstance(value["ok"], bool)


def test_control_characters_never_reach_a_string(compiler, tokenizer, vocab_size):
    schema = {"type": "object", "properties": {"a": {"type": "string", "maxLength": 3}}, "required": ["a"]}
    state = GrammarState(compiled(compiler, Grammar("json_schema", json.dumps(schema))), frozenset({EOS}), vocab_size)
    for token_id in tokenizer.encode('{"a":"x', add_special_tokens=False):
        state.accept(token_id)
    allowed = {i for i in range(vocab_size) if state.mask[i // 32] >> i % 32 & 1}
    assert allowed & set(tokenizer.encode("abc", add_special_tokens=False))
    texts = [tokenizer.decode([i]) for i in allowed if i < len(tokenizer)]
    assert len(texts) > 100
    assert not any(char < " " for text in texts for char in text)


def test_any_json_object(compiler, tokenizer, vocab_size):
    ends = []
    for seed in range(8):
        text, end = generate(compiler, tokenizer, vocab_size, Grammar("json_object"), seed)
        assert text.lstrip().startswith("{")
        if end != "length":
            ends.append(json.loads(text))
    assert ends
    assert all(isinstance(value, dict) for value in ends)


@pytest.mark.parametrize("seed", range(5))
def test_a_regex_matches_the_whole_text(compiler, tokenizer, vocab_size, seed):
    text, _ = generate(compiler, tokenizer, vocab_size, Grammar("regex", "[a-c]{2,5}-[0-9]{3}"), seed)
    assert re.fullmatch("[a-c]{2,5}-[0-9]{3}", text)


def test_ebnf(compiler, tokenizer, vocab_size):
    rules = 'root ::= colour " " number\ncolour ::= "red" | "blue"\nnumber ::= [0-9] [0-9]?'
    texts = {generate(compiler, tokenizer, vocab_size, Grammar("ebnf", rules), seed)[0] for seed in range(10)}
    assert all(re.fullmatch("(red|blue) [0-9][0-9]?", text) for text in texts)
    assert len(texts) > 3


def test_a_complete_answer_ends_without_an_end_token(compiler, tokenizer, vocab_size):
    # even where min_tokens or the lack of an end token would not let it
    grammar = Grammar("regex", "yes|no")
    assert generate(compiler, tokenizer, vocab_size, grammar, min_tokens=50)[1] == "complete"


def test_an_end_token_comes_only_where_the_text_is_complete(compiler, tokenizer, vocab_size):
    for stop_ids in ((), (17,)):
        ends = set()
        for seed in range(30):
            grammar = Grammar("regex", "a+b?")
            text, end = generate(compiler, tokenizer, vocab_size, grammar, seed, stop_token_ids=stop_ids)
            assert re.fullmatch("a+b?", text)
            ends.add(end)
        assert ends >= {"complete", "stop token"}


@pytest.mark.parametrize(
    ("grammar", "reason"),
    [
        (Grammar("json_schema", '{"type":"objet"}'), 'Unsupported type "objet"'),
        (Grammar("json_schema", '{"$ref":"#/nope"}'), "Cannot find field nope"),
        (Grammar("json_schema", "false"), "cannot accept any value"),
        (Grammar("regex", "(a"), "parenthesis is not closed"),
        (Grammar("regex", "(?=a)b"), "Lookahead is not supported"),
        (Grammar("ebnf", 'root ::= "a" b'), 'Rule "b" is not defined'),
        (Grammar("ebnf", 'start ::= "a"'), 'root rule with name "root"'),
    ],
)
def test_what_cannot_be_compiled_is_refused_with_the_reason(compiler, grammar, reason):
    for _ in range(2):
        with pytest.raises(TriptychError) as caught:
            compiled(compiler, grammar)
        assert caught.value.kind is ErrorKind.INVALID_REQUEST
        assert caught.value.param == "grammar"
        assert reason in caught.value.message
        assert ".cc" not in caught.value.message


def test_a_tokenizer_that_grammars_cannot_use():
    compiler = GrammarCompiler(object(), 100, frozenset(), NoTelemetry())
    with pytest.raises(TriptychError, match="do not work with this model's tokenizer") as caught:
        compiled(compiler, Grammar("json_object"))
    assert caught.value.kind is ErrorKind.UNSUPPORTED
    compiler.close()


def test_compiled_grammars_are_kept_within_bytes(tokenizer, vocab_size):
    one = compiled(GrammarCompiler(tokenizer, vocab_size, frozenset(), NoTelemetry()), Grammar("regex", "a{1,9}"))
    compiler = GrammarCompiler(tokenizer, vocab_size, frozenset(), NoTelemetry(), 4 * one.num_bytes)
    first = compiled(compiler, Grammar("regex", "a{1,9}"))
    called = []
    compiler.compile(Grammar("regex", "a{1,9}"), called.append)
    # at once, in this thread
    assert called == [first]
    for i in range(30):
        compiled(compiler, Grammar("regex", f"[a-z]{{1,9}}{i}"))
        assert compiler.cached_bytes <= 4 * one.num_bytes
    assert compiled(compiler, Grammar("regex", "a{1,9}")) is not first
    compiler.close()


def test_the_same_grammar_is_compiled_once_for_all_who_wait(compiler, monkeypatch):
    gate, calls = threading.Event(), []
    real = compiler._compile

    def slow(grammar):
        calls.append(grammar)
        assert gate.wait(30)
        return real(grammar)

    monkeypatch.setattr(compiler, "_compile", slow)
    grammar = Grammar("regex", "only once")
    found, done = [], threading.Semaphore(0)
    for _ in range(5):
        compiler.compile(grammar, lambda outcome: (found.append(outcome), done.release()))
    assert not found
    gate.set()
    for _ in range(5):
        assert done.acquire(timeout=30)
    assert len(calls) == 1
    assert len({id(outcome) for outcome in found}) == 1


def test_closing_answers_those_who_wait(tokenizer, vocab_size, monkeypatch):
    compiler = GrammarCompiler(tokenizer, vocab_size, frozenset(), NoTelemetry())
    gate = threading.Event()
    monkeypatch.setattr(compiler, "_compile", lambda grammar: gate.wait(30))
    found = []
    for k in range(4):
        compiler.compile(Grammar("regex", str(k)), found.append)
    compiler.close()
    gate.set()
    compiler.compile(Grammar("regex", "late"), found.append)
    assert [outcome.kind for outcome in found] == [ErrorKind.STAGE_DEAD] * 5


def test_rollback_takes_tokens_back(compiler, tokenizer, vocab_size):
    state = GrammarState(compiled(compiler, Grammar("regex", "abc?")), frozenset({EOS}), vocab_size)
    a, b, c = (tokenizer.encode(letter, add_special_tokens=False)[0] for letter in "abc")
    before = state.mask.copy()
    for token in (a, b):
        state.accept(token)
    state.rollback(2)
    assert np.array_equal(state.mask, before)
    for token in (a, b, c):
        state.accept(token)
    assert state.finished
    with pytest.raises(ValueError, match="not allowed"):
        state.accept(a)


def test_masks_leave_other_rows_alone(compiler, vocab_size):
    grammar = GrammarState(compiled(compiler, Grammar("regex", "[0-9]")), frozenset({EOS}), vocab_size)
    params = SamplingParams(temperature=0)
    masked = SamplerState(params, np.array([1]), 0, frozenset({EOS}), vocab_size, grammar)
    plain = SamplerState(params, np.array([1]), 0, frozenset({EOS}), vocab_size)
    logits = torch.randn(3, vocab_size, generator=torch.Generator().manual_seed(random.Random(1).randrange(99)))
    rows = [SampleRow(state, -1, 0) for state in (plain, masked, plain)]
    out = [s.token_id for s in Sampler(vocab_size, "cpu").launch(logits, rows, torch.zeros(1)).result()]
    best = logits.argmax(-1).tolist()
    assert (out[0], out[2]) == (best[0], best[2])
    assert grammar.mask[out[1] // 32] >> out[1] % 32 & 1
    assert out[1] != best[1]
    # a NaN is seen although the mask lies over it
    logits[1, next(i for i in range(vocab_size) if not grammar.mask[i // 32] >> i % 32 & 1)] = torch.nan
    assert Sampler(vocab_size, "cpu").launch(logits, rows, torch.zeros(1)).result()[1].token_id == -1
