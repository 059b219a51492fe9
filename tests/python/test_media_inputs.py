"""What callers hand over reaches the decoders' output without a changed pixel or sample."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from triptych.client.calls import media
from triptych.python_models.contract.errors import ErrorKind, TriptychError
from triptych.python_models.families.base import FrameSampling
from triptych.python_models.media.audio import read_with_soundfile
from triptych.python_models.media.image import decode_image
from triptych.python_models.media.video import DECODERS, decode_video


def decoded(value: Any) -> Any:
    data = media.encode("image", value, "x")
    assert isinstance(data, bytes)
    return np.asarray(decode_image(data, 10**6).pixels)


def random(*shape: int) -> Any:
    return np.random.default_rng(len(shape)).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("size", [(5, 7), (33, 41), (64, 48)])
def test_pictures(size: tuple[int, int]) -> None:
    pixels = random(*size, 3)
    for same in (pixels, Image.fromarray(pixels), torch.from_numpy(pixels), torch.from_numpy(pixels).permute(2, 0, 1)):
        assert np.array_equal(decoded(same), pixels)
    grey = pixels[..., 0]
    for same in (grey, grey[..., None], torch.from_numpy(grey.copy())[None], Image.fromarray(grey)):
        assert np.array_equal(decoded(same), np.repeat(grey[..., None], 3, -1))
    # three pixels wide: channels are where the caller's library has them
    narrow = random(3, 8, 3)
    assert np.array_equal(decoded(narrow), narrow)
    assert np.array_equal(decoded(torch.from_numpy(narrow)), narrow.transpose(1, 2, 0))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "1", "I;16"])
def test_other_modes_become_what_a_file_of_them_does(mode: str) -> None:
    if mode == "I;16":
        picture = Image.fromarray(random(20, 30).astype(np.uint16) * 200)
    elif mode == "P":
        picture = Image.fromarray(random(20, 30, 3)).quantize(16)
        picture.info["transparency"] = 3
    else:
        picture = Image.fromarray(random(20, 30, 4)).convert(mode)
    file = io.BytesIO()
    picture.save(file, "PNG")
    assert np.array_equal(decoded(picture), decoded(file.getvalue()))


def test_a_photograph_stands_upright_whether_opened_or_named(tmp_path: Path) -> None:
    picture = Image.fromarray(random(20, 30, 3))
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(tmp_path / "photo.png", exif=exif)
    with Image.open(tmp_path / "photo.png") as opened:
        assert decoded(opened).shape == (30, 20, 3)
        assert np.array_equal(decoded(opened), decoded(tmp_path / "photo.png"))


def test_the_same_pixels_are_the_same_bytes(tmp_path: Path) -> None:
    pixels = random(20, 30, 3)
    Image.fromarray(pixels).save(tmp_path / "x.tif", compression="tiff_lzw", dpi=(72, 72))
    with Image.open(tmp_path / "x.tif") as opened:
        assert media.encode("image", opened, "x") == media.encode("image", pixels, "x")


@pytest.mark.parametrize("decoders", [DECODERS, ("av",)])
@pytest.mark.parametrize(("shape", "fps"), [((8, 48, 64, 3), 8), ((5, 33, 47, 3), 29.97), ((1, 31, 29, 3), 2.5)])
def test_frames(tmp_path: Path, shape: tuple[int, ...], fps: float, decoders: tuple[str, ...]) -> None:
    frames = random(*shape)
    pictures = [Image.fromarray(frame) for frame in frames]
    files = [
        media.encode("video", (same, fps), "x")
        for same in (frames, torch.from_numpy(frames).permute(0, 3, 1, 2), pictures)
    ]
    assert files[0] == files[1] == files[2]
    assert isinstance(files[0], bytes)
    (tmp_path / "x.avi").write_bytes(files[0])
    found: list[Any] = []

    def allocate(wanted: tuple[int, ...]) -> Any:
        found.append(np.zeros(wanted, np.uint8))
        return found[-1]

    sampling = FrameSampling(num_frames=shape[0], multiple=1)
    info = decode_video(str(tmp_path / "x.avi"), sampling, 10**6, 64, allocate, decoders)
    assert np.array_equal(found[0], frames)
    assert (info.total_frames, info.source_fps) == (shape[0], pytest.approx(fps))


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int16])
def test_samples(dtype: Any) -> None:
    values = np.random.default_rng(0).uniform(-1, 1, 999)
    samples = (values * 32767).astype(np.int16) if dtype is np.int16 else values.astype(dtype)
    expected = samples.astype(np.float32) / (32768 if dtype is np.int16 else 1)
    for same in (samples, samples[None], torch.from_numpy(samples)):
        data = media.encode("audio", (same, 16000), "x")
        assert isinstance(data, bytes)
        found, rate = read_with_soundfile(data, 10)
        assert np.array_equal(found, expected)
        assert rate == 16000


def test_addresses_and_files(tmp_path: Path) -> None:
    (tmp_path / "a b.bin").write_bytes(b"content")
    path = tmp_path / "a b.bin"
    encoded = base64.b64encode(b"content").decode()
    for same in (
        b"content",
        bytearray(b"content"),
        memoryview(b"content"),
        path,
        str(path),
        path.as_uri(),
        f"data:image/png;base64,{encoded}",
        f"data:;base64,{encoded[:4]}\n{encoded[4:]}",
        "data:,content",
    ):
        assert media.encode("image", same, "x") == b"content"
    assert media.encode("image", "HTTPS://example.com/a.png", "x") == "HTTPS://example.com/a.png"


@pytest.mark.parametrize(
    ("modality", "value", "message"),
    [
        ("image", np.zeros((4, 4, 3), np.float32), "must be uint8"),
        ("image", np.zeros((9, 9, 7), np.uint8), r"shape \[9, 9, 7\]"),
        ("image", 3, "cannot be int"),
        ("image", Image.new("HSV", (4, 4)), "mode HSV"),
        ("image", "data:image/png", "no comma"),
        ("image", "data:image/png;base64,?", "not valid base64"),
        ("image", "/no/such/file.png", "No such file"),
        ("video", np.zeros((2, 4, 4, 3), np.uint8), r"\(frames, fps\)"),
        ("video", (np.zeros((2, 4, 4, 3), np.uint8), 0), "greater than 0"),
        ("video", (np.zeros((0, 4, 4, 3), np.uint8), 1), "no frames"),
        ("video", ([Image.new("RGB", (4, 4)), Image.new("RGB", (5, 4))], 1), "4x4, 5x4"),
        ("audio", np.zeros(9, np.float32), r"\(samples, sampling_rate\)"),
        ("audio", (np.zeros((2, 9), np.float32), 16000), "must be mono"),
        ("audio", (np.zeros(9, np.int32), 16000), "int16, got int32"),
        ("audio", (np.zeros(9, np.float32), 16000.0), "must be an integer"),
    ],
)
def test_what_is_not_understood_is_named(modality: str, value: Any, message: str) -> None:
    with pytest.raises(TriptychError, match=message) as caught:
        media.encode(modality, value, "messages[1].content[0]")
    assert caught.value.param == "messages[1].content[0]"
    assert caught.value.kind in (ErrorKind.INVALID_REQUEST, ErrorKind.INVALID_MEDIA)
