"""NVILA: grids of tiles, line feeds, what a picture depends on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as PILImage

from triptych.python_models.contract.errors import ErrorKind, TriptychError
from triptych.python_models.contract.request import MediaPart, Message, TextPart
from triptych.python_models.contract.settings import Settings
from triptych.python_models.families.nvila import Squares, _cut, _merged
from triptych.python_models.families.nvila_processing import nearest_grid
from triptych.python_models.families.registry import load_family
from triptych.python_models.media.types import Image, Medium


def test_grids() -> None:
    assert nearest_grid((1000, 1000), 9, 12, 448) == (3, 3)
    assert nearest_grid((1920, 1080), 9, 12, 448) == (4, 3)
    assert nearest_grid((1080, 1920), 9, 12, 448) == (2, 5)
    assert nearest_grid((100, 5000), 9, 12, 448) == (1, 12)
    assert nearest_grid((700, 700), 1, 12, 448) == (2, 2), "more than half of four tiles"
    assert nearest_grid((400, 400), 1, 12, 448) == (1, 1)


def test_tiles_are_merged_and_cut() -> None:
    whole = torch.arange(2 * 6 * 12.0).view(1, 2, 6, 12)
    tiles = _cut(whole, (2, 3))
    assert torch.equal(tiles[4], whole[0, :, 3:6, 4:8])
    assert torch.equal(_merged(tiles, (2, 3)), whole)


def test_squares_of_patches_are_padded() -> None:
    rows = Squares(2)(torch.arange(9.0).view(1, 1, 3, 3))
    assert rows.tolist() == [[[0, 1, 3, 4], [2, 0, 5, 0], [6, 7, 0, 0], [8, 0, 0, 0]]]


@pytest.fixture(params=["nvila", "nvila_lite"])
def preprocessor(request: pytest.FixtureRequest, tiny_checkpoint: Callable[[str], Path]) -> Any:
    return load_family(Settings(model=str(tiny_checkpoint(request.param)))).load_preprocessor()


def prepare(preprocessor: Any, *parts: str | tuple[int, int]) -> Any:
    media, content = [], []
    for part in parts:
        if isinstance(part, str):
            content.append(TextPart(part))
            continue
        pixels = np.full((part[1], part[0], 3), 90, np.uint8)
        medium = Medium("image", Image(PILImage.fromarray(pixels)), f"{part}", f"messages[0].content[{len(content)}]")
        content.append(MediaPart("image", blob=len(media)))
        media.append(medium)
    return preprocessor.prepare([Message("user", tuple(content))], media)


def test_a_line_feed_of_its_own_follows_the_rows(preprocessor: Any) -> None:
    prepared = prepare(preprocessor, (50, 40), "\n\nwhat?")
    (line_feed,) = preprocessor.processor.tokenizer("\n")["input_ids"]
    for _, end in prepared.items[0].spans:
        assert prepared.input_ids[end] == line_feed


def test_a_picture_is_another_beside_others(preprocessor: Any) -> None:
    (alone,) = prepare(preprocessor, (100, 40), "x").items
    first, second = prepare(preprocessor, (100, 40), (100, 40), "x").items
    assert alone.num_rows > first.num_rows
    assert alone.digest != first.digest == second.digest


def test_typed_placeholders_are_text(preprocessor: Any) -> None:
    prepared = prepare(preprocessor, "<image> and <vila/video>", (40, 40))
    assert "<image> and <vila/video>" in preprocessor.processor.tokenizer.decode(prepared.input_ids)
    assert (prepared.input_ids == preprocessor.token_id("image")).sum() == prepared.items[0].num_rows


def test_three_folders_by_slices(tiny_checkpoint: Callable[[str], Path]) -> None:
    family = load_family(Settings(model=str(tiny_checkpoint("nvila_original"))))
    loaded = family.load_decoder("cpu", torch.float32)
    _, source = family.open_decoder("cpu", torch.float32, progress=False)
    for name, tensor in loaded.text_model.state_dict().items():
        assert torch.equal(source.get(name), tensor), name
    assert torch.equal(source.get("lm_head.weight"), loaded.lm_head.weight)
    encoder = family.load_encoder("vision", "cpu", torch.float32)
    assert not [n for n, _ in encoder.model.named_parameters() if n.startswith(("language_model.", "lm_head."))]


def test_other_kinds_of_vila_are_refused(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    config = json.loads((tiny_checkpoint("nvila_original") / "config.json").read_text())
    for k, (change, named) in enumerate(
        [
            ({"image_aspect_ratio": "resize"}, "image_aspect_ratio 'resize'"),
            ({"mm_projector_cfg": {"mm_projector_type": "mlp2x_gelu"}}, "mm_projector_type 'mlp2x_gelu'"),
            ({"s2_scales": "32,96"}, r"s2_scales \[32, 96\]"),
            ({"llm_cfg": {"model_type": "llama"}}, "of type 'llama'"),
        ]
    ):
        folder = tmp_path / str(k)
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(TriptychError, match=named) as caught:
            load_family(Settings(model=str(folder)))
        assert caught.value.kind is ErrorKind.UNSUPPORTED
