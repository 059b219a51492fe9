"""Answers with calls and reasoning as OpenAI's messages and chunks, and what the engine counts and keeps of them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from triptych.client.openai_api.answers import Answers
from triptych.client.openai_api.sse import DONE, Completion
from triptych.python_models.contract.answer import REASONING_PARSERS, Syntax
from triptych.python_models.contract.delta import Delta, TokenLogprob, Usage, merge
from triptych.python_models.contract.request import ChatRequest
from triptych.python_models.contract.sampling import SamplingParams
from triptych.python_models.language_model.engine.detokenizer import Detokenizer, Vocabulary
from triptych.python_models.language_model.engine.reasoning import ReasoningCount

TOOLS = ({"type": "function", "function": {"name": "now"}},)
TEXT = 'hm</think>\n\nLet me see.\n<tool_call>\n{"name": "now", "arguments": {"a": 1}}\n</tool_call>'
SYNTAX = Syntax("hermes", "qwen3", True)


def completion(**options: Any) -> Completion:
    return Completion("id", 1, "m", "fp", answers=Answers(TOOLS), **options)


def deltas(text: str, size: int, syntax: Syntax = SYNTAX, reason: str = "stop") -> list[Delta]:
    pieces = [text[at : at + size] for at in range(0, len(text), size)]
    last = Delta("", (1,), (), reason, None, Usage(3, 0, len(pieces), reasoning_tokens=2))
    return [Delta(usage=Usage(3), syntax=syntax), *(Delta(piece, (1,)) for piece in pieces), last]


def chunks(data: bytes) -> list[dict[str, Any]]:
    return [json.loads(line.removeprefix("data: ")) for line in data.decode().split("\n\n") if line]


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_a_stream_and_a_whole_answer_say_the_same(size: int) -> None:
    found: dict[str, Any] = {"content": "", "reasoning_content": "", "tool_calls": []}
    order = []
    made = completion()
    for delta in deltas(TEXT, size):
        for chunk in chunks(made.chunks(delta)):
            (choice,) = chunk["choices"]
            order += choice["delta"]
            for name in ("content", "reasoning_content"):
                found[name] += choice["delta"].get(name, "")
            for call in choice["delta"].get("tool_calls", []):
                if "id" in call:
                    assert list(call) == ["index", "id", "type", "function"]
                    found["tool_calls"].append(call)
                else:
                    assert list(call) == ["index", "function"]
                    found["tool_calls"][call["index"]]["function"]["arguments"] += call["function"]["arguments"]
    assert choice["finish_reason"] == "tool_calls"
    assert [name for at, name in enumerate(order) if name not in order[:at]] == [
        *("reasoning_content", "content", "tool_calls")
    ]
    whole = completion().whole(deltas(TEXT, size))
    (choice,) = whole["choices"]
    message = choice["message"]
    assert (message["reasoning_content"], message["content"]) == ("hm", "Let me see.")
    assert message["tool_calls"][0]["function"] == {"name": "now", "arguments": '{"a": 1}'}
    for name in ("reasoning_content", "content"):
        assert message[name] == found[name]
    assert found["tool_calls"][0]["function"] == message["tool_calls"][0]["function"]
    assert choice["finish_reason"] == "tool_calls"
    assert whole["usage"]["completion_tokens_details"]["reasoning_tokens"] == 2


def test_an_answer_that_is_cut_ends_with_length() -> None:
    made = completion()
    data = b"".join(made.chunks(delta) for delta in deltas(TEXT[:-15], 5, reason="length"))
    assert chunks(data)[-1]["choices"][0]["finish_reason"] == "length"
    message = completion().whole(deltas(TEXT[:20], 5, reason="length"))["choices"][0]
    assert (message["message"]["content"], message["finish_reason"]) == ("Let me s", "length")


def test_without_a_syntax_text_is_text() -> None:
    made = completion()
    assert chunks(made.chunks(Delta("<tool_call>", (1,))))[0]["choices"][0]["delta"] == {"content": "<tool_call>"}
    (choice,) = completion().whole([Delta("<think>", (1,), (), "stop", None, Usage(1))])["choices"]
    assert choice["message"]["content"] == "<think>"
    assert "tool_calls" not in choice["message"]
    assert "reasoning_content" not in choice["message"]


def test_each_choice_has_a_parser_of_its_own() -> None:
    made = completion(n=2)
    made.chunks(Delta(usage=Usage(1), syntax=Syntax("hermes")))
    made.chunks(Delta('<tool_call>{"na', (1,), index=0))
    made.chunks(Delta('<tool_call>{"name": "n', (1,), index=1))
    ends = [
        made.chunks(Delta('me": "now"}', (1,), (), "stop", index=0)),
        made.chunks(Delta('ow", "arguments": {}}', (1,), (), "stop", index=1)),
    ]
    for index, data in enumerate(ends):
        found = [chunk["choices"][0] for chunk in chunks(data)]
        assert found[0]["delta"]["tool_calls"][0]["function"]["name"] == "now"
        assert {choice["index"] for choice in found} == {index}
        assert found[-1]["finish_reason"] == "tool_calls"
    whole = completion(n=2).whole(
        [
            Delta('<tool_call>{"name": "now"}', (1,), (), "stop", None, Usage(1), 1),
            Delta("text", (1,), (), "stop", None, Usage(1), 0, syntax=Syntax("hermes")),
        ]
    )
    assert [choice["finish_reason"] for choice in whole["choices"]] == ["stop", "tool_calls"]


def test_logprobs_go_with_the_first_chunk_or_alone() -> None:
    made = completion()
    made.chunks(Delta(usage=Usage(1), syntax=Syntax("hermes")))
    held = chunks(made.chunks(Delta("<tool", (1,), (TokenLogprob(1, "<tool", -1.0),))))
    assert held[0]["choices"][0]["delta"] == {"content": ""}
    assert held[0]["choices"][0]["logprobs"]["content"][0]["token"] == "<tool"
    both = chunks(made.chunks(Delta('_call>{"name": "now"} x', (2,), (TokenLogprob(2, "b", -2.0),), "stop")))
    assert [bool(chunk["choices"][0]["logprobs"]) for chunk in both] == [True, *[False] * (len(both) - 1)]


def test_ids_are_as_the_template_wants_them() -> None:
    for tools, length in (("hermes", 29), ("mistral", 9)):
        answers = Answers(TOOLS)
        answers.syntax = Syntax(tools)
        ids = {answers.new_id() for _ in range(20)}
        assert {len(found) for found in ids} == {length}
        assert len(ids) == 20
        assert length == 29 or all(found.isalnum() for found in ids)


def test_the_syntax_survives_wire_and_merging() -> None:
    first = Delta(usage=Usage(3, reasoning_tokens=1), syntax=SYNTAX)
    sent = Delta.from_tensors(first.to_tensors())
    assert sent == first
    assert merge(sent, Delta("a", (1,))).syntax == SYNTAX
    made = completion()
    assert b"reasoning_content" in made.chunks(merge(sent, Delta("a", (1,))))
    assert completion().end([Delta()]) == DONE


def test_turns_survive_the_wire() -> None:
    body = {
        "messages": [
            {"role": "user", "content": "x", "name": "Ada"},
            {
                "role": "assistant",
                "content": None,
                "reasoning_content": "r",
                "tool_calls": [{"id": "c", "type": "function", "function": {"name": "now", "arguments": "{}"}}],
            },
            {"role": "tool", "content": "y", "tool_call_id": "c"},
        ],
        "tools": list(TOOLS),
        "tool_choice": {"type": "function", "function": {"name": "now"}},
        "parallel_tool_calls": False,
        "reasoning_effort": "low",
        "separate_reasoning": True,
    }
    request = ChatRequest.from_json(json.dumps(body), 0)
    assert request.template.calling.required
    assert not request.template.calling.parallel
    assert request.messages[1].tool_calls[0].name == "now"
    assert ChatRequest.from_json(request.to_json(), 0) == request


COUNTS = [
    ("qwen3", True, ["so", " it", " is", "</think>", "yes", "!"], 4),
    ("qwen3", True, ["a</th", "ink", ">b", "c"], 3),
    ("qwen3", True, ["never"] * 5, 5),
    ("qwen3", False, ["\n", "<think>", "a", "</think>", "b"], 4),
    ("qwen3", False, ["<th", "at"], 0),
    ("qwen3", False, ["yes", "<think>", "</think>"], 0),
    ("kimi", False, ["◁think", "▷hm◁", "/think▷", "a"], 3),
    ("qwen3", False, ["", "<think></think>", "b"], 2),
]


@pytest.mark.parametrize(("name", "begun", "pieces", "count"), COUNTS)
def test_tokens_of_reasoning_are_counted(name: str, begun: bool, pieces: list[str], count: int) -> None:
    counter = ReasoningCount(REASONING_PARSERS[name], begun)
    for piece in pieces:
        counter.add(piece)
    assert counter.tokens == count


class Spelled:
    """A tokenizer without a backend, whose special tokens are 8 and 9."""

    def __init__(self, backend: Any = None) -> None:
        special = {8: "[CALL]", 9: "<eos>"}
        self.added_tokens_decoder = {
            number: type("Token", (), {"content": text, "special": True}) for number, text in special.items()
        }
        self.names = {1: "a", 2: "b", **special}
        if backend is not None:
            self.backend_tokenizer = backend

    def decode(self, token_ids: list[int], skip_special_tokens: bool = False, **_: Any) -> str:
        return "".join(self.names[i] for i in token_ids if not (skip_special_tokens and i > 7))

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str | None]:
        return [self.names[i] for i in ids]


@pytest.mark.parametrize("byte_level", [True, False])
@pytest.mark.parametrize(
    ("skip", "kept", "text"),
    [
        (True, frozenset(), "abb"),
        (True, frozenset({"[CALL]"}), "a[CALL]bb"),
        (False, frozenset(), "a[CALL]b<eos>b"),
        (False, frozenset({"[CALL]"}), "a[CALL]b<eos>b"),
    ],
)
def test_special_tokens_that_mark_calls_are_kept(byte_level: bool, skip: bool, kept: frozenset[str], text: str) -> None:
    from tokenizers import decoders

    backend = type("Backend", (), {"decoder": decoders.ByteLevel()}) if byte_level else None
    detokenizer = Detokenizer(Vocabulary(Spelled(backend)), SamplingParams(skip_special_tokens=skip), kept)
    found = "".join(detokenizer.add(token).text for token in (1, 8, 2, 9, 2)) + detokenizer.finish()
    assert found == text


def test_tokens_of_a_syntax() -> None:
    assert Syntax().tokens == frozenset()
    assert Syntax("llama3_json").tokens == {"<|python_tag|>"}
    assert Syntax("", "gemma4").tokens == {"<|channel>", "<|channel>thought\n", "<channel|>"}
    assert Syntax("phi4", "qwen3").tokens == {"<|tool_call|>", "<|/tool_call|>", "<think>", "</think>"}
