"""triptych.Client and AsyncClient on the real server: what the endpoint answers, cancels, a stage that is killed."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from triptych import AsyncClient, Client, ErrorKind, ItemError, TriptychError

LONG = 1900
# Importing torch and loading a model anew, on a busy machine.
HEAL_S = 90.0


@pytest.fixture
def client(server: Any) -> Iterator[Client]:
    with Client(f"127.0.0.1:{server.grpc_port}") as made:
        yield made


def running(server: Any) -> float:
    found: float = server.metric("triptych_requests_running", stage="language_model")
    return found


def wait_until(true: Callable[[], Any]) -> None:
    deadline = time.monotonic() + HEAL_S
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def endpoint(server: Any, *content: Any) -> str:
    answer = server.ask(messages=[{"role": "user", "content": list(content)}], max_tokens=6)
    assert answer.status_code == 200, answer.text
    text: str = answer.json()["choices"][0]["message"]["content"]
    return text


def test_media_over_the_wire(server: Any, client: Client, parts: Any) -> None:
    pixels = np.random.default_rng(3).integers(0, 256, (44, 60, 3), dtype=np.uint8)
    samples = np.random.default_rng(4).integers(-3000, 3000, 9600, dtype=np.int16)
    seen = endpoint(server, parts.image(3), parts.text())
    heard = endpoint(server, parts.audio(4), parts.text())
    forms = [
        ({"type": "image", "image": pixels}, seen),
        (Image.fromarray(pixels), seen),
        (parts.image(3), seen),
        ({"type": "audio", "audio": (samples, 16000)}, heard),
        (parts.input_audio(4), heard),
        ({"type": "video", "video": parts.film(5)}, endpoint(server, parts.video(5), parts.text())),
    ]
    batch: list[Any] = [[{"role": "user", "content": [form, parts.text()]}] for form, _ in forms]
    batch.append([{"role": "user", "content": [{"type": "image", "image": b"none"}]}])
    answers = client.chat(batch, temperature=0, max_tokens=6, return_exceptions=True)
    *good, bad = answers
    assert [answer.text if not isinstance(answer, ItemError) else answer for answer in good] == [t for _, t in forms]
    assert isinstance(bad, ItemError)
    assert (bad.index, bad.kind, bad.param) == (6, ErrorKind.INVALID_MEDIA, "messages[0].content[0]")


def test_raw_prompts(server: Any, client: Client) -> None:
    body = {"model": "tiny-omni", "prompt": "Once upon", "max_tokens": 5, "temperature": 0}
    answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60, trust_env=False)
    text = answer.json()["choices"][0]["text"]
    assert client.generate("Once upon", max_tokens=5, temperature=0).text == text
    assert "".join(d.text for d in client.stream_generate("Once upon", max_tokens=5, temperature=0)) == text


def test_asyncio(server: Any, client: Client) -> None:
    async def run() -> None:
        async with AsyncClient(f"127.0.0.1:{server.grpc_port}") as asking:
            assert (await asking.settings()).model == client.settings().model
            expected = client.chat("hello", max_tokens=6, temperature=0)
            answers = await asyncio.gather(*(asking.chat("hello", max_tokens=6, temperature=0) for _ in range(4)))
            assert [answer.token_ids for answer in answers] == [expected.token_ids] * 4
            stream = await asking.stream_chat("hello", max_tokens=6, temperature=0)
            assert "".join([delta.text async for delta in stream]) == expected.text
            task = asyncio.create_task(asking.chat("hello", max_tokens=LONG, ignore_eos=True))
            await asyncio.to_thread(wait_until, lambda: running(server) == 1)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await asyncio.to_thread(wait_until, lambda: running(server) == 0)

    asyncio.run(asyncio.wait_for(run(), 3 * HEAL_S))


def test_a_killed_stage(server: Any, client: Client) -> None:
    """What has begun to be answered fails, what has not waits for the stage to come back."""
    begun = client.stream_chat("hello", max_tokens=LONG, ignore_eos=True)
    next(begun)
    os.kill(server.stage_pid("language_model"), signal.SIGKILL)
    results: list[Any] = []

    def ask() -> None:
        with Client(f"127.0.0.1:{server.grpc_port}", retry_s=HEAL_S) as patient:
            wait_until(lambda: httpx.get(f"{server.url}/health", trust_env=False).status_code == 503)
            results.append(patient.chat("hello", max_tokens=2, temperature=0).token_ids)

    thread = threading.Thread(target=ask)
    thread.start()
    with pytest.raises(TriptychError) as caught:
        list(begun)
    assert caught.value.kind is ErrorKind.STAGE_DEAD
    thread.join()
    assert len(results[0]) == 2
    wait_until(lambda: httpx.get(f"{server.url}/health", trust_env=False).status_code == 200)
