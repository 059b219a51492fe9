"""Digests: equal for equal content, different for anything else."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image as PILImage

from triptych.python_models.media.digest import digest
from triptych.python_models.media.image import decode_image
from triptych.python_models.media.types import Audio, Image, Video


def picture(shape: tuple[int, int], data: bytes) -> Image:
    return Image(PILImage.frombytes("RGB", shape, data))


def test_one_file_one_digest() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    files = []
    for level in (0, 9):
        out = io.BytesIO()
        PILImage.fromarray(pixels).save(out, "PNG", compress_level=level)
        files.append(out.getvalue())
    one, again, other = (digest(decode_image(file, 10**6), file) for file in (files[0], bytes(files[0]), files[1]))
    assert one == again != other
    assert len(one) == 64


def test_shape_and_kind_count() -> None:
    data = bytes(range(96))
    samples = np.frombuffer(data, np.float32)
    frames = np.frombuffer(data, np.uint8)
    video = Video(frames.reshape(2, 4, 4, 3), 2.0, 1.0, 10.0, (0, 5), 10)
    things = [
        picture((4, 8), data),
        picture((8, 4), data),
        picture((32, 1), data),
        Audio(samples, 16000),
        Audio(samples, 8000),
        Audio(samples[:-1], 16000),
        video,
        replace(video, frames=frames.reshape(1, 8, 4, 3)),
        replace(video, sampled_fps=1.0),
        replace(video, indices=(0, 6)),
    ]
    assert len({digest(thing, b"the same file") for thing in things}) == len(things)


@pytest.mark.parametrize("seed", range(3))
def test_every_byte_counts(seed: int) -> None:
    file = bytearray(np.random.default_rng(seed).bytes(100))
    sound = Audio(np.ones(10, np.float32), 16000)
    before = digest(sound, bytes(file))
    file[50] ^= 1
    assert digest(sound, bytes(file)) != before
