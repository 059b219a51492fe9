"""The ensembles in one process: the same stages, joined without a server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from triptych.python_models.contract.errors import ErrorKind, TriptychError
from triptych.python_models.contract.request import ChatRequest, MediaPart, Message, TextPart
from triptych.python_models.contract.sampling import SamplingParams
from triptych.python_models.contract.settings import Settings
from triptych.python_models.local import LocalEnsemble

MEDIA = Path(__file__).parents[2] / "examples" / "media"


@pytest.fixture(scope="module")
def local() -> Iterator[LocalEnsemble]:
    with LocalEnsemble(Settings(kv_cache_tokens=4096, torch_threads=1)) as ensemble:
        yield ensemble


def ask(local: LocalEnsemble, *parts: TextPart | MediaPart, media: list[bytes] | None = None) -> str:
    sampling = SamplingParams(max_tokens=40, temperature=0.0)
    deltas = list(local.chat(ChatRequest((Message("user", parts),), sampling), media or []))
    assert deltas[-1].finish_reason == "stop"
    assert deltas[-1].usage is not None
    assert deltas[-1].usage.completion_tokens == sum(len(d.token_ids) for d in deltas)
    return "".join(d.text for d in deltas)


def test_text_and_picture(local: LocalEnsemble) -> None:
    assert "picture" in ask(local, TextPart("What colour is the shape?"))
    picture = (MEDIA / "picture.png").read_bytes()
    seen = ask(local, MediaPart("image", blob=0), TextPart("How many shapes are there?"), media=[picture])
    assert seen
    assert seen != ask(local, TextPart("How many shapes are there?"))


def test_errors_are_raised(local: LocalEnsemble) -> None:
    request = ChatRequest((Message("user", (MediaPart("image", blob=0),)),))
    with pytest.raises(TriptychError) as caught:
        list(local.chat(request, [b"no picture"]))
    assert caught.value.kind is ErrorKind.INVALID_MEDIA
