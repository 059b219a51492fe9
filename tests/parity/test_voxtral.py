"""Voxtral: sounds of several pieces; what Mistral's instruction format has no place for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from triptych.python_models.contract.errors import ErrorKind, TriptychError


@pytest.fixture(scope="module")
def voxtral(make_parts: Callable[[str], Any]) -> Any:
    return make_parts("voxtral")


def test_a_long_sound_is_cut_into_pieces(voxtral: Any) -> None:
    make = voxtral.make
    chat = make.chat(make.audio(1, 3.5), "and ", make.audio(2, 2.0), "transcribe")
    prepared = voxtral.prepare(chat)
    assert [item.num_rows for item in prepared.items] == [50, 25]
    with torch.no_grad():
        expected = voxtral.whole(**voxtral.reference_inputs(chat)).logits[0]
    torch.testing.assert_close(voxtral.logits(prepared), expected, atol=1e-3, rtol=1e-3)
    assert voxtral.tokens(chat) == voxtral.reference_tokens(chat)


def test_system_message_without_sounds(voxtral: Any) -> None:
    tokenizer = voxtral.decoder.tokenizer
    messages = [*voxtral.make.chat("a").messages]
    system = type(messages[0])("system", messages[0].parts, plain=True)
    ids = voxtral.preprocessor.prepare([system, *messages], []).input_ids.tolist()
    assert tokenizer.convert_ids_to_tokens(ids) == [
        *("<s>", "[SYSTEM_PROMPT]", "a", "[/SYSTEM_PROMPT]", "[INST]", "a", "[/INST]")
    ]
    chat = voxtral.make.chat(voxtral.make.audio(1), "a")
    with pytest.raises(TriptychError, match="beside a sound") as caught:
        voxtral.preprocessor.prepare([system, *chat.messages], chat.media)
    assert caught.value.kind is ErrorKind.INVALID_REQUEST


def test_roles_alternate(voxtral: Any) -> None:
    make = voxtral.make
    for turns in ([("user", "a"), ("user", "b")], [("assistant", "a")]):
        with pytest.raises(TriptychError, match="must alternate"):
            voxtral.prepare(make.turns(*turns))
    with pytest.raises(TriptychError, match="no messages of role tool"):
        voxtral.prepare(make.turns(("user", "a"), ("tool", "b")))
