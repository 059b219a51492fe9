"""What the benchmark scripts share: a running server, requests, medians, a results file."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import math
import os
import platform
import random
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

import httpx
import psutil
from PIL import Image, ImageDraw

RESULTS = Path(__file__).parent / "results"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def server(
    model: str, *options: str, timeout_s: float = math.inf, errors: IO[str] | None = None
) -> Iterator[tuple[str, psutil.Process, float]]:
    """``triptych serve``: yields (url, process, seconds from start to ready).

    Raises:
        SystemExit: it ends, or is not ready after ``timeout_s``; what it says of that goes to ``errors``.
    """
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [str(Path(sys.executable).with_name("triptych")), "serve", model, "--port", str(port), *options]
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)
    try:
        while True:
            if process.poll() is not None:
                raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
            if time.perf_counter() - start > timeout_s:
                raise SystemExit(f"{' '.join(command)} was not ready after {timeout_s:g} s")
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{url}/health").status_code == 200:
                    break
            time.sleep(0.05)
        yield url, psutil.Process(process.pid), time.perf_counter() - start
    finally:
        process.terminate()
        process.wait()


def picture(seed: int, size: tuple[int, int] = (224, 224)) -> bytes:
    """A PNG that is different for each seed, so that no cache answers for the encoder."""
    rng = random.Random(seed)
    image = Image.new("RGB", size, tuple(rng.randrange(256) for _ in range(3)))
    draw = ImageDraw.Draw(image)
    for _ in range(4):
        x, y, r = rng.randrange(size[0]), rng.randrange(size[1]), rng.randrange(10, 60)
        draw.ellipse((x - r, y - r, x + r, y + r), fill=tuple(rng.randrange(256) for _ in range(3)))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def body(png: bytes | None, question: str, max_tokens: int, stream: bool = True) -> dict[str, Any]:
    """An OpenAI chat request that generates exactly ``max_tokens`` tokens, greedily."""
    content: list[dict[str, Any]] = [{"type": "text", "text": question}]
    if png is not None:
        url = f"data:image/png;base64,{base64.b64encode(png).decode()}"
        content.insert(0, {"type": "image_url", "image_url": {"url": url}})
    return {
        "model": "default",
        "messages": [{"role": "user", "content": content}],
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": stream,
    }


def machine() -> dict[str, Any]:
    """Hardware and versions a figure depends on."""
    names = ("torch", "transformers", "numpy", "tritonclient", "nvidia-pytriton")
    gpu = subprocess.run(
        ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"], capture_output=True, text=True
    ).stdout.strip() if os.path.exists("/usr/bin/nvidia-smi") else ""  # fmt: skip
    found = {}
    for name in names:
        with contextlib.suppress(Exception):
            found[name] = version(name)
    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    return {"cpu": cpu, "cores": os.cpu_count(), "gpu": gpu or None, "python": platform.python_version(), **found}


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def record(path: Path, name: str, command: Sequence[str], figures: dict[str, Any], **more: Any) -> None:
    """Write figures to ``path`` with what they depend on: date, command, machine, and ``more``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    result = {
        "benchmark": name,
        "date": time.strftime("%Y-%m-%d"),
        "command": " ".join(command),
        "machine": machine(),
        **more,
        "figures": figures,
    }
    path.write_text(json.dumps(result, indent=2) + "\n")


def save(name: str, command: Sequence[str], figures: dict[str, Any]) -> None:
    """Write benchmarks/results/NAME.json and print the figures."""
    record(RESULTS / f"{name}.json", name, command, figures)
    print(json.dumps(figures, indent=2))
