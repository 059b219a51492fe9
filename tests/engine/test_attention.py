"""Paged attention against plain attention over each request's own tokens, with poison in everybody else's blocks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from triptych.python_models.language_model.runner.attention import KVCache, PagedStep
from triptych.python_models.language_model.runner.context import How
from triptych.python_models.language_model.runner.step import Slice

BLOCK = 4
# (tokens in the cache, new tokens) of each request
CASES = {
    "decodes of very different lengths": [(3, 1), (200, 1), (0, 1), (8, 1)],
    "fresh prompts": [(0, 5), (0, 17)],
    "chunks": [(4, 7), (30, 9)],
    "all mixed": [(6, 1), (150, 1), (0, 9), (11, 6)],
    "one decode": [(13, 1)],
}
HOWS = {
    "plain": How(),
    "scaled": How(scaling=0.3),
    "window": How(window=6),
    "softcap": How(softcap=1.5),
    "sinks and window": How(window=6, sinks=torch.tensor([0.5, -1.0, 2.0, 0.1, 0.0, 1.0])),
}


def naive(query, key, value, how):
    """query [H, n, D] of the last n tokens, key [Hk, m, D], value [Hk, m, Dv] -> [n, H, Dv]; head by head."""
    heads, new, width = query.shape
    out = torch.zeros(new, heads, value.shape[-1])
    for h in range(heads):
        source = h // (heads // key.shape[0])
        for i in range(new):
            at = key.shape[1] - new + i
            first = 0 if how.window is None else max(0, at - how.window + 1)
            scores = key[source, first : at + 1] @ query[h, i] * (how.scaling or width**-0.5)
            if how.softcap:
                scores = how.softcap * torch.tanh(scores / how.softcap)
            weights = scores.exp()
            total = weights.sum() + (how.sinks[h].exp() if how.sinks is not None else 0)
            out[i, h] = (weights / total) @ value[source, first : at + 1]
    return out


@pytest.mark.parametrize("kv_heads", [6, 2, 1])
@pytest.mark.parametrize("how", HOWS.values(), ids=HOWS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_it_equals_plain_attention(case, how, kv_heads, device):
    generator = torch.Generator().manual_seed(1)
    heads, width, value_width = 6, 8, 5
    cache = KVCache({7: ((kv_heads, width), (kv_heads, value_width))}, 120, BLOCK, torch.float32, device)
    for pages in cache._pages[7]:
        pages[:-1] = torch.nan
    # never block 0, which careless padding would read
    blocks = iter((torch.randperm(119, generator=generator) + 1).tolist())
    slices, queries, keys, values = [], [], [], []
    # single tokens first, as the runner orders them
    for done, new in sorted(case, key=lambda item: item[1] > 1):
        table = tuple(next(blocks) for _ in range(-(-(done + new) // BLOCK)))
        cache.scrub(table)
        positions = np.arange(done, done + new)
        slices.append(Slice(np.zeros(new, np.int64), positions[None], done, (np.asarray(table, np.int32),)))
        queries.append(torch.randn(heads, new, width, generator=generator))
        keys.append(torch.randn(kv_heads, done + new, width, generator=generator))
        values.append(torch.randn(kv_heads, done + new, value_width, generator=generator))
        old = np.arange(done)
        slots = torch.from_numpy(np.array(table)[old // BLOCK] * BLOCK + old % BLOCK).to(device)
        cache.write(7, slots, keys[-1][:, :done].to(device), values[-1][:, :done].to(device))
    if how.sinks is not None:
        how = How(how.scaling, how.window, how.softcap, how.sinks.to(device))
    new_keys = torch.cat([k[:, part.start :] for k, part in zip(keys, slices, strict=True)], 1)
    new_values = torch.cat([v[:, part.start :] for v, part in zip(values, slices, strict=True)], 1)
    step = PagedStep(cache, slices)
    out = step.attend(7, torch.cat(queries, 1).to(device), new_keys.to(device), new_values.to(device), how).cpu()
    how = How(how.scaling, how.window, how.softcap, None if how.sinks is None else how.sinks.cpu())
    expected = torch.cat([naive(q, k, v, how) for q, k, v in zip(queries, keys, values, strict=True)])
    torch.testing.assert_close(out, expected, atol=2e-5, rtol=1e-4)
