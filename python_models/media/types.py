"""Decoded media, as families take them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PILImage

from ..contract.request import NO_OPTIONS, MediaOptions


@dataclass(frozen=True)
class Image:
    """An upright RGB picture (EXIF orientation applied, alpha laid over white)."""

    pixels: PILImage.Image


@dataclass(frozen=True)
class Video:
    """Sampled frames of a video.

    Attributes:
        frames: uint8 [T, height, width, 3], upright RGB.
        sampled_fps: frames per second after sampling, T / duration.
        duration_s: length of the file.
        source_fps: frame rate of the file.
        indices: which frames of the file were taken.
        total_frames: frames in the file.
    """

    frames: NDArray[np.uint8]
    sampled_fps: float
    duration_s: float
    source_fps: float
    indices: tuple[int, ...]
    total_frames: int


@dataclass(frozen=True)
class Audio:
    """A mono sound: float32 [n] in [-1, 1] at ``sampling_rate`` Hz."""

    samples: NDArray[np.float32]
    sampling_rate: int


@dataclass(frozen=True)
class Medium:
    """A decoded medium.

    Attributes:
        modality: "image", "video" or "audio".
        data: the decoded content.
        digest: hex digest over the file and what was taken of it (a family adds its processor's options).
        param: the field of the request it came from, for error messages.
        options: what the request asks for it; frames of a video are sampled accordingly.
    """

    modality: str
    data: Image | Video | Audio
    digest: str
    param: str
    options: MediaOptions = NO_OPTIONS
