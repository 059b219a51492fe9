"""Sampling: kernels against the references, and both against the distribution they claim to draw from."""

from __future__ import annotations

import math

import pytest
import torch

from triptych.kernels.sampling import draw, draw_reference, greedy, greedy_reference
from triptych.kernels.sampling.kernel import (
    _best_kernel,
    _count_kernel,
    _draw_kernel,
    _gather_kernel,
    _merge_kernel,
    _window_kernel,
)
from triptych.kernels.sampling.launch import launch_draw, launch_greedy

# exp of a very negative logit is 0, as it should be; -inf - -inf is never used; the interpreter remarks on both
pytestmark = [
    pytest.mark.filterwarnings("ignore:underflow encountered"),
    pytest.mark.filterwarnings("ignore:invalid value encountered"),
    pytest.mark.filterwarnings("ignore:overflow encountered"),
]


def _settings(device, rows):
    """For each row (temperature, top_k, top_p, min_p) -> tensors."""
    columns = list(zip(*rows, strict=True))
    kinds = (torch.float32, torch.int32, torch.float32, torch.float32)
    return [torch.tensor(column, dtype=kind, device=device) for column, kind in zip(columns, kinds, strict=True)]


def _assert_as_the_reference(tokens, logits, settings, uniform):
    """The reference's token of a number at most 1e-6 away: an edge of the distribution may lie in between."""
    logits, uniform, *settings = (x.cpu() for x in (logits, uniform, *settings))
    near = [draw_reference(logits, *settings, (uniform + shift).clamp(0, 1 - 2**-53)) for shift in (0, -1e-6, 1e-6)]
    wrong = torch.stack([tokens.cpu() != expected for expected in near]).all(0)
    rows = [[x[row].item() for x in (*settings, uniform, tokens, near[0])] for row in wrong.nonzero()[:, 0]]
    assert not rows
    assert (tokens.cpu() == near[0]).float().mean() > 0.9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "vocabulary"), [(1, 2), (3, 1023), (2, 1024), (9, 2049), (33, 5000)])
def test_greedy(device, dtype, rows, vocabulary):
    torch.manual_seed(0)
    # few distinct values: ties everywhere
    logits = torch.randint(-8, 8, (rows, vocabulary + 8), device=device).to(dtype)[:, :vocabulary]
    tokens, usable = launch_greedy(logits)
    expected, _ = greedy_reference(logits.cpu())
    assert tokens.tolist() == expected.tolist()
    assert usable.all()
    assert tokens.dtype == torch.int64
    assert usable.dtype == torch.bool


@pytest.mark.parametrize("place", [0, 1500, 2499])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_greedy_tells_unusable_rows(device, place, bad):
    torch.manual_seed(0)
    logits = torch.randn(4, 2500, device=device)
    logits[1, place] = bad
    logits[2] = -math.inf
    logits[3] = -math.inf
    logits[3, place] = -1e30
    for tokens, usable in (launch_greedy(logits), greedy_reference(logits)):
        assert usable.tolist() == [True, False, False, True]
        assert tokens[0] == logits[0].argmax()
        assert tokens[3] == place
        assert ((tokens >= 0) & (tokens < 2500)).all()


_CUTS = [
    (1.0, 0, 1.0, 0.0),
    (0.6, 0, 1.0, 0.0),
    (1.0, 2, 1.0, 0.0),
    (1.3, 20, 1.0, 0.0),
    (1.0, 300, 1.0, 0.0),
    (1.0, 10**6, 1.0, 0.0),
    (1.0, 0, 0.9, 0.0),
    (1.0, 0, 0.05, 0.0),
    (1.0, 0, 0.9999, 0.0),
    (0.7, 20, 0.8, 0.0),
    (1.5, 300, 0.95, 0.0),
    (1.0, 0, 1.0, 0.1),
    (1.0, 50, 0.9, 0.05),
    (1.0, 0, 0.5, 0.9),
    (0.0, 50, 0.9, 0.05),
    (1.0, 1, 0.9, 0.05),
    (0.01, 0, 0.9, 0.0),
]


@pytest.mark.parametrize(
    ("spread", "vocabulary", "chunk", "tile", "room"),
    [
        (0, 300, 128, 512, 512),
        (3, 301, 64, 16, 512),
        (30, 300, 512, 512, 512),
        (0.5, 250, 64, 128, 8),
        (3, 40, 16, 64, 8),
    ],
)
def test_draws_what_the_reference_draws(device, spread, vocabulary, chunk, tile, room):
    """Every cut, all over the distribution; what lies between the brackets fits a tile, the list, or neither."""
    torch.manual_seed(0)
    cuts = _CUTS
    logits = spread * torch.randn(len(cuts), vocabulary, device=device)
    # masked by a grammar
    logits[:, ::7] = -math.inf
    uniform = torch.rand(len(cuts), dtype=torch.float64, device=device)
    # no further out: what has less than 2^-40 of the probability of the most likely token is not drawn at all
    uniform[::4], uniform[2::8] = 1e-6, 1 - 1e-6
    settings = _settings(device, cuts)
    tokens = launch_draw(logits, *settings, uniform, chunk=chunk, tile=tile, room=room)
    _assert_as_the_reference(tokens, logits, settings, uniform)


@pytest.mark.parametrize("cut", [(1.0, 30, 1.0, 0.0), (1.0, 0, 0.5, 0.0), (1.0, 60, 0.7, 0.0), (1.0, 0, 1.0, 0.3)])
def test_ties_keep_the_lower_tokens(device, cut):
    """Four values only, so every edge runs through dozens of equal logits."""
    torch.manual_seed(0)
    logits = torch.randint(0, 4, (4, 300), device=device).float()
    uniform = torch.linspace(0, 1 - 1e-9, 4, dtype=torch.float64, device=device)
    settings = _settings(device, [cut] * 4)
    tokens = launch_draw(logits, *settings, uniform, chunk=64, tile=64)
    _assert_as_the_reference(tokens, logits, settings, uniform)
    if cut[1] == 30:
        # by hand: of more than 30 logits of 3 only the first 30 may ever come
        for row, token in zip(logits, tokens.tolist(), strict=True):
            assert token in row.eq(3).nonzero()[:30, 0].tolist()


def test_draws_from_a_large_vocabulary(device):
    """Sizes as of real rows; what the brackets leave is a list of its own for each."""
    torch.manual_seed(0)
    cuts = [(0.7, 20, 0.8, 0.0), (1.0, 0, 0.95, 0.0), (1.0, 0, 1.0, 0.05), (1.0, 3000, 0.6, 0.0)]
    logits = torch.tensor([3.0, 0.5, 3.0, 1.0], device=device)[:, None] * torch.randn(4, 12000, device=device)
    uniform = torch.rand(4, dtype=torch.float64, device=device)
    settings = _settings(device, cuts)
    _assert_as_the_reference(launch_draw(logits, *settings, uniform), logits, settings, uniform)


def test_the_draw_does_not_depend_on_the_batch(device):
    torch.manual_seed(0)
    cuts = [(1.0, 0, 0.9, 0.0), (0.7, 20, 0.8, 0.0), (1.0, 50, 0.9, 0.05), (1.0, 0, 1.0, 0.0)]
    logits = torch.randn(4, 200, device=device)
    uniform = torch.rand(4, dtype=torch.float64, device=device)
    settings = _settings(device, cuts)
    together = launch_draw(logits, *settings, uniform, chunk=32, tile=128)
    for row in range(4):
        one = slice(row, row + 1)
        alone = launch_draw(logits[one], *(s[one] for s in settings), uniform[one], chunk=64, tile=256)
        assert alone.item() == together[row].item()


@pytest.mark.parametrize("cut", [(1.0, 0, 1.0, 0.0), (0.7, 4, 1.0, 0.0), (1.0, 0, 0.7, 0.0), (1.0, 0, 1.0, 0.2)])
def test_frequencies_are_probabilities(device, cut):
    """Draws at 12 evenly spread numbers are a token's probability times 12, give or take one."""
    torch.manual_seed(0)
    row = 2 * torch.randn(12)
    heat, k, p, m = cut
    probability = (row.double() / heat).softmax(0)
    order = probability.argsort(descending=True)
    before = probability[order].cumsum(0) - probability[order]
    kept = torch.zeros(12, dtype=torch.bool)
    kept[order] = ((torch.arange(12) < k) | (k == 0)) & ((before < p) | (p == 1))
    kept &= probability >= m * probability.max()
    expected = torch.where(kept, probability, 0.0)
    expected /= expected.sum()
    uniform = ((torch.arange(12) + 0.5) / 12).double().to(device)
    settings = _settings(device, [cut] * 12)
    for run, sizes in ((launch_draw, {"chunk": 8, "tile": 16}), (draw_reference, {})):
        tokens = run(row.to(device).expand(12, 12).contiguous(), *settings, uniform, **sizes)
        counts = torch.bincount(tokens.cpu(), minlength=12)
        assert (counts - 12 * expected).abs().max() <= 1.01


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_unusable_rows_end_with_some_token(device, bad):
    logits = torch.zeros(3, 100, device=device)
    logits[1, 40 : 41 if bad != -math.inf else None] = bad
    if bad == -math.inf:
        logits[1] = bad
    settings = _settings(device, [(1.0, 5, 0.9, 0.1)] * 3)
    uniform = torch.full((3,), 0.5, dtype=torch.float64, device=device)
    for run in (launch_draw, draw_reference):
        tokens = run(logits, *settings, uniform)
        assert ((tokens >= 0) & (tokens < 100)).all()
        assert tokens[0] == tokens[2]


def test_no_rows(device):
    empty = torch.zeros(0, 7, device=device)
    tokens, usable = launch_greedy(empty)
    assert tokens.shape == usable.shape == (0,)
    assert launch_draw(empty, *_settings(device, [(1.0, 0, 1.0, 0.0)])[:0], *[empty[:, 0]] * 5).shape == (0,)


def test_public_functions_run_anywhere(device):
    logits = torch.tensor([[0.0, 5.0, 1.0]], device=device)
    assert greedy(logits)[0].tolist() == [1]
    uniform = torch.zeros(1, dtype=torch.float64, device=device)
    assert draw(logits, *_settings(device, [(1.0, 2, 1.0, 0.0)]), uniform).tolist() == [1]


@pytest.mark.parametrize("kind", ["fp32", "bf16"])
def test_compiles_for_the_h200(compile_sm90, kind):
    sizes = dict.fromkeys(("row_stride", "vocabulary"), "i32:16") | {"chunks": "i32"}
    parts = {"logits": f"*{kind}:16", "values": "*fp32:16", "tokens": "*i32:16"}
    for chunk in (1024, 2048, 4096):
        constants = {"CHUNK": chunk, "PDL": True, "tally": None}
        built = compile_sm90(_best_kernel, parts | sizes, constants, num_warps=4, launch_pdl=True)
        assert built.spilled == 0
        assert "ld.global.v4" in built.ptx
    merge = {"values": "*fp32:16", "tokens": "*i32:16", "out": "*i64:16", "usable": "*i1:16", "chunks": "i32"}
    built = compile_sm90(_merge_kernel, merge, {"BLOCK": 256, "PDL": True}, num_warps=1, launch_pdl=True)
    assert built.spilled == 0
    row = {"values": "*fp32:16", "tokens": "*i32:16"} | dict.fromkeys(("temperature", "top_p", "min_p"), "*fp32:16")
    row |= {"top_k": "*i32:16", "uniform": "*fp64:16", "out": "*i64:16"}
    row |= {"tally": "*i32:16", "bounds": "*i32:16", "sums": "*i64:16", "listed": "*i32:16"}
    types = parts | sizes | row
    for chunk, warps in ((1024, 4), (2048, 8)):
        for kernel, own, kernel_warps in (
            (_best_kernel, {}, 4),
            (_count_kernel, {}, warps),
            (_gather_kernel, {"ROOM": 16384}, warps),
            (_draw_kernel, {"ROOM": 16384, "TILE": 4096}, 16),
        ):
            if kind == "bf16" and kernel is _draw_kernel:
                # slow to compile, and reads of logits look the same in the others
                continue
            constants = {"BLOCK": 262144 // chunk, "CHUNK": chunk, "PDL": True} | own
            constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
            given = {name: types[name] for name in kernel.arg_names if name not in constants}
            built = compile_sm90(kernel, given, constants, num_warps=kernel_warps, launch_pdl=True)
            assert built.spilled == 0
            assert built.shared < 48 * 1024
    given = {name: types[name] for name in _window_kernel.arg_names if name != "PDL"}
    assert compile_sm90(_window_kernel, given, {"PDL": True}, num_warps=4, launch_pdl=True).spilled == 0
