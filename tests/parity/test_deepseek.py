"""DeepSeek's tiles of large pictures, and the special tokens that its prompts are written with."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from triptych.python_models.contract.errors import ErrorKind, TriptychError
from triptych.python_models.contract.sampling import SamplingParams
from triptych.python_models.contract.settings import Settings
from triptych.python_models.families.registry import load_family
from triptych.python_models.language_model.engine.detokenizer import Detokenizer, Vocabulary

from .test_stages import Server, without_end

NEW_TOKENS = 4
# Name -> pictures with no tiles, a row of them, a column and a block.
PICTURES = {
    "deepseek_ocr": {(90, 60): 0, (200, 90): 2, (60, 200): 3, (250, 180): 6},
    "deepseek_ocr2": {(180, 60): 0, (420, 200): 2, (150, 500): 3, (600, 420): 6},
    "deepseek_ocr2_published": {(700, 500): 0, (1300, 700): 2},
}


@pytest.fixture(scope="module", params=PICTURES)
def parts(request: pytest.FixtureRequest, make_parts: Callable[[str], Any]) -> Any:
    return make_parts(request.param)


@pytest.fixture(scope="module")
def pictures(parts: Any) -> list[tuple[Any, int]]:
    """Media and their tiles."""
    sizes = PICTURES[parts.folder.name]
    return [(parts.make.image(seed, *size), count) for seed, (size, count) in enumerate(sizes.items())]


def test_tiles(parts: Any, pictures: list[tuple[Any, int]]) -> None:
    prepared = parts.prepare(parts.make.chat(*(medium for medium, _ in pictures), "which is larger?"))
    items = prepared.features["vision"]
    assert [len(item.tensors.get("tiles", ())) for item in items] == [count for _, count in pictures]
    for item, (medium, count) in zip(items, pictures, strict=True):
        assert item.tensors["pixels"].dtype == np.uint8
        (alone,) = parts.prepare(parts.make.chat(medium, "x")).features["vision"]
        assert alone.digest == item.digest
        assert np.array_equal(alone.tensors["pixels"], item.tensors["pixels"])
        assert not count or np.array_equal(alone.tensors["tiles"], item.tensors["tiles"])


def test_all_sizes_together(parts: Any, pictures: list[tuple[Any, int]]) -> None:
    chat = parts.make.chat(*(medium for medium, _ in pictures), "which is larger?")
    with torch.no_grad():
        expected = parts.whole(**parts.reference_inputs(chat)).logits[0]
    torch.testing.assert_close(parts.logits(parts.prepare(chat)), expected, atol=1e-3, rtol=1e-3)
    assert parts.tokens(chat, NEW_TOKENS) == parts.reference_tokens(chat, NEW_TOKENS)


def test_sizes_of_several_requests_encode_together(parts: Any, pictures: list[tuple[Any, int]]) -> None:
    items = [parts.prepare(parts.make.chat(medium, "x")).features["vision"][0] for medium, _ in pictures]
    encoder = parts.encoders["vision"]
    for alone, together in zip([encoder.encode([item])[0] for item in items], encoder.encode(items), strict=True):
        torch.testing.assert_close(alone, together, atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def vl2(make_parts: Callable[[str], Any]) -> Any:
    return make_parts("deepseek_vl2_tiny")


def grids(prepared: Any) -> list[list[int]]:
    return [item.tensors["grid"].tolist() for item in prepared.features["vision"]]


def test_vl2_cuts_at_most_two_pictures(vl2: Any) -> None:
    make = vl2.make
    wide, high, block = make.image(1, 300, 70), make.image(2, 60, 150), make.image(3, 130, 128)
    chats = [make.chat(wide, "x"), make.chat(high, block, "x"), make.chat(wide, high, block, "x")]
    prepared = [vl2.prepare(chat) for chat in chats]
    assert [grids(each) for each in prepared] == [[[4, 1]], [[2, 3], [3, 2]], [[1, 1]] * 3]
    # what was computed of a picture with tiles is not that of one without
    digests = [item.digest for each in prepared for item in each.items]
    assert len(set(digests)) == len(digests)
    for chat, each in zip(chats, prepared, strict=True):
        with torch.no_grad():
            expected = vl2.whole(**vl2.reference_inputs(chat)).logits[0]
        torch.testing.assert_close(vl2.logits(each), expected, atol=1e-3, rtol=1e-3)
        assert vl2.tokens(chat, NEW_TOKENS) == vl2.reference_tokens(chat, NEW_TOKENS)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("config", {"tile_tag": "1D"}, "tile_tag '1D'"),
        ("config", {"projector_config": {"projector_type": "linear", "n_embed": 64}}, "projector_type 'linear'"),
        ("config", {"vision_config": {"width": {"vit": 1}}}, r"towers \['vit'\]"),
        ("processor_config", {"patch_size": None}, "lacks patch_size"),
        ("processor_config", {"candidate_resolutions": [[20, 30]]}, "begin with a square"),
        ("processor_config", {"candidate_resolutions": [[40, 40]]}, "tiles of 40 pixels for a tower of 20"),
    ],
)
def test_vl2_refuses_what_is_not_published(
    vl2: Any, tmp_path: Path, file: str, change: dict[str, Any], message: str
) -> None:
    folder = tmp_path / "other"
    shutil.copytree(vl2.folder, folder)
    path = folder / f"{file}.json"
    values = json.loads(path.read_text()) | change
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
    with pytest.raises(TriptychError, match=message) as caught:
        load_family(Settings(model=str(folder))).load_preprocessor()
    assert caught.value.kind is ErrorKind.UNSUPPORTED


def test_control_tokens_keep_their_meaning(parts: Any) -> None:
    tokenizer = parts.decoder.tokenizer
    prompt = "<|grounding|>find <|ref|>the fox<|/ref|> here<image>"
    medium = parts.make.image(1)
    prepared = parts.prepare(parts.make.chat(medium, prompt))
    names = ["<|grounding|>", "<|ref|>", "<|/ref|>"]
    counts = [(prepared.input_ids == tokenizer.convert_tokens_to_ids(name)).sum() for name in names]
    assert counts == [1, 1, 1]
    # a placeholder is none of them
    image = tokenizer.convert_tokens_to_ids("<image>")
    assert (prepared.input_ids == image).sum() == prepared.items[0].num_tokens
    ids = parts.reference_inputs(parts.make.chat(medium, prompt.removesuffix("<image>")))["input_ids"][0].tolist()
    end = ids.index(tokenizer.convert_tokens_to_ids("<|/ref|>")) + 1
    assert prepared.input_ids[:end].tolist() == ids[:end]


def test_control_tokens_of_vl2(vl2: Any) -> None:
    test_control_tokens_keep_their_meaning(vl2)


@pytest.mark.parametrize(("skip", "text"), [(False, "<|ref|>a<|/ref|><|det|>[[1, 2]]<|/det|>"), (True, "a[[1, 2]]")])
def test_boxes_are_shown_where_special_tokens_are(parts: Any, skip: bool, text: str) -> None:
    tokenizer = parts.decoder.tokenizer
    ids = tokenizer.encode("<|ref|>a<|/ref|><|det|>[[1, 2]]<|/det|>", add_special_tokens=False)
    detokenizer = Detokenizer(Vocabulary(tokenizer), SamplingParams(skip_special_tokens=skip))
    assert "".join(detokenizer.add(i).text for i in ids) + detokenizer.finish() == text


@pytest.mark.parametrize("window", [0, 12])
@pytest.mark.parametrize("overlap", ["on", "off"])
def test_runs_do_not_repeat(
    make_parts: Callable[[str], Any], new_answer: Callable[[], Any], window: int, overlap: str
) -> None:
    parts = make_parts("deepseek_ocr")
    parts.settings = dataclasses.replace(parts.settings, overlap=overlap)
    server = Server(parts, new_answer)
    try:
        chats = [parts.make.chat(parts.make.image(1), "a a a a"), parts.make.chat("b b b b b b b")]
        options = {"no_repeat_ngram_size": 2, "no_repeat_ngram_window_size": window}
        answers = [server.start(chat, max_tokens=24, **options) for chat in chats]
        free = [parts.reference_tokens(chat, 24) for chat in chats]
        found = [server.tokens(answer) for answer in answers]
        if window:
            parts.whole.generation_config.no_repeat_ngram_window_size = window
        parts.whole.generation_config.no_repeat_ngram_size = 2
        expected = [parts.reference_tokens(chat, 24) for chat in chats]
        assert found == [without_end(parts, tokens) for tokens in expected]
        assert expected != free
    finally:
        parts.whole.generation_config.no_repeat_ngram_size = None
        parts.whole.generation_config.no_repeat_ngram_window_size = None
        server.close()
