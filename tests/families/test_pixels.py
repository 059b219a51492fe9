"""Pictures that the encoder resizes, cuts and normalises, beside what the processor makes of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image as PILImage

from triptych.python_models.contract.request import MediaPart, Message, TextPart
from triptych.python_models.contract.settings import Settings
from triptych.python_models.families.registry import load_family
from triptych.python_models.media.types import Image, Medium


def prepared(family: Any, *sizes: tuple[int, int]) -> Any:
    media, parts = [], []
    for k, (width, height) in enumerate(sizes):
        # noise has the sharpest edges, at which filters overshoot
        picture = PILImage.fromarray(np.random.default_rng(k).integers(0, 256, (height, width, 3), dtype=np.uint8))
        media.append(Medium("image", Image(picture), f"{k}", "messages[0]"))
        parts.append(MediaPart("image", blob=k))
    message = Message("user", (*parts, TextPart("what?")), plain=False)
    return family.load_preprocessor().prepare((message,), tuple(media))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v", "glm46v", "ernie4_5_vl_moe"])
def test_resized_by_the_encoder(name: str, device: str, tiny_checkpoint: Callable[[str], Path]) -> None:
    folder = str(tiny_checkpoint(name))
    usual, early = (load_family(Settings(model=folder, gpu_preprocessing=mode)) for mode in ("off", "on"))
    sizes = (57, 41), (64, 64), (90, 33)
    expected, found = prepared(usual, *sizes), prepared(early, *sizes)
    assert found.input_ids.tolist() == expected.input_ids.tolist()
    assert np.array_equal(found.position_ids, expected.position_ids)
    assert [item.digest for item in found.items] == [item.digest for item in expected.items]
    encoder: Any = early.load_encoder("vision", device, torch.float32)
    for (width, height), own, other in zip(sizes, found.features["vision"], expected.features["vision"], strict=True):
        assert own.tensors["picture"].shape == (height, width, 3)
        std = float(torch.tensor(own.tensors["std"]).min())
        steps = (encoder._pixels(own) - encoder._pixels(other)).abs() * std
        assert float(steps.max()) < 2.5
        assert float((steps > 0.5).float().mean()) < 0.15


@pytest.mark.parametrize(
    ("name", "sizes"),
    [("gemma3", ((33, 41), (32, 32), (60, 30))), ("janus", ((40, 31), (32, 32), (23, 50), (60, 8)))],
)
def test_squares_by_the_encoder(
    name: str, sizes: tuple[tuple[int, int], ...], device: str, tiny_checkpoint: Callable[[str], Path]
) -> None:
    folder = str(tiny_checkpoint(name))
    usual, early = (load_family(Settings(model=folder, gpu_preprocessing=mode)) for mode in ("off", "on"))
    expected, found = prepared(usual, *sizes), prepared(early, *sizes)
    assert found.input_ids.tolist() == expected.input_ids.tolist()
    assert [item.digest for item in found.items] == [item.digest for item in expected.items]
    encoder: Any = early.load_encoder("vision", device, torch.float32)
    for (width, height), own, other in zip(sizes, found.features["vision"], expected.features["vision"], strict=True):
        assert own.tensors["picture"].shape == (height, width, 3)
        std = float(torch.tensor(own.tensors["std"]).min())
        steps = (encoder._pixels(own) - encoder._pixels(other)).abs() * std
        assert float(steps.max()) < 2.5
        assert float((steps > 0.5).float().mean()) < 0.15
    # one that is far larger goes through the processor, and those beside it
    (large, _) = prepared(early, (400, 300), (32, 32)).features["vision"]
    assert "picture" not in large.tensors


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl", "llava_onevision", "internvl"])
def test_frames_taken_in_place_give_the_same(name: str, tiny_checkpoint: Callable[[str], Path]) -> None:
    folder = tiny_checkpoint(name)
    own = load_family(Settings(model=str(folder))).load_preprocessor().processor.video_processor
    plain = transformers.AutoVideoProcessor.from_pretrained(folder)
    assert type(own) is not type(plain), "it was left as it was"
    frames = np.random.default_rng(0).integers(0, 256, (4, 90, 130, 3), dtype=np.uint8)
    options = {"do_sample_frames": False, "input_data_format": "channels_last", "return_tensors": "pt"}
    found, expected = own([frames], **options), plain([frames], **options)
    for key, value in expected.items():
        assert torch.equal(found[key], value)


def test_more_than_a_square_stays_with_the_processor(tiny_checkpoint: Callable[[str], Path]) -> None:
    folder = str(tiny_checkpoint("deepseek_vl_hybrid"))
    usual, early = (load_family(Settings(model=folder, gpu_preprocessing=mode)) for mode in ("off", "on"))
    (expected,), (found,) = (prepared(family, (40, 31)).features["vision"] for family in (usual, early))
    assert set(found.tensors) == set(expected.tensors)
    assert all(np.array_equal(found.tensors[name], value) for name, value in expected.tensors.items())


def test_far_larger_pictures_are_resized_before(tiny_checkpoint: Callable[[str], Path]) -> None:
    family = load_family(Settings(model=str(tiny_checkpoint("qwen2_5_vl")), gpu_preprocessing="on"))
    (item,) = prepared(family, (400, 300)).features["vision"]
    assert item.tensors["picture"].nbytes < 400 * 300
