"""Media that cross-attention layers read: which tokens see which rows, and what is refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from triptych.python_models.contract.errors import TriptychError
from triptych.python_models.contract.plan import CrossRows, MediaItem, Plan
from triptych.python_models.families.mllama import tokens_that_see
from triptych.python_models.language_model.inputs import read_prompt
from triptych.python_models.language_model.runner.cross import CrossLayout, CrossMedia, CrossStep
from triptych.python_models.language_model.runner.step import Slice

LAYOUT = CrossLayout(frozenset({1, 3}), 64)
LENGTH = 20


class Layer(nn.Module):
    """What the runner uses of transformers' layer."""

    def __init__(self, layer_idx: int, hidden: int = 8, heads: int = 2) -> None:
        super().__init__()
        self.layer_idx, self.num_key_value_heads, self.head_dim = layer_idx, heads, hidden // heads
        self.k_proj, self.v_proj = nn.Linear(hidden, hidden, bias=False), nn.Linear(hidden, hidden, bias=False)
        self.k_norm = nn.LayerNorm(hidden // heads)


def media(*items: CrossRows) -> CrossMedia:
    rows = torch.arange(sum(item.rows for item in items)).float()[:, None].repeat(1, 8)
    return CrossMedia(LAYOUT, rows + 1, items, LENGTH)


def a_slice(cross: CrossMedia | None, start: int, count: int) -> Slice:
    ids = np.zeros(count, dtype=np.int64)
    return Slice(ids, ids[None], start, (), cross=cross)


@pytest.mark.parametrize(
    ("places", "seen"),
    [
        ([3], [(3, 20)]),
        ([3, 9], [(3, 9), (9, 20)]),
        # side by side they are seen together
        ([3, 4], [(3, 20), (4, 20)]),
        ([3, 4, 9], [(3, 9), (4, 9), (9, 20)]),
        ([3, 9, 10, 11], [(3, 9), (9, 20), (10, 20), (11, 20)]),
    ],
)
def test_a_picture_is_seen_until_the_next(places: list[int], seen: list[tuple[int, int]]) -> None:
    assert tokens_that_see(places, LENGTH) == seen


def test_runs_of_tokens() -> None:
    cross = media(CrossRows(5, 2, (3, 9)), CrossRows(5, 4, (4, 9)), CrossRows(5, 5, (9, LENGTH)))
    assert cross.runs(0, 3) == [(0, 3, None)]
    assert cross.runs(2, 10) == [(2, 3, None), (3, 4, (0, 2)), (4, 9, (0, 6)), (9, 10, (6, 11))]
    # generated tokens see what the last one of the prompt sees
    assert cross.runs(70, 71) == [(70, 71, (6, 11))]
    ended = media(CrossRows(5, 2, (3, 9)))
    assert ended.runs(8, 30) == [(8, 9, (0, 2)), (9, 30, None)]


def test_visible_rows_lie_in_front_and_rows_go_when_all_layers_have_used_them() -> None:
    cross = media(CrossRows(3, 2, (3, 9)), CrossRows(3, 1, (9, LENGTH)))
    layers = [Layer(layer) for layer in sorted(LAYOUT.layers)]
    found = [cross.keys_values(layer) for layer in layers]
    assert cross.rows is None
    order = torch.tensor([1.0, 2.0, 4.0, 3.0, 5.0, 6.0])[:, None].repeat(1, 8)
    value = layers[0].v_proj(order).view(6, 2, 4).transpose(0, 1)
    torch.testing.assert_close(found[0][1], value)
    assert cross.keys_values(layers[0]) is found[0]


def test_only_requests_with_media_attend() -> None:
    cross = media(CrossRows(3, 2, (3, LENGTH)))
    step = CrossStep.of([a_slice(None, 5, 2), a_slice(cross, 1, 4)])
    assert step is not None
    query = torch.randn(2, 6, 4)
    out = step.attend(Layer(1), query, None)
    assert out.shape == (6, 2, 4)
    assert not out[:2].any()
    assert out[2:].abs().sum((1, 2)).min() > 0
    # the tokens before the picture attend to all there is, but see nothing
    assert step.seeing(query).flatten().tolist() == [0, 0, 0, 0, 1, 1]
    assert CrossStep.of([a_slice(None, 5, 2)]) is None


def test_bytes() -> None:
    config = SimpleNamespace(cross_attention_layers=[1, 3], num_key_value_heads=2, hidden_size=8, num_attention_heads=4)
    layout = CrossLayout.of(SimpleNamespace(config=config, text_model=Layer(1)))  # type: ignore[arg-type]
    assert layout == CrossLayout(frozenset({1, 3}), 2 * 2 * 4 * 4)
    assert media(CrossRows(3, 2, (3, LENGTH))).nbytes == 3 * 8 * 4 + 3 * LAYOUT.bytes_per_row
    del config.cross_attention_layers
    assert CrossLayout.of(SimpleNamespace(config=config, text_model=Layer(1))) is None  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("items", "rows", "message"),
    [
        ([CrossRows(4, 2, (3, 20))], 5, "5 rows are not those of"),
        ([CrossRows(4, 0, (3, 20))], 4, "4 rows are not those of"),
        ([CrossRows(1, 1, (3, 9)), CrossRows(1, 1, (9, 20)), CrossRows(1, 1, (3, 9))], 3, "no neighbours"),
    ],
)
def test_what_does_not_fit_together(items: list[CrossRows], rows: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CrossMedia(LAYOUT, torch.zeros(rows, 8), items, LENGTH)


def read(cross: CrossLayout | None, **tensors: Any) -> Any:
    item = MediaItem("image", "d", ((3, 4),), "vision", CrossRows(4, 2, (3, 10)))
    plan = Plan.from_json(Plan((item,)).to_json())
    assert plan.items == (item,)
    assert (item.num_tokens, item.num_rows) == (1, 4)
    ids = np.array([1, 2, 3, 300, 5, 6, 7, 8, 9, 10])
    inputs = {"input_ids": ids, "position_ids": np.arange(10)[None], **tensors}
    return read_prompt(inputs, plan, 1, 8, 300, cross=cross)


def test_the_token_of_a_picture_lies_behind_the_vocabulary() -> None:
    prompt = read(LAYOUT, vision_embeddings=torch.ones(4, 8))
    assert prompt.media == ()
    assert prompt.cross.runs(0, 10) == [(0, 3, None), (3, 10, (0, 2))]
    assert prompt.media_bytes == 4 * 8 * 4 + 4 * 64
    assert prompt.root == b"\xffd"


@pytest.mark.parametrize(
    ("cross", "tensors", "message"),
    [
        (None, {"vision_embeddings": torch.ones(4, 8)}, "the decoder has no such layers"),
        (LAYOUT, {}, "vision_embeddings is absent"),
        (LAYOUT, {"vision_embeddings": torch.ones(5, 8)}, "5 rows are not those of"),
    ],
)
def test_bad_inputs(cross: CrossLayout | None, tensors: dict[str, Any], message: str) -> None:
    with pytest.raises(TriptychError, match=message):
        read(cross, **tensors)


def test_a_step_that_fails_may_be_computed_again() -> None:
    cross = media(CrossRows(3, 2, (3, 9)), CrossRows(3, 1, (9, LENGTH)))
    layer = Layer(1)
    broken = Layer(1)
    broken.k_norm = nn.LayerNorm(5)
    with pytest.raises(RuntimeError):
        cross.keys_values(broken)
    fresh = media(CrossRows(3, 2, (3, 9)), CrossRows(3, 1, (9, LENGTH)))
    for found, wanted in zip(cross.keys_values(layer), fresh.keys_values(layer), strict=True):
        assert torch.equal(found, wanted)
