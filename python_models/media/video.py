"""Videos: encoded bytes -> sampled frames. Runs in a decode worker (pool.py), because decoders may crash or hang.

decord reads first: it seeks well and is fast on long files. PyAV (FFmpeg) reads the header in any case, and the frames
where decord is missing, fails, disagrees on the number of frames or would mishandle rotation.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..contract.errors import TriptychError
from .containers import container_of
from .limits import MAX_REQUEST_BYTES, check_size, too_large, unreadable

if TYPE_CHECKING:
    from ..families.base import FrameSampling

DECODERS = ("decord", "av")
_READABLE = "MP4, MOV, WebM, MKV, AVI, MPEG, Ogg, FLV, ASF or GIF"
_DECORD_CONTAINERS = ("mov", "matroska", "avi")
_THREADS = min(4, os.cpu_count() or 1)
_BATCH = 8


@dataclass(frozen=True)
class VideoInfo:
    """What a file's header and packet index say.

    Attributes:
        container: FFmpeg's name of the demuxer.
        width, height: as stored, before rotation.
        quarter_turns: how often frames are turned counter-clockwise by 90 degrees to stand upright.
        total_frames: frames to show.
        duration_s: in seconds; ``total_frames / duration_s`` is the frame rate.
        source_fps: that frame rate.
    """

    container: str
    width: int
    height: int
    quarter_turns: int
    total_frames: int
    duration_s: float
    source_fps: float


def frame_indices(info: VideoInfo, sampling: FrameSampling, max_frames: int) -> list[int]:
    """Which frames to take, by the rule of :class:`~triptych.python_models.families.base.FrameSampling`.

    Args:
        info: of the file.
        sampling: the family's.
        max_frames: the deployment's limit; it wins over the family's numbers.
    """
    if sampling.num_frames is not None:
        count = sampling.num_frames
    else:
        fps = next((fps for seconds, fps in sampling.fps_until if info.duration_s <= seconds), sampling.fps)
        count = min(max(round(info.duration_s * fps), sampling.min_frames), sampling.max_frames)
    count = min(count, max_frames)
    count = max(count - count % sampling.multiple, sampling.multiple)
    return [int(i) for i in np.linspace(0, info.total_frames - 1, count).round()]


def probe(path: str, max_pixels: int) -> VideoInfo:
    """Read header and packet index; no frame is decoded but what FFmpeg needs to know the rotation.

    Raises:
        TriptychError: INVALID_MEDIA (no video, damaged, truncated, no frames) or TOO_LARGE.
    """
    import av

    with open(path, "rb") as file:
        head = file.read(1024)
    if not head:
        raise unreadable("the video has 0 bytes")
    container = container_of(head)
    if container is None:
        raise unreadable(f"not a video this server reads ({_READABLE})")
    try:
        with _open(path, container) as source:
            if not source.streams.video:
                raise unreadable("the file has no video track")
            stream = source.streams.video[0]
            if stream.codec_context is None:
                raise unreadable("the video's codec is not known")
            width, height = int(stream.codec_context.width), int(stream.codec_context.height)
            check_size(width, height, max_pixels, "video")
            shown, duration = _index(source, stream, container)
            if not shown:
                raise unreadable("the video has no frames")
        with _open(path, container) as source:
            first = next(source.decode(video=0), None)
            if first is None:
                raise unreadable("the video has no frame that can be decoded")
            turns = round(first.rotation / 90) % 4
    except av.FFmpegError:
        raise unreadable("the video is damaged or truncated, or its codec is not supported") from None
    return VideoInfo(container, width, height, turns, shown, float(duration), float(shown / duration))


def decode_video(
    path: str,
    sampling: FrameSampling,
    max_pixels: int,
    max_frames: int,
    allocate: Callable[[tuple[int, ...]], NDArray[np.uint8]],
    decoders: Sequence[str] = DECODERS,
) -> VideoInfo:
    """Decode the sampled frames of a file.

    Args:
        path: of the file.
        sampling: the family's rule.
        max_pixels: limit on width * height of a frame.
        max_frames: limit on sampled frames.
        allocate: gives the uint8 array [T, height, width, 3] of a shape, which is filled with upright RGB frames.
        decoders: which of ``DECODERS`` to try, in order.

    Returns:
        The file's description; the frames taken are those of :func:`frame_indices`.

    Raises:
        TriptychError: INVALID_MEDIA or TOO_LARGE.
    """
    info = probe(path, max_pixels)
    indices = frame_indices(info, sampling, max_frames)
    height, width = (info.width, info.height) if info.quarter_turns % 2 else (info.height, info.width)
    shape = (len(indices), height, width, 3)
    if (size := int(np.prod(shape, dtype=np.int64))) > MAX_REQUEST_BYTES:
        raise too_large(
            f"{len(indices)} frames of {width}x{height} pixels take {size} bytes; at most {MAX_REQUEST_BYTES} are "
            "allowed, send a shorter or smaller video"
        )
    out = allocate(shape)
    # decord turns frames by itself and gets their shape wrong
    use_decord = "decord" in decoders and info.container in _DECORD_CONTAINERS and not info.quarter_turns
    if not (use_decord and _fill_with_decord(path, info, indices, out)):
        _fill_with_av(path, info, indices, out)
    return info


def _open(path: str, container: str) -> Any:
    import av

    return av.open(path, format=container, options={"protocol_whitelist": "file"})


def _index(source: Any, stream: Any, container: str) -> tuple[int, Fraction]:
    """(frames to show, seconds) from the packets of a file; raises INVALID_MEDIA for a truncated one."""
    times: list[int] = []
    packets = last_duration = 0
    last_end = Fraction(0)
    for packet in source.demux():
        if not packet.size:
            continue
        if packet.is_corrupt:
            raise unreadable("the video is damaged or truncated")
        time = packet.pts if packet.pts is not None else packet.dts
        if time is not None:
            last_end = max(last_end, (time + (packet.duration or 0)) * packet.time_base)
        if packet.stream.index != stream.index:
            continue
        packets += 1
        if not packet.is_discard:
            last_duration = packet.duration or last_duration
            times.append(-1 if time is None else time)
    if container == "mov" and packets < stream.frames:
        raise unreadable(f"the video is truncated: {packets} of {stream.frames} frames are there")
    # containers give their length in microseconds
    declared = Fraction(source.duration or 0, 1_000_000)
    if container == "matroska" and declared - last_end > max(Fraction(1), declared / 10):
        raise unreadable(f"the video is truncated: it ends at {float(last_end):.1f} s of {float(declared):.1f} s")
    if times:
        duration = (max(times) - min(times) + last_duration) * stream.time_base
        if not last_duration and len(times) > 1:
            # no packet durations: the last frame lasts as long as the others do on average
            duration = duration * len(times) / (len(times) - 1)
        if duration > 0:
            return len(times), duration
    return len(times), Fraction(len(times) or 1) / (stream.average_rate or 25)


def _fill_with_decord(path: str, info: VideoInfo, indices: Sequence[int], out: NDArray[np.uint8]) -> bool:
    """Fill ``out``; False where decord cannot do it."""
    try:
        import decord
    except (ImportError, OSError):
        return False
    # its native log writes pieces of the input to stderr
    decord.logging.set_level(decord.logging.QUIET)
    try:
        reader = decord.VideoReader(path, num_threads=_THREADS)
        if len(reader) != info.total_frames:
            return False
        for start in range(0, len(indices), _BATCH):
            frames = reader.get_batch(list(indices[start : start + _BATCH])).asnumpy()
            if frames.shape[1:] != out.shape[1:]:
                return False
            out[start : start + _BATCH] = frames
    except (RuntimeError, ValueError, IndexError, decord.DECORDError):
        return False
    return True


def _fill_with_av(path: str, info: VideoInfo, indices: Sequence[int], out: NDArray[np.uint8]) -> None:
    """Fill ``out``, decoding from the start to the last frame wanted."""
    import av

    slots: dict[int, list[int]] = {}
    for slot, index in enumerate(indices):
        slots.setdefault(index, []).append(slot)
    last = max(slots)
    try:
        for number, frame in enumerate(_frames(path, info.container)):
            if number in slots:
                pixels = frame.to_ndarray(format="rgb24", width=info.width, height=info.height)
                out[slots.pop(number)] = np.rot90(pixels, info.quarter_turns)
            if number >= last:
                break
    except av.FFmpegError:
        raise _stops(slots, info) from None
    if slots:
        raise _stops(slots, info)


def _frames(path: str, container: str) -> Iterator[Any]:
    with _open(path, container) as source:
        stream = source.streams.video[0]
        stream.thread_type = "AUTO"
        stream.codec_context.thread_count = _THREADS
        yield from source.decode(stream)


def _stops(missing: dict[int, list[int]], info: VideoInfo) -> TriptychError:
    return unreadable(f"the video is damaged: frame {min(missing)} of {info.total_frames} cannot be decoded")
