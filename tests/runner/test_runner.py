"""The runner gives transformers' tokens, whatever the backend, padded as in CUDA graphs or not."""

from __future__ import annotations

import random
import re

import numpy as np
import pytest
import torch

from triptych.python_models.contract.errors import TriptychError
from triptych.python_models.contract.settings import Settings
from triptych.python_models.language_model.runner.options import RunnerOptions
from triptych.python_models.language_model.runner.step import KVGroup, Slice

KINDS = ["qwen2", "gemma2", "gemma3", "gpt_oss"]
WINDOWED = ["gemma2", "gemma3", "gpt_oss"]


def prompt_of(length, seed=0):
    return random.Random(seed * 1000 + length).choices(range(1, 290), k=length)


def graph_batch(device, kind):
    # transformers' experts of gpt-oss look at the routing on the host
    return 0 if device == "cuda" and kind == "gpt_oss" else 7


@pytest.mark.parametrize("chunk", [10**6, 7])
@pytest.mark.parametrize("backend", ["sdpa", "triton"])
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_tokens_are_those_of_generate(make_rig, kind, backend, chunk):
    rig = make_rig(kind, attention_backend=backend)
    prompts = [prompt_of(n) for n in (5, 33, 1, 50)]
    assert rig.generate(prompts, 20, chunk) == [rig.expected(p, 20) for p in prompts]


@pytest.mark.parametrize("backend", ["sdpa", "triton"])
@pytest.mark.parametrize("kind", KINDS)
def test_padded_decode_steps_give_the_same_tokens(make_rig, kind, backend, device):
    if device == "cuda" and backend == "sdpa":
        pytest.skip("sdpa does not run in CUDA graphs")
    rig = make_rig(kind, attention_backend=backend, graph_batch=graph_batch(device, kind))
    # batches of 1 to 5 requests, padded to 1, 2, 4 and 7
    prompts = [prompt_of(n) for n in (5, 33, 1, 50, 12)]
    assert rig.generate(prompts, 20) == [rig.expected(p, 20) for p in prompts]


@pytest.mark.parametrize("backend", ["sdpa", "triton"])
@pytest.mark.parametrize("kind", ["qwen2", "gemma3"])
def test_fused_decoders_run_on_the_same_runner(make_rig, kind, backend, device):
    graphs = 0 if device == "cuda" and backend == "sdpa" else 7
    rig = make_rig(kind, decoder="fused", attention_backend=backend, graph_batch=graphs)
    prompts = [prompt_of(n) for n in (5, 33, 1, 50)]
    assert rig.generate(prompts, 20, chunk=16) == [rig.expected(p, 20) for p in prompts]


def test_replayed_steps_are_used_and_padded(make_rig, device):
    rig = make_rig(graph_batch=6)
    seen = []
    graphs = rig.runner._graphs
    forward, compute = graphs.forward, graphs._compute
    graphs.forward = lambda host: seen.append(host.num_tokens) or forward(host)
    assert compute is not None
    rig.generate([prompt_of(24), prompt_of(36)], 5)
    assert sorted(set(seen)) == [1, 2]
    # one more request than was captured
    more = [rig.request(prompt_of(3, seed), seed) for seed in range(7)]
    rig.step({r.slot: (r, rig.slice(r, 3)) for r in more})
    before = len(seen)
    rig.step({r.slot: (r, rig.slice(r, 1)) for r in more})
    assert len(seen) == before
    rig.step({r.slot: (r, rig.slice(r, 1)) for r in more[:6]})
    assert seen[before:] == [6]


@pytest.mark.parametrize("kind", WINDOWED)
@pytest.mark.parametrize("graphs", [0, 4])
def test_window_layers_live_in_few_blocks(make_rig, kind, graphs, device):
    """Blocks out of the window go back full of NaN, so whoever reads one of them fails."""
    rig = make_rig(kind, graph_batch=min(graphs, graph_batch(device, kind)))
    assert [group.window for group in rig.runner.kv_groups] == [None, 9]
    assert rig.runner.kv_groups[0].layers == (1, 3)
    prompt = prompt_of(70)
    least = [len(free) for free in rig.free]
    slice_ = rig.slice

    def watched(*args, **options):
        part = slice_(*args, **options)
        least[:] = [min(a, len(free)) for a, free in zip(least, rig.free, strict=True)]
        return part

    rig.slice = watched
    assert rig.generate([prompt], 40, chunk=8) == [rig.expected(prompt, 40)]
    # 109 tokens in one group; a window, a chunk and what is cut at their ends in the other
    assert [119 - count for count in least] == [28, 4]


def test_one_group_where_windows_are_longer_than_any_request(make_rig):
    rig = make_rig("gemma3", context_length=9)
    assert rig.runner.kv_groups == (KVGroup((0, 1, 2, 3)),)


@pytest.mark.parametrize("backend", ["sdpa", "triton"])
@pytest.mark.parametrize("chunk", [10**6, 16])
def test_spans_attend_both_ways_as_under_a_mask(make_rig, backend, chunk, device):
    """Gemma 3's rule for pictures: (causal or same picture) and, in window layers, within the window."""
    rig = make_rig("gemma3", attention_backend=backend, graph_batch=4 if backend == "triton" else 0)
    spans = ((3, 14), (17, 24), (24, 31))
    prompt = prompt_of(40)
    inside = np.zeros(60, dtype=np.int64)
    for number, (start, end) in enumerate(spans, 1):
        inside[start:end] = number
    request = rig.request(prompt, 0, spans)
    while request.done < len(prompt):
        count = min(chunk, len(prompt) - request.done)
        # a chunk never cuts a span
        end = request.done + count
        end = min([end, *(start for start, stop in spans if start < end < stop)])
        rig.step({0: (request, rig.slice(request, end - request.done))})
    for _ in range(8):
        rig.step({0: (request, rig.slice(request, 1))})

    tokens = list(prompt)
    for _ in range(9):
        tokens.append(int(_masked_logits(rig, tokens, inside)[-1].argmax()))
    assert request.tokens == tokens
    assert tokens[len(prompt) :] != rig.expected(prompt, 9)


def _masked_logits(rig, tokens, inside):
    """transformers' own layers, with masks that are built here."""
    length = len(tokens)
    place = np.arange(length)
    ages = place[:, None] - place
    same = (inside[:length, None] == inside[:length]) & (inside[:length] > 0)
    seen = (ages >= 0) | same
    masks = {}
    for name, allowed in (("full_attention", seen), ("sliding_attention", seen & (ages < 9))):
        mask = torch.zeros(1, 1, length, length).masked_fill_(
            ~torch.from_numpy(allowed), torch.finfo(torch.float32).min
        )
        masks[name] = mask.to(rig.device)
    with torch.no_grad():
        ids = torch.tensor([tokens], device=rig.device)
        hidden = rig.reference.model(input_ids=ids, attention_mask=masks, use_cache=False).last_hidden_state
        logits: torch.Tensor = rig.reference.lm_head(hidden)[0]
    return logits


@pytest.mark.parametrize("backend", ["sdpa", "triton"])
def test_an_fp8_cache_stays_close(make_rig, backend):
    exact, small = (make_rig(attention_backend=backend, kv_cache_dtype=dtype) for dtype in ("auto", "fp8"))
    assert exact.runner.bytes_per_token == (4 * small.runner.bytes_per_token[0],)
    found = []
    for rig in (exact, small):
        request = rig.request(prompt_of(60), 0)
        with torch.inference_mode():
            found.append(rig.runner.forward([rig.slice(request, 60, num_logits=60)]).clone())
    correlation = torch.corrcoef(torch.stack([found[0].flatten(), found[1].flatten()]))[0, 1]
    assert 0.99 < correlation < 0.99999
    assert (found[0].argmax(-1) == found[1].argmax(-1)).float().mean() > 0.8


def test_logits_come_in_the_order_of_the_slices(make_rig):
    """Prompts, decodes, drafts to verify and inner chunks in one step."""
    rig = make_rig()
    prompts = [prompt_of(n) for n in (20, 9, 14, 30)]
    requests = [rig.request(p, slot) for slot, p in enumerate(prompts)]
    with torch.inference_mode():
        rig.runner.forward([rig.slice(requests[1], 8), rig.slice(requests[2], 10)])
    requests[1].done, requests[2].done = 8, 10
    parts = [
        rig.slice(requests[0], 20),
        rig.slice(requests[1], 1),
        rig.slice(requests[2], 4, num_logits=3),
        rig.slice(requests[3], 12, num_logits=0),
    ]
    with torch.inference_mode():
        found = rig.runner.forward(parts)
    with torch.no_grad():
        logits = [rig.reference(torch.tensor([p], device=rig.device)).logits[0] for p in prompts]
    expected = torch.cat([logits[0][-1:], logits[1][-1:], logits[2][-3:]])
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)
    with torch.inference_mode():
        requests[3].done = 12
        assert rig.runner.forward([rig.slice(requests[3], 5, num_logits=0)]).shape == (0, 300)


@pytest.mark.parametrize("backend", ["sdpa", "triton"])
@pytest.mark.parametrize("kind", ["qwen2", "gemma3"])
def test_short_slices_are_replayed_as_rows(make_rig, kind, backend, device):
    """Guesses to verify, the end of a prompt and decodes in one replayed step, each with its own logits."""
    if device == "cuda" and backend == "sdpa":
        pytest.skip("sdpa does not run in CUDA graphs")
    rig = make_rig(kind, attention_backend=backend, graph_batch=16)
    prompts = [prompt_of(n) for n in (20, 9, 24, 30)]
    requests = [rig.request(p, slot) for slot, p in enumerate(prompts)]
    with torch.inference_mode():
        for request, count in zip(requests, (17, 8, 19, 24), strict=True):
            rig.runner._compute(rig.runner._inputs.upload(rig.runner._inputs.prepare([rig.slice(request, count)])))
            request.done = count
        parts = [
            rig.slice(requests[0], 3, num_logits=1),
            rig.slice(requests[1], 1),
            rig.slice(requests[2], 5, num_logits=5),
            rig.slice(requests[3], 4, num_logits=0),
        ]
        host = rig.runner._inputs.prepare(parts)
        assert rig.runner._graphs.serves(host)
        found = rig.runner.forward(parts).clone()
        again = rig.runner._compute(rig.runner._inputs.upload(host))
        # verification alone: every row has logits
        alone = rig.runner.forward([rig.slice(requests[2], 5, num_logits=5)])
    with torch.no_grad():
        logits = [rig.reference(torch.tensor([p], device=rig.device)).logits[0] for p in prompts]
    expected = torch.cat([logits[0][-1:], logits[1][-1:], logits[2][-5:]])
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(again, expected, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(alone, expected[2:], atol=1e-3, rtol=1e-3)


def test_long_or_bidirectional_slices_are_not_replayed(make_rig):
    rig = make_rig(graph_batch=32)
    prepare, serves = rig.runner._inputs.prepare, rig.runner._graphs.serves

    def part(count, start=0, **options):
        table = (np.arange(-(-(start + count) // 4), dtype=np.int32),)
        ids = np.zeros(count, dtype=np.int64)
        return Slice(ids, np.arange(start, start + count)[None], start, table, **options)

    assert serves(prepare([part(16), part(15)]))
    assert not serves(prepare([part(17)]))
    assert not serves(prepare([part(16), part(16), part(1)]))
    assert not serves(prepare([part(4, spans=((0, 3),))]))
    # a few rows of a long request would read it all again and again
    assert serves(prepare([part(5, 4000), part(1, 9000)]))
    assert not serves(prepare([part(5, 5000)]))


def test_a_table_longer_than_any_request_is_an_error(make_rig):
    rig = make_rig(graph_batch=2, context_length=16)
    table = (np.arange(9, dtype=np.int32),)
    part = Slice(np.zeros(1, np.int64), np.full((1, 1), 32, dtype=np.int64), 32, table)
    with pytest.raises(RuntimeError, match="9 blocks, but requests have 5"), torch.inference_mode():
        rig.runner.forward([part])


@pytest.mark.gpu
@pytest.mark.parametrize("decoder", ["fused", "transformers"])
def test_what_cannot_be_captured(make_rig, device, decoder, caplog):
    if device == "cpu":
        pytest.skip("a CPU captures nothing")
    with pytest.raises(TriptychError, match="sdpa cannot run in CUDA graphs; start with --no-cuda-graphs"):
        make_rig(attention_backend="sdpa", graph_batch=2)
    rig = make_rig(decoder=decoder)
    executor, logits = rig.runner._executor, rig.runner._executor.logits
    executor.logits = lambda hidden: logits(hidden * (2 if hidden.sum().item() > 1e30 else 1))
    rig.runner._options = RunnerOptions(graph_batch=2, context_length=256)
    reason = r"(?s)after the attention of layer 3.*--no-cuda-graphs"
    if decoder == "fused":
        with pytest.raises(TriptychError, match=reason):
            rig.runner.warm_up()
        return
    rig.runner.warm_up()
    assert re.search(reason + ".*one kernel at a time", caplog.text)
    assert rig.generate([prompt_of(20)], 5) == [rig.expected(prompt_of(20), 5)]


def test_graphs_are_for_gpus():
    assert RunnerOptions.of(Settings(), 100, "cpu").graph_batch == 0
    assert RunnerOptions.of(Settings(), 100, "cuda:1").graph_batch == 64
    assert RunnerOptions.of(Settings(cuda_graphs=False), 100, "cuda").graph_batch == 0


@pytest.mark.parametrize("backend", ["sdpa", "triton"])
def test_a_rehearsal_leaves_no_trace(make_rig, monkeypatch, backend):
    rig = make_rig("gemma3", attention_backend=backend, spans=True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    cache, _, inputs = rig.runner._parts()
    before = [[pages.clone() for pages in pair] for pair in cache.pages]
    with torch.inference_mode():
        rig.runner._rehearse(cache, inputs, 64)
    for pair, old in zip(cache.pages, before, strict=True):
        for pages, expected in zip(pair, old, strict=True):
            torch.testing.assert_close(pages, expected, rtol=0, atol=0, equal_nan=True)
    assert rig.generate([prompt_of(20)], 5) == [rig.expected(prompt_of(20), 5)]
