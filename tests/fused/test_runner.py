"""Fused decoders in the runner: many requests in one paged cache, in chunks, give the tokens of transformers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from triptych.python_models.language_model.runner.executor import make_executor
from triptych.python_models.language_model.runner.fused import FusedDecoder
from triptych.python_models.language_model.runner.runner import DecoderRunner
from triptych.python_models.language_model.runner.step import Slice

from .conftest import FAMILIES

BLOCK = 4
TOKENS = 8


def prompts(axes):
    rng = np.random.default_rng(0)
    for length in (3, 26, 13):
        yield rng.integers(1, 290, length), np.stack([np.arange(length) // (k + 1) + 2 * k for k in range(axes)])


def expected(tiny, ids, position_ids):
    """Greedy tokens, each step computed anew."""
    out = []
    for _ in range(TOKENS):
        tokens = torch.from_numpy(np.concatenate([ids, out]).astype(np.int64))
        logits = tiny.logits(tiny.reference.embed(tokens, tokens < 0), torch.from_numpy(position_ids))
        out.append(int(logits[-1].argmax()))
        position_ids = np.concatenate([position_ids, position_ids[:, -1:] + 1], axis=1)
    return out


def greedy(runner, requests, chunk):
    """All requests together, prompts in chunks; who is through with its prompt decodes beside the others."""
    out = [[] for _ in requests]
    done = [0] * len(requests)
    while any(len(tokens) < TOKENS for tokens in out):
        slices, owners = [], []
        for index, (ids, positions) in enumerate(requests):
            if len(out[index]) == TOKENS:
                continue
            start = done[index]
            part = ids[start : start + chunk]
            where = positions[:, start : start + chunk]
            if not len(part):
                part = np.array(out[index][-1:])
                where = positions[:, -1:] + len(out[index])
            done[index] += len(part)
            wanted = int(done[index] >= len(ids))
            table = np.arange(index * 20, index * 20 + 20, dtype=np.int32)
            tables = (table,) * len(runner.kv_groups)
            slices.append(Slice(part, where.copy(), start, tables, num_logits=wanted))
            owners += [index] * wanted
        for index, row in zip(owners, runner.forward(slices), strict=True):
            out[index].append(int(row.argmax()))
    return out


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_tokens(make_tiny, name):
    tiny = make_tiny(name)
    requests = list(prompts(tiny.decoder.num_axes))
    answers = [expected(tiny, *request) for request in requests]
    executor = make_executor(tiny.decoder, "fused")
    assert isinstance(executor, FusedDecoder)
    runner = DecoderRunner(executor, tiny.decoder.num_axes, BLOCK, "cpu")
    runner.allocate([60] * len(runner.kv_groups))
    with torch.inference_mode():
        for chunk in (7, 100):
            assert greedy(runner, requests, chunk) == answers
