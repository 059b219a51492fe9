"""Pictures: encoded bytes -> upright RGB."""

from __future__ import annotations

import io
import struct

import numpy as np
from PIL import Image as PILImage
from PIL import UnidentifiedImageError

from .limits import check_size, unreadable
from .types import Image

FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
"""Pillow's names; MPO is what some phones write into a .jpg. Formats this Pillow lacks are skipped by it."""

_READABLE = "PNG, JPEG, WebP, GIF, BMP, TIFF or AVIF"
_ORIENTATION_TAG = 0x0112
_UPRIGHT = {
    2: PILImage.Transpose.FLIP_LEFT_RIGHT,
    3: PILImage.Transpose.ROTATE_180,
    4: PILImage.Transpose.FLIP_TOP_BOTTOM,
    5: PILImage.Transpose.TRANSPOSE,
    6: PILImage.Transpose.ROTATE_270,
    7: PILImage.Transpose.TRANSVERSE,
    8: PILImage.Transpose.ROTATE_90,
}

# Pillow's own limit is process-wide and answers between 90 and 180 Mpx with a Python warning, which cannot be caught
# per thread. check_size replaces it: it runs on the header, before any pixel is decoded.
PILImage.MAX_IMAGE_PIXELS = None


def decode_image(data: bytes, max_pixels: int) -> Image:
    """Decode a picture (the first frame of an animated one).

    Args:
        data: an encoded picture.
        max_pixels: limit on width * height, checked before pixels are decoded.

    Raises:
        TriptychError: INVALID_MEDIA (not a picture, damaged, empty, too narrow) or TOO_LARGE.
    """
    if not data:
        raise unreadable("the picture has 0 bytes")
    try:
        picture = PILImage.open(io.BytesIO(data), formats=[name for name in FORMATS if _known(name)])
    except UnidentifiedImageError:
        raise unreadable(f"not a picture this server reads ({_READABLE})") from None
    except Exception:  # noqa: BLE001 - hostile headers raise anything, and every one means the same
        raise unreadable(f"the picture's header is damaged; a {_READABLE} file is needed") from None
    with picture:
        check_size(*picture.size, max_pixels, "picture")
        try:
            picture.load()
            orientation = _orientation(picture)
            pixels = _to_rgb(picture)
        except MemoryError:
            raise
        except _UnsupportedError as error:
            raise unreadable(str(error)) from None
        except Exception:  # noqa: BLE001 - as above
            raise unreadable(f"the {picture.format} picture is damaged or truncated") from None
    if orientation in _UPRIGHT:
        pixels = pixels.transpose(_UPRIGHT[orientation])
    return Image(pixels)


class _UnsupportedError(Exception):
    """A pixel format without an agreed way to RGB."""


def _known(name: str) -> bool:
    PILImage.init()
    return name in PILImage.OPEN


def _orientation(picture: PILImage.Image) -> int:
    """EXIF orientation 1 to 8; damaged EXIF data counts as upright, because the pixels are still good."""
    try:
        value = picture.getexif().get(_ORIENTATION_TAG, 1)
    except (OSError, SyntaxError, ValueError, TypeError, LookupError, struct.error):
        return 1
    return value if isinstance(value, int) else 1


def _to_rgb(picture: PILImage.Image) -> PILImage.Image:
    """Any mode -> RGB: alpha laid over white, 16-bit samples cut to their upper 8 bits."""
    if picture.mode.startswith("I"):
        # Pillow's own conversion clips 16-bit samples at 255, which turns almost every picture white
        samples = np.asarray(picture).astype(np.int64).clip(0, 65535) >> 8
        picture = PILImage.fromarray(samples.astype(np.uint8))
    if picture.mode in ("F", "LAB"):
        raise _UnsupportedError(
            f"{picture.format} pictures in mode {picture.mode} are not supported; save it as 8-bit RGB"
        )
    if picture.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in picture.info:
        rgba = picture.convert("RGBA")
        white = PILImage.new("RGB", rgba.size, (255, 255, 255))
        white.paste(rgba, mask=rgba.getchannel("A"))
        return white
    if picture.mode == "RGB" and not getattr(picture, "is_animated", False):
        # as it is: convert() would copy every pixel
        return picture
    return picture.convert("RGB")
