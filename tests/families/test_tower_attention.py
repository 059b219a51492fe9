"""Towers give the same rows with one attention call for all sequences."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from triptych.python_models.contract.errors import TriptychError
from triptych.python_models.contract.features import EncoderItem
from triptych.python_models.contract.settings import Settings
from triptych.python_models.families import tower_attention
from triptych.python_models.families.registry import load_family
from triptych.python_models.families.tower_attention import use_packed_attention


def picture(grid):
    rng = np.random.default_rng(sum(grid))
    count = int(np.prod(grid))
    tensors = {
        "patches": rng.integers(0, 256, (count, 3, 1, 64), dtype=np.uint8),
        "grid": np.array(grid),
        "mean": np.full(3, 120, np.float32),
        "std": np.full(3, 60, np.float32),
    }
    return EncoderItem("image", str(grid), count // 4, tensors)


@pytest.mark.parametrize(
    "name",
    [
        "qwen2_vl",
        "qwen2_5_vl",
        "qwen2_5_omni",
        "qwen3_vl",
        "qwen3_omni_moe",
        "glm4v",
        "paddleocr_vl",
        "ernie4_5_vl_moe",
    ],
)
def test_vision_rows_are_the_same(tiny_checkpoint, monkeypatch, name):
    family = load_family(Settings(model=str(tiny_checkpoint(name))))
    encoder = family.load_encoder("vision", "cpu", torch.float32)
    items = [picture((1, 10, 14)), picture((1, 4, 4)), picture((1, 8, 8))]
    expected = encoder.encode(items)
    for part in family.towers["vision"]:
        use_packed_attention(getattr(encoder.base, part))
    calls = []
    attend = tower_attention.packed_attention
    monkeypatch.setattr(tower_attention, "packed_attention", lambda *a, **k: calls.append(1) or attend(*a, **k))
    found = encoder.encode(items)
    # one for each layer
    assert 2 <= len(calls) <= 3
    for rows, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(rows, wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("name", "counts"), [("qwen2_5_omni", (30, 9)), ("qwen3_omni_moe", (16, 5))])
def test_audio_rows_are_the_same(tiny_checkpoint, name, counts):
    family = load_family(Settings(model=str(tiny_checkpoint(name))))
    encoder = family.load_encoder("audio", "cpu", torch.float32)
    rng = np.random.default_rng(0)
    items = [
        EncoderItem("audio", str(n), rows, {"mel": rng.standard_normal((16, n), dtype=np.float32), "piece": piece})
        for n, rows, piece in zip((120, 37), counts, 2 * [np.array([100])], strict=True)
    ]
    expected = encoder.encode(items)
    use_packed_attention(encoder.base.audio_tower)
    for found, wanted in zip(encoder.encode(items), expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


def test_the_backend_that_is_asked_for(tiny_checkpoint, monkeypatch):
    calls = []
    attend = tower_attention.packed_attention
    monkeypatch.setattr(tower_attention, "packed_attention", lambda *a, **k: calls.append(1) or attend(*a, **k))

    def rows(backend):
        settings = Settings(model=str(tiny_checkpoint("qwen2_5_vl")), mm_attention_backend=backend)
        calls.clear()
        (found,) = load_family(settings).load_encoder("vision", "cpu", torch.float32).encode([picture((1, 8, 8))])
        return found, len(calls)

    usual, without = rows("sdpa")
    packed, count = rows("triton")
    assert (without, rows("auto")[1], count) == (0, 0, 2)
    torch.testing.assert_close(packed, usual, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "backend", "why"),
    [
        ("gemma3", "triton", "gemma3 do not pack"),
        ("qwen2_5_vl", "flash_attn", "needs a GPU"),
    ],
)
def test_backends_that_cannot_be(tiny_checkpoint, name, backend, why):
    settings = Settings(model=str(tiny_checkpoint(name)), mm_attention_backend=backend)
    with pytest.raises(TriptychError, match=why) as caught:
        load_family(settings).load_encoder("vision", "cpu", torch.float32)
    assert caught.value.param == "settings.mm_attention_backend"
