"""Fused layers give transformers' logits, for every family that has them."""

from __future__ import annotations

import pytest
import torch

from triptych.python_models.language_model.runner.executor import Deepstack
from triptych.python_models.language_model.runner.fused import FusedDecoder, build, decoder
from triptych.python_models.language_model.runner.fused.decoder import FEW_ROWS

from .conftest import FAMILIES

TOLERANCE = 1e-4


def made(tiny, **options):
    fused = build(tiny.decoder, **options)
    assert isinstance(fused, FusedDecoder), fused
    return fused


def run(fused, context, ids, position_ids, cuts):
    """Logits [T, V] of a request cut into steps of these lengths."""
    found, start = [], 0
    with torch.inference_mode():
        embeddings = fused.embed(ids, torch.zeros_like(ids, dtype=torch.bool))
        for length in cuts:
            span = slice(start, start + length)
            context.place(start, length)
            hidden = fused.forward(embeddings[span], position_ids[:, span], context, None)
            found.append(fused.logits(hidden))
            start += length
    assert start == len(ids)
    return torch.cat(found)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("one_kernel", [False, True])
def test_prefill_chunk_and_decode(make_tiny, context, monkeypatch, name, one_kernel):
    # whether linears of few rows take the residual with them, as where they are kernels of their own
    monkeypatch.setattr(decoder, "fits", lambda *_: one_kernel)
    tiny = make_tiny(name)
    ids, position_ids = tiny.prompt(21 + FEW_ROWS + 7 + 3)
    expected = tiny.logits(tiny.reference.embed(ids, ids < 0), position_ids)
    found = run(made(tiny), context, ids, position_ids, [21, FEW_ROWS + 7, 1, 1, 1])
    assert expected.std() > 0.3
    assert (found - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3_moe", "llama_tied", "phi3"])
def test_modules_share_the_fused_weights_and_still_work(make_tiny, name):
    tiny = make_tiny(name)
    modules = torch.nn.ModuleList([tiny.decoder.text_model, tiny.decoder.lm_head])
    before = {n: p.clone() for n, p in modules.named_parameters()}
    fused = made(tiny)
    held = {}
    for parameter in modules.parameters():
        held[parameter.untyped_storage().data_ptr()] = parameter.untyped_storage().nbytes()
    for layer in fused._layers:
        storage = layer.attention.qkv.weight.untyped_storage()
        assert held[storage.data_ptr()] == storage.nbytes()
    # nothing twice: all storages together are as large as the weights
    tied = tiny.decoder.config.tie_word_embeddings
    unique = {n: p for n, p in before.items() if not (tied and n.startswith("1."))}
    assert sum(held.values()) == sum(p.nbytes for p in unique.values())
    for key, parameter in modules.named_parameters():
        assert torch.equal(parameter, before[key]), key


@pytest.mark.parametrize("one_kernel", [False, True])
def test_deepstack_rows_follow_the_first_layers(make_tiny, context, monkeypatch, one_kernel):
    monkeypatch.setattr(decoder, "fits", lambda *_: one_kernel)
    tiny = make_tiny("qwen3_vl")
    fused = made(tiny)
    for length in (30, FEW_ROWS + 30):
        ids, position_ids = tiny.prompt(length)
        places = torch.tensor([3, 4, 5, 17, 29])
        rows = tuple(torch.randn(5, 96, generator=torch.Generator().manual_seed(k)) for k in range(3))
        mask = torch.zeros(1, length, dtype=torch.bool)
        mask[0, places] = True
        embeddings = tiny.reference.embed(ids, ids < 0)
        expected = tiny.logits(
            embeddings, position_ids, visual_pos_masks=mask, deepstack_visual_embeds=[r.clone() for r in rows]
        )
        context.place(0, length)
        with torch.inference_mode():
            hidden = fused.forward(embeddings, position_ids, context, Deepstack(places, rows))
            found = fused.logits(hidden)
        plain = tiny.logits(embeddings, position_ids)
        assert (plain - expected).abs().max() > 0.1
        assert (found - expected).abs().max() < TOLERANCE


def test_scaled_embeddings_and_placeholders_outside_the_table(make_tiny):
    tiny = make_tiny("gemma3")
    fused = made(tiny)
    ids = torch.tensor([5, 999_999, 7])
    is_media = ids > 1000
    expected = tiny.reference.embed(ids, is_media)
    assert torch.equal(fused.embed(ids, is_media)[~is_media], expected[~is_media])


def test_layer_shapes_and_windows(make_tiny):
    shapes = made(make_tiny("gemma3")).layers
    assert [s.window for s in shapes] == [9, None, 9, None]
    assert {s.key for s in shapes} == {s.value for s in shapes} == {(2, 16)}
