"""Makers of small media files, a loopback web server, and a preprocess stage with a preprocessor of its own."""

from __future__ import annotations

import http.server
import io
import json
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import av
import numpy as np
import psutil
import pytest
import soundfile
from PIL import Image as PILImage

from triptych.python_models.contract.errors import TriptychError
from triptych.python_models.contract.features import EncoderItem
from triptych.python_models.contract.metrics import METRICS
from triptych.python_models.contract.plan import MediaItem
from triptych.python_models.contract.request import NO_INPUTS, MediaPart, Message, TemplateInputs, TextPart
from triptych.python_models.contract.settings import Settings
from triptych.python_models.families.base import FrameSampling, Prepared
from triptych.python_models.media.types import Medium
from triptych.python_models.preprocess.stage import PreprocessStage

SECONDS = 30.0


def png(size: tuple[int, int] = (8, 6), colour: tuple[int, int, int] = (1, 2, 3), **options: Any) -> bytes:
    out = io.BytesIO()
    PILImage.new("RGB", size, colour).save(out, "PNG", **options)
    return out.getvalue()


def clip(
    frames: int = 12, fps: int = 10, width: int = 64, height: int = 48, codec: str = "h264", container: str = "mp4"
) -> bytes:
    """A video whose frame k has the red value 20 * k (mod 240) and a bright upper left quarter (blue)."""
    out = io.BytesIO()
    with av.open(out, "w", format=container) as file:
        stream = file.add_stream(codec, rate=fps)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for k in range(frames):
            picture = np.zeros((height, width, 3), np.uint8)
            picture[..., 0] = 20 * k % 240
            picture[: height // 2, : width // 2, 2] = 255
            file.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        file.mux(stream.encode(None))
    return out.getvalue()


def turned(mp4: bytes, degrees: int) -> bytes:
    """The same MP4 with a display matrix that asks for a clockwise turn, as phones write it."""
    a, b, c, d = {0: (1, 0, 0, 1), 90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0)}[degrees]
    at = mp4.index(b"tkhd") + 44
    one = 1 << 16
    matrix = struct.pack(">9i", a * one, b * one, 0, c * one, d * one, 0, 0, 0, 1 << 30)
    return mp4[:at] + matrix + mp4[at + 36 :]


def tone(rate: int = 16000, channels: int = 1, seconds: float = 0.5, hertz: float = 440.0, fmt: str = "WAV") -> bytes:
    wave = 0.5 * np.sin(2 * np.pi * hertz * np.arange(int(rate * seconds)) / rate)
    out = io.BytesIO()
    soundfile.write(out, np.repeat(wave[:, None], channels, axis=1), rate, format=fmt)
    return out.getvalue()


def m4a(rate: int = 44100, seconds: float = 0.5, video_frames: int = 0) -> bytes:
    """AAC in MP4, with a video track before it where ``video_frames`` is set."""
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as file:
        video = file.add_stream("h264", rate=10) if video_frames else None
        if video is not None:
            video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        sound = file.add_stream("aac", rate=rate)
        wave = (0.5 * np.sin(2 * np.pi * 440 * np.arange(int(rate * seconds)) / rate)).astype(np.float32)
        for _ in range(video_frames):
            assert video is not None
            file.mux(video.encode(av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8), format="rgb24")))
        if video is not None:
            file.mux(video.encode(None))
        frame = av.AudioFrame.from_ndarray(wave[None], format="fltp", layout="mono")
        frame.sample_rate = rate
        file.mux(sound.encode(frame))
        file.mux(sound.encode(None))
    return out.getvalue()


class WebServer:
    """Answers each path with what the test put into ``routes``: a function of the request handler."""

    def __init__(self) -> None:
        self.routes: dict[str, Callable[[http.server.BaseHTTPRequestHandler], None]] = {}
        self.seen: list[tuple[str, dict[str, str]]] = []
        self.release = threading.Event()
        self.open_now = 0
        self.most_open = 0
        self._lock = threading.Lock()
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                with outer._lock:
                    outer.open_now += 1
                    outer.most_open = max(outer.most_open, outer.open_now)
                    outer.seen.append((self.path, {k.lower(): v for k, v in self.headers.items()}))
                try:
                    outer.routes[self.path.partition("?")[0]](self)
                except (BrokenPipeError, ConnectionResetError):
                    pass
                finally:
                    with outer._lock:
                        outer.open_now -= 1

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.block_on_close = False
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    def url(self, path: str, host: str = "127.0.0.1") -> str:
        return f"http://{host}:{self.port}{path}"

    def serve(self, path: str, body: bytes, status: int = 200, **headers: str) -> str:
        def answer(handler: http.server.BaseHTTPRequestHandler) -> None:
            handler.send_response(status)
            for name, value in headers.items():
                handler.send_header(name.replace("_", "-"), value)
            if "Content_Length" not in headers:
                handler.send_header("Content-Length", str(len(body)))
            handler.end_headers()
            handler.wfile.write(body)

        self.routes[path] = answer
        return self.url(path)

    def stall(self, path: str) -> str:
        """Accept, then say nothing until the test ends."""
        self.routes[path] = lambda handler: (self.release.wait(30), None)[1]
        return self.url(path)

    def close(self) -> None:
        self.release.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class Letters:
    """A preprocessor: a token per character, four per medium."""

    frame_sampling = FrameSampling(fps=2)
    sampling_rate = 16000
    context_length = 1000

    def __init__(self, modalities: Sequence[str] = ("image", "video", "audio")) -> None:
        self.name = "fake"
        self.modalities = frozenset(modalities)
        self.seen: list[list[Medium]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.inside = 0
        self.most_inside = 0
        self.lock = threading.Lock()

    def prepare(
        self, messages: Sequence[Message], media: Sequence[Medium], template: TemplateInputs = NO_INPUTS
    ) -> Prepared:
        if media:
            with self.lock:
                self.inside += 1
                self.most_inside = max(self.most_inside, self.inside)
            assert self.gate.wait(SECONDS)
            with self.lock:
                self.inside -= 1
                self.seen.append(list(media))
        ids: list[int] = []
        items: list[MediaItem] = []
        features: dict[str, list[EncoderItem]] = {"vision": [], "audio": []}
        rest = iter(media)
        for message in messages:
            for part in message.parts:
                if isinstance(part, TextPart):
                    if part.text == "explode":
                        raise RuntimeError("secret detail in /home/somebody")
                    ids += [ord(c) for c in part.text]
                    continue
                assert isinstance(part, MediaPart)
                medium = next(rest)
                assert medium.modality == part.modality
                encoder = "audio" if part.modality == "audio" else "vision"
                items.append(MediaItem(medium.modality, medium.digest, ((len(ids), len(ids) + 4),), encoder))
                value = {"x": np.full(3, len(ids), np.float32)}
                features[encoder].append(EncoderItem(medium.modality, medium.digest, 4, value))
                ids += [0] * 4
        length = len(ids)
        return Prepared(np.array(ids, np.int32), np.arange(length, dtype=np.int32)[None], 7, tuple(items), features)


class Recorder:
    """A Telemetry that checks names and labels against the contract."""

    def __init__(self) -> None:
        self.totals: Counter[tuple[str, ...]] = Counter()
        self.lock = threading.Lock()

    def add(self, name: str, value: float = 1.0, **labels: str) -> None:
        self._count(("counter", "gauge"), name, labels, value)

    def set(self, name: str, value: float, **labels: str) -> None:
        self._count(("gauge",), name, labels, 1)

    def observe(self, name: str, value: float, **labels: str) -> None:
        assert value >= 0
        self._count(("histogram",), name, labels, 1)

    def _count(self, kinds: tuple[str, ...], name: str, labels: Mapping[str, str], value: float) -> None:
        spec = METRICS[name]
        assert spec.kind in kinds
        assert set(labels) == set(spec.labels)
        with self.lock:
            self.totals[(name, *labels.values())] += value  # type: ignore[assignment]


class Answer:
    """A Responder that keeps what it gets."""

    def __init__(self) -> None:
        self.done = threading.Event()
        self.tensors: Mapping[str, Any] | None = None
        self.problem: TriptychError | None = None
        self.count = 0

    def send(self, tensors: Mapping[str, Any], *, final: bool) -> None:
        assert final
        self.count += 1
        self.tensors = tensors
        self.done.set()

    def fail(self, error: TriptychError) -> None:
        self.count += 1
        self.problem = error
        self.done.set()

    @property
    def ok(self) -> Mapping[str, Any]:
        assert self.done.wait(SECONDS), "no answer"
        assert self.problem is None, self.problem
        assert self.tensors is not None
        return self.tensors

    @property
    def error(self) -> TriptychError:
        assert self.done.wait(SECONDS), "no answer"
        assert self.problem is not None, "no error"
        # what reaches a caller survives the wire and gives away no path
        assert TriptychError.from_wire(self.problem.to_wire()) == self.problem
        assert "/home" not in self.problem.message
        return self.problem


class Running:
    """A stage with its preprocessor and telemetry."""

    def __init__(self, modalities: Sequence[str], options: dict[str, Any]) -> None:
        self.letters = Letters(modalities)
        self.telemetry = Recorder()
        settings = Settings(allowed_media_hosts=("127.0.0.1",), **options)
        before = set(psutil.Process().children())
        self.stage = PreprocessStage(settings, self.telemetry, "cpu", self.letters)
        self.workers = set(psutil.Process().children()) - before

    def submit(self, inputs: dict[str, Any], request_id: str = "") -> Answer:
        answer = Answer()
        self.stage.submit(request_id, inputs, answer)
        return answer

    def start(self, content: Any, *blobs: bytes, request_id: str = "", **more: Any) -> Answer:
        request = {"messages": [{"role": "user", "content": content}], **more}
        inputs: dict[str, Any] = {"request": [json.dumps(request).encode()]}
        if blobs:
            inputs["media"] = list(blobs)
        return self.submit(inputs, request_id)

    def check_healthy(self) -> None:
        """Text and a picture still work."""
        assert self.start("hello").ok["input_ids"].tolist() == [ord(c) for c in "hello"]
        if "image" in self.letters.modalities:
            assert "vision_features" in self.start([{"type": "image", "blob": 0}], png()).ok

    def counted(self, *key: str) -> float:
        return self.telemetry.totals[key]


@pytest.fixture
def make() -> Iterator[Callable[..., Running]]:
    made: list[Running] = []
    before = set(psutil.Process().children())

    def start(modalities: Sequence[str] = ("image",), **options: Any) -> Running:
        made.append(Running(modalities, options))
        return made[-1]

    yield start
    for running in made:
        running.letters.gate.set()
        running.stage.close()
    assert set(psutil.Process().children()) <= before


@pytest.fixture(scope="module")
def shared() -> Iterator[Running]:
    """One stage for tests that leave it as it was."""
    running = Running(("image", "video", "audio"), {"max_media_bytes": 200_000, "max_media_items": 4})
    yield running
    running.check_healthy()
    running.stage.close()


@pytest.fixture
def web() -> Iterator[WebServer]:
    server = WebServer()
    yield server
    server.close()


@pytest.fixture(scope="session")
def make_clip() -> Callable[..., bytes]:
    return clip


@pytest.fixture(scope="session")
def make_turned() -> Callable[..., bytes]:
    return turned


@pytest.fixture(scope="session")
def make_tone() -> Callable[..., bytes]:
    return tone


@pytest.fixture(scope="session")
def make_m4a() -> Callable[..., bytes]:
    return m4a
