"""Sounds: encoded bytes -> mono float32 at the rate a checkpoint wants.

libsndfile (wav, flac, ogg, mp3 and more) reads first; what it does not know goes to :func:`read_with_av`, which the
stage calls in a decode worker.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import soundfile
from numpy.typing import NDArray

from .containers import container_of
from .limits import too_large, unreadable
from .types import Audio

MIN_RATE, MAX_RATE = 1000, 768_000
MAX_CHANNELS = 64
_READABLE = "WAV, FLAC, Ogg, MP3, M4A, AAC or WebM"
_BLOCK_FRAMES = 65536
# libsndfile's SF_COUNT_MAX: a streamed FLAC file whose header does not say; it then cannot read to the end
_FRAMES_UNKNOWN = 2**62
_UNKNOWN_SIZES = (0, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)


class NotForSoundfileError(Exception):
    """libsndfile cannot read this file; the second decoder may."""


def read_with_soundfile(data: bytes, max_s: float) -> tuple[NDArray[np.float32], int]:
    """Decode with libsndfile.

    Args:
        data: an encoded sound.
        max_s: longest sound in seconds.

    Returns:
        Mono samples float32 [n] (mean of the channels) and their rate in Hz.

    Raises:
        NotForSoundfileError: for a file that it cannot read but the second decoder may.
        TriptychError: INVALID_MEDIA or TOO_LARGE.
    """
    if not data:
        raise unreadable("the sound has 0 bytes")
    _check_riff(data)
    try:
        file = soundfile.SoundFile(io.BytesIO(data))
    except soundfile.LibsndfileError:
        raise NotForSoundfileError from None
    with file:
        _check_header(file.samplerate, file.channels)
        # a header may lie either way: judge what it says, then count what is really there
        if file.frames >= _FRAMES_UNKNOWN:
            raise NotForSoundfileError
        if file.frames > max_s * file.samplerate:
            raise _too_long(file.frames / file.samplerate, max_s)
        blocks: list[NDArray[np.float32]] = []
        total = 0
        try:
            while len(block := file.read(_BLOCK_FRAMES, dtype="float32", always_2d=True)):
                total += len(block)
                if total > max_s * file.samplerate:
                    raise _too_long(total / file.samplerate, max_s)
                blocks.append(block.mean(axis=1, dtype=np.float32))
        except soundfile.LibsndfileError:
            raise unreadable(f"the {file.format} sound is damaged or truncated") from None
    return (np.concatenate(blocks) if blocks else np.zeros(0, np.float32)), int(file.samplerate)


def read_with_av(path: str, max_s: float) -> tuple[NDArray[np.float32], int]:
    """Decode the first sound track of a file with FFmpeg; as :func:`read_with_soundfile`.

    Runs in a decode worker only: hostile files may crash or hang FFmpeg.
    """
    import av

    with open(path, "rb") as file:
        container = container_of(file.read(1024))
    if container is None:
        raise unreadable(f"not a sound this server reads ({_READABLE})")
    try:
        with av.open(path, format=container, options={"protocol_whitelist": "file"}) as source:
            if not source.streams.audio:
                raise unreadable("the file has no sound track")
            stream = source.streams.audio[0]
            if stream.codec_context is None:
                raise unreadable("the sound's codec is not known")
            rate = int(stream.codec_context.sample_rate or 0)
            _check_header(rate, int(stream.codec_context.channels or 0))
            resampler = av.AudioResampler(format="fltp", rate=rate)
            blocks: list[NDArray[np.float32]] = []
            total = packets = 0

            def take(frame: Any) -> None:
                nonlocal total
                for piece in resampler.resample(frame):
                    mono = piece.to_ndarray().mean(axis=0, dtype=np.float32)
                    total += mono.size
                    if total > max_s * rate:
                        raise _too_long(total / rate, max_s)
                    blocks.append(mono)

            for packet in source.demux(stream):
                packets += bool(packet.size)
                for frame in packet.decode():
                    take(frame)
            if total:
                take(None)
            if container == "mov" and packets < stream.frames:
                raise unreadable(f"the sound is truncated: {packets} of {stream.frames} packets are there")
    except av.FFmpegError:
        raise unreadable("the sound is damaged or truncated, or its codec is not supported") from None
    return (np.concatenate(blocks) if blocks else np.zeros(0, np.float32)), rate


def to_audio(samples: NDArray[np.float32], rate: int, target_rate: int) -> Audio:
    """Check decoded samples and resample them (band-limited, soxr's high quality as transformers does).

    Args:
        samples: mono float32 [n].
        rate: theirs, in Hz.
        target_rate: the checkpoint's, in Hz.

    Raises:
        TriptychError: INVALID_MEDIA for an empty or silent sound or one with NaN or infinite samples.
    """
    import librosa

    if not samples.size:
        raise unreadable("the sound has 0 samples")
    if not np.isfinite(samples).all():
        raise unreadable("the sound has samples that are not finite numbers (NaN or infinity)")
    if not samples.any():
        raise unreadable("the sound is silent: every sample is zero")
    if rate != target_rate:
        samples = librosa.resample(samples, orig_sr=rate, target_sr=target_rate, res_type="soxr_hq")
    return Audio(np.ascontiguousarray(samples, dtype=np.float32), target_rate)


def _check_header(rate: int, channels: int) -> None:
    if not MIN_RATE <= rate <= MAX_RATE:
        raise unreadable(f"the sound's header says {rate} Hz; {MIN_RATE} to {MAX_RATE} Hz are allowed")
    if not 1 <= channels <= MAX_CHANNELS:
        raise unreadable(f"the sound's header says {channels} channels; 1 to {MAX_CHANNELS} are allowed")


def _check_riff(data: bytes) -> None:
    """libsndfile reads a truncated WAV file without a word; its RIFF size tells."""
    if data[:4] != b"RIFF" or data[8:12] != b"WAVE":
        return
    declared = int.from_bytes(data[4:8], "little")
    if declared not in _UNKNOWN_SIZES and declared + 8 > len(data) + 1:
        raise unreadable(f"the WAV sound is truncated: {len(data)} of {declared + 8} bytes are there")


def _too_long(seconds: float, limit: float) -> Exception:
    return too_large(f"the sound lasts {seconds:.1f} s or more; at most {limit:g} s are allowed")
