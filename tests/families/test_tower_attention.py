"""Towers give the same rows with one attention call for all sequences."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from triptych.python_models.contract.features import EncoderItem
from triptych.python_models.contract.settings import Settings
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


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen2_5_omni"])
def test_vision_rows_are_the_same(tiny_checkpoint, name):
    family = load_family(Settings(model=str(tiny_checkpoint(name))))
    encoder = family.load_encoder("vision", "cpu", torch.float32)
    items = [picture((1, 10, 14)), picture((1, 4, 4)), picture((1, 8, 8))]
    expected = encoder.encode(items)
    use_packed_attention(encoder.base.visual)
    for rows, wanted in zip(encoder.encode(items), expected, strict=True):
        torch.testing.assert_close(rows, wanted, atol=1e-5, rtol=1e-4)


def test_audio_rows_are_the_same(tiny_checkpoint):
    family = load_family(Settings(model=str(tiny_checkpoint("qwen2_5_omni"))))
    encoder = family.load_encoder("audio", "cpu", torch.float32)
    rng = np.random.default_rng(0)
    items = [
        EncoderItem("audio", str(n), rows, {"mel": rng.standard_normal((16, n), dtype=np.float32)})
        for n, rows in ((120, 30), (37, 9))
    ]
    expected = encoder.encode(items)
    use_packed_attention(encoder.base.audio_tower)
    for found, wanted in zip(encoder.encode(items), expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
