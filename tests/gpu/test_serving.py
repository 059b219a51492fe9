"""``triptych serve`` on a GPU: the same answers as the stages on the CPU, embeddings that never leave the GPU."""

from __future__ import annotations

import base64
import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from triptych.python_models.contract.request import ChatRequest, MediaPart, Message, TextPart
from triptych.python_models.contract.sampling import SamplingParams
from triptych.python_models.contract.settings import Settings
from triptych.python_models.local import LocalEnsemble

pytestmark = pytest.mark.gpu

MEDIA = Path(__file__).parents[2] / "examples" / "media"
COMMAND = [sys.executable, "-c", "import sys; from triptych.client.cli import main; sys.exit(main())"]
ASKED = [
    ("image", "picture.png", "What is in the picture?"),
    ("video", "clip.mp4", "What happens in the video?"),
    ("audio", "digits.wav", "Which digits are spoken?"),
]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen([*COMMAND, "serve", "--device", "cuda", "--port", str(port)], start_new_session=True)
    address = f"http://127.0.0.1:{port}"
    try:
        until = time.monotonic() + 300
        while True:
            assert process.poll() is None
            assert time.monotonic() < until
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{address}/health", trust_env=False).status_code == 200:
                    break
            time.sleep(0.2)
        yield address
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise


def content(kind: str, name: str, question: str) -> list[dict[str, Any]]:
    data = base64.b64encode((MEDIA / name).read_bytes()).decode()
    part: dict[str, Any]
    if kind == "audio":
        part = {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}
    else:
        part = {"type": f"{kind}_url", f"{kind}_url": {"url": f"data:;base64,{data}"}}
    return [part, {"type": "text", "text": question}]


def ask(url: str, asked: tuple[str, str, str]) -> str:
    body = {
        "model": "default",
        "messages": [{"role": "user", "content": content(*asked)}],
        "temperature": 0,
        "max_tokens": 32,
    }
    answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=120, trust_env=False)
    assert answer.status_code == 200, answer.text
    text: str = answer.json()["choices"][0]["message"]["content"]
    return text


def on_cpu(local: LocalEnsemble, kind: str, name: str, question: str) -> str:
    message = Message("user", (MediaPart(kind, blob=0), TextPart(question)))
    request = ChatRequest((message,), SamplingParams(temperature=0.0, max_tokens=32))
    return "".join(delta.text for delta in local.chat(request, [(MEDIA / name).read_bytes()]))


def test_answers_equal_those_of_the_cpu_alone_and_together(url: str) -> None:
    with LocalEnsemble(Settings(device="cpu", kv_cache_tokens=4096)) as local:
        expected = [on_cpu(local, *asked) for asked in ASKED]
    assert all(expected)
    assert [ask(url, asked) for asked in ASKED] == expected
    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(lambda asked: ask(url, asked), ASKED * 8)) == expected * 8


def test_embeddings_stay_on_the_gpu(url: str) -> None:
    ask(url, ASKED[0])
    metrics = httpx.get(f"{url}/metrics", trust_env=False).text
    places = dict(re.findall(r'triptych_embedding_bytes_total\{[^}]*device="(\w+)"[^}]*\} (\S+)', metrics))
    assert set(places) == {"cuda"}
    assert float(places["cuda"]) > 0
