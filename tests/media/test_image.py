"""Pictures: formats, modes, orientation, limits and damage."""

from __future__ import annotations

import contextlib
import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image as PILImage

from triptych.python_models.contract.errors import ErrorKind, TriptychError
from triptych.python_models.media.image import decode_image

LIMIT = 1_000_000


def encode(picture: PILImage.Image, fmt: str = "PNG", **options: object) -> bytes:
    out = io.BytesIO()
    picture.save(out, fmt, **options)
    return out.getvalue()


def pixels(data: bytes, limit: int = LIMIT) -> np.ndarray:
    picture = decode_image(data, limit).pixels
    assert picture.mode == "RGB"
    return np.asarray(picture)


def refused(data: bytes, limit: int = LIMIT) -> TriptychError:
    with pytest.raises(TriptychError) as caught:
        decode_image(data, limit)
    return caught.value


def corners() -> PILImage.Image:
    """6 x 4 with a colour of its own in each corner's quarter."""
    out = np.zeros((4, 6, 3), np.uint8)
    out[:2, :3], out[:2, 3:], out[2:, :3], out[2:, 3:] = (250, 0, 0), (0, 250, 0), (0, 0, 250), (250, 250, 0)
    return PILImage.fromarray(out)


@pytest.mark.parametrize("fmt", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"])
def test_formats(fmt: str) -> None:
    picture = PILImage.new("RGB", (32, 24), (200, 40, 90))
    if fmt == "AVIF" and not PILImage.registered_extensions().get(".avif"):
        pytest.skip("this Pillow has no AVIF")
    out = pixels(encode(picture, fmt))
    assert out.shape == (24, 32, 3)
    assert np.abs(out.astype(int) - (200, 40, 90)).max() <= 6


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("fmt", ["PNG", "TIFF", "WEBP"])
def test_orientation(orientation: int, fmt: str) -> None:
    upright = corners()
    stored = {
        1: upright,
        2: upright.transpose(PILImage.Transpose.FLIP_LEFT_RIGHT),
        3: upright.transpose(PILImage.Transpose.ROTATE_180),
        4: upright.transpose(PILImage.Transpose.FLIP_TOP_BOTTOM),
        5: upright.transpose(PILImage.Transpose.TRANSPOSE),
        6: upright.transpose(PILImage.Transpose.ROTATE_90),
        7: upright.transpose(PILImage.Transpose.TRANSVERSE),
        8: upright.transpose(PILImage.Transpose.ROTATE_270),
    }[orientation]
    exif = PILImage.Exif()
    exif[0x0112] = orientation
    out = pixels(encode(stored, fmt, exif=exif, **({"lossless": True} if fmt == "WEBP" else {})))
    np.testing.assert_array_equal(out, np.asarray(upright))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_bad_exif_is_upright() -> None:
    data = encode(corners(), "PNG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff garbage")
    np.testing.assert_array_equal(pixels(data), np.asarray(corners()))


def test_alpha_is_laid_over_white() -> None:
    picture = PILImage.new("RGBA", (3, 1))
    picture.putdata([(0, 0, 0, 0), (200, 0, 0, 255), (0, 0, 0, 128)])
    assert pixels(encode(picture)).tolist() == [[[255, 255, 255], [200, 0, 0], [127, 127, 127]]]


def test_grey_alpha_and_palette_transparency() -> None:
    grey = PILImage.new("LA", (2, 1))
    grey.putdata([(10, 0), (10, 255)])
    assert pixels(encode(grey)).tolist() == [[[255] * 3, [10] * 3]]
    palette = PILImage.new("P", (2, 1))
    palette.putpalette([0, 0, 0, 9, 8, 7])
    palette.putdata([0, 1])
    assert pixels(encode(palette, transparency=0)).tolist() == [[[255] * 3, [9, 8, 7]]]
    rgb = PILImage.new("RGB", (2, 1))
    rgb.putdata([(1, 2, 3), (4, 5, 6)])
    assert pixels(encode(rgb, transparency=(1, 2, 3))).tolist() == [[[255] * 3, [4, 5, 6]]]


@pytest.mark.parametrize("fmt", ["PNG", "TIFF"])
def test_16_bit_grey(fmt: str) -> None:
    samples = np.array([[0, 0x0180, 0x8000, 0xFFFF]], np.uint16)
    assert pixels(encode(PILImage.fromarray(samples), fmt))[0, :, 0].tolist() == [0, 1, 128, 255]


def test_big_endian_16_bit_tiff() -> None:
    samples = np.array([[0, 0x0180, 0x8000, 0xFFFF]], ">u2")
    head = b"MM\0*" + struct.pack(">I", 8)
    tags = [(256, 4, 4), (257, 4, 1), (258, 3, 16 << 16), (259, 3, 1 << 16), (262, 3, 1 << 16)]
    tags += [(273, 4, 8 + 2 + 8 * 12 + 4), (278, 4, 1), (279, 4, 8)]
    directory = struct.pack(">H", len(tags)) + b"".join(struct.pack(">HHII", t, k, 1, v) for t, k, v in tags)
    assert pixels(head + directory + bytes(4) + samples.tobytes())[0, :, 0].tolist() == [0, 1, 128, 255]


def test_other_modes() -> None:
    assert pixels(encode(PILImage.new("L", (2, 2), 77)))[0, 0].tolist() == [77] * 3
    assert pixels(encode(PILImage.new("1", (2, 2), 1)))[0, 0].tolist() == [255] * 3
    assert pixels(encode(PILImage.new("CMYK", (8, 8), (0, 255, 255, 0)), "TIFF"))[0, 0].tolist() == [255, 0, 0]
    jpeg = pixels(encode(PILImage.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=95))[0, 0].astype(int)
    assert np.abs(jpeg - (255, 0, 0)).max() <= 4
    assert refused(encode(PILImage.new("F", (2, 2)), "TIFF")).kind is ErrorKind.INVALID_MEDIA


@pytest.mark.parametrize("fmt", ["GIF", "WEBP", "PNG"])
def test_animated_gives_first_frame(fmt: str) -> None:
    first, second = PILImage.new("RGB", (8, 8), (255, 0, 0)), PILImage.new("RGB", (8, 8), (0, 0, 255))
    data = encode(first, fmt, save_all=True, append_images=[second], **({"lossless": True} if fmt == "WEBP" else {}))
    assert pixels(data)[0, 0].tolist() == [255, 0, 0]


def png_header(width: int, height: int) -> bytes:
    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"\0" * 16)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(1000, 1001), (20_000, 10_000), (60_000, 60_000), (2**31 - 1, 2**31 - 1)])
def test_pixel_limit_is_read_from_the_header(size: tuple[int, int]) -> None:
    # nothing behind the header could be decoded, so only a check before decoding gives this error
    error = refused(png_header(*size))
    assert error.kind is ErrorKind.TOO_LARGE
    assert str(LIMIT) in error.message
    assert f"{size[0]}x{size[1]}" in error.message


def test_limit_is_inclusive() -> None:
    data = encode(PILImage.new("L", (100, 50)))
    assert pixels(data, 5000).shape == (50, 100, 3)
    assert refused(data, 4999).kind is ErrorKind.TOO_LARGE


def test_tiny_and_long() -> None:
    assert pixels(encode(PILImage.new("RGB", (1, 1)))).shape == (1, 1, 3)
    assert pixels(encode(PILImage.new("L", (200, 1)))).shape == (1, 200, 3)
    assert "200 times" in refused(encode(PILImage.new("L", (201, 1)))).message


@pytest.mark.parametrize("size", [(0, 0), (0, 5), (5, 0)])
def test_no_pixels(size: tuple[int, int]) -> None:
    assert refused(png_header(*size)).kind is ErrorKind.INVALID_MEDIA
    # a GIF's header may say 0 x 0 too
    assert refused(b"GIF89a" + struct.pack("<HH", *size) + b"\0\0\0;").kind is ErrorKind.INVALID_MEDIA


@pytest.mark.parametrize("fmt", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_truncated(fmt: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    data = encode(PILImage.fromarray(noise), fmt)
    for keep in (len(data) // 2, 20):
        assert refused(data[:keep]).kind is ErrorKind.INVALID_MEDIA


@pytest.mark.parametrize(
    "data", [b"", b"\0", b"hello, I am no picture" * 50, b"<svg xmlns='http://www.w3.org/2000/svg'/>"]
)
def test_not_a_picture(data: bytes) -> None:
    error = refused(data)
    assert error.kind is ErrorKind.INVALID_MEDIA
    assert "BytesIO" not in error.message


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_random_damage_never_escapes() -> None:
    rng = np.random.default_rng(1)
    for fmt in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"):
        data = np.frombuffer(encode(corners().resize((40, 30)), fmt), np.uint8)
        for _ in range(60):
            bad = data.copy()
            bad[rng.integers(0, bad.size, 5)] = rng.integers(0, 256, 5)
            # decoded or refused; anything else would fail the test
            with contextlib.suppress(TriptychError):
                pixels(bad.tobytes())
