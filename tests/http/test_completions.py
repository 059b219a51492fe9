"""POST /v1/completions: prompts as the model reads them, through the official client and a real server."""

from __future__ import annotations

import json
import socket
import time
from typing import Any

import httpx
import openai
import pytest

from triptych.client.openai_api.completions import parse
from triptych.client.openai_api.fields import StreamOptions
from triptych.client.openai_api.text_completion import TextCompletion
from triptych.python_models.contract.delta import Delta, TokenLogprob, Usage
from triptych.python_models.contract.errors import TriptychError

NAME = "tiny-omni"


def body(**change: Any) -> bytes:
    return json.dumps({"model": NAME, "prompt": "Hi"} | change).encode()


def checked(**change: Any) -> Any:
    return parse(body(**change), NAME, 10)


# --- what is asked, without a server


def test_prompts_in_all_their_forms() -> None:
    for prompt, texts, ids in [
        ("a", ["a"], [None]),
        (["a", "b"], ["a", "b"], [None, None]),
        ([1, 2], [None], [(1, 2)]),
        ([[1], [2, 3]], [None, None], [(1,), (2, 3)]),
    ]:
        found = [request.prompt for request in checked(prompt=prompt).requests]
        assert [p.text for p in found] == texts
        assert [p.token_ids for p in found] == ids
    (request,) = checked(add_special_tokens=False).requests
    assert not request.prompt.add_special_tokens
    assert request.sampling.max_tokens == 16


def test_more_are_made_than_kept() -> None:
    call = checked(best_of=3, n=2)
    assert (call.requests[0].sampling.n, call.keep, call.logprobs) == (3, 2, False)
    assert call.requests[0].sampling.logprobs
    assert not checked(best_of=2, n=2).requests[0].sampling.logprobs
    call = checked(logprobs=0)
    assert call.logprobs
    assert call.requests[0].sampling.top_logprobs == 0


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": ["a", ""]}, "prompt[1]"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": [1, -1]}, "prompt[1]"),
        ({"prompt": [[1], []]}, "prompt[1]"),
        ({"prompt": [[1], [True]]}, "prompt[1][0]"),
        ({"prompt": ["a"] * 257}, "prompt"),
        ({"prompt": "\ud800"}, "prompt"),
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 1, "n": 2}, "best_of"),
        ({"best_of": 2, "stream": True}, "best_of"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"echo": True, "logprobs": 1}, "logprobs"),
        ({"echo": 1}, "echo"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"prompt": ["a", "b"], "return_timings": True}, "return_timings"),
        ({"messages": []}, "messages"),
        ({"user": 1}, "user"),
        ({"promt": "x"}, "promt"),
        ({"top_logprobs": 1}, "top_logprobs"),
    ],
)
def test_refusals_name_the_field(change: dict[str, Any], param: str) -> None:
    with pytest.raises(TriptychError) as caught:
        checked(**change)
    assert caught.value.param == param
    assert caught.value.kind.status == 400


def test_every_field_of_the_openai_package_is_known() -> None:
    import typing

    from openai.types.completion_create_params import CompletionCreateParamsStreaming

    fields = set(typing.get_type_hints(CompletionCreateParamsStreaming))
    assert len(fields) > 10
    for field in fields - {"model", "prompt"}:
        with pytest.raises(TriptychError) as caught:
            checked(**{field: {"no": "such"}})
        # it is the value that is refused
        assert f"unknown field {field!r}" not in str(caught.value)


def writer(**change: Any) -> TextCompletion:
    given: dict[str, Any] = {
        "prompts": 1,
        "generated": 1,
        "keep": 1,
        "echoed": (),
        "logprobs": False,
        "stream_options": StreamOptions(),
    }
    return TextCompletion("cmpl-1", 1, NAME, "fp", **(given | change))


def logprob(text: str, value: float) -> TokenLogprob:
    return TokenLogprob(0, text, value, None, ((0, text, value, None), (1, "z", -9.0, None)))


def test_the_best_are_those_likeliest_per_token() -> None:
    deltas = [
        Delta("long", (1, 2), (logprob("lo", -1.0), logprob("ng", -1.0)), "stop", index=0),
        Delta("bad", (1,), (logprob("bad", -5.0),), "stop", index=1),
        Delta("good", (1,), (logprob("good", -0.5),), "length", index=2, usage=Usage(3, 0, 4)),
    ]
    whole = writer(generated=3, keep=2).whole(deltas)
    assert [(c["index"], c["text"], c["finish_reason"]) for c in whole["choices"]] == [
        (0, "good", "length"),
        (1, "long", "stop"),
    ]
    assert all(c["logprobs"] is None for c in whole["choices"])
    # tokens of those that are not answered were made too
    assert whole["usage"]["completion_tokens"] == 4


def test_legacy_logprobs_and_usage_over_prompts() -> None:
    made = writer(prompts=2, logprobs=True)
    whole = made.whole(
        [
            Delta("ab", (1, 2), (logprob("a", -1.0), logprob("b", float("-inf"))), "stop", usage=Usage(3, 1, 2)),
            Delta("c", (3,), (logprob("c", -2.0),), "length", index=1, usage=Usage(5, 0, 1)),
        ]
    )
    assert whole["choices"][0]["logprobs"] == {
        "tokens": ["a", "b"],
        "token_logprobs": [-1.0, -9999.0],
        "top_logprobs": [{"a": -1.0, "z": -9.0}, {"b": -9999.0, "z": -9.0}],
        "text_offset": [0, 1],
    }
    assert whole["usage"]["prompt_tokens"] == 8
    assert whole["usage"]["completion_tokens"] == 3
    assert whole["usage"]["prompt_tokens_details"]["cached_tokens"] == 1


# --- through the server


def ask(client: openai.OpenAI, prompt: Any, **change: Any) -> Any:
    return client.completions.create(**({"model": NAME, "prompt": prompt, "max_tokens": 6, "temperature": 0} | change))


def tokens(server: Any, text: str) -> list[int]:
    answer = httpx.post(f"{server.url}/tokenize", json={"prompt": text}, timeout=60, trust_env=False)
    ids: list[int] = answer.json()["tokens"]
    return ids


def test_the_same_tokens_as_transformers(client: openai.OpenAI, server: Any, checkpoint: Any) -> None:
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    text = "<|im_start|>user\nTell me<|im_end|>\n"
    ids = tokenizer([text])["input_ids"][0]
    model = transformers.Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32)
    out = model.eval().generate(torch.tensor([ids]), max_new_tokens=6, do_sample=False)[0, len(ids) :].tolist()
    theirs = tokenizer.decode(out, skip_special_tokens=True)
    whole = ask(client, text)
    assert whole.choices[0].text == theirs
    assert whole.usage.prompt_tokens == len(ids)
    assert ask(client, ids).choices[0].text == theirs
    assert tokens(server, text) == ids


def test_one_prompt_whole_and_streamed(client: openai.OpenAI) -> None:
    whole = ask(client, "Once upon a time", max_tokens=10)
    assert whole.object == "text_completion"
    assert whole.id.startswith("cmpl-")
    (choice,) = whole.choices
    assert choice.finish_reason in ("stop", "length")
    assert choice.logprobs is None
    chunks = list(ask(client, "Once upon a time", max_tokens=10, stream=True, stream_options={"include_usage": True}))
    assert {chunk.object for chunk in chunks} == {"text_completion"}
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == choice.text
    reasons = [chunk.choices[0].finish_reason for chunk in chunks[:-1]]
    assert reasons == [None] * (len(reasons) - 1) + [choice.finish_reason]
    assert chunks[-1].choices == []
    assert chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_several_prompts_and_choices(client: openai.OpenAI, server: Any) -> None:
    texts = ["Hello", "Count to ten", "<|im_start|>"]
    alone = [ask(client, text) for text in texts]
    whole = ask(client, texts, n=2)
    assert [choice.index for choice in whole.choices] == list(range(6))
    assert [choice.text for choice in whole.choices] == [one.choices[0].text for one in alone for _ in range(2)]
    assert whole.usage.prompt_tokens == sum(one.usage.prompt_tokens for one in alone)
    assert whole.usage.completion_tokens == 2 * sum(one.usage.completion_tokens for one in alone)
    by_ids = ask(client, [tokens(server, text) for text in texts])
    assert [choice.text for choice in by_ids.choices] == [one.choices[0].text for one in alone]
    found = dict.fromkeys(range(6), "")
    chunks = list(ask(client, texts, n=2, stream=True, stream_options={"include_usage": True}))
    for chunk in chunks[:-1]:
        found[chunk.choices[0].index] += chunk.choices[0].text
    assert list(found.values()) == [choice.text for choice in whole.choices]
    assert chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


@pytest.mark.parametrize("as_ids", [False, True])
def test_echo(client: openai.OpenAI, server: Any, as_ids: bool) -> None:
    text = "a <|im_start|> prompt"
    plain = ask(client, text).choices[0].text
    prompt = tokens(server, text) if as_ids else text
    assert ask(client, prompt, echo=True).choices[0].text == text + plain
    chunks = list(ask(client, prompt, echo=True, stream=True))
    assert chunks[0].choices[0].text == text
    assert "".join(chunk.choices[0].text for chunk in chunks) == text + plain


def test_logprobs_whole_and_streamed(client: openai.OpenAI) -> None:
    found = ask(client, "Hello", logprobs=2).choices[0].logprobs
    assert len(found.tokens) == len(found.token_logprobs) == len(found.top_logprobs) == len(found.text_offset)
    assert found.text_offset[0] == 0
    for text, value, top in zip(found.tokens, found.token_logprobs, found.top_logprobs, strict=True):
        assert top[text] == value
        assert value == max(top.values())
        assert len(top) in (1, 2)
    parts = [c.choices[0].logprobs for c in ask(client, "Hello", logprobs=2, stream=True) if c.choices[0].logprobs]
    assert [t for part in parts for t in part.tokens] == found.tokens
    assert [o for part in parts for o in part.text_offset] == found.text_offset


def test_extras_work_as_in_chat(client: openai.OpenAI) -> None:
    text = ask(client, "Say", temperature=1, seed=3, extra_body={"regex": "(yes|no)+"}, max_tokens=4).choices[0].text
    assert set(text) <= set("yesno")
    first = ask(client, "Say", temperature=1, seed=3, best_of=3, max_tokens=4)
    assert len(first.choices) == 1
    assert first.usage.completion_tokens > 4
    again = ask(client, "Say", temperature=1, seed=3, best_of=3, max_tokens=4)
    assert again.choices[0].text == first.choices[0].text


@pytest.mark.parametrize(
    ("prompt", "param"),
    [
        ([1, 10**9], "prompt[1]"),
        ([[1], [10**9]], "prompt[1][0]"),
        ("x " * 70000, "prompt"),
        (["a", "x " * 70000], "prompt[1]"),
        ("look: <|image_pad|>", "prompt"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_only_the_server_can_refuse(client: openai.OpenAI, prompt: Any, param: str, stream: bool) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, prompt, stream=stream)
    assert caught.value.body["param"] == param, caught.value
    assert ask(client, "Hello").choices


def test_an_unknown_id_is_refused_for_echo_too(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, [[1], [2, 10**9]], echo=True)
    assert caught.value.body["param"] == "prompt[1][1]"


def test_a_client_that_goes_away_ends_all_its_prompts(server: Any) -> None:
    data = json.dumps(
        {"model": NAME, "prompt": ["a", "b"], "max_tokens": 2000, "ignore_eos": True, "stream": True}
    ).encode()
    host, port = server.url.removeprefix("http://").split(":")
    running = lambda: server.metric("triptych_requests_running", stage="language_model")  # noqa: E731
    with socket.create_connection((host, int(port))) as link:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n"
        link.sendall(head.encode() + data)
        assert link.recv(4096).startswith(b"HTTP/1.1 200")
    until = time.monotonic() + 60
    while time.monotonic() < until and (running() or server.metric("triptych_shim_requests_running")):
        time.sleep(0.1)
    assert running() == 0


def test_chat_goes_on_with_its_last_message(client: openai.OpenAI, server: Any) -> None:
    """The same as the raw prompt that the template writes."""
    messages: Any = [{"role": "user", "content": "Count"}, {"role": "assistant", "content": "One, two"}]
    raw = "<|im_start|>user\nCount<|im_end|>\n<|im_start|>assistant\nOne, two"
    extra = {"continue_final_message": True, "add_generation_prompt": False}
    chat = client.chat.completions.create(model=NAME, messages=messages, max_tokens=6, temperature=0, extra_body=extra)
    assert chat.choices[0].message.content == ask(client, raw).choices[0].text
    assert chat.usage.prompt_tokens == len(tokens(server, raw))
    closed = client.chat.completions.create(
        model=NAME, messages=messages, max_tokens=1, extra_body={"add_generation_prompt": False}
    )
    assert closed.usage.prompt_tokens == len(tokens(server, raw + "<|im_end|>\n"))
    for bad, param in (
        (extra | {"add_generation_prompt": True}, "add_generation_prompt"),
        ({"continue_final_message": "yes"}, "continue_final_message"),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(model=NAME, messages=messages, extra_body=bad)
        assert caught.value.body["param"] == param
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=NAME, messages=messages[:1], extra_body=extra)
    assert caught.value.body["param"] == "continue_final_message"
