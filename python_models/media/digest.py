"""Digests of media: one file decoded in one way gives one digest, any other file or way another.

The encoded bytes are hashed, not what they decode to: they are a fraction of it, and decoding is always the same.
"""

from __future__ import annotations

import hashlib
import json

from .types import Audio, Image, Video


def digest(data: Image | Video | Audio, file: bytes) -> str:
    """SHA-256, for which CPUs of servers have instructions, in hex, over a file and what was taken of it.

    Args:
        data: what was decoded: its kind and shape count, of a video which frames were taken and their rate (families
            derive positions from it), of a sound its sampling rate.
        file: it was decoded from.
    """
    state = hashlib.sha256(json.dumps(_taken(data)).encode() + b"\n")
    state.update(file)
    return state.hexdigest()


def _taken(data: Image | Video | Audio) -> list[object]:
    if isinstance(data, Image):
        return ["image", *data.pixels.size]
    if isinstance(data, Video):
        return ["video", *data.frames.shape, f"{data.sampled_fps:.6g}", *data.indices]
    return ["audio", data.samples.size, data.sampling_rate]
