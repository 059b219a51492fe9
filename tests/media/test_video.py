"""Videos: sampling, rotation, decoders, limits and damage (decoders called in this process)."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image as PILImage

from triptych.python_models.contract.errors import ErrorKind, TriptychError
from triptych.python_models.families.base import FrameSampling
from triptych.python_models.media import video
from triptych.python_models.media.video import VideoInfo, decode_video, frame_indices, probe

Make = Callable[..., bytes]
DEFAULT = FrameSampling()


def every(frames: int) -> FrameSampling:
    return FrameSampling(num_frames=frames, multiple=1)


class Decode:
    def __init__(self, folder: Path) -> None:
        self.path = folder / "file"

    def __call__(
        self,
        data: bytes,
        sampling: FrameSampling = DEFAULT,
        max_frames: int = 1000,
        max_pixels: int = 10**6,
        decoders: tuple[str, ...] = ("decord", "av"),
    ) -> tuple[VideoInfo, np.ndarray]:
        self.path.write_bytes(data)
        made: list[np.ndarray] = []

        def allocate(shape: tuple[int, ...]) -> np.ndarray:
            made.append(np.full(shape, 77, np.uint8))
            return made[0]

        info = decode_video(str(self.path), sampling, max_pixels, max_frames, allocate, decoders)
        return info, made[0]

    def refused(self, data: bytes, **options: int) -> TriptychError:
        with pytest.raises(TriptychError) as caught:
            self(data, **options)
        return caught.value


@pytest.fixture
def decode(tmp_path: Path) -> Decode:
    return Decode(tmp_path)


def info_of(frames: int, fps: float) -> VideoInfo:
    return VideoInfo("mov", 8, 8, 0, frames, frames / fps, fps)


@pytest.mark.parametrize(
    ("frames", "fps", "sampling", "limit", "count"),
    [
        (90, 30, FrameSampling(fps=2), 768, 6),
        (75, 30, FrameSampling(fps=2), 768, 4),
        (30, 30, FrameSampling(fps=2), 768, 4),
        (3, 30, FrameSampling(fps=2), 768, 4),
        (9000, 30, FrameSampling(fps=2), 768, 600),
        (90000, 30, FrameSampling(fps=2), 768, 768),
        (90000, 30, FrameSampling(fps=2), 101, 100),
        (900, 30, FrameSampling(num_frames=8), 768, 8),
        (900, 30, FrameSampling(num_frames=9), 768, 8),
        (900, 30, FrameSampling(num_frames=9, multiple=1), 768, 9),
        (900, 30, FrameSampling(), 1, 2),
        (1, 1, FrameSampling(fps=2), 768, 4),
    ],
)
def test_sampling_rule(frames: int, fps: float, sampling: FrameSampling, limit: int, count: int) -> None:
    indices = frame_indices(info_of(frames, fps), sampling, limit)
    assert indices == [round(i) for i in np.linspace(0, frames - 1, count)]
    assert len(indices) == count


@pytest.mark.parametrize("fps", [5, 12, 24, 30])
@pytest.mark.parametrize("decoders", [("decord",), ("av",)])
def test_frames_and_times(decode: Decode, make_clip: Make, fps: int, decoders: tuple[str, ...]) -> None:
    info, frames = decode(make_clip(12, fps), every(12), decoders=decoders)
    assert (info.total_frames, info.width, info.height) == (12, 64, 48)
    assert info.duration_s == pytest.approx(12 / fps)
    assert info.source_fps == pytest.approx(fps)
    assert frames.shape == (12, 48, 64, 3)
    red = frames[:, 36, 48, 0].astype(int)
    assert np.abs(red - 20 * np.arange(12)).max() <= 8


def test_decoders_agree(decode: Decode, make_clip: Make) -> None:
    data = make_clip(30, 15, 128, 96)
    sampling = FrameSampling(fps=4, min_frames=4)
    _, first = decode(data, sampling, decoders=("decord",))
    _, second = decode(data, sampling, decoders=("av",))
    assert first.shape == second.shape == (8, 96, 128, 3)
    assert np.abs(first.astype(int) - second).max() <= 2


def test_decord_is_the_one_used(decode: Decode, make_clip: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError("PyAV decoded although decord could")

    monkeypatch.setattr(video, "_fill_with_av", never)
    for container, codec in (("mp4", "h264"), ("matroska", "h264"), ("webm", "libvpx-vp9")):
        _, frames = decode(make_clip(6, 6, codec=codec, container=container), every(6))
        assert frames[0, 36, 48, 0] < 10 < 90 < frames[5, 36, 48, 0]


def test_falls_back_to_av(decode: Decode, make_clip: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    import decord

    data = make_clip(6, 6)
    _, expected = decode(data, decoders=("av",))

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(decord, "VideoReader", broken)
    _, frames = decode(data)
    np.testing.assert_array_equal(frames, expected)


@pytest.mark.parametrize(
    ("container", "codec"), [("mpegts", "h264"), ("avi", "mpeg4"), ("flv", "flv1"), ("mov", "h264")]
)
def test_other_containers(decode: Decode, make_clip: Make, container: str, codec: str) -> None:
    info, frames = decode(make_clip(10, 10, codec=codec, container=container), every(10))
    assert info.total_frames == 10
    assert info.duration_s == pytest.approx(1.0, abs=0.11)
    assert np.abs(frames[:, 36, 48, 0].astype(int) - 20 * np.arange(10)).max() <= 12


def test_animated_gif(decode: Decode) -> None:
    out = io.BytesIO()
    pictures = [PILImage.new("RGB", (20, 10), (40 * k, 0, 0)) for k in range(5)]
    pictures[0].save(out, "GIF", save_all=True, append_images=pictures[1:], duration=200)
    info, frames = decode(out.getvalue(), every(5))
    assert (info.total_frames, info.duration_s) == (5, pytest.approx(1.0))
    assert frames[:, 5, 5, 0].tolist() == [0, 40, 80, 120, 160]


@pytest.mark.parametrize(("degrees", "corner"), [(0, (0, 0)), (90, (0, 1)), (180, (1, 1)), (270, (1, 0))])
def test_rotation(decode: Decode, make_clip: Make, make_turned: Make, degrees: int, corner: tuple[int, int]) -> None:
    _, frames = decode(make_turned(make_clip(3, 3), degrees))
    assert frames.shape[1:] == ((64, 48, 3) if degrees % 180 else (48, 64, 3))
    height, width = frames.shape[1:3]
    blue = frames[0, height // 4 :: height // 2, width // 4 :: width // 2, 2]
    expected = np.zeros((2, 2), bool)
    expected[corner] = True
    np.testing.assert_array_equal(blue > 128, expected)


def test_fewer_frames_than_wanted_repeat(decode: Decode, make_clip: Make) -> None:
    for decoders in (("decord",), ("av",)):
        _, frames = decode(make_clip(2, 2), FrameSampling(min_frames=4), decoders=decoders)
        red = frames[:, 36, 48, 0]
        assert red[0] == red[1] < 10
        assert red[2] == red[3] > 10


def test_limits(decode: Decode, make_clip: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    data = make_clip(10, 10)
    error = decode.refused(data, max_pixels=64 * 48 - 1)
    assert error.kind is ErrorKind.TOO_LARGE
    assert "64x48" in error.message
    assert decode(data, every(10), max_frames=4)[1].shape[0] == 4
    monkeypatch.setattr(video, "MAX_REQUEST_BYTES", 64 * 48 * 3 * 4 - 1)
    assert decode.refused(data).kind is ErrorKind.TOO_LARGE


def test_huge_header_is_refused_before_decoding(decode: Decode, make_clip: Make, tmp_path: Path) -> None:
    data = make_clip(2, 2, 2000, 16)
    assert decode.refused(data, max_pixels=31_999).kind is ErrorKind.TOO_LARGE
    assert decode(data, every(2), max_pixels=32_000)[1].shape == (2, 16, 2000, 3)


@pytest.mark.parametrize("keep", [0.0, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("container", ["mp4", "faststart"])
def test_truncated(decode: Decode, make_clip: Make, keep: float, container: str, tmp_path: Path) -> None:
    data = make_clip(30, 10, 160, 120)
    if container == "faststart":
        data = with_index_first(data, tmp_path)
    assert decode.refused(data[: int(len(data) * keep)]).kind is ErrorKind.INVALID_MEDIA


def test_truncated_between_two_frames(decode: Decode, make_clip: Make, tmp_path: Path) -> None:
    data = with_index_first(make_clip(30, 10, 160, 120), tmp_path)
    with av.open(io.BytesIO(data)) as file:
        starts = sorted(packet.pos for packet in file.demux(video=0) if packet.size)
    assert decode(data)[0].total_frames == 30
    assert "10 of 30 frames" in decode.refused(data[: starts[10]]).message


def with_index_first(data: bytes, folder: Path) -> bytes:
    source, target = folder / "in.mp4", folder / "out.mp4"
    source.write_bytes(data)
    with av.open(str(source)) as a, av.open(str(target), "w", options={"movflags": "+faststart"}) as b:
        stream = b.add_stream_from_template(a.streams.video[0])
        for packet in a.demux(video=0):
            if packet.size:
                packet.stream = stream
                b.mux(packet)
    out = target.read_bytes()
    assert out.index(b"moov") < out.index(b"mdat")
    return out


def test_truncated_matroska(decode: Decode, make_clip: Make) -> None:
    data = make_clip(60, 10, 160, 120, container="matroska")
    assert decode(data)[0].total_frames == 60
    assert decode.refused(data[: len(data) // 3]).kind is ErrorKind.INVALID_MEDIA


@pytest.mark.parametrize(
    "data",
    [
        b"\0",
        b"not a video at all" * 100,
        b"#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1/a.ts\n",
        b"ffconcat version 1.0\nfile a\n",
    ],
)
def test_garbage_and_playlists(decode: Decode, data: bytes) -> None:
    error = decode.refused(data)
    assert error.kind is ErrorKind.INVALID_MEDIA
    assert "not a video" in error.message


def test_no_video_track(decode: Decode, make_m4a: Make) -> None:
    assert "no video track" in decode.refused(make_m4a()).message


def test_no_frames(decode: Decode, make_clip: Make) -> None:
    # a header without any packet
    data = make_clip(30, 10, container="matroska")
    assert decode.refused(data[: data.index(b"\x1f\x43\xb6\x75")]).kind is ErrorKind.INVALID_MEDIA
    fragmented = make_clip(0, 10)
    assert decode.refused(fragmented).kind is ErrorKind.INVALID_MEDIA


def test_damage_in_the_middle_never_escapes(decode: Decode, make_clip: Make) -> None:
    good = np.frombuffer(make_clip(10, 10), np.uint8)
    rng = np.random.default_rng(2)
    for _ in range(25):
        bad = good.copy()
        bad[rng.integers(40, bad.size, 20)] = rng.integers(0, 256, 20)
        # decoded or refused; anything else would fail the test
        with contextlib.suppress(TriptychError):
            decode(bad.tobytes(), decoders=("av",))


def test_probe_counts_without_decoding(decode: Decode, make_clip: Make, tmp_path: Path) -> None:
    path = tmp_path / "clip"
    path.write_bytes(make_clip(25, 25))
    assert probe(str(path), 10**6) == VideoInfo("mov", 64, 48, 0, 25, 1.0, 25.0)
