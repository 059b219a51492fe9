"""Two and more ranks, each with its part of the weights, give what one gives with all of them."""

from __future__ import annotations

import dataclasses
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from triptych.python_models.language_model.runner.fused import FusedDecoder, ModuleSource, Shard, build, decoder
from triptych.python_models.language_model.runner.fused import spec as specs
from triptych.python_models.language_model.runner.fused.decoder import FEW_ROWS
from triptych.python_models.language_model.runner.fused.verify import DenseContext

from .conftest import FAMILIES, MIXTURES, Decoder, make_decoder


class Group:
    """Collectives of ranks that are threads of this process."""

    def __init__(self, size):
        self.size = size
        self.calls = 0
        self._parts = [None] * size
        self._barrier = threading.Barrier(size, timeout=30)

    def of(self, rank):
        return Rank(self, rank)

    def exchange(self, rank, tensor):
        self._parts[rank] = tensor.clone()
        self._barrier.wait()
        parts = list(self._parts)
        self._barrier.wait()
        self.calls += 1
        return parts


class Rank:
    def __init__(self, group, rank):
        self.group, self.rank = group, rank

    def all_reduce(self, tensor):
        return torch.stack(self.group.exchange(self.rank, tensor)).sum(0)

    def all_gather(self, tensor):
        return torch.cat(self.group.exchange(self.rank, tensor), dim=-1)


def shards(tiny, size, expert_parallel=False):
    group = Group(size)
    made = [build(tiny.decoder, Shard(rank, size, expert_parallel), group.of(rank)) for rank in range(size)]
    for fused in made:
        assert isinstance(fused, FusedDecoder), fused
    return group, made


def ask(made, ids, position_ids, cuts):
    """Logits [T, V] of every rank."""

    def run(fused):
        context, found, start = DenseContext(256), [], 0
        with torch.inference_mode():
            embeddings = fused.embed(ids, torch.zeros_like(ids, dtype=torch.bool))
            for length in cuts:
                span = slice(start, start + length)
                context.place(start, length)
                found.append(fused.logits(fused.forward(embeddings[span], position_ids[:, span], context, None)))
                start += length
        return torch.cat(found)

    with ThreadPoolExecutor(len(made)) as pool:
        return list(pool.map(run, made))


# five heads of the tiny qwen3 cannot be shared by two ranks
@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "qwen3"])
@pytest.mark.parametrize("one_kernel", [False, True])
def test_two_ranks(make_tiny, monkeypatch, name, one_kernel):
    monkeypatch.setattr(decoder, "fits", lambda *_: one_kernel)
    tiny = make_tiny(name)
    ids, position_ids = tiny.prompt(FEW_ROWS + 20)
    expected = tiny.logits(tiny.reference.embed(ids, ids < 0), position_ids)
    for expert_parallel in (False, True) if name in MIXTURES else (False,):
        _, made = shards(tiny, 2, expert_parallel)
        first, second = ask(made, ids, position_ids, [FEW_ROWS + 9, 10, 1])
        assert torch.equal(first, second)
        assert (first - expected).abs().max() < 1e-4
        assert torch.equal(first.argmax(-1), expected.argmax(-1))


def test_more_ranks_than_key_heads_and_a_vocabulary_that_does_not_divide(make_tiny):
    tiny = make_tiny("qwen3")
    # 5 ranks share one key head; 303 rows of the head are 61 for each but the last
    ids, position_ids = tiny.prompt(23)
    options = {"intermediate_size": 65}
    reference = tiny.__class__(make_decoder("qwen3", **options), make_decoder("qwen3", **options))
    expected = reference.logits(reference.reference.embed(ids, ids < 0), position_ids)
    group, made = shards(reference, 5)
    assert {fused.layers[0].key for fused in made} == {(1, 16)}
    for found in ask(made, ids, position_ids, [22, 1]):
        assert (found - expected).abs().max() < 1e-4
    # two sums for each layer and one gathering of logits, for every rank and step
    assert group.calls == 5 * 2 * (2 * 4 + 1)


def test_a_rank_holds_its_part_only(make_tiny):
    tiny = make_tiny("qwen3_moe")
    _, whole = shards(tiny, 1)
    for expert_parallel in (False, True):
        _, made = shards(tiny, 2, expert_parallel)
        for fused in made:
            assert _nbytes(fused) < 0.6 * _nbytes(whole[0])


def _nbytes(fused):
    """Of the storages that layers hold, so that a view of a whole weight counts as the whole."""
    held = {}
    for layer in fused._layers:
        mlp = layer.mlp
        experts = (mlp.gate_up, mlp.down) if hasattr(mlp, "router") else (mlp.gate_up.weight, mlp.down.weight)
        for tensor in (layer.attention.qkv.weight, layer.attention.o.weight, *experts):
            storage = tensor.untyped_storage()
            held[storage.data_ptr()] = storage.nbytes()
    return sum(held.values())


@pytest.mark.parametrize(
    ("name", "size", "expert_parallel", "reason"),
    [
        ("qwen3", 2, False, "5 query and 1 key heads cannot be split over 2 ranks"),
        ("glm", 4, False, "6 query and 2 key heads cannot be split over 4 ranks"),
        ("llama", 3, False, "an MLP of width 64 cannot be split over 3 ranks"),
        ("qwen3_moe", 4, True, "6 experts cannot be split over 4 ranks"),
        ("qwen3_moe", 5, False, "experts of width 24 cannot be split over 5 ranks"),
    ],
)
def test_what_cannot_be_split_is_said(make_tiny, name, size, expert_parallel, reason):
    result = build(make_tiny(name).decoder, Shard(0, size, expert_parallel), Group(size).of(0))
    assert isinstance(result, str)
    assert reason in result


class Recording:
    """A source that reads from modules and remembers what it was asked for."""

    def __init__(self, modules):
        self.modules, self.asked = modules, {}

    def get(self, name, dim=None, start=None, stop=None):
        self.asked.setdefault(name, []).append((dim, start, stop))
        return self.modules.get(name, dim, start, stop)


@pytest.mark.parametrize("name", ["qwen2", "gemma3", "glm4_moe", "llama_tied", "phi3", "ernie4_5_moe"])
def test_a_decoder_without_weights_and_a_source(make_tiny, name):
    import transformers

    tiny = make_tiny(name)
    with torch.device("meta"):
        model = transformers.AutoModel.from_config(tiny.decoder.config).eval()
        head = torch.nn.Linear(96, tiny.decoder.config.vocab_size, bias=False)
    if tiny.decoder.config.tie_word_embeddings:
        head.weight = model.get_input_embeddings().weight
    empty = Decoder(model, head, tiny.decoder.config, tiny.decoder.num_axes)
    ids, position_ids = tiny.prompt(20)
    expected = tiny.logits(tiny.reference.embed(ids, ids < 0), position_ids)
    group, made = Group(2), []
    for rank in range(2):
        source = Recording(ModuleSource(tiny.decoder.text_model, tiny.decoder.lm_head))
        made.append(build(empty, Shard(rank, 2), group.of(rank), source))
        assert isinstance(made[-1], FusedDecoder), made[-1]
        whole = {n for n, calls in source.asked.items() if any(dim is None for dim, _, _ in calls)}
        assert not [n for n in whole if "proj" in n and not n.endswith("bias")]
    for found in ask(made, ids, position_ids, [19, 1]):
        assert (found - expected).abs().max() < 1e-4


def test_parts_cover_everything_once():
    for size in (1, 2, 3, 4, 8):
        ranks = [Shard(rank, size) for rank in range(size)]
        rows = [i for shard in ranks for i in range(*shard.vocabulary(303)[:2])]
        assert rows == list(range(303))
        heads = [i for shard in ranks for i in range(*shard.even(24))]
        assert heads == list(range(24))
    assert [Shard(rank, 8).kv_heads(4) for rank in range(8)] == [(i, i + 1) for i in (0, 0, 1, 1, 2, 2, 3, 3)]
    with pytest.raises(ValueError, match="rank 2"):
        Shard(2, 2)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_decoder_without_weights_is_rehearsed_on_a_small_copy(make_tiny, monkeypatch, name):
    tiny = make_tiny(name)
    options = (Shard(0, 1), None, ModuleSource(tiny.decoder.text_model, tiny.decoder.lm_head))
    assert isinstance(build(tiny.decoder, *options), FusedDecoder)
    right = specs.RULES[tiny.decoder.config.model_type]
    wrong = dataclasses.replace(right, interleaved=not right.interleaved)
    monkeypatch.setattr(specs, "RULES", {tiny.decoder.config.model_type: wrong})
    assert str(build(tiny.decoder, *options)).startswith("layer 0 differs by")
    assert isinstance(build(tiny.decoder, *options, check=False), FusedDecoder)
