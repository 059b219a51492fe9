"""The contract's dataclasses survive the wire and refuse what is wrong by name."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from triptych.python_models.contract.delta import Delta, TokenLogprob, Usage, merge, put
from triptych.python_models.contract.errors import ErrorKind, TriptychError
from triptych.python_models.contract.features import EncoderItem, pack, unpack
from triptych.python_models.contract.plan import MediaItem, Plan
from triptych.python_models.contract.request import ChatRequest
from triptych.python_models.contract.sampling import MAX_GRAMMAR_BYTES, Grammar, SamplingParams
from triptych.python_models.contract.settings import Settings
from triptych.python_models.contract.tensors import ENSEMBLES, STAGES


@pytest.mark.parametrize("kind", list(ErrorKind))
def test_errors_survive_the_wire_and_the_ensemble_prefix(kind: ErrorKind) -> None:
    error = TriptychError(kind, "a [b] c", "messages[0].content[1]", "preprocess")
    assert TriptychError.from_wire(f"in ensemble 'chat', {error.to_wire()}") == error
    assert 400 <= kind.status < 600


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("in ensemble 'chat', Stub process 'language_model_0_0' is not healthy.", ErrorKind.STAGE_DEAD),
        ("Request for unknown model: 'x' is not found", ErrorKind.STAGE_DEAD),
        ("in ensemble 'chat', cancelled", ErrorKind.CANCELLED),
        ("boom", ErrorKind.STAGE_FAILED),
    ],
)
def test_messages_of_the_server_itself_are_understood(text: str, kind: ErrorKind) -> None:
    assert TriptychError.from_wire(text).kind is kind


REQUEST: dict[str, Any] = {
    "messages": [
        {"role": "system", "content": "be brief"},
        {
            "role": "user",
            "content": [
                {"type": "image", "blob": 0},
                {"type": "audio", "url": "https://example.com/a.wav"},
                {"type": "text", "text": "naïve 图"},
            ],
        },
    ],
    "sampling": {"temperature": 0, "stop": "x", "logit_bias": {"7": -1.5}, "max_tokens": 3},
    "stream": False,
    "lease_s": 10,
    "priority": 3,
    "cache_salt": "tenant",
    "tools": [{"type": "function", "function": {"name": "find", "parameters": {"type": "object"}}}],
    "chat_template_kwargs": {"enable_thinking": False},
}


def test_request_round_trip() -> None:
    request = ChatRequest.from_json(json.dumps(REQUEST), num_blobs=1)
    assert ChatRequest.from_json(request.to_json(), num_blobs=1) == request
    assert [where for where, _ in request.media()] == ["messages[1].content[0]", "messages[1].content[1]"]
    assert request.sampling.stop == ("x",)
    assert request.sampling.logit_bias == {7: -1.5}


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": []}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "smell"}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "blob": 5}]}]}, "messages[0].content[0]"),
        ({"mesages": 1}, "mesages"),
        ({"sampling": {"temperature": 9}}, "sampling.temperature"),
        ({"sampling": {"temperature": float("nan")}}, "sampling.temperature"),
        ({"sampling": {"top_p": 0}}, "sampling.top_p"),
        ({"sampling": {"max_tokens": 0}}, "sampling.max_tokens"),
        ({"sampling": {"max_tokens": True}}, "sampling.max_tokens"),
        ({"sampling": {"stop": [""]}}, "sampling.stop"),
        ({"sampling": {"logit_bias": {"a": 1}}}, "sampling.logit_bias"),
        ({"sampling": {"top_logprobs": 21}}, "sampling.top_logprobs"),
        ({"sampling": {"temprature": 1}}, "sampling.temprature"),
        ({"sampling": {"n": 0}}, "sampling.n"),
        ({"sampling": {"n": 129}}, "sampling.n"),
        ({"sampling": {"speculative_tokens": 17}}, "sampling.speculative_tokens"),
        ({"sampling": {"no_repeat_ngram_size": -1}}, "sampling.no_repeat_ngram_size"),
        (
            {"sampling": {"no_repeat_ngram_size": 9, "no_repeat_ngram_window_size": 8}},
            "sampling.no_repeat_ngram_window_size",
        ),
        (
            {"sampling": {"no_repeat_ngram_size": 9, "grammar": {"type": "regex", "value": "a"}}},
            "sampling.no_repeat_ngram_size",
        ),
        ({"sampling": {"no_repeat_ngram_allowed_ids": 7}}, "sampling.no_repeat_ngram_allowed_ids"),
        ({"sampling": {"grammar": "x"}}, "sampling.grammar"),
        ({"sampling": {"grammar": {"type": "yaml"}}}, "sampling.grammar.type"),
        ({"sampling": {"grammar": {"type": "regex", "pattern": "a"}}}, "sampling.grammar.pattern"),
        ({"sampling": {"grammar": {"type": "regex"}}}, "sampling.grammar.value"),
        ({"sampling": {"grammar": {"type": "ebnf", "value": 3}}}, "sampling.grammar.value"),
        ({"sampling": {"grammar": {"type": "json_object", "value": "x"}}}, "sampling.grammar.value"),
        ({"sampling": {"grammar": {"type": "json_schema", "value": "{"}}}, "sampling.grammar.value"),
        ({"sampling": {"grammar": {"type": "json_schema", "value": [1]}}}, "sampling.grammar.value"),
        (
            {"sampling": {"grammar": {"type": "json_schema", "value": '{"items":' * 200 + "{}" + "}" * 200}}},
            "sampling.grammar.value",
        ),
        ({"priority": 0.5}, "priority"),
        ({"priority": 2**31}, "priority"),
        ({"cache_salt": 1}, "cache_salt"),
        ({"cache_salt": "x" * 257}, "cache_salt"),
        ({"stream": 1}, "stream"),
        ({"lease_s": -1}, "lease_s"),
    ],
)
def test_a_wrong_request_is_refused_by_the_name_of_its_field(change: dict[str, Any], param: str) -> None:
    with pytest.raises(TriptychError) as caught:
        ChatRequest.from_json(json.dumps(REQUEST | change), num_blobs=1)
    assert caught.value.param == param
    assert caught.value.kind.status == 400


def test_not_json() -> None:
    for text in ("", "{", "[1]", "null", "[" * 100_000):
        with pytest.raises(TriptychError):
            ChatRequest.from_json(text, 0)


def test_unknown_setting_names_the_nearest() -> None:
    with pytest.raises(TriptychError, match="did you mean 'context_length'"):
        Settings.from_json('{"context_lenght": 5}')
    settings = Settings(model="x", allowed_media_hosts=("a:1",))
    assert Settings.from_json(settings.to_json()) == settings


@pytest.mark.parametrize("rate", ["1", "-0.1", "half", "nan"])
def test_pruning_rates_are_shares(rate: str) -> None:
    with pytest.raises(TriptychError, match="from 0 to less than 1") as caught:
        Settings.from_dict({"video_pruning_rate": rate})
    assert caught.value.param == "settings.video_pruning_rate"
    assert Settings.from_dict({"video_pruning_rate": "0.7"}).video_pruning_rate == "0.7"


def test_plan_round_trip() -> None:
    plan = Plan(
        (MediaItem("image", "ab", ((3, 7), (9, 10)), "vision"),),
        SamplingParams(temperature=0.5, stop=("a",), logit_bias={3: 1.0}),
        rope_delta=-3,
        lease_s=2.0,
        priority=-4,
        cache_salt="ü",
    )
    assert Plan.from_json(plan.to_json()) == plan
    assert plan.items[0].num_rows == 5


def test_features_round_trip_and_refuse_garbage() -> None:
    tensors = {"pixel_values": np.arange(6, dtype=np.float32).reshape(2, 3), "grid": np.array([[1, 2]], np.int64)}
    items = unpack(pack([EncoderItem("image", "ab", 2, tensors), EncoderItem("video", "cd", 1, tensors)]))
    assert [(i.modality, i.digest, i.num_rows) for i in items] == [("image", "ab", 2), ("video", "cd", 1)]
    for item in items:
        for name, value in tensors.items():
            assert item.tensors[name].dtype == value.dtype
            np.testing.assert_array_equal(item.tensors[name], value)
    for garbage in (b"", b"xyz", b"\xff" * 64):
        with pytest.raises(TriptychError):
            unpack(np.frombuffer(garbage, np.uint8))


def test_delta_round_trip() -> None:
    logprob = TokenLogprob(5, "ä", -0.5, (195, 164), ((5, "ä", -0.5, (195, 164)), (6, "b", -1.0, None)))
    delta = Delta("ä", (5,), (logprob,), "stop", "</s>", Usage(3, 1, 1, 2), index=1)
    assert Delta.from_tensors(delta.to_tensors()) == delta
    assert Delta(usage=Usage(1)).is_heartbeat
    assert not delta.is_heartbeat


def test_a_delta_with_nothing_to_say_writes_no_json() -> None:
    assert Delta("x", (1, 2)).to_tensors()["info"] == [""]


def test_merged_deltas_say_the_same() -> None:
    first, second = (TokenLogprob(i, str(i), -0.5) for i in (1, 2))
    one = Delta("a", (1,), (first,), usage=Usage(5), index=2)
    two = Delta("b", (2, 3), (second,), index=2)
    assert merge(one, two) == Delta("ab", (1, 2, 3), (first, second), usage=Usage(5), index=2)
    end = Delta("c", (4,), (), "stop", 4, Usage(5, 0, 4), 2)
    assert merge(merge(one, two), end) == merge(one, merge(two, end))
    assert merge(one, end) == Delta("ac", (1, 4), (first,), "stop", 4, Usage(5, 0, 4), 2)
    assert merge(Delta(), Delta("b")) == Delta("b")


def test_deltas_of_other_choices_and_after_the_end_are_not_merged() -> None:
    with pytest.raises(ValueError, match="choice 1"):
        merge(Delta("a"), Delta("b", index=1))
    with pytest.raises(ValueError, match="cannot follow"):
        merge(Delta("a", finish_reason="stop"), Delta("b"))


def test_waiting_deltas_are_one_per_choice_and_the_newest_is_last() -> None:
    waiting: dict[int, Delta] = {}
    for delta in (Delta("a", (1,)), Delta("x", (7,), index=1), Delta("b", (2,)), Delta("", (), (), "stop", index=1)):
        put(waiting, delta)
    assert list(waiting.values()) == [Delta("ab", (1, 2)), Delta("x", (7,), (), "stop", index=1)]
    put(waiting, Delta("", (3,), (), "length", None, Usage(1)))
    assert list(waiting.values())[-1] == Delta("ab", (1, 2, 3), (), "length", None, Usage(1))


def test_grammars_round_trip() -> None:
    for given, kept in (
        ({"type": "json_object"}, Grammar("json_object")),
        ({"type": "json_schema", "value": {"type": "object"}}, Grammar("json_schema", '{"type":"object"}')),
        ({"type": "json_schema", "value": '{"a": "ü"}'}, Grammar("json_schema", '{"a":"ü"}')),
        ({"type": "json_schema", "value": True}, Grammar("json_schema", "true")),
        ({"type": "regex", "value": "[ab]+"}, Grammar("regex", "[ab]+")),
        (None, None),
    ):
        params = SamplingParams.from_json({"grammar": given, "n": 3, "speculative_tokens": 4})
        assert (params.grammar, params.n, params.speculative_tokens) == (kept, 3, 4)
        assert SamplingParams.from_json(json.loads(json.dumps(params.to_json()))) == params


def test_a_grammar_has_a_largest_size() -> None:
    with pytest.raises(TriptychError) as caught:
        SamplingParams.from_json({"grammar": {"type": "regex", "value": "ü" * MAX_GRAMMAR_BYTES}})
    assert caught.value.kind is ErrorKind.TOO_LARGE
    assert caught.value.param == "sampling.grammar.value"


def test_every_ensemble_step_maps_tensors_that_exist() -> None:
    for ensemble in ENSEMBLES.values():
        known = {spec.name: spec for spec in ensemble.inputs}
        for step in ensemble.steps:
            stage = STAGES[step.stage]
            inputs = {spec.name: spec for spec in stage.inputs}
            outputs = {spec.name: spec for spec in stage.outputs}
            for inner, outer in step.inputs.items():
                assert known[outer].dtype == inputs[inner].dtype
            known |= {outer: outputs[inner] for inner, outer in step.outputs.items()}
        assert {spec.name for spec in ensemble.outputs} <= set(known)
