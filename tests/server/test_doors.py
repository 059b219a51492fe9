"""Triton's own doors: tritonclient over gRPC and HTTP, sync and aio, the generate endpoints and the repository API."""

from __future__ import annotations

import asyncio
import base64
import importlib.util
import io
import json
import sys
import time
import urllib.error
import urllib.request
import warnings
import wave
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from triptych.client.launcher import TritonServer, find_server
from triptych.python_models.contract.delta import Delta
from triptych.python_models.contract.settings import Settings
from triptych.python_models.contract.tensors import ENSEMBLES, GENERATE, STAGES

with warnings.catch_warnings():
    # the clients' own imports warn
    warnings.simplefilter("ignore")
    import tritonclient.grpc as grpc
    import tritonclient.grpc.aio as grpc_aio
    import tritonclient.http as http
    import tritonclient.http.aio as http_aio
    from tritonclient.utils import InferenceServerException

EXAMPLES = Path(__file__).parents[2] / "examples"
NO_PROXY = urllib.request.build_opener(urllib.request.ProxyHandler({}))
CHANNEL = [("grpc.enable_http_proxy", 0), ("grpc.max_receive_message_length", -1)]
EXTRAS = ("finish_reason", "cumulative_logprob", "logprobs", "num_input_tokens", "num_output_tokens")
PICTURE_PLACE = "<|vision_start|><|image_pad|><|vision_end|>"
SOUND_PLACE = "<|audio_start|><|audio_pad|><|audio_end|>"
TOKENS = 9
GREEDY = {"max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}


class Door:
    """The endpoints of a server, and how to talk to them."""

    def __init__(self, server: TritonServer) -> None:
        self.server = server
        self.grpc = grpc.InferenceServerClient(server.grpc_url, channel_args=CHANNEL)
        self.http = http.InferenceServerClient(server.http_url.removeprefix("http://"), network_timeout=120)

    def close(self) -> None:
        self.grpc.close()
        self.http.close()

    def post(self, path: str, body: Mapping[str, Any]) -> tuple[int, str]:
        """Status and text of a POST with plain JSON."""
        request = urllib.request.Request(f"{self.server.http_url}{path}", json.dumps(body).encode(), method="POST")
        try:
            with NO_PROXY.open(request, timeout=120) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def generate(self, model: str, **body: Any) -> dict[str, Any]:
        """Triton's generate endpoint."""
        status, text = self.post(f"/v2/models/{model}/generate", body)
        assert status == 200, text
        found: dict[str, Any] = json.loads(text)
        return found

    def generate_stream(self, model: str, **body: Any) -> list[dict[str, Any]]:
        """Triton's generate_stream endpoint: the events."""
        status, text = self.post(f"/v2/models/{model}/generate_stream", body)
        assert status == 200, text
        return [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line]

    def stream(self, model: str, tensors: Mapping[str, Any], **options: Any) -> list[dict[str, Any]]:
        """One request over the synchronous gRPC client, to its end."""
        with grpc.InferenceServerClient(self.server.grpc_url, channel_args=CHANNEL) as client:
            results: list[Any] = []
            client.start_stream(lambda result, error: results.append(error or result))
            client.async_stream_infer(model, inputs(grpc, model, tensors), **options)
            # ends the stream when everything has arrived
            client.stop_stream()
        for result in results:
            if isinstance(result, InferenceServerException):
                raise result
        return [outputs(result) for result in results]


def inputs(module: ModuleType, model: str, tensors: Mapping[str, Any]) -> list[Any]:
    """Plain values -> InferInputs, with the dtypes that the contract says."""
    specs = {spec.name: spec for spec in (STAGES[model] if model in STAGES else ENSEMBLES[model]).inputs}
    made = []
    for name, value in tensors.items():
        kind = {"EMBEDDING": "FP32"}.get(specs[name].dtype, specs[name].dtype.removeprefix("TYPE_"))
        values = value if isinstance(value, (list, np.ndarray)) else [value]
        if kind == "STRING":
            kind = "BYTES"
            array = np.empty(len(values), dtype=np.object_)
            array[:] = [item.encode() if isinstance(item, str) else item for item in values]
        else:
            array = np.asarray(values)
        tensor = module.InferInput(name, list(array.shape), kind)
        tensor.set_data_from_numpy(array)
        made.append(tensor)
    return made


def outputs(result: Any) -> dict[str, Any]:
    response = result.get_response()
    found = response.get("outputs", []) if isinstance(response, dict) else response.outputs
    names = [output["name"] if isinstance(output, dict) else output.name for output in found]
    return {name: result.as_numpy(name) for name in names}


def text(responses: list[dict[str, Any]], choice: int = 0) -> str:
    """Answer number ``choice`` of ``generate``."""
    return b"".join(response["text_output"][choice] for response in responses).decode()


def said(responses: list[dict[str, Any]]) -> list[int]:
    """Tokens of an answer of ``chat`` or ``language_model``."""
    return [token for response in responses for token in Delta.from_tensors(response).token_ids]


def picture(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (48, 72, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def sound(seed: int) -> bytes:
    samples = np.random.default_rng(seed).integers(-3000, 3000, 9600, dtype=np.int16)
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16000)
        file.writeframes(samples.tobytes())
    return out.getvalue()


def prompt(words: str, *media: str, **fields: Any) -> str:
    """The ``request`` of a prompt that needs no chat template, with a place for each medium."""
    places = {"image": PICTURE_PLACE, "audio": SOUND_PLACE}
    written = "".join(places[modality] for modality in media) + words
    parts = [{"type": modality, "blob": index} for index, modality in enumerate(media)]
    return json.dumps({"prompt": {"text": written, "media": parts}, "sampling": GREEDY, **fields})


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Callable[[str], Path]) -> Path:
    return tiny_checkpoint("qwen2_5_omni")


@pytest.fixture(scope="module")
def door(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory, start: Any) -> Iterator[Door]:
    log = tmp_path_factory.mktemp("doors") / "server.log"
    server = TritonServer(
        find_server(),
        Settings(model=str(checkpoint), kv_cache_tokens=8192, torch_threads=1),
        management_key="",
        log=log,
    )
    start(server)
    door = Door(server)
    yield door
    door.close()
    server.stop()
    assert "Traceback" not in log.read_text()


# --- the ensemble generate, as clients of Triton's vLLM backend call it


def test_generate_answers_as_chat_does(door: Door) -> None:
    """A picture in base64, raw and the same prompt through the ensemble chat: the same text."""
    shown, words = picture(1), "what is it?"
    asked = {"text_input": PICTURE_PLACE + words, "sampling_parameters": json.dumps(GREEDY), "stream": True}
    wanted = [Delta.from_tensors(r) for r in door.stream("chat", {"request": prompt(words, "image"), "media": [shown]})]
    expected = "".join(delta.text for delta in wanted)
    assert expected
    for image in (base64.b64encode(shown), shown):
        assert text(door.stream("generate", asked | {"image": [image]})) == expected
    assert text(door.stream("generate", asked | {"image": [picture(2)]})) != expected


def test_whole_answers_begin_with_the_prompt_unless_told(door: Door) -> None:
    asked = {"text_input": "hello world", "sampling_parameters": json.dumps(GREEDY)}
    (alone,) = door.stream("generate", asked | {"exclude_input_in_output": True})
    for kept in ({}, {"exclude_input_in_output": False}, {"stream": False}):
        (whole,) = door.stream("generate", asked | kept)
        assert text([whole]) == "hello world" + text([alone])
    streamed = door.stream("generate", asked | {"stream": True})
    assert len(streamed) > 1
    assert text(streamed) == text([alone])


def test_outputs_that_are_asked_for(door: Door) -> None:
    """Each response has just the outputs asked for, and their sums are those of the whole answer."""
    sampling = GREEDY | {"logprobs": 2, "n": 2, "temperature": 1, "seed": 3}
    asked: dict[str, Any] = {"text_input": "hello world", "sampling_parameters": json.dumps(sampling)}
    wanted = {f"return_{name}": True for name in EXTRAS}
    (whole,) = door.stream("generate", asked | wanted | {"exclude_input_in_output": True})
    streamed = door.stream("generate", asked | wanted | {"stream": True})
    for response in (whole, *streamed):
        assert set(response) == {"text_output", *EXTRAS}
        assert [len(response[name]) for name in ("text_output", *EXTRAS)] == [2, 2, 2, 2, 1, 2]
    (plain,) = door.stream("generate", asked | {"return_finish_reason": True})
    assert set(plain) == {"text_output", "finish_reason"}
    assert text([whole], 0) != text([whole], 1)
    for choice in range(2):
        assert text(streamed, choice) == text([whole], choice)
        assert sum(int(r["num_output_tokens"][choice]) for r in streamed) == TOKENS
        assert whole["num_output_tokens"][choice] == TOKENS
        logprobs = json.loads(whole["logprobs"][choice])
        assert [item for r in streamed for item in json.loads(r["logprobs"][choice])] == logprobs
        assert len(logprobs) == TOKENS
        total = 0.0
        for known in logprobs:
            chosen, *others = known.values()
            total += chosen["logprob"]
            assert {item["rank"] for item in others} | {chosen["rank"]} >= {1, 2}
            for other in others:
                assert (other["rank"] < chosen["rank"]) == (other["logprob"] > chosen["logprob"])
        assert whole["cumulative_logprob"][choice] == pytest.approx(total, rel=1e-3)
        assert streamed[-1]["cumulative_logprob"][choice] == pytest.approx(total, rel=1e-3)
    assert whole["finish_reason"].tolist() == [b"length", b"length"]
    assert streamed[0]["finish_reason"].tolist() == [b"None", b"None"]
    assert streamed[-1]["finish_reason"].tolist() == [b"length", b"length"]
    assert {int(r["num_input_tokens"][0]) for r in (whole, *streamed)} == {
        Delta.from_tensors(door.stream("chat", {"request": prompt("hello world")})[0]).usage.prompt_tokens  # type: ignore[union-attr]
    }
    (bare,) = door.stream("generate", {"text_input": "x", "return_logprobs": True, "return_cumulative_logprob": True})
    assert bare["logprobs"].tolist() == [b"null"]
    assert bare["cumulative_logprob"][0] < 0


def test_sampling_parameters_as_clients_write_them(door: Door) -> None:
    """Numbers as strings, parameters of the request instead of the tensor, and the backend's default of 16 tokens."""
    asked = {"text_input": "hello world", "return_num_output_tokens": True, "exclude_input_in_output": True}
    as_strings = {"max_tokens": "5", "temperature": "0", "min_tokens": "5"}
    (first,) = door.stream("generate", asked | {"sampling_parameters": json.dumps(as_strings)})
    (second,) = door.stream("generate", asked, parameters=as_strings)
    assert text([first]) == text([second])
    assert first["num_output_tokens"].tolist() == second["num_output_tokens"].tolist() == [5]
    # as the vLLM backend's own sample client does it: both
    both = asked | {"sampling_parameters": json.dumps(as_strings)}
    assert text(door.stream("generate", both, parameters=as_strings)) == text([first])
    (default,) = door.stream("generate", asked, parameters={"ignore_eos": True})
    assert default["num_output_tokens"].tolist() == [16]
    choice = {"structured_outputs": json.dumps({"choice": ["yes", 'no "way"']}), "max_tokens": 60}
    assert text(door.stream("generate", asked, parameters=choice)) in ("yes", 'no "way"')


def test_generate_over_the_aio_client(door: Door) -> None:
    """As the vLLM backend's sample client: many prompts on one stream, told apart by their ids."""
    asked = {f"{k}": {"text_input": f"prompt {k}", "sampling_parameters": json.dumps(GREEDY)} for k in range(3)}

    async def requests() -> AsyncIterator[dict[str, Any]]:
        for key, tensors in asked.items():
            wanted = [grpc_aio.InferRequestedOutput("text_output")]
            given = inputs(grpc_aio, "generate", tensors | {"stream": True})
            yield {"model_name": "generate", "inputs": given, "outputs": wanted, "request_id": key}

    async def run() -> dict[str, str]:
        found = dict.fromkeys(asked, "")
        async with grpc_aio.InferenceServerClient(door.server.grpc_url, channel_args=CHANNEL) as client:
            async for result, error in client.stream_infer(requests()):
                assert error is None
                found[result.get_response().id] += text([outputs(result)])
        return found

    found = asyncio.run(run())
    for key, tensors in asked.items():
        assert found[key] == text(door.stream("generate", tensors | {"exclude_input_in_output": True}))


def test_generate_endpoints(door: Door) -> None:
    """Triton's HTTP generate and generate_stream, on every ensemble."""
    parameters = {"temperature": 0, "max_tokens": TOKENS, "ignore_eos": True, "exclude_input_in_output": True}
    image = base64.b64encode(picture(1)).decode()
    asked = {"text_input": PICTURE_PLACE + "what?", "image": image, "parameters": parameters}
    whole = door.generate("generate", **asked)
    events = door.generate_stream("generate", **asked, stream=True, return_finish_reason=True, id="mine")
    assert len(events) > 1
    assert "".join(event["text_output"] for event in events) == whole["text_output"] != ""
    assert [event["finish_reason"] for event in events[-2:]] == ["None", "length"]
    assert {event["id"] for event in events} == {"mine"}
    for ensemble in ("chat", "chat_text"):
        events = door.generate_stream(ensemble, request=prompt("hello"))
        streamed = "".join(event["text"] for event in events)
        assert events[-1]["finish_reason"] == "length"
        answer = door.generate(ensemble, request=prompt("hello", stream=False, heartbeats=False))
        assert answer["text"] == streamed != ""
        assert answer["finish_reason"] == "length"
        assert json.loads(answer["info"])["usage"]["completion_tokens"] == TOKENS


# --- every stage alone


def alone_over(door: Door, way: str) -> Callable[[str, Mapping[str, Any]], dict[str, Any]]:
    """(stage, tensors) -> outputs, by one of the four clients."""
    sync = {"grpc": (grpc, door.grpc), "http": (http, door.http)}
    if way in sync:
        module, client = sync[way]
        return lambda stage, tensors: outputs(client.infer(stage, inputs(module, stage, tensors)))
    module, url, options = {
        "grpc aio": (grpc_aio, door.server.grpc_url, {"channel_args": CHANNEL}),
        "http aio": (http_aio, door.server.http_url.removeprefix("http://"), {}),
    }[way]

    async def infer(stage: str, tensors: Mapping[str, Any]) -> dict[str, Any]:
        async with module.InferenceServerClient(url, **options) as client:
            return outputs(await client.infer(stage, inputs(module, stage, tensors)))

    return lambda stage, tensors: asyncio.run(infer(stage, tensors))


@pytest.fixture(scope="module")
def tower(checkpoint: Path) -> Any:
    """transformers' own model and processor."""
    from transformers import AutoProcessor, Qwen2_5OmniThinkerForConditionalGeneration

    model = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).eval()
    return model, AutoProcessor.from_pretrained(checkpoint)


@pytest.mark.parametrize("way", ["grpc", "http", "grpc aio", "http aio"])
def test_stages_alone(door: Door, tower: Any, way: str) -> None:
    """Preprocess, then an encoder, then the language model: each gives what transformers' parts or ``chat`` give."""
    infer = alone_over(door, way)
    pictures, heard = [picture(3), picture(4)], sound(5)
    media = [*pictures, heard]
    request = prompt("well?", "image", "image", "audio")
    ready = infer("preprocess", {"request": request, "media": media})
    seen = infer("vision_encoder", {"vision_features": ready["vision_features"]})
    listened = infer("audio_encoder", {"audio_features": ready["audio_features"]})
    assert seen["vision_rows"].sum() == len(seen["vision_embeddings"])
    assert len(seen["vision_rows"]) == 2
    assert listened["audio_rows"].tolist() == [len(listened["audio_embeddings"])]

    model, processor = tower
    with torch.no_grad():
        for k, rows in enumerate(np.split(seen["vision_embeddings"], [seen["vision_rows"][0]])):
            pixels = processor.image_processor([Image.open(io.BytesIO(pictures[k]))], return_tensors="pt")
            own = model.get_image_features(pixels["pixel_values"], image_grid_thw=pixels["image_grid_thw"])
            np.testing.assert_allclose(rows, features(own), atol=2e-5, rtol=1e-4)
        samples = np.frombuffer(heard[44:], np.int16).astype(np.float32) / 32768
        mel = processor.feature_extractor(
            samples, sampling_rate=16000, return_attention_mask=True, padding="max_length", return_tensors="pt"
        )
        own = model.get_audio_features(mel["input_features"], feature_attention_mask=mel["attention_mask"])
        np.testing.assert_allclose(listened["audio_embeddings"], features(own), atol=2e-5, rtol=1e-4)

    given = {name: ready[name] for name in ("input_ids", "position_ids", "plan")}
    given |= {name: found[name] for found, name in ((seen, "vision_embeddings"), (listened, "audio_embeddings"))}
    responses = door.stream("language_model", given)
    tokens = said(responses)
    assert tokens == said(door.stream("chat", {"request": request, "media": media}))
    assert len(tokens) == TOKENS


def features(found: Any) -> Any:
    """The rows in what transformers' ``get_*_features`` returns, whichever its form."""
    rows = found if isinstance(found, (torch.Tensor, tuple, list)) else found.pooler_output
    return (torch.cat(tuple(rows)) if isinstance(rows, (tuple, list)) else rows).numpy()


# --- what describes and rules models


def test_what_the_server_says_of_models(door: Door) -> None:
    for model, spec in (STAGES | ENSEMBLES).items():
        told = door.http.get_model_metadata(model)
        assert [t["name"] for t in told["inputs"]] == [t.name for t in spec.inputs]
        assert [t["name"] for t in told["outputs"]] == [t.name for t in spec.outputs]
        assert door.grpc.is_model_ready(model)


def test_statistics_count_requests(door: Door) -> None:
    def counts(outcome: str) -> dict[str, int]:
        stats = door.http.get_inference_statistics()["model_stats"]
        return {model["name"]: model["inference_stats"][outcome]["count"] for model in stats}

    def become(outcome: str, wanted: dict[str, int]) -> None:
        until = time.monotonic() + 15
        while (now := counts(outcome)) != wanted and time.monotonic() < until:
            time.sleep(0.1)
        assert now == wanted

    # answers arrive before they are counted
    before = None
    while before != (before := counts("success")):
        time.sleep(0.3)
    door.stream("generate", {"text_input": "hello"})
    stages = (step.stage for step in GENERATE.steps)
    become("success", before | {name: before[name] + 1 for name in (GENERATE.name, *stages)})
    failed = counts("fail")
    with pytest.raises(InferenceServerException):
        door.stream("generate", {"text_input": "hello", "sampling_parameters": "{"})
    until = time.monotonic() + 15
    # the server counts a failed request of an ensemble more than once
    while counts("fail")[GENERATE.name] <= failed[GENERATE.name]:
        assert time.monotonic() < until
        time.sleep(0.1)


IMAGE = base64.b64encode(picture(1))
BAD: list[tuple[str, dict[str, Any], str]] = [
    ("chat", {"request": "{"}, "request is not JSON"),
    ("chat", {"request": prompt("x"), "media": [b"x"]}, r"media blob 0 .*param=media\[0\]"),
    ("chat_text", {"request": prompt("x", sampling={"top_p": 7})}, "sampling.top_p must be"),
    ("generate", {}, "lacks the input request or text_input"),
    ("generate", {"stream": True}, "lacks the input request or text_input"),
    ("generate", {"text_input": b"\xff"}, "text_input is not UTF-8"),
    ("generate", {"text_input": "x", "image": [b"@@"]}, r"image\[0\]: not a picture"),
    ("generate", {"text_input": "x", "image": [b"abc"]}, r"image\[0\] is not base64"),
    ("generate", {"text_input": "x", "image": [IMAGE]}, "param=text_input"),
    ("generate", {"text_input": PICTURE_PLACE}, "param=text_input"),
    ("generate", {"text_input": PICTURE_PLACE, "image": ["http://127.0.0.1/a.png"]}, r"image\[0\]: .* loopback"),
    ("generate", {"text_input": "x", "stream": True, "exclude_input_in_output": False}, "exclude_input_in_output must"),
    ("generate", {"text_input": "x", "sampling_parameters": "[]"}, "sampling_parameters must be an object"),
    ("generate", {"text_input": "x", "sampling_parameters": '{"temprature": 1}'}, "did you mean 'temperature'"),
    ("generate", {"text_input": "x", "sampling_parameters": '{"best_of": 2}'}, "sampling_parameters.best_of is not"),
    ("generate", {"text_input": "x", "sampling_parameters": '{"logprobs": 50}'}, "sampling_parameters.logprobs must"),
    ("generate", {"text_input": "x" * 100_000}, "context length .*param=text_input"),
    ("language_model", {"plan": "{}"}, "lacks the input input_ids"),
    ("language_model", {"input_ids": np.array([1], np.int32)}, "without a plan"),
]


@pytest.mark.parametrize(("model", "tensors", "words"), BAD)
def test_bad_input_of_streams(door: Door, model: str, tensors: dict[str, Any], words: str) -> None:
    """An error that names what was wrong ends the request at fault; one that runs beside it is not touched."""
    good = {"text_input": "hello world", "sampling_parameters": json.dumps(GREEDY), "stream": True}
    with pytest.raises(InferenceServerException, match=words):
        door.stream(model, tensors)
    assert len(door.stream("generate", good | {"return_num_output_tokens": True})) > 0


def test_bad_input_of_stages_has_a_status(door: Door) -> None:
    rubbish = {"vision_features": np.frombuffer(b"rubbish", np.uint8)}
    for stage, tensors, words in (
        ("preprocess", {"request": "{}"}, "exactly one of messages and prompt"),
        ("preprocess", {"media": [b"x"]}, "lacks the input request"),
        ("preprocess", {"text_input": "x", "request": prompt("x")}, "only one of the inputs"),
        ("preprocess", {"text_input": "x", "media": [b"x"]}, "media is not allowed beside text_input"),
        ("preprocess", {"request": prompt("x"), "stream": True}, "stream is only allowed beside text_input"),
        ("vision_encoder", rubbish, "vision_features: .*param=vision_features"),
        ("audio_encoder", {"audio_features": rubbish["vision_features"]}, "audio_features: .*param=audio_features"),
    ):
        with pytest.raises(InferenceServerException, match=words) as caught:
            door.grpc.infer(stage, inputs(grpc, stage, tensors))
        assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"
        with pytest.raises(InferenceServerException, match=words) as caught:
            door.http.infer(stage, inputs(http, stage, tensors))
        assert caught.value.status() == "400"


def test_bad_input_that_the_server_itself_refuses(door: Door) -> None:
    """A tensor that there is not, one of another type, a model for streams alone, none at all."""
    request = inputs(grpc, "preprocess", {"request": "{}"})
    number = grpc.InferInput("request", [1], "INT32")
    number.set_data_from_numpy(np.zeros(1, np.int32))
    for model, given, words in (
        ("vision_encoder", request, "unexpected inference input 'request'"),
        ("preprocess", [number], "'request' data-type is 'INT32'.*expects 'BYTES'"),
        ("chat", request, "decoupled"),
        ("nobody", request, "unknown model: 'nobody'"),
    ):
        with pytest.raises(InferenceServerException, match=words):
            door.grpc.infer(model, given)


def test_bad_input_over_the_generate_endpoints(door: Door) -> None:
    for body, words in (
        ({"text_input": "x", "temperature": 9}, "temperature must be between 0 and 2"),
        ({"text_input": "x", "max_token": 9}, "did you mean 'max_tokens'"),
        ({"text_input": "x", "sampling_parameters": '{"n": 2}', "n": 3}, "sampling_parameters.n is 2"),
        ({"text": "x"}, "text_input"),
    ):
        for endpoint in ("generate", "generate_stream"):
            status, answer = door.post(f"/v2/models/generate/{endpoint}", body)
            assert status == 400
            assert words in json.loads(answer.removeprefix("data: "))["error"]


# --- examples


@pytest.mark.parametrize(
    ("script", "arguments", "words"),
    [
        ("triton_embeddings.py", ["--place", PICTURE_PLACE, "media/picture.png", "media/two_a.jpg"], "two_a.jpg"),
        ("triton_generate.py", ["--place", PICTURE_PLACE, "--image", "media/picture.png", "What is it?"], "length"),
    ],
)
def test_examples(
    door: Door, script: str, arguments: list[str], words: str, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = importlib.util.spec_from_file_location(script.removesuffix(".py"), EXAMPLES / script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    given = [str(EXAMPLES / item) if item.startswith("media/") else item for item in arguments]
    monkeypatch.setattr(sys, "argv", [script, "--url", door.server.grpc_url, *given])
    assert module.main() == 0
    assert words in capsys.readouterr().out


# --- load and unload: last, as it disturbs the server


def test_unload_and_load_a_stage(door: Door) -> None:
    """Without the audio encoder what needs it is refused and the rest goes on; loaded again, it serves."""
    heard = {"request": prompt("and?", "audio"), "media": [sound(1)]}
    before = said(door.stream("chat", heard))
    door.http.unload_model("audio_encoder")
    for path, body in (
        ("chat/generate_stream", {"request": prompt("x")}),
        ("audio_encoder/infer", {"inputs": []}),
    ):
        status, answer = door.post(f"/v2/models/{path}", body)
        assert status in (400, 404)
        assert "has no available versions" in answer
    states = {model["name"]: model.get("state") for model in door.http.get_model_repository_index()}
    assert states["chat"] == "UNAVAILABLE"
    assert states["audio_encoder"] in ("UNLOADING", "UNAVAILABLE")
    assert states["generate"] == states["chat_text"] == "READY"
    assert text(door.stream("generate", {"text_input": PICTURE_PLACE, "image": [picture(1)]}))
    assert door.stream("chat_text", {"request": prompt("x")})
    door.grpc.load_model("audio_encoder")
    assert all(model["state"] == "READY" for model in door.grpc.get_model_repository_index(as_json=True)["models"])
    assert said(door.stream("chat", heard)) == before


def test_an_ensemble_can_be_unloaded_alone(door: Door) -> None:
    door.grpc.unload_model(GENERATE.name)
    with pytest.raises(InferenceServerException, match="'generate' has no available versions"):
        door.stream("generate", {"text_input": "x"})
    assert door.stream("chat", {"request": prompt("x")})
    door.http.load_model(GENERATE.name)
    assert door.stream("generate", {"text_input": "x"})
