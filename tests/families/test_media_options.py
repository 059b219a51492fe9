"""What a request asks for one medium: detail, pixels, tiles, frames; each has an effect or is refused by name."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as PILImage

from triptych.python_models.contract.errors import ErrorKind, TriptychError
from triptych.python_models.contract.request import ChatRequest, MediaOptions, MediaPart, Message, TextPart
from triptych.python_models.contract.settings import Settings
from triptych.python_models.families.base import FrameSampling
from triptych.python_models.families.media_options import fit, sampling_of
from triptych.python_models.families.registry import load_family
from triptych.python_models.media.types import Image, Medium

Tiny = Callable[[str], Path]


class Family:
    """The preprocessor of a tiny checkpoint."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.preprocessor: Any = load_family(Settings(model=str(folder), **settings)).load_preprocessor()

    def prepare(self, size: tuple[int, int], *options: MediaOptions) -> Any:
        """A picture for each of the options."""
        pixels = np.random.default_rng(1).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        picture = Image(PILImage.fromarray(pixels))
        media = [Medium("image", picture, "x", f"messages[0].content[{k}]", own) for k, own in enumerate(options)]
        parts = tuple(MediaPart("image", blob=0) for _ in media)
        return self.preprocessor.prepare([Message("user", (*parts, TextPart("x")))], media)

    def rows(self, size: tuple[int, int], **options: Any) -> int:
        return int(self.prepare(size, MediaOptions(**options)).items[0].num_rows)


@pytest.fixture(scope="module")
def load(tiny_checkpoint: Tiny) -> Callable[[str], Family]:
    made: dict[str, Family] = {}

    def load(name: str) -> Family:
        return made.setdefault(name, Family(tiny_checkpoint(name))) if name not in made else made[name]

    return load


def test_pixels_are_as_if_the_processor_had_these_bounds(load: Callable[[str], Family]) -> None:
    family = load("qwen2_5_vl")
    image_processor = family.preprocessor.processor.image_processor
    pixels = np.random.default_rng(2).integers(0, 256, (200, 300, 3), dtype=np.uint8)
    found = family.prepare((300, 200), MediaOptions(max_pixels=4096, min_pixels=2000))
    own = type(image_processor)(**(image_processor.to_dict() | {"size": {"shortest_edge": 2000, "longest_edge": 4096}}))
    picture = PILImage.fromarray(pixels)
    grid = own(picture, return_tensors="pt")["image_grid_thw"][0]
    assert found.features["vision"][0].tensors["grid"].tolist() == grid.tolist()
    resized = fit(image_processor, picture, 2000, 4096, "x")
    raw = {"do_rescale": False, "do_normalize": False, "return_tensors": "pt"}
    expected = type(own).__mro__[1](**own.to_dict())(picture, **raw)["pixel_values"]
    assert np.array_equal(type(own).__mro__[1](**image_processor.to_dict())(resized, **raw)["pixel_values"], expected)


@pytest.mark.parametrize(
    ("name", "size"),
    [("qwen2_5_vl", (300, 200)), ("glm4v", (300, 200)), ("paddleocr_vl", (300, 200)), ("kimi_vl", (200, 150))],
)
def test_max_pixels_give_fewer_tokens(load: Callable[[str], Family], name: str, size: tuple[int, int]) -> None:
    family = load(name)
    usual = family.rows(size)
    assert 0 < family.rows(size, max_pixels=3000) <= usual / 2
    # each of several pictures has its own
    prepared = family.prepare(size, MediaOptions(), MediaOptions(max_pixels=3000), MediaOptions(detail="high"))
    first, second, third = prepared.items
    assert (first.num_rows, second.num_rows, third.num_rows) == (usual, family.rows(size, max_pixels=3000), usual)
    assert first.digest == third.digest != second.digest


def test_min_pixels_give_more_tokens(load: Callable[[str], Family]) -> None:
    for name in ("qwen2_5_vl", "kimi_vl"):
        assert load(name).rows((40, 40), min_pixels=6400) >= 2 * load(name).rows((40, 40))


def test_low_detail(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    folder = tmp_path / "real"
    folder.mkdir()
    for file in tiny_checkpoint("qwen2_5_vl").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    path = folder / "processor_config.json"
    path.write_text(path.read_text().replace('"longest_edge": 12544', '"longest_edge": 12845056'))
    family = Family(folder)
    usual, low = family.rows((1600, 1200)), family.rows((1600, 1200), detail="low")
    assert usual == 1600 * 1200 // 16**2
    assert 0.9 * 512 * 512 / 16**2 < low <= 512 * 512 / 16**2
    assert family.rows((1600, 1200), detail="high") == family.rows((1600, 1200), detail="auto") == usual
    assert family.rows((300, 200), detail="low") == family.rows((300, 200))


def test_tiles(load: Callable[[str], Family]) -> None:
    for name in ("internvl", "internvl3_published"):
        family = load(name)
        usual = family.rows((400, 100))
        rows = [family.rows((400, 100), max_dynamic_patch=k) for k in (1, 2, 4)]
        assert rows[0] < rows[1] < rows[2] == usual
        assert family.rows((400, 100), detail="low") == rows[0]
        assert family.rows((33, 33), max_dynamic_patch=2) < family.rows((33, 33), min_dynamic_patch=4)


@pytest.mark.parametrize(
    ("name", "option", "why"),
    [
        ("gemma3", "max_pixels", "gemma3 gives every picture the same size"),
        ("llava", "min_pixels", "llava gives every picture the same size"),
        ("qwen2_5_vl", "max_dynamic_patch", "qwen2_5_vl cuts no tiles"),
        ("gemma3", "min_dynamic_patch", "gemma3 cuts no tiles"),
    ],
)
def test_options_without_effect_are_refused(load: Callable[[str], Family], name: str, option: str, why: str) -> None:
    with pytest.raises(TriptychError, match=why) as caught:
        load(name).rows((64, 48), **{option: 4})
    assert (caught.value.kind, caught.value.param) == (ErrorKind.UNSUPPORTED, f"messages[0].content[0].{option}")


def test_bounds_that_leave_nothing_are_refused(load: Callable[[str], Family]) -> None:
    with pytest.raises(TriptychError, match="between 1024 and 12544 pixels"):
        load("qwen2_5_vl").rows((64, 48), max_pixels=100)
    with pytest.raises(TriptychError, match="between 1024 and 12544 pixels"):
        load("qwen2_5_vl").rows((64, 48), min_pixels=20_000)
    with pytest.raises(TriptychError, match="max_image_pixels"):
        load("kimi_vl").rows((64, 48), min_pixels=200_000_000)


def test_frames_of_a_video() -> None:
    own = FrameSampling(fps=2.0, min_frames=4, max_frames=32, num_frames=16, fps_until=((5.0, 3.0),))
    free = dataclasses.replace(own, num_frames=None)
    assert sampling_of(own, MediaOptions()) == own
    assert sampling_of(own, MediaOptions(fps=1.0)) == dataclasses.replace(free, fps=1.0, fps_until=())
    assert sampling_of(own, MediaOptions(num_frames=3)).num_frames == 3
    few = sampling_of(own, MediaOptions(max_frames=2))
    assert (few.min_frames, few.max_frames, few.num_frames) == (2, 2, 2)
    assert sampling_of(free, MediaOptions(fps=1.0, max_frames=8)) == dataclasses.replace(
        free, fps=1.0, max_frames=8, fps_until=()
    )


@pytest.mark.parametrize(
    ("part", "param", "words"),
    [
        ({"type": "image", "fps": 1}, "fps", "unknown field"),
        ({"type": "video", "max_pixels": 1}, "max_pixels", "unknown field"),
        ({"type": "audio", "detail": "low"}, "detail", "unknown field"),
        ({"type": "image", "detail": "best"}, "detail", "auto, low, high"),
        ({"type": "image", "max_pixels": 0}, "max_pixels", "at least 1|between 1"),
        ({"type": "image", "max_pixels": 2.5}, "max_pixels", "integer"),
        ({"type": "image", "max_pixels": 4, "min_pixels": 5}, "min_pixels", "at most max_pixels"),
        ({"type": "video", "fps": 0}, "fps", "between 0.001"),
        ({"type": "video", "fps": 1, "num_frames": 2}, "num_frames", "only one"),
    ],
)
def test_wrong_options_are_refused_by_name(part: dict[str, Any], param: str, words: str) -> None:
    body = {"messages": [{"role": "user", "content": [part | {"blob": 0}]}]}
    with pytest.raises(TriptychError, match=words) as caught:
        ChatRequest.from_json(json.dumps(body), 1)
    assert caught.value.param == f"messages[0].content[0].{param}"


def test_they_survive_the_wire() -> None:
    content = [
        {"type": "image", "blob": 0, "detail": "low", "max_pixels": 9, "max_dynamic_patch": 2},
        {"type": "video", "blob": 0, "fps": 0.5, "max_frames": 4},
        {"type": "audio", "url": "https://example.com/a.wav"},
    ]
    request = ChatRequest.from_json(json.dumps({"messages": [{"role": "user", "content": content}]}), 1)
    assert ChatRequest.from_json(request.to_json(), 1) == request
    assert json.loads(request.to_json())["messages"][0]["content"] == content
