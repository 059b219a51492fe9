"""Paged attention against the reference, and the reference against transformers' formula, on ugly shapes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from triptych.kernels import attention
from triptych.kernels.attention import launch as launching
from triptych.kernels.attention.launch import Launch, choose, launch, share_out

FP8 = torch.float8_e4m3fn
SMALL = Launch(block_m=32, block_n=16, num_warps=4, num_stages=2, programs_per_sm=1)


@dataclass
class Cache:
    """A paged KV cache in which everything that must not be read is NaN."""

    keys: list[torch.Tensor]  # [Hk, L, D] of each request, dense
    values: list[torch.Tensor]
    key_pages: torch.Tensor
    value_pages: torch.Tensor
    block_table: torch.Tensor
    context_lens: torch.Tensor


def make_cache(
    device: str,
    contexts: list[int],
    kv_heads: int,
    dim: int,
    dim_value: int,
    page: int,
    dtype: torch.dtype,
    queries: list[int],
    window: int | None = None,
) -> Cache:
    widest = -(-max(contexts) // page) + 2
    needed = sum(-(-length // page) for length in contexts)
    order = torch.randperm(needed).tolist()
    # the last block pads the table
    pages = [torch.full((needed + 1, kv_heads, page, width), float("nan")).to(dtype) for width in (dim, dim_value)]
    table = torch.full((len(contexts), widest), needed, dtype=torch.int32)
    dense: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
    for request, length in enumerate(contexts):
        for width, which in ((dim, 0), (dim_value, 1)):
            dense[which].append(torch.randn(kv_heads, length, width).to(dtype))
        first = 0 if window is None else max(0, length - queries[request] - window + 1)
        for begin in range(0, length, page):
            block = order.pop()
            table[request, begin // page] = block
            part = slice(begin, min(begin + page, length))
            if part.stop <= first:
                # slid out of every window: somebody else's block by now
                continue
            for which in (0, 1):
                pages[which][block, :, : part.stop - begin] = dense[which][request][:, part]
    return Cache(
        [part.to(device) for part in dense[0]],
        [part.to(device) for part in dense[1]],
        pages[0].to(device),
        pages[1].to(device),
        table.to(device),
        torch.tensor(contexts, dtype=torch.int32, device=device),
    )


def run(
    device: str,
    contexts: list[int],
    queries: list[int] | None,
    *,
    heads: tuple[int, int] = (4, 2),
    dim: int = 64,
    dim_value: int | None = None,
    page: int = 16,
    dtype: torch.dtype = torch.float32,
    pages: torch.dtype | None = None,
    sinks: bool = False,
    spans: list[tuple[int, int, int]] | None = None,
    params: Launch | None = SMALL,
    num_splits: int | None = 1,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(kernel's result, reference's). ``queries`` None is decode; ``spans`` are (request, start, end), absolute."""
    torch.manual_seed(0)
    counts = queries or [1] * len(contexts)
    cache = make_cache(
        device, contexts, heads[1], dim, dim_value or dim, page, pages or dtype, counts, options.get("window")
    )
    # a view with strides of its own, as one projection gives it
    query = torch.randn(sum(counts), heads[0] + 1, dim).to(dtype).to(device)[:, :-1]
    starts = torch.tensor([0, *counts], dtype=torch.int32).cumsum(0).to(torch.int32).to(device)
    options = {"scaling": dim**-0.5, **options}
    if sinks:
        options["sinks"] = torch.randn(heads[0]).to(dtype).to(device)
    if spans is not None:
        options["spans"] = torch.zeros(sum(counts), 2, dtype=torch.int32, device=device)
        for request, begin, end in spans:
            before = contexts[request] - counts[request]
            for at in range(max(begin, before), min(end, contexts[request])):
                options["spans"][int(starts[request]) + at - before] = torch.tensor([begin, end])
    memory = (cache.key_pages, cache.value_pages, cache.block_table, cache.context_lens)
    expected = attention.prefill_reference(query, *memory, starts, **options)
    defaults = {"window": None, "softcap": None, "sinks": None, "spans": None, "key_scale": 1.0, "value_scale": 1.0}
    if queries is None:
        together = attention.decode_reference(query, *memory, **options)
        torch.testing.assert_close(together, expected, atol=1e-5, rtol=1e-5 if dtype == torch.float32 else 1e-2)
    actual = launch(
        query,
        *memory,
        None if queries is None else starts,
        max(counts),
        **{**defaults, **options},
        num_splits=num_splits,
        params=params,
    )
    return actual, expected


DECODE: dict[str, dict[str, Any]] = {
    "one token": {"contexts": [1]},
    "block boundary, one less and one more": {"contexts": [16, 15, 17, 32]},
    "padding rows": {"contexts": [0, 33, 0]},
    "padding rows, split": {"contexts": [0, 33, 0], "num_splits": 4},
    "padding rows, split, sinks": {"contexts": [0, 33, 0], "num_splits": 4, "sinks": True},
    "more splits than tiles": {"contexts": [1, 16, 17, 100], "num_splits": 8},
    "splits that are no power of two": {"contexts": [100, 7], "num_splits": 3},
    "table's own splits": {"contexts": [100, 7], "num_splits": None, "params": None},
    "one head for each": {"contexts": [37, 5], "heads": (2, 2)},
    "group of 7": {"contexts": [37, 5], "heads": (14, 2), "num_splits": 2},
    "group of 8": {"contexts": [37], "heads": (8, 1)},
    "group of 40, three tiles": {
        "contexts": [37, 3],
        "heads": (40, 1),
        "num_splits": 2,
        "params": Launch(16, 16, 4, 2, 1),
    },
    "pages of 8": {"contexts": [65, 8, 9], "page": 8, "num_splits": 2},
    "pages of 4": {"contexts": [21, 8], "page": 4},
    "pages of 32": {"contexts": [65, 31, 33], "page": 32},
    "pages of 64, tiles of 32": {"contexts": [130, 63], "page": 64, "params": Launch(16, 32, 4, 2, 1)},
    "pages of 128": {"contexts": [129, 128], "page": 128, "num_splits": 2},
    "pages of 16, tiles of 64": {"contexts": [130, 63, 64], "params": Launch(16, 64, 4, 2, 1), "num_splits": 2},
    "head dim 16": {"contexts": [40, 9], "dim": 16},
    "head dim 80": {"contexts": [40, 9], "dim": 80, "num_splits": 2},
    "head dim 96": {"contexts": [40, 9], "dim": 96},
    "head dim 128": {"contexts": [40, 9], "dim": 128},
    "head dim 256": {"contexts": [40, 9], "dim": 256, "num_splits": 2},
    "values narrower than keys": {"contexts": [40, 9], "dim": 72, "dim_value": 48, "num_splits": 2},
    "latent attention": {
        "contexts": [21],
        "heads": (16, 1),
        "dim": 576,
        "dim_value": 512,
        "params": None,
        "num_splits": 2,
    },
    "window": {"contexts": [100, 5, 37], "window": 20},
    "window, split": {"contexts": [100, 5, 37], "window": 33, "num_splits": 4},
    "window that begins within a tile, pages of 4": {"contexts": [43, 5], "window": 20, "page": 4},
    "window of one": {"contexts": [33, 1], "window": 1},
    "window wider than the context": {"contexts": [33, 1], "window": 1000},
    "soft cap": {"contexts": [50, 3], "softcap": 2.0, "num_splits": 2},
    "sinks": {"contexts": [50, 3], "sinks": True},
    "sinks, split, window": {"contexts": [50, 3], "sinks": True, "num_splits": 2, "window": 18},
    "bfloat16": {"contexts": [50, 3], "dtype": torch.bfloat16, "num_splits": 2},
    "float16": {"contexts": [50, 3], "dtype": torch.float16, "sinks": True},
    "float8 pages": {
        "contexts": [50, 3],
        "dtype": torch.bfloat16,
        "pages": FP8,
        "key_scale": 0.7,
        "value_scale": 1.7,
        "num_splits": 2,
    },
    "float8 pages, direct": {"contexts": [50], "pages": FP8, "key_scale": 0.7, "value_scale": 1.7},
}


@pytest.mark.parametrize("case", DECODE.values(), ids=DECODE.keys())
def test_decode(device, assert_close, case):
    actual, expected = run(device, queries=None, **case)
    assert_close(actual, expected)
    for row, context in enumerate(case["contexts"]):
        if context == 0:
            assert not actual[row].any(), "a padding row is not zero"


BOTH = {"window": 21, "spans": [(0, 20, 50), (1, 3, 9)]}
PREFILL: dict[str, dict[str, Any]] = {
    "whole prompts": {"contexts": [33, 64, 17], "queries": [33, 64, 17]},
    "one token prompts among others": {"contexts": [40, 1, 7], "queries": [40, 1, 1]},
    "a request without tokens": {"contexts": [40, 9, 7], "queries": [40, 0, 7]},
    "padding": {"contexts": [40, 0], "queries": [40, 3]},
    "prefix": {"contexts": [100, 64, 50], "queries": [33, 32, 20]},
    "prefix, short": {"contexts": [100, 16, 50], "queries": [5, 16, 1], "heads": (14, 2)},
    "prefix, short, split": {"contexts": [100, 16, 50], "queries": [5, 16, 1], "heads": (14, 2), "num_splits": 4},
    "prefix, short, padding": {"contexts": [100, 0, 50], "queries": [3, 3, 3], "num_splits": 2},
    "prefix, split": {"contexts": [130, 30], "queries": [20, 30], "num_splits": 3},
    "the table's choice": {"contexts": [70, 30], "queries": [40, 30], "num_splits": None, "params": None},
    "the table's choice, short": {"contexts": [70, 30], "queries": [4, 3], "num_splits": None, "params": None},
    "tiles of keys wider than of rows": {"contexts": [90, 65], "queries": [40, 65], "params": Launch(16, 64, 4, 2, 1)},
    "pages of 64, tiles of 32": {
        "contexts": [130, 63],
        "queries": [70, 63],
        "page": 64,
        "params": Launch(32, 32, 4, 2, 1),
    },
    "pages of 8": {"contexts": [65, 40], "queries": [30, 40], "page": 8},
    "window": {"contexts": [130, 40], "queries": [70, 40], "window": 20},
    "window that tiles fit into": {"contexts": [180, 40], "queries": [70, 40], "window": 100},
    "window, short": {"contexts": [130, 40], "queries": [7, 5], "window": 20},
    "window, split": {"contexts": [130, 40], "queries": [40, 40], "window": 70, "num_splits": 2},
    "window that begins within a tile, pages of 4": {"contexts": [75], "queries": [40], "window": 9, "page": 4},
    "window of one": {"contexts": [50], "queries": [40], "window": 1},
    "soft cap and sinks": {"contexts": [60, 20], "queries": [40, 20], "softcap": 2.0, "sinks": True},
    "sinks, short": {"contexts": [60, 20], "queries": [10, 3], "sinks": True, "num_splits": 2},
    "spans": {"contexts": [70, 33], "queries": [70, 33], "spans": [(0, 5, 30), (0, 40, 69), (1, 0, 33)]},
    "spans over the prefix and past the tile": {"contexts": [90], "queries": [60], "spans": [(0, 20, 85)]},
    "spans, short": {"contexts": [90, 20], "queries": [12, 9], "spans": [(0, 70, 88), (1, 13, 19)]},
    "spans and window": {"contexts": [90, 20], "queries": [80, 20], **BOTH},
    "spans and window, split": {"contexts": [90, 20], "queries": [80, 20], **BOTH, "num_splits": 2},
    "spans that end after the chunk": {"contexts": [50], "queries": [40], "spans": [(0, 30, 70)]},
    "head dim 80": {"contexts": [40, 20], "queries": [30, 20], "dim": 80},
    "head dim 256": {"contexts": [40], "queries": [30], "dim": 256},
    "values narrower than keys": {"contexts": [40], "queries": [30], "dim": 72, "dim_value": 48},
    "bfloat16": {"contexts": [70, 20], "queries": [40, 20], "dtype": torch.bfloat16, "heads": (7, 1)},
    "float8 pages": {
        "contexts": [70, 20],
        "queries": [40, 20],
        "dtype": torch.bfloat16,
        "pages": FP8,
        "key_scale": 0.7,
        "value_scale": 1.7,
    },
}


@pytest.mark.parametrize("case", PREFILL.values(), ids=PREFILL.keys())
def test_prefill(device, assert_close, case):
    actual, expected = run(device, **case)
    assert_close(actual, expected)


@pytest.mark.parametrize("window", [None, 13])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_the_reference_is_the_formula(assert_close, window, softcap, with_sinks):
    """Row by row, key by key, over the dense keys and values."""
    torch.manual_seed(0)
    contexts, queries, heads, kv_heads, dim, page = [30, 9, 17], [12, 9, 1], 6, 2, 16, 4
    cache = make_cache("cpu", contexts, kv_heads, dim, dim, page, torch.float32, queries, window)
    query = torch.randn(sum(queries), heads, dim)
    sinks = torch.randn(heads) if with_sinks else None
    starts = torch.tensor([0, 12, 21, 22], dtype=torch.int32)
    spans = torch.zeros(sum(queries), 2, dtype=torch.int32)
    spans[2:8] = torch.tensor([20, 26])
    actual = attention.prefill(
        query,
        cache.key_pages,
        cache.value_pages,
        cache.block_table,
        cache.context_lens,
        starts,
        max_query_len=12,
        scaling=0.3,
        window=window,
        softcap=softcap,
        sinks=sinks,
        spans=spans,
    )
    expected = torch.empty(sum(queries), heads, dim)
    for request, count in enumerate(queries):
        for row in range(count):
            token, position = int(starts[request]) + row, contexts[request] - count + row
            begin, end = spans[token].tolist()
            seen = [
                at
                for at in range(contexts[request])
                if (at <= position or begin <= at < end) and (window is None or at > position - window)
            ]
            for head in range(heads):
                keys = cache.keys[request][head // 3, seen]
                scores = keys @ query[token, head] * 0.3
                scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
                scores = scores.exp()
                total = scores.sum() + (0 if sinks is None else sinks[head].exp())
                expected[token, head] = scores @ cache.values[request][head // 3, seen] / total
    assert_close(actual, expected)


def test_decode_is_prefill_of_one_token(device, assert_close):
    torch.manual_seed(0)
    contexts = [5, 40, 16]
    cache = make_cache(device, contexts, 2, 64, 64, 16, torch.float32, [1, 1, 1])
    query = torch.randn(3, 4, 64, device=device)
    memory = (cache.key_pages, cache.value_pages, cache.block_table, cache.context_lens)
    starts = torch.arange(4, dtype=torch.int32, device=device)
    one = attention.decode(query, *memory, scaling=0.125)
    assert_close(one, attention.prefill(query, *memory, starts, max_query_len=1, scaling=0.125))
    assert_close(one, attention.decode_reference(query, *memory, scaling=0.125))


@pytest.mark.gpu
def test_a_captured_graph_is_right_for_later_lengths(assert_close):
    """Split decode, captured at one context length and replayed at others: nothing of the grid depends on lengths."""
    torch.manual_seed(0)
    contexts = [500, 77, 1]
    cache = make_cache("cuda", contexts, 2, 128, 128, 16, torch.bfloat16, [1] * 3)
    query = torch.randn(3, 14, 128, device="cuda", dtype=torch.bfloat16)
    memory = (cache.key_pages, cache.value_pages, cache.block_table, cache.context_lens)
    attention.decode(query, *memory, scaling=0.1, num_splits=8)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attention.decode(query, *memory, scaling=0.1, num_splits=8)
    for lengths in ([500, 77, 1], [16, 0, 1], [333, 64, 0]):
        cache.context_lens.copy_(torch.tensor(lengths))
        graph.replay()
        torch.cuda.synchronize()
        assert_close(out, attention.decode_reference(query, *memory, scaling=0.1))


def test_misfits_are_refused():
    cache = make_cache("cpu", [5, 9], 2, 16, 16, 4, torch.float32, [1, 1])
    memory = (cache.key_pages, cache.value_pages, cache.block_table, cache.context_lens)
    query = torch.randn(2, 4, 16)
    for wrong, message in (
        ((query[:, :3], *memory), "no multiple of 2 kv heads"),
        ((query[:, :, :8], *memory), "do not fit together"),
        ((query[:1], *memory), "one for each"),
        ((query.half(), *memory), "for queries of torch.float16"),
        ((query.transpose(1, 2).contiguous().transpose(1, 2), *memory), "next to each other"),
        ((query, *memory[:2], cache.block_table.long(), cache.context_lens), "int32"),
        ((query, *memory[:3], cache.context_lens[:1]), "1 context lengths for 2 rows"),
    ):
        with pytest.raises(ValueError, match=message):
            attention.decode(*wrong, scaling=1.0)
    with pytest.raises(ValueError, match="window of 0"):
        attention.decode(query, *memory, scaling=1.0, window=0)
    with pytest.raises(ValueError, match="scaling of 0"):
        attention.decode(query, *memory, scaling=0)
    with pytest.raises(ValueError, match="query_starts"):
        attention.prefill(query, *memory, cache.context_lens, max_query_len=1, scaling=1.0)


def test_warm_up_compiles_all_that_launches_need(device, monkeypatch):
    """Whatever a request asks for later, its kernel was launched before."""
    asked: set[Any] = set()
    for name in ("_attend_kernel", "_merge_kernel"):
        kernel = getattr(launching, name)

        class Recorded:
            def __init__(self, name: str, kernel: Any) -> None:
                self.name, self.kernel = name, kernel

            def __getitem__(self, grid: Any) -> Any:
                def call(*args: Any, **constants: Any) -> None:
                    asked.add((self.name, *(arg is None for arg in args), *sorted(constants.items(), key=str)))
                    if device == "cuda":
                        self.kernel[grid](*args, **constants)

                return call

        monkeypatch.setattr(launching, name, Recorded(name, kernel))
    pages = torch.zeros(9, 2, 16, 64, device=device)
    query = torch.zeros(300, 8, 64, device=device)
    assert launching.warm_up(query, pages, pages, window=40, spans=True) > 0
    warm = set(asked)
    table = torch.zeros(3, 8, dtype=torch.int32, device=device)
    for lengths in ([3, 1, 2], [16, 0, 0], [17, 1, 0], [40, 80, 3]):
        starts = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0).to(torch.int32).to(device)
        spans = torch.zeros(sum(lengths), 2, dtype=torch.int32, device=device)
        options = {"scaling": 1.0, "softcap": None, "sinks": None, "key_scale": 1.0, "value_scale": 1.0, "window": 40}
        for num_splits in (None, 1, 2, 17):
            for given in (None, spans):
                launch(
                    query[: sum(lengths)],
                    pages,
                    pages,
                    table,
                    torch.tensor(lengths, dtype=torch.int32, device=device),
                    starts,
                    max(lengths),
                    spans=given,
                    num_splits=num_splits,
                    **options,
                )
    for num_splits in (None, 1, 2, 17):
        context_lens = torch.tensor([3, 60, 0], dtype=torch.int32, device=device)
        launch(query[:3], pages, pages, table, context_lens, None, 1, spans=None, num_splits=num_splits, **options)
    assert asked == warm


def test_splits_fill_the_gpu_and_no_more():
    assert share_out(programs=4, wanted=528, tiles=512) == 128
    assert share_out(programs=128, wanted=528, tiles=512) == 4
    assert share_out(programs=512, wanted=528, tiles=512) == 1
    assert share_out(programs=4, wanted=528, tiles=3) == 2
    assert share_out(programs=4, wanted=528, tiles=1) == 1


def test_the_table_has_an_entry_for_every_shape():
    for arch in ((9, 0), (8, 0), (12, 0), (0, 0)):
        for tables in ("decode", "verify", "prefill"):
            for width in (16, 64, 80, 96, 128, 192, 256, 576):
                for element in (1, 2, 4):
                    for size in (0, 1, 128, 100_000):
                        assert choose(tables, arch, width, element, size).block_n >= 16
    with pytest.raises(ValueError, match="too wide"):
        choose("decode", (9, 0), 2048, 2, 1)
