"""The LLaVA lineage: large and extreme pictures in tiles, several pictures, videos of different lengths."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from triptych.python_models.contract.request import ChatRequest, MediaPart, Message, TextPart
from triptych.python_models.contract.sampling import SamplingParams
from triptych.python_models.contract.settings import Settings
from triptych.python_models.local import LocalEnsemble

TILES = ("llava_next", "llava_next_video", "llava_onevision", "internvl", "llava_v1_6_mistral", "internvl2_internlm2")
SIZES = ("llava", "pixtral", "mistral3", "lighton_ocr", "llava_v1_5")
# Without --families only these.
QUICK = ("llava_next", "llava_onevision", "internvl", "mistral3")
# width, height
SHAPES = ((300, 200), (200, 300), (31, 400), (640, 640), (400, 9), (12, 10))


def check(parts: Any, chat: Any) -> None:
    prepared = parts.prepare(chat)
    inputs = parts.reference_inputs(chat)
    assert prepared.input_ids.tolist() == inputs["input_ids"][0].tolist()
    with torch.no_grad():
        expected = parts.whole(**inputs).logits[0]
    torch.testing.assert_close(parts.logits(prepared), expected, atol=1e-3, rtol=1e-3)
    assert parts.tokens(chat) == parts.reference_tokens(chat)


@pytest.mark.parametrize("name", [*TILES, *SIZES])
def test_large_and_extreme_pictures(
    make_parts: Callable[[str], Any], name: str, request: pytest.FixtureRequest
) -> None:
    if name not in QUICK and not request.config.getoption("--families"):
        pytest.skip("one of make parity's")
    parts = make_parts(name)
    tiles = set()
    # of the smallest picture transformers' Mistral 3 cannot tell the only row from none
    for seed, (width, height) in enumerate(SHAPES[:-1] if name == "mistral3" else SHAPES):
        chat = parts.make.chat("what is ", parts.make.image(seed, width, height), "this?")
        check(parts, chat)
        (item,) = parts.prepare(chat).features["vision"]
        tiles.add(len(item.tensors["pixels"]))
    assert len(tiles) > 1 or name in SIZES, "no two pictures were cut alike"


def test_onevision_scales_down_what_has_too_many_rows(make_parts: Callable[[str], Any]) -> None:
    parts = make_parts("llava_onevision")
    (item,) = parts.prepare(parts.make.chat(parts.make.image(1, 60, 120), "x")).items
    side = 4
    tiles = 8
    assert item.num_rows < side * side * (tiles + 1)


def test_onevision_cuts_the_only_picture_and_none_of_several(make_parts: Callable[[str], Any]) -> None:
    parts = make_parts("llava_onevision")
    make = parts.make
    (alone,) = parts.prepare(make.chat(make.image(1), "x")).items
    first, second = parts.prepare(make.chat(make.image(1), make.image(1), "x")).items
    assert alone.num_rows > first.num_rows
    assert first.digest == second.digest != alone.digest, "a cached row of one would be taken for the other"


@pytest.mark.parametrize("name", ["llava_next_video", "llava_onevision", "internvl"])
def test_videos_of_different_lengths(make_parts: Callable[[str], Any], name: str) -> None:
    """transformers refuses several in one call: each must give the rows that it gives alone."""
    parts = make_parts(name)
    make = parts.make
    videos = [make.video(1, frames=3), make.video(2, frames=6)]
    prepared = parts.prepare(make.chat(videos[0], "and", make.image(3), videos[1], "which is longer?"))
    assert [item.modality for item in prepared.items] == ["video", "image", "video"]
    alone = [parts.prepare(make.chat(medium, "x")) for medium in (videos[0], make.image(3), videos[1])]
    assert [item.digest for item in prepared.items] == [one.items[0].digest for one in alone]
    rows = parts.encode(prepared)["vision"]
    expected = torch.cat([parts.encode(one)["vision"] for one in alone])
    torch.testing.assert_close(rows, expected, atol=1e-4, rtol=1e-4)
    counts = [3, 6]
    by_frame = [one.items[0].num_rows // count for one, count in zip(alone[::2], counts, strict=True)]
    assert by_frame[0] == by_frame[1], "each frame has the same number of rows"


def test_internvl_tells_pictures_from_frames_by_their_order(make_parts: Callable[[str], Any]) -> None:
    parts = make_parts("internvl")
    make = parts.make
    check(parts, make.chat(make.video(1, frames=2), "a", make.image(2, 100, 40), "b", make.video(3, frames=2)))
    check(parts, make.turns(("user", make.image(2), "a"), ("assistant", "b"), ("user", "c", make.video(1), "d")))


@pytest.mark.parametrize(("name", "frames"), [("llava_next_video", 8), ("llava_onevision", 32), ("internvl", 32)])
def test_frames_where_the_checkpoint_does_not_say(make_parts: Callable[[str], Any], name: str, frames: int) -> None:
    assert make_parts(name).preprocessor.frame_sampling.num_frames == frames


def test_mistral3_takes_a_picture_of_one_row(make_parts: Callable[[str], Any]) -> None:
    parts = make_parts("mistral3")
    small, other = (parts.prepare(parts.make.chat(parts.make.image(k, 12, 10 * k * k), "x")) for k in (1, 2))
    assert small.items[0].num_rows == 1
    encoder = parts.encoders["vision"]
    (alone,) = encoder.encode(small.features["vision"])
    together, _ = encoder.encode([*small.features["vision"], *other.features["vision"]])
    torch.testing.assert_close(alone, together, atol=1e-4, rtol=1e-4)


def test_pixtral_breaks_between_rows_are_text(make_parts: Callable[[str], Any]) -> None:
    parts = make_parts("pixtral")
    prepared = parts.prepare(parts.make.chat(parts.make.image(1, 24, 16), "x"))
    (item,) = prepared.items
    # three patches a row, two rows
    assert [end - start for start, end in item.spans] == [3, 3]
    tokenizer = parts.decoder.tokenizer
    between = [int(prepared.input_ids[end]) for _, end in item.spans]
    assert tokenizer.convert_ids_to_tokens(between) == ["[IMG_BREAK]", "[IMG_END]"]


def test_media_tokens_beyond_the_vocabulary(make_parts: Callable[[str], Any], tmp_path: Path) -> None:
    """The token of pictures is the first one that LLaVA 1.5's table of embeddings has no row for."""
    parts = make_parts("llava_v1_5")
    folder = tmp_path / "cut"
    shutil.copytree(parts.folder, folder)
    size = parts.preprocessor.token_id("image")
    raw = json.loads((folder / "config.json").read_text())
    whole = raw["vocab_size"]
    (folder / "config.json").write_text(json.dumps(raw | {"vocab_size": size}))
    for file in folder.glob("pytorch_model-*.bin"):
        weights = torch.load(file, weights_only=True)
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            if name in weights:
                weights[name] = weights[name][:size].clone()
        torch.save(weights, file)
    picture = parts.make.image(1)
    chat = parts.make.chat("what is ", picture, "this? which colours?")
    inputs = parts.reference_inputs(chat)
    length = inputs["input_ids"].shape[1]
    with torch.no_grad():
        out = parts.whole.generate(
            **inputs, max_new_tokens=10, do_sample=False, suppress_tokens=list(range(size, whole))
        )
    expected = out[0, length:].tolist()
    encoded = io.BytesIO()
    picture.data.pixels.save(encoded, "PNG")
    message = Message("user", (TextPart("what is "), MediaPart("image", blob=0), TextPart("this? which colours?")))
    for penalty in (1.0, 1.3):
        sampling = SamplingParams(max_tokens=10, temperature=0.0, repetition_penalty=penalty, ignore_eos=True)
        with LocalEnsemble(Settings(model=str(folder), kv_cache_tokens=4096, torch_threads=1)) as local:
            deltas = list(local.chat(ChatRequest((message,), sampling), [encoded.getvalue()]))
        tokens = [token for delta in deltas for token in delta.token_ids]
        assert len(tokens) == 10
        if penalty == 1.0:
            assert tokens[: len(expected)] == expected
