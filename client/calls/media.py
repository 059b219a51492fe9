"""What Python callers hold in their hands, as the encoded bytes that ``preprocess`` reads; no pixel or sample changes.

Pictures become uncompressed TIFF files, frames of videos uncompressed AVI files, sounds WAV files of 32-bit floats (or
16-bit integers where they were such). All three are written at the speed of a copy, are the same for the same content
(so caches find them), and are files that any server of this system takes over the wire.
"""

from __future__ import annotations

import io
import os
import struct
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from triptych.python_models.contract.errors import ErrorKind, TriptychError, invalid

from .data_url import of_data_url

_CHANNELS = (1, 3, 4)
_ORIENTATION_TAG = 0x0112
_WAV_PCM, _WAV_FLOAT = 1, 3
_EXAMPLES = {
    "image": "a PIL image, a uint8 array [height, width, 3], a torch tensor [3, height, width]",
    "video": "(frames, fps) with frames a uint8 array [T, height, width, 3], a torch tensor [T, 3, height, width] or a "
    "list of pictures",
    "audio": "(samples, sampling_rate) with samples a float or int16 array [n]",
}


def encode(modality: str, value: Any, where: str) -> bytes | str:
    """A medium as encoded bytes, or as the http(s) URL to fetch it from.

    Args:
        modality: "image", "video" or "audio".
        value: bytes of a file, a path, an http(s), data or file URL, or what :data:`_EXAMPLES` lists.
        where: the caller's name for it.

    Raises:
        TriptychError: INVALID_REQUEST or INVALID_MEDIA naming ``where`` and what is allowed.
    """
    if isinstance(value, (bytes, bytearray, memoryview)):
        return bytes(value)
    if isinstance(value, str):
        return _of_text(value, where)
    if isinstance(value, os.PathLike):
        return _read(Path(value), where)
    if modality == "image":
        return _tiff(_picture(value, where), where)
    if modality == "audio" and isinstance(value, Mapping) and {"array", "sampling_rate"} <= value.keys():
        # as the `datasets` library has it
        value = value["array"], value["sampling_rate"]
    if not (isinstance(value, tuple) and len(value) == 2):
        raise _not_taken(modality, value, where)
    return (_avi if modality == "video" else _wav)(*value, where)


def _of_text(value: str, where: str) -> bytes | str:
    # a data: URL may have megabytes, which base64 alone is to read
    scheme = value[:8].partition(":")[0].lower()
    if scheme in ("http", "https"):
        return value
    if scheme == "data":
        return of_data_url(value, where)
    if scheme == "file":
        return _read(Path(unquote(urlsplit(value).path)), where)
    return _read(Path(value).expanduser(), where)


def _read(path: Path, where: str) -> bytes:
    try:
        return path.read_bytes()
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise TriptychError(ErrorKind.INVALID_MEDIA, f"{where}: {path} cannot be read: {reason}", where) from None


def _picture(value: Any, where: str) -> Image.Image:
    if isinstance(value, Image.Image):
        return value
    pixels = _pixels(value, "image", where)
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def _tiff(picture: Image.Image, where: str) -> bytes:
    """An upright picture; how modes other than RGB become RGB is decided where files are decoded."""
    mode = picture.mode
    try:
        if picture.getexif().get(_ORIENTATION_TAG, 1) != 1:
            picture = ImageOps.exif_transpose(picture)
        if "transparency" in picture.info:
            picture = picture.convert("RGBA")
        # what a file brought along (profiles, resolution, its compression) would be written too
        plain = picture if type(picture) is Image.Image and not picture.info else picture.copy()
        if plain.info:
            plain.info = {}
        out = io.BytesIO()
        plain.save(out, "TIFF")
    except (OSError, KeyError, ValueError, SyntaxError) as error:
        raise TriptychError(
            ErrorKind.INVALID_MEDIA, f"{where}: the picture (mode {mode}) cannot be handed over: {error}", where
        ) from None
    return out.getvalue()


def _avi(frames: Any, fps: Any, where: str) -> bytes:
    import av

    if isinstance(fps, bool) or not isinstance(fps, (int, float, Fraction, np.integer, np.floating)) or not fps > 0:
        raise invalid(f"{where}: fps of (frames, fps) must be a number greater than 0, got {fps!r}", where)
    if isinstance(frames, Sequence) and not isinstance(frames, str):
        frames = _stack([np.asarray(_picture(frame, where).convert("RGB")) for frame in frames], where)
    pixels = _pixels(frames, "video", where)
    if pixels.shape[-1] != 3:
        raise invalid(f"{where}: frames must have 3 channels, got {pixels.shape[-1]}", where)
    if not all(pixels.shape):
        raise invalid(f"{where}: the video has no frames", where)
    out = io.BytesIO()
    with av.open(out, "w", format="avi") as file:
        stream = file.add_stream("rawvideo", rate=_rational(fps))
        stream.height, stream.width, stream.pix_fmt = pixels.shape[1], pixels.shape[2], "bgr24"
        for frame in pixels:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame[..., ::-1]), "bgr24")))
        file.mux(stream.encode())
    return out.getvalue()


def _rational(fps: Any) -> Fraction:
    return (fps if isinstance(fps, Fraction) else Fraction(float(fps))).limit_denominator(1_000_000)


def _stack(frames: list[NDArray[np.uint8]], where: str) -> NDArray[np.uint8]:
    if len({frame.shape for frame in frames}) != 1:
        sizes = sorted({f"{frame.shape[1]}x{frame.shape[0]}" for frame in frames})
        raise invalid(f"{where}: frames must be pictures of one size, got {', '.join(sizes) or 'none'}", where)
    return np.stack(frames)


def _wav(samples: Any, rate: Any, where: str) -> bytes:
    if isinstance(rate, bool) or not isinstance(rate, (int, np.integer)) or not 0 < rate < 2**31:
        raise invalid(f"{where}: sampling_rate of (samples, sampling_rate) must be an integer, got {rate!r}", where)
    data = _array(samples, "audio", where)
    if data.ndim == 2 and 1 in data.shape:
        data = data.reshape(-1)
    if data.ndim != 1:
        raise invalid(f"{where}: samples must be mono, an array [n], got the shape {list(data.shape)}", where)
    if data.dtype in (np.float16, np.float32, np.float64):
        kind, raw = _WAV_FLOAT, data.astype("<f4").tobytes()
    elif data.dtype == np.int16:
        kind, raw = _WAV_PCM, data.astype("<i2").tobytes()
    else:
        raise invalid(f"{where}: samples must be floats in [-1, 1] or int16, got {data.dtype}", where)
    width = 4 if kind == _WAV_FLOAT else 2
    if len(raw) > 2**32 - 64:
        raise TriptychError(
            ErrorKind.TOO_LARGE, f"{where}: the sound has {len(raw)} bytes; a WAV file holds 4 GiB", where
        )
    form = struct.pack("<HHIIHH", kind, 1, rate, rate * width, width, 8 * width)
    head = struct.pack("<4sI4s4sI", b"RIFF", 36 + len(raw), b"WAVE", b"fmt ", len(form))
    return head + form + struct.pack("<4sI", b"data", len(raw)) + raw


def _array(value: Any, modality: str, where: str) -> NDArray[Any]:
    """A numpy array of what is one, or a tensor of torch (which is not imported here)."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        # numpy has no bfloat16
        value = (value.float() if "bfloat16" in str(value.dtype) else value).numpy()
    elif isinstance(value, list):
        value = np.asarray(value)
    if not isinstance(value, np.ndarray):
        raise _not_taken(modality, value, where)
    return value


def _pixels(value: Any, modality: str, where: str) -> NDArray[np.uint8]:
    """uint8 [height, width, channels] of a picture, [T, height, width, channels] of a video.

    Channels may stand first, as torch has them, where they cannot be taken for the width.
    """
    pixels = _array(value, modality, where)
    ndim = 4 if modality == "video" else 3
    if modality == "image" and pixels.ndim == 2:
        pixels = pixels[..., None]
    if pixels.dtype != np.uint8:
        raise invalid(f"{where}: pixels must be uint8 from 0 to 255, got {pixels.dtype}", where)
    first_is_usual = hasattr(value, "detach")
    if pixels.ndim == ndim:
        last, first = pixels.shape[-1] in _CHANNELS, pixels.shape[-3] in _CHANNELS
        if first and (first_is_usual or not last):
            return np.ascontiguousarray(np.moveaxis(pixels, -3, -1))
        if last:
            return np.ascontiguousarray(pixels)
    raise invalid(
        f"{where}: pixels of shape {list(pixels.shape)} are not understood; {modality} can be {_EXAMPLES[modality]}",
        where,
    )


def _not_taken(modality: str, value: Any, where: str) -> TriptychError:
    return invalid(
        f"{where}: {modality} cannot be {type(value).__name__}; it can be bytes of a file, a path, an http(s) or data "
        f"URL, or {_EXAMPLES[modality]}",
        where,
    )
