"""An encoder on another server: the same answers, and what happens when that server is gone."""

from __future__ import annotations

import io
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tritonclient.utils import InferenceServerException

from triptych.client.launcher import TritonServer, find_server
from triptych.python_models.contract.errors import ErrorKind, TriptychError
from triptych.python_models.contract.request import ChatRequest
from triptych.python_models.contract.settings import Settings
from triptych.python_models.local import LocalEnsemble

SETTINGS = {"torch_threads": 1, "context_length": 512, "kv_cache_tokens": 4096}


def picture(seed: int) -> bytes:
    out = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (48, 72, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def request(with_picture: bool = True) -> str:
    content: list[dict[str, Any]] = [{"type": "image", "blob": 0}] if with_picture else []
    content.append({"type": "text", "text": "what is this?"})
    messages = [{"role": "user", "content": content}]
    return json.dumps({"messages": messages, "sampling": {"max_tokens": 8, "temperature": 0, "ignore_eos": True}})


@dataclass
class Pool:
    """A server with the vision encoder alone, and a client of one that uses it."""

    encoder: TritonServer
    front: Any
    settings: Settings

    def ask(self, seed: int) -> list[int]:
        events = self.front.stream("chat", {"request": [request()], "media": [picture(seed)]}).all()
        return [int(token) for event in events for token in event["token_ids"]]


@pytest.fixture(scope="module")
def pool(
    start: Callable[..., Any], tiny_checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Pool]:
    logs = tmp_path_factory.mktemp("pool")
    settings = Settings(model=str(tiny_checkpoint("qwen2_5_omni")), **SETTINGS)  # type: ignore[arg-type]
    encoder = TritonServer(find_server(), settings, stages=["vision_encoder"], log=logs / "encoder.log")
    said: list[str] = []
    start(encoder, said)
    assert said[-1].endswith("(1 of 1)")
    with_pool = Settings(**{**settings.__dict__, "vision_encoder_url": encoder.grpc_url})
    front = start(TritonServer(find_server(), with_pool, log=logs / "front.log"))
    found = Pool(encoder, front, settings)
    yield found
    front.server.stop()
    found.encoder.stop()


def test_same_tokens_as_with_the_encoder_here(pool: Pool) -> None:
    with LocalEnsemble(pool.settings) as local:
        for seed in (0, 1):
            chat = ChatRequest.from_json(request(), 1)
            expected = [token for delta in local.chat(chat, [picture(seed)]) for token in delta.token_ids]
            assert len(expected) == 8
            assert pool.ask(seed) == expected


def test_errors_of_the_other_server_arrive(pool: Pool) -> None:
    with pytest.raises(InferenceServerException) as caught:
        pool.front.infer("vision_encoder", {"vision_features": np.frombuffer(b"no features", dtype=np.uint8)})
    error = TriptychError.from_wire(caught.value.message())
    assert (error.kind, error.param, error.stage) == (ErrorKind.INVALID_REQUEST, "vision_features", "vision_encoder")
    assert pool.front.infer("vision_encoder", {"cancel": ["nobody"]}) == {}


def test_cancel(pool: Pool) -> None:
    (stub,) = pool.encoder.stage_pids().values()
    os.kill(stub, signal.SIGSTOP)
    try:
        stream = pool.front.stream("chat", {"request": [request()], "media": [picture(2)]})
        pool.front.wait_metric(lambda value: value == 1, "triptych_requests_running", stage="vision_encoder")
        pool.front.cancel("vision_encoder", stream.request_id)
        with pytest.raises(TriptychError) as caught:
            stream.all()
        assert caught.value.kind is ErrorKind.CANCELLED
        pool.front.wait_metric(lambda value: value == 0, "triptych_requests_running", stage="vision_encoder")
    finally:
        os.kill(stub, signal.SIGCONT)
    assert len(pool.ask(2)) == 8


def test_a_pool_that_is_gone_and_comes_back(pool: Pool, start: Callable[..., Any]) -> None:
    pool.encoder.stop()
    with pytest.raises(TriptychError, match=f"no server of the pool {pool.encoder.grpc_url} can be reached") as caught:
        pool.ask(3)
    assert (caught.value.kind, caught.value.stage) == (ErrorKind.STAGE_DEAD, "vision_encoder")
    # requests without pictures are none of its business
    assert len(pool.front.stream("chat_text", {"request": [request(False)]}).all()) > 0
    pool.encoder = pool.encoder.another()
    start(pool.encoder)
    assert any(answered(pool) for _ in range(100))


def answered(pool: Pool) -> bool:
    """Whether a picture is answered; the pool rests for a moment from a server that it could not reach."""
    try:
        return len(pool.ask(3)) == 8
    except TriptychError:
        time.sleep(0.2)
        return False
