"""Families put together from blocks: loading part by part and by slices, from checkpoints in published formats."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as PILImage
from safetensors.torch import load_file, save_file

from triptych.python_models.contract.errors import ErrorKind, TriptychError
from triptych.python_models.contract.request import MediaPart, Message, TextPart
from triptych.python_models.contract.settings import Settings
from triptych.python_models.families.registry import load_family
from triptych.python_models.families.tower_attention import use_packed_attention
from triptych.python_models.families.tower_fusion import fuse_tower
from triptych.python_models.media.types import Image, Medium

COMPOSITES = ("dots_ocr", "dots_vlm", "minicpmv", "minicpmo", "step3_vl", "nvila", "nvila_lite")


@pytest.fixture(params=COMPOSITES)
def folder(request: pytest.FixtureRequest, tiny_checkpoint: Callable[[str], Path]) -> Path:
    return tiny_checkpoint(request.param)


def changed(folder: Path, to: Path, drop: str = "", **config: object) -> Path:
    """A copy of a checkpoint without one of its tensors, or with other values in config.json."""
    shutil.copytree(folder, to)
    weights = load_file(to / "model.safetensors")
    if drop:
        del weights[drop]
    save_file(weights, to / "model.safetensors", metadata={"format": "pt"})
    values = json.loads((to / "config.json").read_text()) | config
    (to / "config.json").write_text(json.dumps(values))
    return to


def test_slices_are_the_weights_of_the_loaded_decoder(folder: Path) -> None:
    family = load_family(Settings(model=str(folder)))
    loaded = family.load_decoder("cpu", torch.float32)
    _, source = family.open_decoder("cpu", torch.float32, progress=False)
    for name, tensor in loaded.text_model.state_dict().items():
        assert torch.equal(source.get(name), tensor), name
    head = loaded.lm_head.state_dict()["weight"]
    assert torch.equal(source.get("lm_head.weight", 0, 3, 7), head[3:7])
    source.close()


def test_a_tied_head_is_the_table(folder: Path, tmp_path: Path) -> None:
    head = next(n for n in load_file(folder / "model.safetensors") if n.endswith("lm_head.weight"))
    tied = {"tie_word_embeddings": True}
    values = json.loads((folder / "config.json").read_text())
    config = {key: value | tied for key, value in values.items() if key in ("text_config", "llm_cfg")}
    family = load_family(Settings(model=str(changed(folder, tmp_path / "tied", head, **(config or tied)))))
    decoder = family.load_decoder("cpu", torch.float32)
    assert decoder.lm_head.weight is decoder.text_model.get_input_embeddings().weight
    _, source = family.open_decoder("cpu", torch.float32, progress=False)
    assert torch.equal(source.get("lm_head.weight"), decoder.lm_head.weight)


def test_an_encoder_holds_nothing_of_the_text_model(folder: Path) -> None:
    family = load_family(Settings(model=str(folder)))
    for name in family.encoders:
        model = family.load_encoder(name, "cpu", torch.float32).model
        assert not [n for n, _ in model.named_parameters() if n.startswith(("language_model.", "lm_head."))]


def test_missing_weights_are_named(folder: Path, tmp_path: Path) -> None:
    name = next(
        n for n in load_file(folder / "model.safetensors") if n.endswith("model.layers.0.input_layernorm.weight")
    )
    family = load_family(Settings(model=str(changed(folder, tmp_path / "less", name))))
    with pytest.raises(TriptychError) as caught:
        family.load_decoder("cpu", torch.float32)
    assert caught.value.kind is ErrorKind.STAGE_FAILED
    assert "layers.0.input_layernorm.weight" in caught.value.message


def test_random_weights_are_finite(folder: Path) -> None:
    family = load_family(Settings(model=str(folder), load_format="dummy"))
    for name in family.encoders:
        model = family.load_encoder(name, "cpu", torch.float32).model
        assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.parametrize(("name", "tower"), [("dots_ocr", "vision_tower"), ("minicpmv", "vpm")])
def test_towers_attend_in_one_call_for_all_pictures(
    tiny_checkpoint: Callable[[str], Path], name: str, tower: str
) -> None:
    family = load_family(Settings(model=str(tiny_checkpoint(name))))
    preprocessor, encoder = family.load_preprocessor(), family.load_encoder("vision", "cpu", torch.float32)
    items = []
    for k, size in enumerate([(56, 40), (33, 90)]):
        picture = PILImage.fromarray(np.random.default_rng(k).integers(0, 256, (*size, 3), dtype=np.uint8))
        messages = [Message("user", (MediaPart("image", blob=0), TextPart("x")))]
        items += preprocessor.prepare(messages, [Medium("image", Image(picture), str(k), "x")]).features["vision"]
    expected = encoder.encode(items)
    use_packed_attention(encoder.model.get_submodule(tower))
    for rows, wanted in zip(encoder.encode(items), expected, strict=True):
        torch.testing.assert_close(rows, wanted, atol=1e-4, rtol=1e-3)


def test_the_dots_tower_is_fused_as_qwens(tiny_checkpoint: Callable[[str], Path]) -> None:
    encoder = load_family(Settings(model=str(tiny_checkpoint("dots_ocr")))).load_encoder("vision", "cpu", torch.float32)
    done = fuse_tower(encoder.model.vision_tower)
    assert done["attention layers"] == done["gated layers"] == 2
