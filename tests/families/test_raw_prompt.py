"""Prompts without a chat template: the same tokens as transformers' processor and ``generate``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as PILImage

from triptych.python_models.builtin import checkpoint as builtin_checkpoint
from triptych.python_models.contract.errors import TriptychError
from triptych.python_models.contract.request import Message, RawPrompt, TemplateInputs, TextPart
from triptych.python_models.contract.settings import Settings
from triptych.python_models.families.registry import load_family
from triptych.python_models.media.types import Audio, Image, Medium

# What each processor wants for a picture.
PICTURES = {
    "qwen2_5_omni": "<|vision_start|><|image_pad|><|vision_end|>",
    "builtin": None,
    "llava": "<image>",
    "gemma3": "<start_of_image>",
}


def image(seed: int, width: int = 56, height: int = 40) -> Medium:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Medium("image", Image(PILImage.fromarray(pixels)), f"{seed}", f"prompt.media[{seed}]")


class Case:
    """A checkpoint's preprocessor beside transformers' processor."""

    def __init__(self, name: str, folder: Path) -> None:
        import transformers

        self.name = name
        self.preprocessor: Any = load_family(Settings(model=str(folder))).load_preprocessor()
        self.processor = transformers.AutoProcessor.from_pretrained(folder)
        self.tokenizer = self.processor.tokenizer
        self.picture = PICTURES[name] or self.preprocessor._placeholder("image")

    def theirs(self, text: str, *media: Medium) -> dict[str, Any]:
        arguments: dict[str, Any] = {"images": [m.data.pixels for m in media if isinstance(m.data, Image)]}
        return dict(self.processor(text=[text], return_tensors="pt", **(arguments if media else {})))

    def ids(self, prompt: RawPrompt, *media: Medium) -> list[int]:
        found: list[int] = self.preprocessor.prepare(prompt, media).input_ids.tolist()
        return found


@pytest.fixture(scope="module", params=list(PICTURES))
def case(request: Any, tiny_checkpoint: Callable[[str], Path]) -> Case:
    name = request.param
    return Case(name, builtin_checkpoint() if name == "builtin" else tiny_checkpoint(name))


def test_text_alone(case: Case) -> None:
    special = next(iter(case.tokenizer.added_tokens_decoder.values())).content
    for text in ("Hello world", f"one {special} two"):
        theirs = case.tokenizer([text])["input_ids"][0]
        assert case.ids(RawPrompt(text)) == theirs
        assert case.ids(RawPrompt(token_ids=tuple(theirs))) == theirs
        bare = case.tokenizer([text], add_special_tokens=False)["input_ids"][0]
        assert case.ids(RawPrompt(text, add_special_tokens=False)) == bare


def test_pictures_by_text_and_by_token_ids(case: Case) -> None:
    text = f"Look: {case.picture} and {case.picture}\nWhat?"
    media = image(0), image(1, 80, 30)
    theirs = case.theirs(text, *media)["input_ids"][0].tolist()
    prepared = case.preprocessor.prepare(RawPrompt(text), media)
    assert prepared.input_ids.tolist() == theirs
    assert [item.modality for item in prepared.items] == ["image", "image"]
    # a prompt of their own ids, the place of a picture written once
    ids = case.tokenizer([text])["input_ids"][0]
    assert len(ids) < len(theirs)
    again = case.preprocessor.prepare(RawPrompt(token_ids=tuple(ids)), media)
    assert again.input_ids.tolist() == theirs
    assert (again.position_ids == prepared.position_ids).all()
    assert [item.spans for item in again.items] == [item.spans for item in prepared.items]


def test_token_ids_stay_as_they_are(case: Case) -> None:
    """Ids that no tokenizer would give for their text."""
    (first,) = case.tokenizer(["a"], add_special_tokens=False)["input_ids"]
    (joined,) = case.tokenizer(["aaaa"], add_special_tokens=False)["input_ids"]
    ids = (*first * 4, *case.tokenizer([case.picture], add_special_tokens=False)["input_ids"][0], *first * 3)
    found = case.ids(RawPrompt(token_ids=ids), image(0))
    assert found[: 4 * len(first)] == first * 4
    assert found[-3 * len(first) :] == first * 3
    assert len(first) * 4 >= len(joined)


@pytest.mark.parametrize("count", [0, 2])
def test_as_many_places_as_pictures(case: Case, count: int) -> None:
    media = [image(0)]
    with pytest.raises(TriptychError) as caught:
        case.preprocessor.prepare(RawPrompt(f"a {case.picture * count} b"), media)
    assert caught.value.kind.status == 400
    assert str(caught.value.param).startswith("prompt")


def test_what_cannot_be_a_prompt(case: Case) -> None:
    with pytest.raises(TriptychError, match="must be a token id from 0 to") as caught:
        case.ids(RawPrompt(token_ids=(1, 10**9)))
    assert caught.value.param == "prompt.token_ids[1]"
    with pytest.raises(TriptychError, match="no tokens"):
        case.ids(RawPrompt("", add_special_tokens=False))


def test_sounds_and_pictures_in_any_order(tiny_checkpoint: Callable[[str], Path]) -> None:
    case = Case("qwen2_5_omni", tiny_checkpoint("qwen2_5_omni"))
    sound = Medium("audio", Audio(np.full(4800, 0.1, np.float32), 16000), "s", "prompt.media[1]")
    text = f"{case.preprocessor._placeholder('audio')}{case.picture}"
    prepared = case.preprocessor.prepare(RawPrompt(text), [image(0), sound])
    assert [item.modality for item in prepared.items] == ["audio", "image"]
    assert prepared.items[0].spans < prepared.items[1].spans


def test_a_text_begins_once(tiny_checkpoint: Callable[[str], Path]) -> None:
    """Mllama's processor writes what begins a text, and so does its tokenizer."""
    folder = tiny_checkpoint("mllama")
    preprocessor: Any = load_family(Settings(model=str(folder))).load_preprocessor()
    tokenizer = preprocessor.processor.tokenizer
    theirs = tokenizer(["Hello"])["input_ids"][0]
    assert theirs[0] == tokenizer.bos_token_id
    for prompt in (RawPrompt("Hello"), RawPrompt(tokenizer.bos_token + "Hello"), RawPrompt(None, tuple(theirs))):
        assert preprocessor.prepare(prompt, []).input_ids.tolist() == theirs
    bare = preprocessor.prepare(RawPrompt("Hello", add_special_tokens=False), []).input_ids.tolist()
    assert bare == theirs[1:]


@pytest.mark.parametrize("plain", [True, False])
def test_continue_final_message(case: Case, plain: bool) -> None:
    """The answer goes on with the last message, written as transformers writes it."""
    messages = [Message("user", (TextPart("Say it"),), plain), Message("assistant", (TextPart("It is"),), plain)]
    template = TemplateInputs(add_generation_prompt=False, continue_final_message=True)
    ids = case.preprocessor.prepare(messages, [], template).input_ids.tolist()
    (end,) = case.tokenizer(["It is"], add_special_tokens=False)["input_ids"]
    assert ids[-len(end) :] == end or case.tokenizer.decode(ids).endswith("It is")
    closed = case.preprocessor.prepare(messages, [], TemplateInputs(add_generation_prompt=False)).input_ids.tolist()
    assert closed[: len(ids)] == ids
    assert len(closed) > len(ids)
    opened = case.preprocessor.prepare(messages, []).input_ids.tolist()
    assert opened[: len(closed)] == closed
    assert len(opened) > len(closed)
