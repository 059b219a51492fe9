"""Families put together from blocks: loading part by part and by slices, from checkpoints in published formats."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as PILImage
from safetensors.torch import load_file, save_file

from triptych.python_models.contract.errors import ErrorKind, TriptychError
from triptych.python_models.contract.request import MediaPart, Message, TextPart
from triptych.python_models.contract.settings import Settings
from triptych.python_models.families.checkpoint import Checkpoint
from triptych.python_models.families.composite import CompositeFamily
from triptych.python_models.families.dots import DotsOCR
from triptych.python_models.families.loading import meta_model
from triptych.python_models.families.minicpm import MiniCPMV
from triptych.python_models.families.registry import load_family
from triptych.python_models.families.tower_attention import use_packed_attention
from triptych.python_models.families.tower_fusion import fuse_tower
from triptych.python_models.media.types import Audio, Image, Medium

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


@pytest.mark.parametrize("name", COMPOSITES)
def test_encoders_in_half_precision(tiny_checkpoint: Callable[[str], Path], name: str) -> None:
    family = load_family(Settings(model=str(tiny_checkpoint(name))))
    preprocessor: Any = family.load_preprocessor()
    pixels = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    media = [Medium("image", Image(PILImage.fromarray(pixels)), "a", "x")]
    if "audio" in preprocessor.modalities:
        samples = np.random.default_rng(0).standard_normal(20_000).astype(np.float32)
        media.append(Medium("audio", Audio(samples, preprocessor.sampling_rate), "b", "x"))
    parts = tuple(MediaPart(medium.modality, blob=k) for k, medium in enumerate(media))
    features = preprocessor.prepare([Message("user", parts)], media).features
    assert set(features) == set(family.encoders)
    for encoder, items in features.items():
        half, full = (
            family.load_encoder(encoder, "cpu", dtype).encode(items) for dtype in (torch.bfloat16, torch.float32)
        )
        for rows, wanted in zip(half, full, strict=True):
            assert rows.dtype == torch.bfloat16
            error = (rows.float() - wanted).norm() / wanted.norm()
            assert error < 0.05, error


def test_published_sizes() -> None:
    """Of whole checkpoints: 643 tensors in a public loading report of dots.ocr, 8.1 billion on MiniCPM-V 2.6's card."""
    siglip = {"hidden_size": 1152, "image_size": 980, "intermediate_size": 4304, "num_attention_heads": 16}
    dots = {
        "model_type": "dots_ocr",
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "tie_word_embeddings": False,
        "image_token_id": 151665,
        "vision_config": {"embed_dim": 1536, "hidden_size": 1536, "num_hidden_layers": 42, "use_bias": False},
    }
    minicpm = {
        "model_type": "minicpmv",
        "version": 2.6,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 151666,
        "tie_word_embeddings": False,
        "vision_config": {**siglip, "num_hidden_layers": 27, "patch_size": 14},
    }
    tensors, parameters = sizes(DotsOCR, dots)
    assert (tensors, round(parameters / 1e9, 2)) == (643, 3.04)
    assert round(sizes(MiniCPMV, minicpm)[1] / 1e9, 1) == 8.1


def sizes(family: type[CompositeFamily], config: dict[str, Any]) -> tuple[int, int]:
    made = family(Checkpoint(Path("/nowhere"), config), Settings())
    parameters = list(meta_model(made.load_class(), made.load_config()).parameters())
    return len(parameters), sum(parameter.numel() for parameter in parameters)


def test_the_dots_tower_is_fused_as_qwens(tiny_checkpoint: Callable[[str], Path]) -> None:
    encoder = load_family(Settings(model=str(tiny_checkpoint("dots_ocr")))).load_encoder("vision", "cpu", torch.float32)
    done = fuse_tower(encoder.model.vision_tower)
    assert done["attention layers"] == done["gated layers"] == 2
