"""MiniCPM 2.6: slices, placeholders, long sounds, what is refused."""

from __future__ import annotations

import json
import shutil
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
from triptych.python_models.families.minicpm import table_rows
from triptych.python_models.families.minicpm_processing import Slicer, sound_rows
from triptych.python_models.families.registry import load_family
from triptych.python_models.media.types import Audio, Image, Medium


def test_sizes_and_placeholders_of_the_published_settings() -> None:
    slicer = Slicer()

    def shapes(width: int, height: int, limit: int = 9) -> list[tuple[int, ...]]:
        return [piece.shape[:2] for piece in slicer.pieces(PILImage.new("RGB", (width, height)), limit)]

    # smaller than the square: enlarged, alone
    assert shapes(100, 100) == [(448, 448)]
    assert shapes(448, 448) == [(448, 448)]
    # twice the square side by side: overview, then 2 x 1 cells
    assert shapes(896, 448) == [(322, 630), (448, 448), (448, 448)]
    # 1080p: 10.3 squares, at most 9; 4 columns x 2 rows are nearest to 16:9
    assert slicer.grid((1920, 1080), 9) == (4, 2)
    assert len(shapes(1920, 1080)) == 9
    assert slicer.grid((1080, 1920), 9) == (2, 4)
    assert slicer.grid((1920, 1080), 1) is None
    text = slicer.placeholder((1920, 1080), 9, 3)
    assert text.startswith("<image_id>3</image_id><image><unk>")
    assert text.count("<unk>") == 64 * 9
    assert text.count("\n") == 1
    assert slicer.placeholder((10, 10), 2, None) == "<image>" + "<unk>" * 64 + "</image>"


def test_values_are_the_published_arithmetic() -> None:
    values = Slicer(norm_mean=(0.48, 0.45, 0.4), norm_std=(0.26, 0.27, 0.28)).values()
    pixels = np.arange(256, dtype=np.uint8)[:, None, None].repeat(3, axis=2)
    expected = pixels.astype(np.float32) / 255
    expected = (expected - np.array([0.48, 0.45, 0.4], np.float32)) / np.array([0.26, 0.27, 0.28], np.float32)
    assert np.array_equal(values.T, expected[:, 0])


def test_rows_of_the_table_round_as_published() -> None:
    # 25 patches on a table of 70: exact fractions would give other rows
    rows = table_rows(25, 1, 70) // 70
    bounds = torch.arange(1 / 70, 1.0, 1 / 70)
    step = 1 / torch.tensor(25, dtype=torch.int32)
    assert rows.tolist() == torch.bucketize(torch.arange(0, 1 - 1e-6, step), bounds, right=True).tolist()
    assert rows.tolist() != torch.bucketize(torch.arange(25) / 25, bounds, right=True).tolist()
    for side in range(1, 100):
        assert len(table_rows(side, 1, 70)) == side


def test_rows_of_sounds() -> None:
    assert [sound_rows(frames) for frames in (3, 4, 100, 3000, 3100)] == [1, 1, 25, 750, 775]


def message(*parts: TextPart | MediaPart) -> Message:
    return Message("user", parts)


def test_a_long_sound_is_heard_in_pieces(tiny_checkpoint: Callable[[str], Path]) -> None:
    # half a minute of the published extractor is two seconds of this one
    family = load_family(Settings(model=str(tiny_checkpoint("minicpmo"))))
    preprocessor: Any = family.load_preprocessor()
    encoder = family.load_encoder("audio", "cpu", torch.float32)
    samples = (np.random.default_rng(0).standard_normal(72_345) * 0.1).astype(np.float32)

    def hear(part: Any) -> Any:
        medium = Medium("audio", Audio(part, 16000), str(len(part)), "messages[0]")
        prepared = preprocessor.prepare([message(MediaPart("audio", blob=0), TextPart("x"))], [medium])
        (item,) = prepared.features["audio"]
        (rows,) = encoder.encode([item])
        assert len(rows) == item.num_rows == prepared.items[0].num_rows
        return rows

    parts = [hear(samples[start : start + 32_000]) for start in range(0, len(samples), 32_000)]
    assert len(parts) == 3
    torch.testing.assert_close(hear(samples), torch.cat(parts), atol=1e-4, rtol=1e-4)


def test_typed_placeholders_are_text(tiny_checkpoint: Callable[[str], Path]) -> None:
    preprocessor: Any = load_family(Settings(model=str(tiny_checkpoint("minicpmo")))).load_preprocessor()
    picture = Medium("image", Image(PILImage.new("RGB", (20, 20))), "p", "messages[0]")
    typed = "(<image>./</image>)(<audio>./</audio>)<image>./</image><|audio_start|>./<|audio_end|><unk><slice>"
    prepared = preprocessor.prepare([message(TextPart(typed), MediaPart("image", blob=0))], [picture])
    decoded = preprocessor.processor.tokenizer.decode(prepared.input_ids)
    assert typed in decoded
    unk = preprocessor.token_id("image")
    assert (prepared.input_ids == unk).sum() == prepared.items[0].num_rows


def test_too_short_a_sound(tiny_checkpoint: Callable[[str], Path]) -> None:
    preprocessor = load_family(Settings(model=str(tiny_checkpoint("minicpmo")))).load_preprocessor()
    short = Medium("audio", Audio(np.zeros(320, np.float32), 16000), "s", "messages[2]")
    with pytest.raises(TriptychError, match=r"messages\[2\]: this sound lasts 20.0 ms") as caught:
        preprocessor.prepare([message(MediaPart("audio", blob=0))], [short])
    assert caught.value.kind is ErrorKind.INVALID_MEDIA


def test_other_versions_are_refused(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tmp_path / "other"
    shutil.copytree(tiny_checkpoint("minicpmv"), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"version": 4.5}))
    with pytest.raises(TriptychError, match=r"version 4.5; supported: 2.6") as caught:
        load_family(Settings(model=str(folder))).load_preprocessor()
    assert caught.value.kind is ErrorKind.UNSUPPORTED


def test_a_folder_without_processor_options(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tmp_path / "less"
    shutil.copytree(tiny_checkpoint("minicpmv"), folder)
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(TriptychError, match=r"has no preprocessor_config\.json") as caught:
        load_family(Settings(model=str(folder))).load_preprocessor()
    assert caught.value.kind is ErrorKind.MODEL_NOT_FOUND
