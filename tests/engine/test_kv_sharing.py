"""Layers that read another one's keys and values have no pages of their own."""

from __future__ import annotations

import torch

from triptych.python_models.language_model.runner.executor import LayerShape
from triptych.python_models.language_model.runner.kv_cache import KVCache, group_layers

WIDE, NARROW = LayerShape((2, 16), (2, 16)), LayerShape((2, 8), (2, 8), window=8)
LAYERS = (WIDE, NARROW, LayerShape((2, 16), (2, 16), shares=0), LayerShape((2, 8), (2, 8), window=8, shares=1))


def test_groups_hold_only_layers_that_keep() -> None:
    groups = group_layers(LAYERS, 512)
    assert [(group.layers, group.window) for group in groups] == [((0,), None), ((1,), 8)]


def test_pages_are_the_source_s() -> None:
    groups = group_layers(LAYERS, 512)
    cache = KVCache(LAYERS, groups, [3, 2], 4, torch.float32, "cpu")
    assert cache.group_of == (0, 1, 0, 1)
    assert cache.sharing == {2, 3}
    assert cache.pages[2] is cache.pages[0]
    assert cache.pages[3] is cache.pages[1]
    places = torch.tensor([0, 2]), torch.tensor([1, 3])
    key, value = torch.randn(2, 2, 16), torch.randn(2, 2, 16)
    cache.write(0, places, key, value)
    keys, values = cache.read(2, torch.tensor([[0, 2]]), torch.float32)
    torch.testing.assert_close(keys[0, :, [1, 7]].transpose(0, 1), key)
    torch.testing.assert_close(values[0, :, [1, 7]].transpose(0, 1), value)
    cache.scrub(0, [0, 2])
    assert not cache.pages[2][0].any()
