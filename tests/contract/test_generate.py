"""The words of Triton's vLLM backend: sampling parameters, and outputs made of deltas."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from triptych.python_models.contract import generate, vllm_sampling
from triptych.python_models.contract.delta import Delta, TokenLogprob, Usage
from triptych.python_models.contract.errors import ErrorKind, TriptychError
from triptych.python_models.contract.generate import Form, Renderer
from triptych.python_models.contract.plan import Plan
from triptych.python_models.contract.sampling import Grammar, SamplingParams

OUTPUTS = ("finish_reason", "cumulative_logprob", "logprobs", "num_input_tokens", "num_output_tokens")


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ({}, SamplingParams(max_tokens=16)),
        ({"max_tokens": None, "seed": None}, SamplingParams(max_tokens=16)),
        ({"max_tokens": "7", "temperature": "0.5", "ignore_eos": "True"}, SamplingParams(7, 0, 0.5, ignore_eos=True)),
        ({"top_k": -1, "stop": ["a", "b"]}, SamplingParams(16, top_k=-1, stop=("a", "b"))),
        ({"logprobs": 0}, SamplingParams(16, logprobs=True)),
        ({"logprobs": "3"}, SamplingParams(16, logprobs=True, top_logprobs=3)),
        ({"logit_bias": {"5": 1.5}}, SamplingParams(16, logit_bias={5: 1.5})),
        ({"best_of": 1, "use_beam_search": "false", "detokenize": True, "lora_name": None}, SamplingParams(16)),
        ({"guided_decoding": {"regex": "[ab]"}}, SamplingParams(16, grammar=Grammar("regex", "[ab]"))),
        ({"structured_outputs": '{"json_object": true}'}, SamplingParams(16, grammar=Grammar("json_object"))),
        ({"structured_outputs": {"json": {"a": 1}}}, SamplingParams(16, grammar=Grammar("json_schema", '{"a":1}'))),
        ({"structured_outputs": {"json_object": False}}, SamplingParams(16)),
        (
            {"guided_decoding": {"choice": ["a", 'b"\n'], "backend": "xgrammar"}},
            SamplingParams(16, grammar=Grammar("ebnf", 'root ::= "a" | "b\\"\\n"')),
        ),
    ],
)
def test_sampling_parameters_under_vllms_names(given: dict[str, Any], meant: SamplingParams) -> None:
    assert vllm_sampling.read(given, "sampling_parameters") == meant


@pytest.mark.parametrize(
    ("given", "kind", "param", "words"),
    [
        ({"max_token": 5}, ErrorKind.INVALID_REQUEST, "max_token", "did you mean 'max_tokens'"),
        ({"max_tokens": "many"}, ErrorKind.INVALID_REQUEST, "max_tokens", "must be an integer, got 'many'"),
        ({"ignore_eos": "perhaps"}, ErrorKind.INVALID_REQUEST, "ignore_eos", "must be true or false"),
        ({"temperature": float("nan")}, ErrorKind.INVALID_REQUEST, "temperature", "must be a finite number"),
        ({"logprobs": -1}, ErrorKind.INVALID_REQUEST, "logprobs", "sampling_parameters.logprobs must be between 0 and"),
        ({"best_of": 2}, ErrorKind.UNSUPPORTED, "best_of", "left out or 1"),
        ({"best_of": True}, ErrorKind.UNSUPPORTED, "best_of", "left out or 1"),
        ({"lora_name": "x"}, ErrorKind.UNSUPPORTED, "lora_name", "leave it out"),
        ({"bad_words": ["x"]}, ErrorKind.UNSUPPORTED, "bad_words", "left out"),
        ({"structured_outputs": "{"}, ErrorKind.INVALID_REQUEST, "structured_outputs", "is not JSON"),
        ({"structured_outputs": {"regx": "a"}}, ErrorKind.INVALID_REQUEST, "structured_outputs.regx", "did you mean"),
        (
            {"structured_outputs": {"regex": "a", "json": {}}},
            ErrorKind.INVALID_REQUEST,
            "structured_outputs",
            "only one of",
        ),
        (
            {"guided_decoding": {"choice": ["a", 1]}},
            ErrorKind.INVALID_REQUEST,
            "guided_decoding.choice[1]",
            "must be a string",
        ),
        (
            {"guided_decoding": {"backend": "outlines"}},
            ErrorKind.UNSUPPORTED,
            "guided_decoding.backend",
            "xgrammar",
        ),
        (
            {"guided_decoding": {"regex": "a"}, "structured_outputs": {"regex": "a"}},
            ErrorKind.INVALID_REQUEST,
            "structured_outputs",
            "only one of",
        ),
    ],
)
def test_what_cannot_be_done_is_named(given: dict[str, Any], kind: ErrorKind, param: str, words: str) -> None:
    with pytest.raises(TriptychError, match=words) as caught:
        vllm_sampling.read(given, "sampling_parameters")
    assert caught.value.kind is kind
    assert caught.value.param == f"sampling_parameters.{param}"


def test_parameters_of_the_request_join_the_tensor() -> None:
    sent = {"max_tokens": 3, "id": "x", "triton_enable_empty_final_response": True, "sequence_id": 0}
    inputs = {"text_input": [b"a"], "sampling_parameters": [b'{"top_k": 2, "max_tokens": 3}']}
    found = generate.read(inputs | {generate.PARAMETERS: [json.dumps(sent)]})
    assert found.request.sampling == SamplingParams(3, top_k=2)
    with pytest.raises(TriptychError, match="parameter top_k is 5"):
        generate.read(inputs | {generate.PARAMETERS: ['{"top_k": 5}']})
    with pytest.raises(TriptychError, match="did you mean 'text_input'"):
        generate.read(inputs | {generate.PARAMETERS: ['{"textinput": "x"}']})


def test_a_stream_has_no_heartbeats_and_tells_each_thing_once() -> None:
    form = Form("", True, 2, True, *[True] * len(OUTPUTS))
    renderer = Renderer(form)
    first = TokenLogprob(7, "a", -1.5, None, ((9, "z", -0.5, None), (7, "a", -1.5, None)), 2)
    second = TokenLogprob(8, "b", -0.25, None, (), 1)
    assert renderer(Delta(usage=Usage(prompt_tokens=5))) is None
    found = [
        renderer(Delta("a", (7,), (first,))),
        renderer(Delta()),
        renderer(Delta("xy", (1, 2), (second, second), "length", index=1)),
        renderer(Delta("b", (8,), (second,), "stop")),
    ]
    assert found[1] is None
    told = [response for response in found if response is not None]
    assert [response["text_output"] for response in told] == [["a", ""], ["", "xy"], ["b", ""]]
    assert [r["finish_reasons"] for r in told] == [["None", "None"], ["None", "length"], ["stop", "length"]]
    assert [r["num_output_tokens"].tolist() for r in told] == [[1, 0], [0, 2], [1, 0]]
    assert [r["cumulative_logprob"].tolist() for r in told] == [[-1.5, 0], [-1.5, -0.5], [-1.75, -0.5]]
    assert all(r["num_input_tokens"].tolist() == [5] for r in told)
    assert json.loads(told[0]["logprobs"][0]) == [
        {
            "7": {"logprob": -1.5, "rank": 2, "decoded_token": "a"},
            "9": {"logprob": -0.5, "rank": 1, "decoded_token": "z"},
        }
    ]
    assert told[0]["logprobs"][1] == "[]"
    assert {name: np.asarray(value).dtype.name for name, value in told[0].items() if name.startswith("num_")} == {
        "num_input_tokens": "uint32",
        "num_output_tokens": "uint32",
    }


def test_a_whole_answer_is_one_response() -> None:
    renderer = Renderer(Form("prompt ", choices=2, finish_reason=True))
    assert renderer(Delta("a", (1,), (), "stop")) is None
    assert renderer(Delta("b", (1,), (), "length", index=1)) == {
        "text_output": ["prompt a", "prompt b"],
        "finish_reasons": ["stop", "length"],
    }


def test_a_form_travels_in_the_plan() -> None:
    form = Form("ü", choices=3, logprobs=True)
    assert Plan.from_json(Plan(form=form).to_json()).form == form
    assert Plan.from_json(Plan().to_json()).form is None
