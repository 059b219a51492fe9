"""A real server, started as a user would: ``triptych serve`` in a process of its own, on a tiny checkpoint."""

from __future__ import annotations

import base64
import http.server
import io
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import wave
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import av
import httpx
import numpy as np
import openai
import psutil
import pytest
from PIL import Image

COMMAND = [sys.executable, "-c", "import sys; from triptych.client.cli import main; sys.exit(main())"]
NAME = "tiny-omni"
MAX_INFLIGHT = 8
MAX_BODY_MB = 4
LEASE_S = 2
STAGES = ("preprocess", "vision_encoder", "audio_encoder", "language_model")
# Generous: the machines that run tests are small and busy.
START_S = 180.0


@dataclass
class Serving:
    """A running ``triptych serve``."""

    process: subprocess.Popen[str]
    lines: list[str] = field(default_factory=list)
    url: str = ""
    grpc_port: int = 0
    metrics_port: int = 0

    def output(self) -> str:
        return "".join(self.lines)

    def wait_for(self, text: str, timeout_s: float = START_S) -> str:
        """The first line of output that holds ``text``."""
        until = time.monotonic() + timeout_s
        while time.monotonic() < until:
            for line in list(self.lines):
                if text in line:
                    return line
            if self.process.poll() is not None:
                break
            time.sleep(0.05)
        raise AssertionError(f"{text!r} did not appear; status {self.process.poll()}, output:\n{self.output()}")

    def family(self) -> list[psutil.Process]:
        """The process and everything living that it started."""
        root = psutil.Process(self.process.pid)
        return [root, *(p for p in root.children(recursive=True) if p.status() != psutil.STATUS_ZOMBIE)]

    def stage_pid(self, stage: str) -> int:
        found = []
        for process in self.family()[1:]:
            line = process.cmdline()
            if "triton_python_backend_stub" in line[0] and any(part.startswith(f"{stage}_0") for part in line[1:]):
                found.append(process.pid)
        assert len(found) == 1, (stage, found)
        return found[0]

    def metric(self, name: str, **labels: str) -> float:
        """A sample's value; 0 where there is none yet."""
        for line in httpx.get(f"{self.url}/metrics", trust_env=False).text.splitlines():
            if line.startswith(name) and all(f'{key}="{value}"' in line for key, value in labels.items()):
                return float(line.rpartition(" ")[2])
        return 0.0

    def ask(self, **change: Any) -> httpx.Response:
        """A small request that always has the same answer."""
        body = {
            "model": NAME,
            "messages": [{"role": "user", "content": "hello"}],
            "max_tokens": 2,
            "temperature": 0,
        } | change
        return httpx.post(f"{self.url}/v1/chat/completions", json=body, timeout=60, trust_env=False)


@contextmanager
def serving(*args: str) -> Iterator[Serving]:
    """``triptych serve`` with these arguments; killed at the end if it still runs."""
    process = subprocess.Popen(
        [*COMMAND, "serve", *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    served = Serving(process)

    def collect() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            served.lines.append(line)

    reader = threading.Thread(target=collect, daemon=True)
    reader.start()
    try:
        yield served
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(40)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        reader.join(5)
        assert process.stdout is not None
        process.stdout.close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture(scope="session")
def start() -> Callable[..., Any]:
    return serving


@pytest.fixture(scope="session")
def command() -> list[str]:
    return COMMAND


@pytest.fixture(scope="session")
def checkpoint(tiny_checkpoint: Callable[[str], Path]) -> Path:
    return tiny_checkpoint("qwen2_5_omni")


class SlowFiles(http.server.BaseHTTPRequestHandler):
    """A picture, or a video or sound where the name ends so, at once; ``/slow.png`` after a minute."""

    def do_GET(self) -> None:
        if self.path.startswith("/slow"):
            # who asked is gone by then
            time.sleep(60)
            return
        name = self.path.partition("?")[0]
        data = film(9) if name.endswith(".mp4") else sound(9) if name.endswith(".wav") else picture(9)
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture(scope="session")
def files() -> Iterator[str]:
    """Base URL of a web server with media."""
    web = http.server.ThreadingHTTPServer(("127.0.0.1", 0), SlowFiles)
    web.daemon_threads = True
    threading.Thread(target=web.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{web.server_port}"
    web.shutdown()
    web.server_close()


@pytest.fixture(scope="session")
def server(files: str, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """One server for all tests of this folder."""
    ports = [free_port() for _ in range(2)]
    log = tmp_path_factory.mktemp("server") / "server.log"
    with serving(
        str(checkpoint),
        "--served-model-name",
        NAME,
        "--port=0",
        f"--grpc-port={ports[0]}",
        f"--metrics-port={ports[1]}",
        f"--max-inflight-requests={MAX_INFLIGHT}",
        f"--max-body-mb={MAX_BODY_MB}",
        f"--lease-s={LEASE_S}",
        f"--allowed-media-host={files.removeprefix('http://')}",
        f"--server-log={log}",
    ) as served:
        served.url = served.wait_for("ready: ").split()[1]
        served.grpc_port, served.metrics_port = ports
        yield served


@pytest.fixture
def client(server: Serving) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120) as made:
        yield made


def picture(seed: int = 0, width: int = 60, height: int = 44, form: str = "PNG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, form)
    return out.getvalue()


def sound(seed: int = 0, seconds: float = 0.6, rate: int = 16000) -> bytes:
    samples = np.random.default_rng(seed).integers(-3000, 3000, int(seconds * rate), dtype=np.int16)
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples.tobytes())
    return out.getvalue()


def film(seed: int = 0, frames: int = 8) -> bytes:
    rng = np.random.default_rng(seed)
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as file:
        stream = file.add_stream("mpeg4", rate=8)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for _ in range(frames):
            pixels = rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        file.mux(stream.encode())
    return out.getvalue()


def data_url(data: bytes, mime: str) -> str:
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"


def image_part(seed: int = 0) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": data_url(picture(seed), "image/png")}}


def video_part(seed: int = 0) -> dict[str, Any]:
    return {"type": "video_url", "video_url": {"url": data_url(film(seed), "video/mp4")}}


def audio_part(seed: int = 0) -> dict[str, Any]:
    return {"type": "audio_url", "audio_url": {"url": data_url(sound(seed), "audio/wav")}}


def input_audio_part(seed: int = 0) -> dict[str, Any]:
    return {"type": "input_audio", "input_audio": {"data": base64.b64encode(sound(seed)).decode(), "format": "wav"}}


def text_part(text: str = "what is this?") -> dict[str, Any]:
    return {"type": "text", "text": text}


class Parts:
    """Makers of content parts, and of the media in them."""

    image, video, audio, input_audio, text = (
        staticmethod(image_part),
        staticmethod(video_part),
        staticmethod(audio_part),
        staticmethod(input_audio_part),
        staticmethod(text_part),
    )
    picture, sound, film, data_url = (
        staticmethod(picture),
        staticmethod(sound),
        staticmethod(film),
        staticmethod(data_url),
    )


@pytest.fixture(scope="session")
def parts() -> type[Parts]:
    return Parts
