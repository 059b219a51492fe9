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


def test_same_picture_in_another_file() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    digests = set()
    for fmt, options in (("PNG", {}), ("PNG", {"compress_level": 1}), ("BMP", {}), ("WEBP", {"lossless": True})):
        out = io.BytesIO()
        PILImage.fromarray(pixels).save(out, fmt, **options)
        digests.add(digest(decode_image(out.getvalue(), 10**6)))
    assert len(digests) == 1
    assert len(digests.pop()) == 64
    pixels[0, 0, 0] ^= 1
    assert digest(Image(PILImage.fromarray(pixels))) not in digests


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
    ]
    assert len({digest(thing) for thing in things}) == len(things)


def test_memory_layout_does_not_count() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (2, 4, 6, 3), np.uint8)
    one = Video(frames, 2.0, 1.0, 10.0, (0, 5), 10)
    other = Video(np.asfortranarray(frames), 2.0, 1.0, 10.0, (0, 5), 10)
    assert digest(one) == digest(other)


@pytest.mark.parametrize("seed", range(3))
def test_no_collision_between_neighbours(seed: int) -> None:
    samples = np.random.default_rng(seed).uniform(-1, 1, 100).astype(np.float32)
    changed = samples.copy()
    changed[50] = np.nextafter(changed[50], np.float32(2))
    assert digest(Audio(samples, 16000)) != digest(Audio(changed, 16000))
