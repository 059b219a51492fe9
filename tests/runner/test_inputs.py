"""The vectorised layout of a step equals one written with plain loops."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from triptych.python_models.language_model.runner.graphs import graph_sizes
from triptych.python_models.language_model.runner.inputs import StepInputs
from triptych.python_models.language_model.runner.step import MediaRows, Slice

BLOCK, AXES, PADS = 4, 3, (90, 40)


def random_slice(rng, slot):
    length = rng.choice([1, 1, 1, 2, 5, 17])
    start = rng.choice([0, 1, 3, 4, 30])
    blocks = -(-(start + length) // BLOCK) + rng.choice([0, 0, 2])
    tables = tuple(np.array([rng.randrange(pad) for _ in range(blocks)], dtype=np.int32) for pad in PADS)
    media = ()
    if length == 17:
        media = (
            MediaRows(np.array([2, 3, 9]), torch.full((3, 8), float(slot))),
            MediaRows(np.array([5]), torch.full((1, 8), float(slot) + 0.5)),
        )
    return Slice(
        token_ids=np.array([rng.randrange(1000) for _ in range(length)]),
        position_ids=np.array([[rng.randrange(1000) for _ in range(length)] for _ in range(AXES)]),
        start=start,
        block_tables=tables,
        slot=slot,
        first_on_device=rng.random() < 0.5,
        media=media,
        spans=((1, 4), (4, 5)) if length == 5 else (),
        num_logits=rng.choice([0, 1, min(2, length)]),
    )


def naive(slices):
    """Everything that a batch holds, token by token."""
    order = [s for s in slices if len(s) == 1] + [s for s in slices if len(s) > 1]
    out = {"ids": [], "source": [], "positions": [], "slots": [[], []], "media": [], "spans": [], "ends": {}}
    for part in order:
        for i in range(len(part)):
            place = part.start + i
            out["ids"].append(int(part.token_ids[i]))
            out["source"].append(part.slot if i == 0 and part.first_on_device else -1)
            out["positions"].append(part.position_ids[:, i].tolist())
            for group in range(2):
                block = int(part.block_tables[group][place // BLOCK])
                out["slots"][group].append(block * BLOCK + place % BLOCK)
            if len(part) > 1:
                inside = [(part.start + a, part.start + b) for a, b in part.spans if a <= i < b]
                out["spans"].append(list(inside[0]) if inside else [0, 0])
        for media in part.media:
            out["media"] += [len(out["ids"]) - len(part) + int(p) for p in media.positions]
        out["ends"][id(part)] = len(out["ids"])
    out["logits"] = [out["ends"][id(s)] - k for s in slices for k in range(s.num_logits, 0, -1)]
    return order, out


@pytest.mark.parametrize("seed", range(40))
def test_a_batch_is_what_plain_loops_make_of_it(seed, device):
    rng = random.Random(seed)
    slices = [random_slice(rng, slot) for slot in range(rng.choice([1, 2, 9]))]
    order, expected = naive(slices)
    inputs = StepInputs(AXES, BLOCK, PADS, device)
    last_tokens = torch.arange(16, device=device) + 5000
    batch = inputs.upload(inputs.prepare(slices))
    assert batch.tokens[0].tolist() == expected["ids"]
    ids = [5000 + s if s >= 0 else i for s, i in zip(expected["source"], expected["ids"], strict=True)]
    assert batch.token_ids(last_tokens).tolist() == ids
    assert batch.position_ids.T.tolist() == expected["positions"]
    assert batch.slots.tolist() == expected["slots"]
    assert batch.context_lens.tolist() == [s.start + len(s) for s in order]
    singles = sum(len(s) == 1 for s in slices)
    assert batch.num_singles == singles
    longer = [len(s) for s in order[singles:]]
    assert batch.max_query_len == max(longer, default=0)
    if longer:
        assert batch.query_starts.tolist() == [0, *np.cumsum(longer)]
    else:
        assert batch.query_starts is None
    if any(s.spans for s in slices):
        assert batch.spans.tolist() == expected["spans"]
    else:
        assert batch.spans is None
    for group, pad in enumerate(PADS):
        for row, part in zip(batch.tables[group].tolist(), order, strict=True):
            used = -(-(part.start + len(part)) // BLOCK)
            assert row[:used] == part.block_tables[group][:used].tolist()
            assert set(row[used:]) <= {pad}
    found = list(range(len(ids))) if batch.logit_rows is None else batch.logit_rows.tolist()
    assert found == expected["logits"]
    places = [] if batch.media_places is None else batch.media_places.tolist()
    assert places == expected["media"]
    assert batch.is_media.nonzero().flatten().tolist() == sorted(expected["media"])
    rows = torch.cat(batch.host.media_rows)[:, 0].tolist() if places else []
    assert rows == [float(m.rows[i, 0]) for part in order for m in part.media for i in range(len(m.positions))]
    assert batch.tokens.device.type == device


def test_decodes_alone_need_no_picking(device):
    slices = [
        Slice(np.array([7]), np.zeros((AXES, 1), np.int64), start, (np.arange(9, dtype=np.int32),) * 2, 3)
        for start in (3, 4, 30)
    ]
    inputs = StepInputs(AXES, BLOCK, PADS, device)
    batch = inputs.upload(inputs.prepare(slices))
    assert batch.logit_rows is None
    assert batch.host.in_order
    assert not batch.late


def test_an_upload_is_not_overwritten_by_the_next(device):
    """Whatever the host writes for step k + 1, step k keeps its values."""
    inputs = StepInputs(AXES, BLOCK, PADS, device)
    rng = random.Random(0)
    steps = [[random_slice(rng, slot) for slot in range(9)] for _ in range(8)]
    if device == "cuda":
        # keep the device busy, so that copies wait in line
        wide = torch.randn(4096, 4096, device=device)
        for _ in range(20):
            wide = torch.tanh(wide @ wide)
    previous = None
    for slices in steps:
        batch = inputs.upload(inputs.prepare(slices))
        if previous is not None:
            assert torch.equal(previous[0].tokens.cpu(), torch.from_numpy(previous[1]))
        previous = batch, batch.host.tokens.copy()


def test_graph_sizes_end_with_the_largest_batch():
    assert graph_sizes(1) == [1]
    assert graph_sizes(5) == [1, 2, 4, 5]
    assert graph_sizes(64) == [1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64]
    assert graph_sizes(130)[-3:] == [120, 128, 130]
    assert graph_sizes(512)[-2:] == [480, 512]
