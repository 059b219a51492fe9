"""SGLang's native endpoints."""

from __future__ import annotations

import base64
import itertools
import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from triptych.client.openai_api.generation import ABORTED
from triptych.client.openai_api.sglang.answer import Answers
from triptych.client.openai_api.sglang.request import LogprobOptions, parse
from triptych.python_models.contract.delta import Delta, Usage
from triptych.python_models.contract.errors import TriptychError

PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"


def checked(**change: Any) -> Any:
    return parse(json.dumps({"text": "Hi"} | change).encode(), 10)


# --- what is asked, without a server


def test_one_prompt_and_batches() -> None:
    call = checked()
    assert (len(call.asks), call.batch) == (1, False)
    assert call.asks[0][0].sampling.max_tokens == 128
    call = checked(
        text=["a", "b"],
        sampling_params=[{"max_new_tokens": 1}, {"max_new_tokens": 2, "n": 3}],
        rid=["x", "y"],
        return_logprob=[True, False],
        top_logprobs_num=[2, 0],
    )
    assert call.rids == ("x", "y")
    assert [ask.sampling.max_tokens for ask, _ in call.asks] == [1, 2]
    assert [ask.sampling.n for ask, _ in call.asks] == [1, 3]
    assert [ask.sampling.top_logprobs for ask, _ in call.asks] == [2, 0]
    assert [options.wanted for options in call.logprobs] == [True, False]
    assert checked(text=["a", "b"], rid="x").rids == ("x_0", "x_1")
    assert checked(text=["a"]).batch
    call = parse(json.dumps({"input_ids": [[1, 2], [3]]}).encode(), 10)
    assert [ask.prompt.token_ids for ask, _ in call.asks] == [(1, 2), (3,)]


def test_sampling_by_sglangs_names() -> None:
    given = {
        "max_new_tokens": 5,
        "min_new_tokens": 2,
        "temperature": 0.5,
        "top_k": 7,
        "stop": ["x"],
        "sampling_seed": 3,
        "json_schema": '{"type": "object"}',
        "no_stop_trim": False,
    }
    sampling = checked(sampling_params=given).asks[0][0].sampling
    assert (sampling.max_tokens, sampling.min_tokens, sampling.seed, sampling.top_k) == (5, 2, 3, 7)
    assert sampling.grammar.type == "json_schema"


def test_media_in_their_forms() -> None:
    raw = base64.b64encode(b"abc").decode()
    call = checked(image_data=raw, audio_data=["https://example.com/a.wav", {"url": f"data:audio/wav;base64,{raw}"}])
    ((request, blobs),) = call.asks
    assert [part.modality for part in request.prompt.media] == ["image", "audio", "audio"]
    assert blobs == (b"abc", b"abc")
    call = checked(text=["a", "b"], image_data=[None, [raw, {"url": raw, "detail": "low"}]])
    assert [len(blobs) for _, blobs in call.asks] == [0, 2]
    assert call.asks[1][0].prompt.media[1].options.detail == "low"


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"text": None}, "text"),
        ({"input_ids": [1]}, "text"),
        ({"text": []}, "text"),
        ({"text": ""}, "text"),
        ({"text": ["a", 1]}, "text[1]"),
        ({"text": 5}, "text"),
        ({"sampling_params": {"max_new_tokens": 0}}, "sampling_params.max_new_tokens"),
        ({"sampling_params": {"temperature": 3}}, "sampling_params.temperature"),
        ({"sampling_params": {"max_tokens": 3}}, "sampling_params.max_tokens"),
        ({"sampling_params": {"stop_regex": "x"}}, "sampling_params.stop_regex"),
        ({"sampling_params": {"no_stop_trim": True}}, "sampling_params.no_stop_trim"),
        ({"sampling_params": {"json_schema": "{"}}, "sampling_params.json_schema"),
        ({"sampling_params": [{}]}, "sampling_params"),
        ({"text": ["a", "b"], "sampling_params": [{}]}, "sampling_params"),
        ({"text": ["a", "b"], "sampling_params": [{}, {"top_p": 2}]}, "sampling_params[1].top_p"),
        ({"text": ["a", "b"], "image_data": "x"}, "image_data"),
        ({"image_data": ["/etc/passwd"]}, "image_data[0]"),
        ({"image_data": "file:///etc/passwd"}, "image_data[0]"),
        ({"image_data": [{"url": "x", "feature": []}]}, "image_data[0].feature"),
        ({"rid": ""}, "rid"),
        ({"text": ["a", "b"], "rid": ["x", "x"]}, "rid"),
        ({"logprob_start_len": 0}, "logprob_start_len"),
        ({"return_logprob": 1}, "return_logprob"),
        ({"top_logprobs_num": 21, "return_logprob": True}, "top_logprobs_num"),
        ({"lora_path": "x"}, "lora_path"),
        ({"input_embeds": [[0.5]]}, "input_embeds"),
        ({"modalities": ["smell"]}, "modalities"),
        ({"extra_key": "x" * 300}, "extra_key"),
        ({"txt": "x"}, "txt"),
    ],
)
def test_refusals_name_the_field(change: dict[str, Any], param: str) -> None:
    with pytest.raises(TriptychError) as caught:
        checked(**change)
    assert caught.value.param == param, caught.value
    assert caught.value.kind.status == 400


def test_an_answer_that_was_ended_says_so() -> None:
    answers = Answers(["x"], [1], [LogprobOptions()], False, time.perf_counter())
    answers.chunks(Delta("ab", (1, 2), usage=Usage(3, 0, 2)))
    event = json.loads(answers.chunks(Delta(finish_reason=ABORTED)).removeprefix(b"data: "))
    assert event["text"] == "ab"
    assert event["meta_info"]["finish_reason"]["type"] == "abort"
    assert event["meta_info"]["completion_tokens"] == 2


# --- through the server


def post(server: Any, path: str, body: Any, timeout: float = 120) -> httpx.Response:
    return httpx.post(f"{server.url}{path}", json=body, timeout=timeout, trust_env=False)


def get(server: Any, path: str) -> httpx.Response:
    return httpx.get(f"{server.url}{path}", timeout=120, trust_env=False)


def generate(server: Any, **body: Any) -> Any:
    params = {"temperature": 0, "max_new_tokens": 6} | body.pop("sampling_params", {})
    answer = post(server, "/generate", body | {"sampling_params": params})
    assert answer.status_code == 200, answer.text
    return answer.json()


def events(text: str) -> list[Any]:
    *found, done, rest = text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in found]


def plain(server: Any, prompt: Any) -> str:
    answer = post(server, "/v1/completions", {"model": "default", "prompt": prompt, "max_tokens": 6, "temperature": 0})
    text: str = answer.json()["choices"][0]["text"]
    return text


def test_text_ids_and_stream_agree(server: Any) -> None:
    whole = generate(server, text="Hello", rid="mine-1")
    assert whole["text"] == plain(server, "Hello")
    meta = whole["meta_info"]
    assert meta["id"] == "mine-1"
    assert meta["completion_tokens"] == len(whole["output_ids"])
    assert meta["finish_reason"]["type"] in ("stop", "length")
    assert meta["e2e_latency"] > 0
    ids = post(server, "/tokenize", {"prompt": "Hello"}).json()["tokens"]
    assert meta["prompt_tokens"] == len(ids)
    assert generate(server, input_ids=ids)["output_ids"] == whole["output_ids"]
    body = {"text": "Hello", "stream": True, "sampling_params": {"temperature": 0, "max_new_tokens": 6}}
    found = events(post(server, "/generate", body).text)
    assert found[-1]["text"] == whole["text"]
    assert found[-1]["output_ids"] == whole["output_ids"]
    assert all(later["text"].startswith(earlier["text"]) for earlier, later in itertools.pairwise(found))
    assert [event["meta_info"]["finish_reason"] is None for event in found] == [True] * (len(found) - 1) + [False]


def test_a_batch_with_pictures_and_choices(server: Any, parts: Any) -> None:
    raw = base64.b64encode(parts.picture(3)).decode()
    texts = ["Hello", f"{PICTURE}What?", "Count"]
    found = generate(server, text=texts, image_data=[None, raw, None], rid=["a", "b", "c"])
    assert [one["meta_info"]["id"] for one in found] == ["a", "b", "c"]
    assert found[0]["text"] == plain(server, "Hello")
    assert found[1]["meta_info"]["prompt_tokens"] > found[0]["meta_info"]["prompt_tokens"]
    alone = generate(server, text=texts[1], image_data=parts.data_url(parts.picture(3), "image/png"))
    assert alone["output_ids"] == found[1]["output_ids"]
    other = generate(server, text=texts[1], image_data=base64.b64encode(parts.picture(4)).decode())
    assert other["meta_info"]["prompt_tokens"] == alone["meta_info"]["prompt_tokens"]
    several = generate(server, text="Hello", sampling_params={"n": 2})
    assert [one["output_ids"] for one in several] == [found[0]["output_ids"]] * 2
    body = {"text": texts, "image_data": [None, raw, None], "stream": True}
    streamed = events(
        post(server, "/generate", body | {"sampling_params": {"max_new_tokens": 6, "temperature": 0}}).text
    )
    last = {event["index"]: event["output_ids"] for event in streamed}
    assert last == {index: one["output_ids"] for index, one in enumerate(found)}


def test_a_picture_of_a_chat_is_the_same(server: Any, parts: Any, client: Any) -> None:
    """The prompt that the chat template writes, with its picture beside it, has the answer of the chat."""
    chat = client.chat.completions.create(
        model="default",
        messages=[{"role": "user", "content": [parts.image(5), parts.text("What?")]}],
        max_tokens=6,
        temperature=0,
    )
    text = f"<|im_start|>user\n{PICTURE}What?<|im_end|>\n<|im_start|>assistant\n"
    found = generate(server, text=text, image_data=[base64.b64encode(parts.picture(5)).decode()])
    assert found["text"] == chat.choices[0].message.content
    assert found["meta_info"]["prompt_tokens"] == chat.usage.prompt_tokens


def test_logprobs(server: Any) -> None:
    found = generate(server, text="Hello", return_logprob=True, top_logprobs_num=2, return_text_in_logprobs=True)
    meta = found["meta_info"]
    assert [token for _, token, _ in meta["output_token_logprobs"]] == found["output_ids"]
    for (value, token, text), top in zip(meta["output_token_logprobs"], meta["output_top_logprobs"], strict=True):
        assert top[0][0] == value
        assert len(top) == 2
        assert isinstance(text, str)
        assert isinstance(token, int)
    assert generate(server, text="Hello", return_logprob=True)["meta_info"]["output_token_logprobs"][0][2] is None


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"text": PICTURE}, "text"),
        ({"text": "no place", "image_data": "AAAA"}, "image_data[0]"),
        ({"text": ["a", "b"], "image_data": [None, "AAAA"]}, "image_data[1][0]"),
        ({"input_ids": [1, 10**9]}, "input_ids[1]"),
        ({"input_ids": [[1], [10**9]]}, "input_ids[1][0]"),
        ({"text": "x " * 5000}, "text"),
        ({"text": "a", "sampling_params": {"max_new_tokens": 10**6}}, "max_new_tokens"),
    ],
)
def test_bad_input_is_refused_and_harms_nobody(server: Any, body: dict[str, Any], param: str) -> None:
    for stream in (False, True):
        answer = post(server, "/generate", body | {"stream": stream})
        assert answer.status_code == 400, answer.text
        assert answer.json()["error"]["param"] == param
    assert generate(server, text="Hello")["output_ids"]


class Long:
    """A request that runs until it is ended."""

    def __init__(self, server: Any, rid: str, stream: bool) -> None:
        self.answer: httpx.Response | None = None
        params = {"max_new_tokens": 2000, "ignore_eos": True}
        body = {"text": "Go", "rid": rid, "stream": stream, "sampling_params": params}

        def run() -> None:
            self.answer = post(server, "/generate", body)

        self.thread = threading.Thread(target=run)
        self.thread.start()
        wait_for(lambda: engine_runs(server) > 0)

    def end(self) -> httpx.Response:
        self.thread.join(60)
        assert self.answer is not None
        return self.answer


def engine_runs(server: Any) -> float:
    found: float = server.metric("triptych_requests_running", stage="language_model")
    return found


def wait_for(condition: Any) -> None:
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


@pytest.fixture
def quiet(server: Any) -> Iterator[None]:
    """Nothing runs before, and what is left over is ended."""
    wait_for(lambda: engine_runs(server) == 0)
    yield
    post(server, "/abort_request", {"abort_all": True})


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("everything", [False, True])
def test_abort(server: Any, quiet: None, stream: bool, everything: bool) -> None:
    running = Long(server, "long-1", stream)
    twice = post(server, "/generate", {"text": "Go", "rid": "long-1"})
    assert twice.status_code == 400
    assert twice.json()["error"]["param"] == "rid"
    assert post(server, "/abort_request", {"rid": "someone-else"}).status_code == 200
    assert running.thread.is_alive()
    assert post(server, "/abort_request", {"abort_all": True} if everything else {"rid": "long-1"}).status_code == 200
    answer = running.end()
    body = events(answer.text)[-1] if stream else answer.json()
    assert body["meta_info"]["finish_reason"]["type"] == "abort"
    wait_for(lambda: engine_runs(server) == 0)
    assert generate(server, text="Hello", rid="long-1")["meta_info"]["id"] == "long-1"


def test_abort_of_a_chat_by_the_id_of_its_answer(server: Any, quiet: None, client: Any) -> None:
    stream = client.chat.completions.create(
        model="default",
        messages=[{"role": "user", "content": "Go"}],
        max_tokens=2000,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    first = next(stream)
    assert post(server, "/abort_request", {"rid": first.id}).status_code == 200
    assert [chunk.choices[0].finish_reason for chunk in stream][-1] == "abort"


def test_flush_cache_empties_the_caches(server: Any, quiet: None, parts: Any) -> None:
    text = f"{PICTURE}" + "tell me more of this " * 20
    picture = base64.b64encode(parts.picture(77)).decode()

    def cached() -> int:
        found: int = generate(server, text=text, image_data=picture)["meta_info"]["cached_tokens"]
        return found

    def hits() -> float:
        found: float = server.metric("triptych_encoder_cache_hits_total", stage="vision_encoder")
        return found

    cached()
    before = hits()
    assert cached() > 0
    wait_for(lambda: hits() == before + 1)
    for method in ("POST", "GET"):
        wait_for(lambda: engine_runs(server) == 0)
        answer = httpx.request(method, f"{server.url}/flush_cache?timeout=30", timeout=60, trust_env=False)
        assert answer.status_code == 200, answer.text
        assert "Cache flushed" in answer.text
        assert cached() == 0
    wait_for(lambda: server.metric("triptych_encoder_cache_misses_total", stage="vision_encoder") > 0)
    assert hits() == before + 1


def test_flush_cache_fails_while_requests_run(server: Any, quiet: None) -> None:
    running = Long(server, "long-2", False)
    answer = post(server, "/flush_cache", None)
    assert answer.status_code == 400
    assert "run or wait" in answer.text
    waiting: list[httpx.Response] = []
    thread = threading.Thread(target=lambda: waiting.append(post(server, "/flush_cache?timeout=60", None)))
    thread.start()
    post(server, "/abort_request", {"rid": "long-2"})
    running.end()
    thread.join(60)
    assert waiting[0].status_code == 200
    assert post(server, "/flush_cache?timeout=never", None).status_code == 400


@pytest.mark.parametrize("body", [{}, {"rid": 5}, {"rid": ""}, {"rid": "x", "abort_all": 1}, {"id": "x"}])
def test_abort_wants_a_name(server: Any, body: Any) -> None:
    assert post(server, "/abort_request", body).status_code == 400


def test_a_client_that_goes_away_ends_its_batch(server: Any, quiet: None) -> None:
    params = {"max_new_tokens": 2000, "ignore_eos": True}
    data = json.dumps({"text": ["a", "b"], "stream": True, "sampling_params": params}).encode()
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as link:
        head = f"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n"
        link.sendall(head.encode() + data)
        assert link.recv(4096).startswith(b"HTTP/1.1 200")
    wait_for(lambda: engine_runs(server) == 0)


def test_what_the_server_is(server: Any) -> None:
    for path in ("/model_info", "/get_model_info"):
        found = get(server, path).json()
        assert found["is_generation"] is True
        assert found["has_image_understanding"] is True
        assert found["has_audio_understanding"] is True
        assert found["model_type"] == "qwen2_5_omni_thinker"
        assert found["architectures"]
        assert found["model_path"] == found["tokenizer_path"]
    for path in ("/server_info", "/get_server_info"):
        found = get(server, path).json()
        assert found["served_model_name"] == "tiny-omni"
        assert found["context_length"] > 0
        assert found["internal_states"]
        assert "api_keys" not in found


def test_health_generate(server: Any) -> None:
    assert get(server, "/health_generate").status_code == 200
