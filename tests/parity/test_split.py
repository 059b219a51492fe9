"""The parts of a checkpoint, each loaded alone, together equal transformers' whole model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch


def chat_of(parts: Any, case: str) -> Any:
    make = parts.make
    if case == "text":
        return make.chat("hello world, what is shown?")
    if case == "text_turns":
        return make.turns(("user", "what is 0123456789?"), ("assistant", "a number"), ("user", "which colours? " * 6))
    if case == "turns":
        return make.turns(
            ("system", "describe in detail"),
            ("user", make.image(1), "what is this?"),
            ("assistant", "a lazy dog"),
            ("user", "and this?", make.image(2, 40, 80), " How many?"),
        )
    if case == "image":
        return make.chat(make.image(1), "describe this")
    if case == "two_images":
        return make.chat(make.image(1), make.image(2, 90, 33), "which is larger?")
    if case == "wide_image":
        return make.chat("what is this? ", make.image(3, 200, 64))
    if case == "video":
        return make.chat(make.video(4), "describe this video")
    if case == "slow_video":
        return make.chat("first ", make.video(5, frames=6, duration=5.0), "then")
    if case == "very_slow_video":
        # its positions go on behind those of the text
        return make.chat(make.video(6, frames=8, duration=10.0), "x")
    if case == "audio":
        return make.chat(make.audio(6), "transcribe")
    if case == "two_audios":
        return make.chat(make.audio(6), " and ", make.audio(7, 1.3))
    if case == "image_and_audio":
        return make.turns(
            ("user", make.image(2), "what is this? ", make.audio(7)),
            ("assistant", "a fox"),
            ("user", make.audio(8, 0.4), "transcribe"),
        )
    if case == "image_and_video":
        return make.chat("first ", make.image(2), make.video(4), "what has changed?")
    assert case == "mixed"
    return make.turns(
        ("user", make.audio(6, 0.5), make.image(1), "what is the connection?"),
        ("assistant", "none"),
        ("user", make.video(4), "and here?", make.image(2), make.audio(7)),
    )


def test_inputs_equal_the_processor(parts: Any, case: str) -> None:
    chat = chat_of(parts, case)
    prepared = parts.prepare(chat)
    inputs = parts.reference_inputs(chat)
    assert prepared.input_ids.dtype == np.int32
    assert prepared.input_ids.tolist() == inputs["input_ids"][0].tolist()
    assert prepared.position_ids.shape == (parts.decoder.num_axes, len(prepared.input_ids))
    assert [item.modality for item in prepared.items] == [medium.modality for medium in chat.media]
    ids = {parts.preprocessor.token_id(m) for m in parts.preprocessor.modalities}
    covered = sorted(i for item in prepared.items for start, end in item.spans for i in range(start, end))
    assert covered == [i for i, token in enumerate(prepared.input_ids) if token in ids]


def test_logits_equal_the_whole_model(parts: Any, case: str) -> None:
    chat = chat_of(parts, case)
    parts.whole.base_model.rope_deltas = None
    with torch.no_grad():
        expected = parts.whole(**parts.reference_inputs(chat)).logits[0]
    found = parts.logits(parts.prepare(chat))
    assert float(expected.std()) > 0.1, "flat logits prove nothing"
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)


def test_tokens_equal_generate(parts: Any, case: str) -> None:
    chat = chat_of(parts, case)
    assert parts.tokens(chat) == parts.reference_tokens(chat)


def test_pixels_equal_the_processor_bit_for_bit(parts: Any) -> None:
    encoder = parts.encoders.get("vision")
    if not hasattr(encoder, "_pixels"):
        pytest.skip("pixels travel as the processor made them")
    chats = [parts.make.chat(parts.make.image(seed, *size), "x") for seed, *size in ((1,), (2, 90, 33))]
    for chat in chats:
        (item,) = parts.prepare(chat).features["vision"]
        inputs = parts.reference_inputs(chat)
        found, expected = encoder._pixels(item), next(v for k, v in inputs.items() if k.endswith("pixel_values"))
        assert torch.equal(found.flatten(), expected.flatten())


def test_items_of_several_requests_encode_together(parts: Any) -> None:
    make = parts.make
    media = {
        "image": [make.image(1), make.image(2, 90, 33), make.image(3, 112, 112)],
        "video": [make.video(4)],
        "audio": [make.audio(6), make.audio(7, 1.3), make.audio(8, 0.2)],
    }
    prepared = [parts.prepare(make.chat(medium, "a")) for name in parts.modalities for medium in media[name]]
    for name, encoder in parts.encoders.items():
        items = [item for one in prepared for item in one.features.get(name, [])]
        together = encoder.encode(items)
        alone = [rows for item in items for rows in encoder.encode([item])]
        assert [len(rows) for rows in together] == [item.num_rows for item in items]
        for a, b in zip(together, alone, strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_same_medium_same_digest_only(parts: Any) -> None:
    make = parts.make

    def digest(medium: Any) -> str:
        (item,) = parts.prepare(make.chat(medium, "x")).items
        return str(item.digest)

    for name in parts.modalities:
        of = getattr(make, name)
        assert digest(of(1)) == digest(of(1)) != digest(of(2))
    if "video" in parts.modalities:
        slow, fast = (digest(make.video(4, duration=d)) for d in (4.0, 2.0))
        assert slow != fast, "the frame rate decides positions"
