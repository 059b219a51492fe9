"""The ensembles with the real stages on a tiny checkpoint: the same tokens as transformers' ``generate``."""

from __future__ import annotations

import importlib.util
import io
import json
import sys
import wave
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image as PILImage

from triptych.client.launcher import TritonServer, find_server
from triptych.python_models.contract.delta import Delta
from triptych.python_models.contract.errors import ErrorKind, TriptychError
from triptych.python_models.contract.settings import Settings
from triptych.python_models.contract.tensors import STAGES
from triptych.python_models.media.types import Audio, Image, Medium, Video

TOKENS = 12
RATE = 16000
FRAMES, FPS = 8, 8
# two frames a second, but at least four: evenly over frames 0 to 7
SAMPLED = (0, 2, 5, 7)


@dataclass(frozen=True)
class File:
    """A medium as a file, and decoded."""

    blob: bytes
    medium: Medium


def picture(seed: int, width: int = 72, height: int = 48) -> File:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image = PILImage.fromarray(pixels)
    out = io.BytesIO()
    image.save(out, "PNG")
    return File(out.getvalue(), Medium("image", Image(image), f"image-{seed}", "test"))


def film(seed: int) -> File:
    rng = np.random.default_rng(seed)
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as file:
        stream = file.add_stream("mpeg4", rate=FPS)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for _ in range(FRAMES):
            pixels = rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        file.mux(stream.encode())
    with av.open(io.BytesIO(out.getvalue())) as file:
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])
    seconds = FRAMES / FPS
    video = Video(frames[list(SAMPLED)], len(SAMPLED) / seconds, seconds, float(FPS), SAMPLED, FRAMES)
    return File(out.getvalue(), Medium("video", video, f"video-{seed}", "test"))


def sound(seed: int, seconds: float = 0.6) -> File:
    samples = np.random.default_rng(seed).integers(-3000, 3000, int(seconds * RATE), dtype=np.int16)
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes(samples.tobytes())
    audio = Audio(samples.astype(np.float32) / 32768, RATE)
    return File(out.getvalue(), Medium("audio", audio, f"audio-{seed}", "test"))


CASES: dict[str, list[File | str]] = {
    "text": ["hello world, how many objects are there?"],
    "image": ["look: ", picture(1), " what is it?"],
    "video": [film(2), "what happens?"],
    "audio": ["listen ", sound(3)],
    "all": [sound(4), picture(5), "and", film(6), "together?"],
    "an image twice": [picture(7), picture(7), "same?"],
    "a longer text": ["the quick brown fox jumps over the lazy dog. " * 6],
}


def request(parts: Sequence[File | str], **sampling: Any) -> dict[str, Any]:
    """Tensors of an ensemble request."""
    content: list[dict[str, Any]] = []
    blobs: list[bytes] = []
    for part in parts:
        if isinstance(part, str):
            content.append({"type": "text", "text": part})
        else:
            content.append({"type": part.medium.modality, "blob": len(blobs)})
            blobs.append(part.blob)
    sampling = {"max_tokens": TOKENS, "temperature": 0} | sampling
    body = {"messages": [{"role": "user", "content": content}], "sampling": sampling}
    return {"request": [json.dumps(body)], **({"media": blobs} if blobs else {})}


def deltas(responses: Sequence[dict[str, Any]]) -> list[Delta]:
    return [Delta.from_tensors(response) for response in responses]


def tokens(found: Sequence[Delta]) -> list[int]:
    return [token for delta in found for token in delta.token_ids]


@pytest.fixture(scope="module")
def reference(tiny_checkpoint: Callable[[str], Path]) -> Callable[[str], list[int]]:
    """Name of a case -> the tokens of transformers' own processor and ``generate``."""
    path = Path(__file__).parents[1] / "parity" / "conftest.py"
    spec = importlib.util.spec_from_file_location("parity_reference", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    whole = module.Parts(tiny_checkpoint("qwen2_5_omni"))
    known: dict[str, list[int]] = {}

    def generate(case: str) -> list[int]:
        if case not in known:
            parts = [part if isinstance(part, str) else part.medium for part in CASES[case]]
            known[case] = whole.reference_tokens(whole.make.turns(("user", *parts)), TOKENS)
        return known[case]

    return generate


@pytest.fixture(scope="module")
def tiny(tiny_checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory, start: Any) -> Iterator[Any]:
    """A server on the tiny omni checkpoint, at a path that is not ASCII."""
    folder = tmp_path_factory.mktemp("tiny")
    model = folder / "prüfling 漢"
    model.symlink_to(tiny_checkpoint("qwen2_5_omni"))
    settings = Settings(model=str(model), kv_cache_tokens=8192, torch_threads=1)
    log = folder / "server.log"
    server = TritonServer(find_server(), settings, log=log)
    yield start(server)
    server.stop()
    text = log.read_text()
    # a metric outside the contract, a stage that raised, an answer that could not be sent
    assert "is not in the contract" not in text
    assert "Traceback" not in text


@pytest.mark.parametrize("case", CASES)
def test_tokens_equal_transformers(tiny: Any, reference: Callable[[str], list[int]], case: str) -> None:
    found = deltas(tiny.stream("chat", request(CASES[case])).all())
    assert tokens(found) == reference(case)
    assert found[-1].finish_reason in ("length", "stop")
    usage = found[-1].usage
    assert usage is not None
    assert usage.completion_tokens == len(reference(case))
    for modality in ("image", "video", "audio"):
        given = any(not isinstance(part, str) and part.medium.modality == modality for part in CASES[case])
        assert (getattr(usage, f"{modality}_tokens") > 0) == given


def test_the_ensemble_without_encoders_answers_the_same(tiny: Any, reference: Callable[[str], list[int]]) -> None:
    for case in ("text", "a longer text"):
        assert tokens(deltas(tiny.stream("chat_text", request(CASES[case])).all())) == reference(case)


def test_requests_running_together_do_not_touch_each_other(tiny: Any, reference: Callable[[str], list[int]]) -> None:
    for _ in range(2):
        streams = {case: tiny.stream("chat", request(parts)) for case, parts in CASES.items()}
        for case, stream in streams.items():
            assert tokens(deltas(stream.all())) == reference(case), case
    assert len({tuple(reference(case)) for case in CASES}) == len(CASES)


def test_stages_report_to_the_metrics_page(tiny: Any) -> None:
    before = {stage: tiny.settled("triptych_requests_total", stage=stage, outcome="ok") for stage in STAGES}
    hits = tiny.settled("triptych_encoder_cache_hits_total", stage="vision_encoder")
    made = tiny.settled("triptych_generation_tokens_total", stage="language_model")
    for _ in range(2):
        found = deltas(tiny.stream("chat", request([picture(11), sound(12), "?"], ignore_eos=True)).all())
        assert len(tokens(found)) == TOKENS
    for stage in STAGES:
        tiny.wait_metric(lambda v, b=before[stage]: v == b + 2, "triptych_requests_total", stage=stage, outcome="ok")
    tiny.wait_metric(lambda v: v == hits + 1, "triptych_encoder_cache_hits_total", stage="vision_encoder")
    tiny.wait_metric(lambda v: v == made + 2 * TOKENS, "triptych_generation_tokens_total", stage="language_model")
    tiny.wait_metric(lambda v: v == 0, "triptych_requests_running", stage="language_model")


def test_cancel_frees_the_engine(tiny: Any) -> None:
    endless = request(["go on"], max_tokens=1500, ignore_eos=True)
    stream = tiny.stream("chat_text", endless)
    stream.next()
    tiny.wait_metric(lambda v: v == 1, "triptych_requests_running", stage="language_model")
    tiny.cancel("language_model", stream.request_id)
    with pytest.raises(TriptychError) as caught:
        stream.all()
    assert caught.value.kind is ErrorKind.CANCELLED
    tiny.wait_metric(lambda v: v == 0, "triptych_requests_running", stage="language_model")
    tiny.wait_metric(lambda v: v == 0, "triptych_kv_cache_usage_ratio", stage="language_model")


@pytest.mark.parametrize(
    ("tensors", "kind", "param"),
    [
        ({"request": ["{"]}, ErrorKind.INVALID_REQUEST, "request"),
        (request([File(b"no picture", picture(1).medium)]), ErrorKind.INVALID_MEDIA, "messages[0].content[0]"),
        (request(["x"], max_tokens=-1), ErrorKind.INVALID_REQUEST, None),
        (request(["x"], temprature=1), ErrorKind.INVALID_REQUEST, None),
    ],
)
def test_bad_requests_are_named_and_harm_nobody(
    tiny: Any, reference: Callable[[str], list[int]], tensors: dict[str, Any], kind: ErrorKind, param: str | None
) -> None:
    with pytest.raises(TriptychError) as caught:
        tiny.stream("chat", tensors).all()
    assert caught.value.kind is kind
    assert param is None or caught.value.param == param
    assert caught.value.stage == "preprocess"
    assert tokens(deltas(tiny.stream("chat", request(CASES["image"])).all())) == reference("image")


@pytest.mark.parametrize(
    ("model", "tensors", "missing"),
    [("chat", {"media": [b"x"]}, "request"), ("language_model", {"plan": ["{}"]}, "input_ids")],
)
def test_a_request_without_its_main_input_is_refused(
    tiny: Any, model: str, tensors: dict[str, Any], missing: str
) -> None:
    with pytest.raises(TriptychError, match=f"lacks the input {missing}") as caught:
        tiny.stream(model, tensors).all()
    assert caught.value.kind is ErrorKind.INVALID_REQUEST


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_answers_the_probe(tiny: Any, stage: str) -> None:
    assert tiny.cancel(stage) == []
    assert tiny.cancel(stage, "nobody") == []
