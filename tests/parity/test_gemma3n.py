"""Gemma 3n: what it refuses, and what it serves without timm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from triptych.python_models.contract.errors import ErrorKind, TriptychError
from triptych.python_models.families import gemma3n
from triptych.python_models.families.registry import load_family


@pytest.fixture(scope="module")
def parts(make_parts: Callable[[str], Any]) -> Any:
    return make_parts("gemma3n")


def test_pictures_need_timm(parts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemma3n, "find_spec", lambda name: None)
    family = load_family(parts.settings)
    assert family.encoders == {"audio"}
    preprocessor = family.load_preprocessor()
    chat = parts.make.chat(parts.make.image(1), "x")
    with pytest.raises(TriptychError, match="install timm") as caught:
        preprocessor.prepare(chat.messages, chat.media)
    assert caught.value.kind is ErrorKind.UNSUPPORTED
    assert caught.value.param == "messages[0]"


@pytest.mark.parametrize(
    ("seconds", "message"), [(30.5, "lasts 30.5 s; the model takes at most 30 s"), (0.01, "10.0 ms")]
)
def test_sounds_of_other_lengths(parts: Any, seconds: float, message: str) -> None:
    with pytest.raises(TriptychError, match=message) as caught:
        parts.prepare(parts.make.chat(parts.make.audio(1, seconds), "x"))
    assert caught.value.kind is ErrorKind.INVALID_MEDIA


def test_a_sound_depends_on_its_padding(parts: Any) -> None:
    """As transformers pads it, to the longest sound of the request."""
    make = parts.make
    alone, beside = (
        parts.prepare(make.chat(*sounds, "x")) for sounds in ((make.audio(1),), (make.audio(1), make.audio(2, 2.0)))
    )
    assert alone.items[0].digest != beside.items[0].digest
    assert alone.items[0].digest == parts.prepare(make.chat("other ", make.audio(1))).items[0].digest


def test_ids_behind_the_vocabulary_have_embeddings(parts: Any) -> None:
    """Those that end media, and what the model may answer."""
    base = parts.whole.model
    ids = torch.arange(parts.decoder.config.vocab_size)
    found = parts.decoder.embed(ids, torch.zeros(len(ids), dtype=torch.bool))
    for embedder in (base.embed_vision, base.embed_audio):
        own = ids[embedder.vocab_offset : embedder.vocab_offset + embedder.vocab_size]
        torch.testing.assert_close(found[own], embedder(input_ids=own))
    text = ids[: base.embed_vision.vocab_offset]
    torch.testing.assert_close(found[text], base.get_input_embeddings()(text))


def test_shared_layers_keep_nothing(parts: Any) -> None:
    from triptych.python_models.language_model.runner.executor import ModulesExecutor

    layers = ModulesExecutor(parts.decoder).layers
    assert [layer.shares for layer in layers] == [None, None, None, None, 2, 3]
    assert [layer.keeps for layer in layers] == [True] * 4 + [False] * 2
