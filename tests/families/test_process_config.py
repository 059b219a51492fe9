"""--mm-process-config: options of every section have an effect, and what has none is refused at start by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as PILImage

from triptych.python_models.contract.errors import ErrorKind, TriptychError
from triptych.python_models.contract.request import MediaOptions, MediaPart, Message, TextPart
from triptych.python_models.contract.settings import Settings
from triptych.python_models.families.registry import load_family
from triptych.python_models.media.types import Audio, Image, Medium, Video

Tiny = Callable[[str], Path]


def load(folder: Path, **sections: Any) -> Any:
    settings = Settings.from_dict({"model": str(folder), "mm_process_config": json.dumps(sections) if sections else ""})
    return load_family(settings).load_preprocessor()


def item(preprocessor: Any, data: Any, options: MediaOptions | None = None) -> Any:
    modality = {Image: "image", Video: "video", Audio: "audio"}[type(data)]
    medium = Medium(modality, data, "x", "messages[0].content[0]", options or MediaOptions())
    parts = (MediaPart(modality, blob=0), TextPart("x"))
    return preprocessor.prepare([Message("user", parts)], [medium]).items[0]


def picture(width: int, height: int) -> Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image(PILImage.fromarray(pixels))


def video(frames: int = 4) -> Video:
    pixels = np.random.default_rng(0).integers(0, 256, (frames, 96, 128, 3), dtype=np.uint8)
    return Video(pixels, 2.0, frames / 2, 16.0, tuple(range(0, frames * 8, 8)), frames * 8)


def sound(seconds: float) -> Audio:
    samples = np.random.default_rng(0).standard_normal(int(seconds * 16000)) * 0.1
    return Audio(samples.astype(np.float32), 16000)


@pytest.mark.parametrize(
    ("name", "options", "fewer"),
    [
        ("qwen2_5_vl", {"max_pixels": 4096}, True),
        ("qwen2_5_vl", {"size": {"longest_edge": 4096}}, True),
        ("qwen3_vl", {"max_pixels": 4096}, True),
        ("glm4v", {"max_pixels": 4096}, True),
        ("ernie4_5_vl_moe", {"max_pixels": 4096}, True),
        ("kimi_vl", {"max_pixels": 4096}, True),
        ("kimi_vl", {"in_token_limit": 40}, True),
        ("pixtral", {"size": {"longest_edge": 32}}, True),
        ("mistral3", {"max_pixels": 1024}, True),
        ("internvl", {"max_patches": 1}, True),
        ("internvl3_published", {"max_patches": 2}, True),
        ("minicpmv", {"max_slice_nums": 2}, True),
        ("minicpmv4_6", {"max_slice_nums": 1}, True),
        ("phi4_multimodal", {"dynamic_hd": 1}, True),
        ("llava_next", {"max_pixels": 1500}, True),
        ("qwen2_5_vl", {"min_pixels": 12000}, False),
    ],
)
def test_pictures(tiny_checkpoint: Tiny, name: str, options: dict[str, Any], fewer: bool) -> None:
    data = picture(300, 200) if fewer else picture(40, 40)
    usual, changed = (item(load(tiny_checkpoint(name), **own), data) for own in ({}, {"image": options}))
    assert (changed.num_rows < usual.num_rows) if fewer else (changed.num_rows > usual.num_rows)
    assert changed.digest != usual.digest


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("qwen2_5_vl", {"max_pixels": 2304, "min_pixels": 1024}),
        ("qwen3_vl", {"size": {"longest_edge": 8192}}),
        ("qwen3_vl", {"total_pixels": 8192}),
        ("qwen3_vl", {"max_pixels": 2304}),
        ("glm4v", {"max_pixels": 2304}),
        ("ernie4_5_vl_moe", {"max_pixels": 1200}),
        ("kimi_k25", {"max_pixels": 1200}),
        ("minicpmv4_6", {"max_pixels": 1200}),
        ("minicpmv", {"frame_slice_nums": 1}),
    ],
)
def test_videos(tiny_checkpoint: Tiny, name: str, options: dict[str, Any]) -> None:
    usual, changed = (item(load(tiny_checkpoint(name), **own), video()) for own in ({}, {"video": options}))
    assert changed.num_rows < usual.num_rows
    assert changed.digest != usual.digest


@pytest.mark.parametrize("name", ["qwen2_5_vl", "glm4v", "internvl", "nvila", "llava_next_video", "nemotron_nano_vl"])
def test_frames(tiny_checkpoint: Tiny, name: str) -> None:
    """For all families: they are sampled before any processor sees them."""
    own = load(tiny_checkpoint(name)).frame_sampling
    fixed = load(tiny_checkpoint(name), video={"num_frames": 6}).frame_sampling
    assert (fixed.num_frames, fixed.multiple) == (6, own.multiple)
    slow = load(tiny_checkpoint(name), video={"fps": 0.5, "max_frames": 4, "min_frames": 2}).frame_sampling
    assert (slow.fps, slow.num_frames, slow.min_frames, slow.max_frames) == (0.5, None, 2, 4)


@pytest.mark.parametrize("name", ["qwen2_audio", "qwen2_5_omni", "voxtral", "phi4_multimodal"])
def test_sounds(tiny_checkpoint: Tiny, name: str) -> None:
    usual, changed, shorter = (
        item(load(tiny_checkpoint(name), **own), data)
        for own, data in (({}, sound(1.5)), ({"audio": {"max_seconds": 0.75}}, sound(1.5)), ({}, sound(0.75)))
    )
    assert changed.num_rows == shorter.num_rows <= usual.num_rows
    assert changed.digest != usual.digest


def test_a_request_stays_within_the_operators_bounds(tiny_checkpoint: Tiny) -> None:
    for name in ("qwen2_5_vl", "kimi_vl"):
        preprocessor = load(tiny_checkpoint(name), image={"max_pixels": 4096})
        rows = item(preprocessor, picture(300, 200)).num_rows
        assert item(preprocessor, picture(300, 200), MediaOptions(max_pixels=100_000)).num_rows == rows
        assert item(preprocessor, picture(300, 200), MediaOptions(max_pixels=2000)).num_rows < rows


@pytest.mark.parametrize(
    ("name", "sections", "kind", "words"),
    [
        ("qwen2_5_vl", {"picture": {}}, ErrorKind.INVALID_REQUEST, "picture.*allowed: audio, image, video"),
        ("qwen2_5_vl", {"image": 3}, ErrorKind.INVALID_REQUEST, "image must be an object"),
        ("qwen2_5_vl", {"image": {"max_pixel": 3}}, ErrorKind.INVALID_REQUEST, "allowed: max_pixels, min_pixels, size"),
        ("qwen2_5_vl", {"image": {"patch_size": 4}}, ErrorKind.INVALID_REQUEST, "no such option"),
        ("qwen2_5_vl", {"image": {"max_pixels": "x"}}, ErrorKind.INVALID_REQUEST, "must be an integer"),
        ("qwen2_5_vl", {"image": {"size": {"height": 3}}}, ErrorKind.INVALID_REQUEST, "longest_edge, shortest_edge"),
        ("qwen2_5_vl", {"image": {"max_pixels": 10}}, ErrorKind.INVALID_REQUEST, "no range"),
        ("qwen2_5_vl", {"video": {"fps": 1, "num_frames": 2}}, ErrorKind.INVALID_REQUEST, "only one of fps"),
        ("qwen2_5_vl", {"video": {"fps": 0}}, ErrorKind.INVALID_REQUEST, "between 0.001"),
        ("qwen2_5_vl", {"video": {"max_frames": 2, "min_frames": 3}}, ErrorKind.INVALID_REQUEST, "between 1 and 2"),
        ("qwen2_5_vl", {"audio": {"max_seconds": 2}}, ErrorKind.UNSUPPORTED, "images and videos, not audio"),
        ("qwen2_audio", {"audio": {"fps": 2}}, ErrorKind.INVALID_REQUEST, "allowed: max_seconds"),
        ("qwen2_audio", {"audio": {"max_seconds": 0}}, ErrorKind.INVALID_REQUEST, "at least 0.1"),
        ("gemma3", {"image": {"max_pixels": 4096}}, ErrorKind.UNSUPPORTED, "same size"),
        ("internvl", {"video": {"max_pixels": 4096}}, ErrorKind.UNSUPPORTED, "every frame of a video the same size"),
        ("qwen3_vl", {"video": {"min_pixels": 4096}}, ErrorKind.INVALID_REQUEST, "total_pixels"),
        ("qwen2_5_vl", {"video": {"max_pixels": "x"}}, ErrorKind.INVALID_REQUEST, "must be an integer"),
        ("gemma3", {"image": {"size": {"height": 64}}}, ErrorKind.INVALID_REQUEST, "allowed: max_pixels, min_pixels$"),
        ("minicpmv", {"image": {"slice_mode": 1}}, ErrorKind.INVALID_REQUEST, "true or false"),
    ],
)
def test_refused_at_start(
    tiny_checkpoint: Tiny, name: str, sections: dict[str, Any], kind: ErrorKind, words: str
) -> None:
    with pytest.raises(TriptychError, match=words) as caught:
        load(tiny_checkpoint(name), **sections)
    assert caught.value.kind is kind
    assert (caught.value.param or "").startswith("settings.mm_process_config")


def test_what_is_no_json_is_refused() -> None:
    with pytest.raises(TriptychError, match="is not JSON"):
        Settings.from_dict({"mm_process_config": "{"})
    with pytest.raises(TriptychError, match="must be an object"):
        Settings.from_dict({"mm_process_config": "[]"})


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl", "glm4v"])
def test_the_example_of_the_guides(tiny_checkpoint: Tiny, name: str) -> None:
    sections = {"image": {"max_pixels": 1048576}, "video": {"fps": 3, "max_pixels": 602112, "max_frames": 60}}
    preprocessor = load(tiny_checkpoint(name), **sections)
    # squares of 16 pixels, as many as the picture has: the tiny checkpoint's own bound is far below
    assert item(preprocessor, picture(640, 480)).num_rows == 40 * 30
    sampling = preprocessor.frame_sampling
    assert (sampling.fps, sampling.max_frames) == (3, 60)
