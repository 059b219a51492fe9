"""The preprocess stage with real families: files in, the features that the family makes of their content out."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as PILImage

from triptych.python_models.contract.errors import ErrorKind, TriptychError
from triptych.python_models.contract.features import unpack
from triptych.python_models.contract.plan import Plan
from triptych.python_models.contract.settings import Settings
from triptych.python_models.preprocess.stage import PreprocessStage
from triptych.python_models.stage import NoTelemetry

Make = Callable[..., bytes]


class Answer:
    def __init__(self) -> None:
        self.done = threading.Event()
        self.result: Mapping[str, Any] | TriptychError | None = None

    def send(self, tensors: Mapping[str, Any], *, final: bool) -> None:
        self.result = tensors
        self.done.set()

    def fail(self, error: TriptychError) -> None:
        self.result = error
        self.done.set()


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen2_5_omni", "gemma3"])
def stage(request: pytest.FixtureRequest, tiny_checkpoint: Callable[[str], Path]) -> Iterator[PreprocessStage]:
    settings = Settings(model=str(tiny_checkpoint(request.param)))
    running = PreprocessStage(settings, NoTelemetry(), "cpu")
    yield running
    running.close()


def ask(stage: PreprocessStage, parts: list[Any], blobs: list[bytes]) -> Answer:
    answer = Answer()
    request = {"messages": [{"role": "user", "content": parts}]}
    inputs: dict[str, Any] = {"request": [json.dumps(request).encode()]}
    if blobs:
        inputs["media"] = blobs
    stage.submit("", inputs, answer)
    return answer


def result(answer: Answer) -> Mapping[str, Any]:
    assert answer.done.wait(60)
    assert isinstance(answer.result, dict), answer.result
    return answer.result


def png(seed: int, width: int = 64, height: int = 48) -> bytes:
    out = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    PILImage.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def content(*kinds: str) -> list[dict[str, Any]]:
    return [{"type": kind, "blob": k} for k, kind in enumerate(kinds)] + [{"type": "text", "text": "what is it?"}]


def same(one: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    assert set(one) == set(other)
    # all but when it was done
    plans = [replace(Plan.from_json(answer["plan"][0]), times=None) for answer in (one, other)]
    assert plans[0] == plans[1]
    for name in set(one) - {"plan"}:
        np.testing.assert_array_equal(one[name], other[name])


def test_text(stage: PreprocessStage) -> None:
    out = result(ask(stage, content(), []))
    assert set(out) == {"input_ids", "position_ids", "plan"}
    axes = 3 if "video" in stage._preprocessor.modalities else 1
    assert out["position_ids"].shape == (axes, out["input_ids"].size)


def test_spans_digests_and_rows(stage: PreprocessStage, make_clip: Make, make_tone: Make) -> None:
    kinds = ["image", "video", "image"]
    blobs = [png(1), make_clip(20, 10, 64, 48), png(1)]
    if "video" not in stage._preprocessor.modalities:
        kinds[1], blobs[1] = "image", png(2)
    if "audio" in stage._preprocessor.modalities:
        kinds.append("audio")
        blobs.append(make_tone(22050, 2, 1.0, fmt="MP3"))
    out = result(ask(stage, content(*kinds), blobs))
    plan = Plan.from_json(out["plan"][0])
    assert [item.modality for item in plan.items] == kinds
    assert plan.items[0].digest == plan.items[2].digest != plan.items[1].digest
    for encoder in ("vision", "audio"):
        mine = [item for item in plan.items if item.encoder == encoder]
        if not mine:
            assert f"{encoder}_features" not in out
            continue
        packed = unpack(out[f"{encoder}_features"])
        assert [(p.digest, p.num_rows) for p in packed] == [(i.digest, i.num_rows) for i in mine]
    ends = [span for item in plan.items for span in item.spans]
    assert ends == sorted(ends)
    assert all(len(set(out["input_ids"][start:end].tolist())) == 1 for start, end in ends)


def test_together_as_alone(stage: PreprocessStage, make_clip: Make, make_tone: Make) -> None:
    """Requests that run at the same time get what each gets alone."""
    requests = []
    for k in range(4):
        requests.append((content(), []))
        requests.append((content("image"), [png(k, 40 + 16 * k)]))
        requests.append((content("image", "image"), [png(k), png(k + 50, 80, 120)]))
    if "video" in stage._preprocessor.modalities:
        requests.append((content("video"), [make_clip(20, 10)]))
    if "audio" in stage._preprocessor.modalities:
        requests.append((content("audio", "image"), [make_tone(), png(3)]))
    alone = [result(ask(stage, *request)) for request in requests]
    together = [ask(stage, *request) for request in requests * 2]
    for answer, expected in zip(together, alone * 2, strict=True):
        same(result(answer), expected)


def test_placeholder_typed_by_the_user_is_text(stage: PreprocessStage) -> None:
    typed = "<|image_pad|><|video_pad|><start_of_image><image_soft_token>"
    out = result(ask(stage, [{"type": "text", "text": typed}], []))
    assert Plan.from_json(out["plan"][0]).items == ()


def test_bad_media_leave_it_healthy(stage: PreprocessStage) -> None:
    for kind in sorted(stage._preprocessor.modalities):
        answer = ask(stage, content("image", kind), [png(1), b"damaged"])
        assert answer.done.wait(60)
        assert isinstance(answer.result, TriptychError)
        assert (answer.result.kind, answer.result.param) == (ErrorKind.INVALID_MEDIA, "messages[0].content[1]")
    if "audio" not in stage._preprocessor.modalities:
        answer = ask(stage, content("audio"), [b"x"])
        assert answer.done.wait(60)
        assert isinstance(answer.result, TriptychError)
        assert answer.result.kind is ErrorKind.UNSUPPORTED
    result(ask(stage, content("image"), [png(1)]))


@pytest.mark.parametrize("size", [(1, 1), (2, 300), (300, 2), (1000, 700)])
def test_odd_sizes(stage: PreprocessStage, size: tuple[int, int]) -> None:
    out = result(ask(stage, content("image"), [png(1, *size)]))
    (item,) = unpack(out["vision_features"])
    assert item.num_rows >= 1


def test_missing_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(TriptychError) as caught:
        PreprocessStage(Settings(model=str(tmp_path / "nothing")), NoTelemetry(), "cpu")
    assert caught.value.kind is ErrorKind.MODEL_NOT_FOUND
