"""Paged attention against plain attention over each request's own tokens, with poison in everybody else's blocks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from triptych.python_models.contract.errors import TriptychError
from triptych.python_models.language_model.runner.attention import load_backend
from triptych.python_models.language_model.runner.context import HeadNorm, How, Rope
from triptych.python_models.language_model.runner.executor import LayerShape
from triptych.python_models.language_model.runner.inputs import StepInputs
from triptych.python_models.language_model.runner.kv_cache import FP8, KVCache, group_layers
from triptych.python_models.language_model.runner.step import Slice

BLOCK = 4
HEADS = 6
# (tokens in the cache, new tokens) of each request
CASES = {
    "decodes of very different lengths": [(3, 1), (200, 1), (0, 1), (8, 1)],
    "fresh prompts": [(0, 5), (0, 17)],
    "chunks": [(4, 7), (30, 9)],
    "all mixed": [(6, 1), (0, 9), (150, 1), (11, 6)],
    "one decode": [(13, 1)],
}
HOWS = {
    "plain": How(),
    "scaled": How(scaling=0.3),
    "window": How(window=6),
    "softcap": How(softcap=1.5),
    "sinks and window": How(window=6, sinks=torch.tensor([0.5, -1.0, 2.0, 0.1, 0.0, 1.0])),
}


@dataclass
class Case:
    """Requests with keys and values: float32 on the CPU, head-major, of all tokens."""

    cache: KVCache
    slices: list[Slice]
    queries: list[torch.Tensor]
    keys: list[torch.Tensor]
    values: list[torch.Tensor]

    @property
    def ordered(self):
        """Requests as the batch has them: single tokens first."""
        return sorted(range(len(self.slices)), key=lambda i: len(self.slices[i]) > 1)

    def new(self, tensors):
        """The new tokens of all requests, in batch order: [heads, T, D]."""
        return torch.cat([tensors[i][:, -len(self.slices[i]) :] for i in self.ordered], 1)


def make_case(requests, kv_heads, widths, device, window=None, dtype=torch.float32, spans=()):
    """Requests whose old tokens are stored; all other blocks hold NaN, also those that fell out of the window."""
    generator = torch.Generator().manual_seed(1)
    key_width, value_width = widths
    layers = (LayerShape((kv_heads, key_width), (kv_heads, value_width), window),)
    cache = KVCache(layers, group_layers(layers, 10_000), [120], BLOCK, dtype, device)
    for pages in cache.pages[0]:
        pages[:-1] = torch.full((), torch.nan, device=device).to(dtype)
    # never block 0, which careless padding would read
    blocks = iter((torch.randperm(119, generator=generator) + 1).tolist())
    case = Case(cache, [], [], [], [])
    for done, new in requests:
        table = np.array([next(blocks) for _ in range(-(-(done + new) // BLOCK))], dtype=np.int32)
        cache.scrub(0, table.tolist())
        positions = np.arange(done, done + new)
        case.slices.append(Slice(np.zeros(new, np.int64), positions[None], done, (table,), spans=tuple(spans)))
        case.queries.append(torch.randn(HEADS, new, key_width, generator=generator))
        case.keys.append(torch.randn(kv_heads, done + new, key_width, generator=generator))
        case.values.append(torch.randn(kv_heads, done + new, value_width, generator=generator))
        if dtype == FP8:
            # what is stored is what the reference sees
            case.keys[-1], case.values[-1] = (t.to(FP8).float() for t in (case.keys[-1], case.values[-1]))
        old = torch.arange(done, device=device)
        places = torch.from_numpy(table).to(device, torch.int64)[old // BLOCK], old % BLOCK
        stored = (t[:, :done].transpose(0, 1).to(device) for t in (case.keys[-1], case.values[-1]))
        cache.write(0, places, *stored)
        if window is not None:
            gone = max(0, done - window + 1) // BLOCK
            for pages in cache.pages[0]:
                pages[torch.from_numpy(table[:gone]).to(device, torch.int64)] = torch.nan
    return case


def step_of(case, backend, device):
    inputs = StepInputs(1, BLOCK, case.cache.num_blocks, device)
    layers = tuple(
        LayerShape((k.shape[0], k.shape[2]), (v.shape[0], v.shape[2])) for k, v in [(case.keys[0], case.values[0])]
    )
    return load_backend(backend, layers, case.cache)(case.cache, inputs.upload(inputs.prepare(case.slices)))


def naive(query, key, value, how, spans=()):
    """query [H, n, D] of the last n tokens, key [Hk, m, D], value [Hk, m, Dv] -> [n, H, Dv]; head by head."""
    heads, new, width = query.shape
    done = key.shape[1] - new
    out = torch.zeros(new, heads, value.shape[-1])
    for h in range(heads):
        source = h // (heads // key.shape[0])
        for i in range(new):
            at = done + i
            last = max([at + 1, *(done + end for start, end in spans if start <= i < end)])
            first = 0 if how.window is None else max(0, at - how.window + 1)
            scores = key[source, first:last] @ query[h, i] * (how.scaling or width**-0.5)
            if how.softcap:
                scores = how.softcap * torch.tanh(scores / how.softcap)
            weights = scores.exp()
            total = weights.sum() + (how.sinks[h].exp() if how.sinks is not None else 0)
            out[i, h] = (weights / total) @ value[source, first:last]
    return out


def expected(case, how, spans=()):
    return torch.cat([naive(case.queries[i], case.keys[i], case.values[i], how, spans) for i in case.ordered])


def on(device, how):
    return How(how.scaling, how.window, how.softcap, None if how.sinks is None else how.sinks.to(device))


def attend(case, backend, how, device):
    step = step_of(case, backend, device)
    new = (case.new(t).to(device) for t in (case.queries, case.keys, case.values))
    return step.attend(0, *new, on(device, how)).cpu()


@pytest.mark.parametrize("backend", ["sdpa", "triton"])
@pytest.mark.parametrize("kv_heads", [6, 2, 1])
@pytest.mark.parametrize("how", HOWS.values(), ids=HOWS)
@pytest.mark.parametrize("requests_", CASES.values(), ids=CASES)
def test_it_equals_plain_attention(requests_, how, kv_heads, backend, device):
    # the kernels take no value narrower than 16
    widths = (8, 5) if backend == "sdpa" else (16, 16)
    case = make_case(requests_, kv_heads, widths, device, how.window)
    out = attend(case, backend, how, device)
    torch.testing.assert_close(out, expected(case, how), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("backend", ["sdpa", "triton"])
@pytest.mark.parametrize("window", [None, 6, 3])
@pytest.mark.parametrize("requests_", [[(0, 17)], [(30, 19), (6, 17)], [(6, 1), (0, 16), (9, 18)]])
def test_spans_attend_both_ways(requests_, window, backend, device):
    spans = ((2, 7), (7, 8), (11, 16))
    case = make_case(requests_, 2, (16, 16), device, window, spans=spans)
    out = attend(case, backend, How(window=window), device)
    torch.testing.assert_close(out, expected(case, How(window=window), spans), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("backend", ["sdpa", "triton"])
def test_fp8_pages_hold_what_fp8_can_say(backend, device):
    case = make_case(CASES["all mixed"], 2, (16, 16), device, dtype=FP8)
    out = attend(case, backend, How(), device)
    torch.testing.assert_close(out, expected(case, How()), atol=2e-5, rtol=1e-4)


def test_fp8_takes_the_nearest_number_it_has(device):
    case = make_case([(0, 3)], 2, (16, 16), device, dtype=FP8)
    huge = torch.full((3, 2, 16), 1e6, device=device)
    places = torch.tensor([1, 1, -1], device=device), torch.tensor([0, 1, 3], device=device)
    case.cache.write(0, places, huge, -huge)
    keys, values = case.cache.read(0, torch.tensor([[1, 120]], device=device), torch.float32)
    assert keys[0, :, [0, 1, 7]].eq(448).all()
    assert values[0, :, [0, 1, 7]].eq(-448).all()


@pytest.mark.parametrize("backend", ["sdpa", "triton"])
@pytest.mark.parametrize("normed", [False, True])
def test_fused_layers_find_the_same_pages(backend, normed, device):
    """rotate_and_store and attend_stored do what attend does after transformers' own rotation."""
    heads, kv_heads, width = HEADS, 2, 16
    case = make_case(CASES["all mixed"], kv_heads, (width, width), device)
    step = step_of(case, backend, device)
    tokens = sum(len(part) for part in case.slices)
    generator = torch.Generator().manual_seed(3)
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * width, generator=generator)
    angles = torch.rand(tokens, width // 2, generator=generator) * 3
    weights = torch.rand(2, width, generator=generator)
    query, key, value = (
        t.view(tokens, -1, width) for t in qkv.split([heads * width, kv_heads * width, kv_heads * width], -1)
    )
    norm = None
    if normed:
        norm = HeadNorm(weights[0].to(device), weights[1].to(device), 1e-6, 1.0)
        query, key = (
            t * torch.rsqrt(t.square().mean(-1, keepdim=True) + 1e-6) * (w + 1)
            for t, w in ((query, weights[0]), (key, weights[1]))
        )
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    rotated = []
    for t in (query, key):
        a, b = t.chunk(2, -1)
        rotated.append(torch.cat([a * cos - b * sin, b * cos + a * sin], -1).transpose(0, 1).to(device))
    wanted = step.attend(0, *rotated, value.transpose(0, 1).to(device), How())
    before = [pages.clone() for pages in case.cache.pages[0]]
    own = make_case(CASES["all mixed"], kv_heads, (width, width), device)
    step = step_of(own, backend, device)
    rope = Rope(angles.cos().to(device), angles.sin().to(device))
    turned = step.rotate_and_store(0, qkv.to(device), (heads, kv_heads), rope, norm)
    torch.testing.assert_close(turned.transpose(0, 1), rotated[0], atol=1e-5, rtol=1e-5)
    for pages, other in zip(own.cache.pages[0], before, strict=True):
        torch.testing.assert_close(pages, other, atol=1e-5, rtol=1e-5, equal_nan=True)
    torch.testing.assert_close(step.attend_stored(0, turned, How()), wanted, atol=2e-5, rtol=1e-4)


def test_flash_attn_says_why_it_cannot(device):
    case = make_case([(0, 3)], 2, (16, 16), device)
    with pytest.raises(TriptychError, match=r"flash_attn cannot be used: .*(not installed|multiple of 256)"):
        step_of(case, "flash_attn", device)
