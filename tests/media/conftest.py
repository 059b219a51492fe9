"""Makers of small media files, and a loopback web server."""

from __future__ import annotations

import http.server
import io
import struct
import threading
from collections.abc import Callable, Iterator

import av
import numpy as np
import pytest
import soundfile


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
