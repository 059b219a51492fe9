"""Sounds: rates, channels, containers, limits and damage."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

from triptych.python_models.contract.errors import ErrorKind, TriptychError
from triptych.python_models.media.audio import NotForSoundfileError, read_with_av, read_with_soundfile, to_audio
from triptych.python_models.media.types import Audio

Make = Callable[..., bytes]


def decode(data: bytes, rate: int = 16000, max_s: float = 10.0) -> Audio:
    return to_audio(*read_with_soundfile(data, max_s), rate)


def refused(data: bytes, max_s: float = 10.0) -> TriptychError:
    with pytest.raises(TriptychError) as caught:
        decode(data, max_s=max_s)
    return caught.value


def pitch(sound: Audio) -> float:
    spectrum = np.abs(np.fft.rfft(sound.samples * np.hanning(sound.samples.size)))
    return float(spectrum.argmax() * sound.sampling_rate / sound.samples.size)


@pytest.mark.parametrize("rate", [8000, 16000, 22050, 44100, 48000])
@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("fmt", ["WAV", "FLAC", "OGG", "MP3"])
def test_formats(make_tone: Make, rate: int, channels: int, fmt: str) -> None:
    sound = decode(make_tone(rate, channels, 0.5, fmt=fmt))
    assert sound.samples.dtype == np.float32
    assert sound.sampling_rate == 16000
    # mp3 pads to whole frames
    assert 0.5 - 1e-3 <= sound.samples.size / 16000 <= 0.62
    assert pitch(sound) == pytest.approx(440, abs=4)
    assert np.abs(sound.samples).max() == pytest.approx(0.5, abs=0.05)


def test_channels_are_averaged() -> None:
    out = io.BytesIO()
    soundfile.write(out, np.tile([[0.5, -0.25]], (100, 1)), 16000, format="WAV", subtype="FLOAT")
    np.testing.assert_allclose(decode(out.getvalue()).samples, 0.125)


def test_same_rate_is_untouched() -> None:
    wave = np.random.default_rng(0).uniform(-1, 1, 1000).astype(np.float32)
    out = io.BytesIO()
    soundfile.write(out, wave, 16000, format="WAV", subtype="FLOAT")
    np.testing.assert_array_equal(decode(out.getvalue()).samples, wave)


def test_resampling_is_band_limited(make_tone: Make) -> None:
    # 15 kHz is above half of 16 kHz and must vanish, not come back as 1 kHz
    assert np.abs(decode(make_tone(48000, hertz=15000)).samples[200:-200]).max() < 0.01


def wav(rate: int = 16000, channels: int = 1, data: bytes = b"\1\0" * 100, data_size: int | None = None) -> bytes:
    head = struct.pack("<HHIIHH", 1, channels, rate, rate * channels * 2, channels * 2, 16)
    size = len(data) if data_size is None else data_size
    body = b"WAVEfmt " + struct.pack("<I", 16) + head + b"data" + struct.pack("<I", size & 0xFFFFFFFF) + data
    return b"RIFF" + struct.pack("<I", 0xFFFFFFFF if data_size is not None else len(body)) + body


def test_header_lies() -> None:
    assert refused(wav(rate=1)).kind is ErrorKind.INVALID_MEDIA
    assert "768000" in refused(wav(rate=2_000_000_000)).message
    assert refused(wav(channels=500)).kind is ErrorKind.INVALID_MEDIA
    # streamed files do not know their size: what is there counts
    assert decode(wav(data_size=0xFFFFFFFF)).samples.size == 100


def test_too_long(make_tone: Make) -> None:
    for fmt in ("WAV", "FLAC", "MP3"):
        error = refused(make_tone(seconds=3, fmt=fmt), max_s=2)
        assert error.kind is ErrorKind.TOO_LARGE
        assert "2 s" in error.message
    assert decode(make_tone(seconds=2), max_s=2).samples.size == 32000


def flac_with_total(data: bytes, total: int) -> bytes:
    """Set the 36-bit sample count in STREAMINFO."""
    at = 4 + 4 + 10
    field = int.from_bytes(data[at : at + 8], "big") & ~((1 << 36) - 1) | total
    return data[:at] + field.to_bytes(8, "big") + data[at + 8 :]


def test_flac_sample_count(make_tone: Make, tmp_path: Path) -> None:
    data = make_tone(fmt="FLAC")
    # a streamed file
    with pytest.raises(NotForSoundfileError):
        read_with_soundfile(flac_with_total(data, 0), 10)
    path = tmp_path / "file"
    path.write_bytes(flac_with_total(data, 0))
    samples, rate = read_with_av(str(path), 10)
    np.testing.assert_allclose(samples, read_with_soundfile(data, 10)[0], atol=1e-4)
    assert rate == 16000
    assert refused(flac_with_total(data, 2**36 - 1)).kind is ErrorKind.TOO_LARGE
    assert "truncated" in refused(flac_with_total(data, 50_000)).message


@pytest.mark.parametrize("fmt", ["WAV", "FLAC"])
def test_truncated(fmt: str) -> None:
    out = io.BytesIO()
    soundfile.write(out, np.random.default_rng(0).uniform(-1, 1, 40000), 16000, format=fmt)
    data = out.getvalue()
    assert refused(data[: len(data) // 2]).kind is ErrorKind.INVALID_MEDIA


def test_nothing_to_hear() -> None:
    assert "0 bytes" in refused(b"").message
    assert "0 samples" in refused(wav(data=b"")).message
    assert "silent" in refused(wav(data=bytes(2000))).message


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_not_finite(value: float) -> None:
    wave = np.full(100, 0.1, np.float32)
    wave[50] = value
    out = io.BytesIO()
    soundfile.write(out, wave, 16000, format="WAV", subtype="FLOAT")
    assert "finite" in refused(out.getvalue()).message


@pytest.mark.parametrize("data", [b"\0", b"no sound at all" * 100])
def test_garbage_goes_to_the_second_decoder(data: bytes, tmp_path: Path) -> None:
    with pytest.raises(NotForSoundfileError):
        read_with_soundfile(data, 1)
    path = tmp_path / "file"
    path.write_bytes(data)
    with pytest.raises(TriptychError, match="not a sound"):
        read_with_av(str(path), 1)


def test_m4a_and_the_sound_of_a_video(make_m4a: Make, make_clip: Make, tmp_path: Path) -> None:
    path = tmp_path / "file"
    for frames in (0, 5):
        data = make_m4a(44100, 1.0, frames)
        with pytest.raises(NotForSoundfileError):
            read_with_soundfile(data, 10)
        path.write_bytes(data)
        samples, rate = read_with_av(str(path), 10)
        assert rate == 44100
        sound = to_audio(samples, rate, 16000)
        assert sound.samples.size / 16000 == pytest.approx(1.0, abs=0.1)
        assert pitch(sound) == pytest.approx(440, abs=4)
        with pytest.raises(TriptychError) as caught:
            read_with_av(str(path), 0.5)
        assert caught.value.kind is ErrorKind.TOO_LARGE
        path.write_bytes(data[: len(data) * 2 // 3])
        with pytest.raises(TriptychError, match="damaged"):
            read_with_av(str(path), 10)
    path.write_bytes(make_clip(5))
    with pytest.raises(TriptychError, match="no sound track"):
        read_with_av(str(path), 10)
