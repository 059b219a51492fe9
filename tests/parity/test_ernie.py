"""ERNIE 4.5 VL: experts for text and for what is seen; times drawn on frames."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from triptych.python_models.contract.errors import ErrorKind, TriptychError
from triptych.python_models.contract.settings import Settings
from triptych.python_models.families.ernie_published import FONT, translate
from triptych.python_models.families.registry import load_family
from triptych.python_models.media.types import Medium


@pytest.fixture(scope="module")
def ernie(make_parts: Callable[[str], Any]) -> Any:
    return make_parts("ernie4_5_vl_moe")


def test_token_types_are_the_processors(ernie: Any) -> None:
    make = ernie.make
    chat = make.turns(
        ("user", make.video(4), make.image(1), "which?"),
        ("assistant", "none"),
        ("user", make.image(2, 90, 33), "and here?"),
    )
    wanted = ernie.reference_inputs(chat)["moe_mm_token_type_ids"][0].bool()
    found = torch.tensor(ernie.prepare(chat).extras["moe_mm_token_type_ids"]).bool()
    assert found.tolist() == wanted.tolist()
    prepared = ernie.prepare(chat)
    logits = ernie.logits(prepared)
    all_text = ernie.logits(dataclasses.replace(prepared, extras={}))
    assert (logits - all_text).abs().max() > 0.1


def test_typed_marks_are_text(ernie: Any) -> None:
    make = ernie.make
    prepared = ernie.prepare(make.chat("<|IMAGE_START|>a<|IMAGE_END|>", make.image(1), "<|VIDEO_START|>"))
    types = prepared.extras["moe_mm_token_type_ids"]
    assert len(types) == len(prepared.input_ids)
    # the rows of the picture and the two marks around them
    assert sum(types) == prepared.items[0].num_rows + 2
    assert ernie.prepare(make.chat("<|IMAGE_START|>")).extras == {}


def test_equal_frames_at_other_times_are_other_videos(ernie: Any) -> None:
    medium = ernie.make.video(4)
    later = dataclasses.replace(medium.data, indices=tuple(i + 8 for i in medium.data.indices))
    chats = [ernie.make.chat(m, "x") for m in (medium, dataclasses.replace(medium, data=later))]
    first, other = (ernie.prepare(chat) for chat in chats)
    assert first.items[0].digest != other.items[0].digest
    patches = [prepared.features["vision"][0].tensors["patches"] for prepared in (first, other)]
    assert (patches[0] != patches[1]).any()
    # the frames themselves stay as they are
    assert medium.data.frames is chats[0].media[0].data.frames
    assert (medium.data.frames == ernie.make.video(4).data.frames).all()


def test_published_configuration(make_parts: Callable[[str], Any], ernie: Any) -> None:
    published = make_parts("ernie4_5_vl_published")
    found, wanted = published.family.load_config(), ernie.family.load_config()
    for name in ("text_config", "vision_config"):
        ours, theirs = (getattr(config, name).to_dict() for config in (found, wanted))
        assert {key: ours[key] for key in theirs if key != "dtype"} == {k: v for k, v in theirs.items() if k != "dtype"}
    raw = published.family.checkpoint.config
    with pytest.raises(TriptychError, match=r"moe_num_experts \[4, 8\]"):
        translate(raw | {"moe_num_experts": [4, 8]}, {})


def test_published_without_a_font(make_parts: Callable[[str], Any], tmp_path: Path) -> None:
    published = make_parts("ernie4_5_vl_published")
    folder = tmp_path / "checkpoint"
    shutil.copytree(published.folder, folder)
    (folder / FONT).unlink()
    preprocessor = load_family(Settings(model=str(folder))).load_preprocessor()

    def prepare(medium: Medium) -> Any:
        chat = published.make.chat(medium, "x")
        return preprocessor.prepare(chat.messages, chat.media)

    assert prepare(published.make.image(1)).items
    with pytest.raises(TriptychError, match=f"put {FONT} into its folder") as caught:
        prepare(published.make.video(4))
    assert caught.value.kind is ErrorKind.UNSUPPORTED


def test_published_with_a_tokenizer_of_sentencepiece_alone(make_parts: Callable[[str], Any], tmp_path: Path) -> None:
    """transformers reads one only where its package is installed."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(make_parts("ernie4_5_vl_published").folder, folder)
    for path in folder.glob("tokenizer*"):
        path.unlink()
    (folder / "tokenizer.model").write_bytes(b"no model")
    with pytest.raises(TriptychError, match="tokenizer") as caught:
        load_family(Settings(model=str(folder))).load_preprocessor()
    assert caught.value.kind is ErrorKind.MODEL_NOT_FOUND
