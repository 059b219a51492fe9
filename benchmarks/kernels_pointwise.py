"""Norm, rotation, activation, sampling and the small vision kernels on a GPU: checked, then timed against torch.

    python3 benchmarks/kernels_pointwise.py                 # about a minute, most of it compiling
    python3 benchmarks/kernels_pointwise.py --json FILE     # the table's rows too

Shapes are Qwen2.5-7B's. A figure is the median of CUDA graphs that hold several calls, on inputs that together are
larger than the L2 cache where a call moves megabytes, and that stay in it, as in a decode step, where it moves less.
"floor" is the bytes a call must move over 4.26 TB/s, what a device copy reaches on an H200. "host" is what queueing one
call outside a graph costs the CPU. "torch" is the same in torch's own functions, in a graph as well.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from triptych.kernels.activation import gated, gated_reference
from triptych.kernels.evs import frame_similarity, frame_similarity_reference
from triptych.kernels.image import normalise_patches, normalise_patches_reference
from triptych.kernels.norm import rms_norm, rms_norm_reference
from triptych.kernels.rope import rope_table, rope_table_reference, rotate_and_store, rotate_and_store_reference
from triptych.kernels.sampling import draw, draw_reference, greedy, greedy_reference
from triptych.kernels.sampling.reference import _top

HIDDEN, FFN, HEADS, KV_HEADS, DIM, VOCABULARY = 3584, 18944, 28, 4, 128, 152064
BANDWIDTH = 4.26e12
TOKENS = (1, 32, 128, 2048)
ROWS = (1, 32, 128)
# what the calls of one graph move at least, where a call moves much; the L2 of an H200 holds 60 MB
COLD = 256e6
MAX_SETS = 16
FP8 = torch.float8_e4m3fn

Call = Callable[[], Any]


@dataclass
class Row:
    """One line of the table; microseconds."""

    name: str
    ours: float
    torch: float | None
    floor: float
    host: float


def microseconds(calls: list[Call], repeats: int = 7) -> float:
    """Median time of one of the calls, run as a CUDA graph of all of them."""
    calls = list(itertools.islice(itertools.cycle(calls), max(len(calls), MAX_SETS)))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        calls[0]()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return 1000 * statistics.median(times) / len(calls)


def host_microseconds(call: Call, count: int = 30) -> float:
    """What one call costs the CPU."""
    call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(count):
        call()
    spent = time.perf_counter() - start
    torch.cuda.synchronize()
    return 1e6 * spent / count


def measure(name: str, make: Callable[[int], tuple[Call, Call | None]], moved: float) -> Row:
    """``make(seed)`` -> (our call, torch's call) on inputs of their own; ``moved``: bytes of a call."""
    pairs = [make(seed) for seed in range(max(1, min(MAX_SETS, int(COLD / moved) if moved > 4e6 else 2)))]
    theirs = [other for _, other in pairs if other is not None]
    return Row(
        name,
        microseconds([ours for ours, _ in pairs]),
        microseconds(theirs) if theirs else None,
        1e6 * moved / BANDWIDTH,
        host_microseconds(pairs[0][0]),
    )


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape, device="cuda", generator=generator).to(dtype)


def close(name: str, actual: torch.Tensor, expected: torch.Tensor, allowed: float = 0.03) -> None:
    """Largest error over the root mean square of what is expected."""
    got, want = actual.float(), expected.float()
    error = ((got - want).abs() - allowed * want.abs()).max().item() / want.square().mean().sqrt().item()
    if not error <= allowed:
        raise AssertionError(f"{name}: error {error:.3g} of the root mean square")


def norm_rows() -> list[Row]:
    weight = random(HIDDEN)
    out = []
    for tokens in TOKENS:

        def make(seed: int, tokens: int = tokens) -> tuple[Call, Call]:
            x, residual = random(tokens, HIDDEN, seed=seed), random(tokens, HIDDEN, seed=seed + 100)
            got = rms_norm(x, weight, 1e-6, residual=residual)
            for actual, expected in zip(got, rms_norm_reference(x, weight, 1e-6, residual=residual), strict=True):
                close("rms_norm", actual, expected)
            return (
                lambda: rms_norm(x, weight, 1e-6, residual=residual),
                lambda: functional.rms_norm(x + residual, (HIDDEN,), weight, 1e-6),
            )

        out.append(measure(f"rms_norm + residual, {tokens} tokens", make, tokens * HIDDEN * 8))
    return out


def activation_rows() -> list[Row]:
    out = []
    for tokens in TOKENS:

        def make(seed: int, tokens: int = tokens) -> tuple[Call, Call]:
            x = random(tokens, 2 * FFN, seed=seed)
            close("gated", gated(x, "silu"), gated_reference(x, "silu"))
            return lambda: gated(x, "silu"), lambda: functional.silu(x[:, :FFN]) * x[:, FFN:]

        out.append(measure(f"gated silu, {tokens} tokens", make, tokens * FFN * 6))
    return out


def rope_rows() -> list[Row]:
    inv_freq = 1e6 ** -(torch.arange(DIM // 2, device="cuda") / (DIM // 2))
    axis = torch.zeros(DIM // 2, dtype=torch.int64, device="cuda")
    out = []
    for tokens in TOKENS:

        def table(seed: int, tokens: int = tokens) -> tuple[Call, Call]:
            positions = torch.randint(0, 100_000, (1, tokens), device="cuda")
            got = rope_table(positions, inv_freq, axis, 1.0)
            for actual, expected in zip(got, rope_table_reference(positions, inv_freq, axis, 1.0), strict=True):
                close("rope_table", actual, expected, 1e-5)
            return (
                lambda: rope_table(positions, inv_freq, axis, 1.0),
                lambda: rope_table_reference(positions, inv_freq, axis, 1.0),
            )

        out.append(measure(f"rope_table, {tokens} tokens", table, tokens * DIM * 4))
    for pages_dtype, norm in ((torch.bfloat16, False), (torch.bfloat16, True), (FP8, False)):
        for tokens in TOKENS:

            def make(
                seed: int, tokens: int = tokens, pages_dtype: torch.dtype = pages_dtype, norm: bool = norm
            ) -> tuple[Call, None]:
                qkv = random(tokens, (HEADS + 2 * KV_HEADS) * DIM, seed=seed)
                angles = 3 * random(tokens, DIM // 2, seed=seed, dtype=torch.float32)
                cos, sin = angles.cos(), angles.sin()
                pages = [
                    torch.zeros(tokens // 16 + 2, KV_HEADS, 16, DIM, device="cuda").to(pages_dtype) for _ in range(4)
                ]
                slots = torch.randperm(16 * (tokens // 16 + 1), device="cuda")[:tokens]
                options: dict[str, Any] = {"num_heads": HEADS, "num_kv_heads": KV_HEADS}
                if norm:
                    options |= {"query_norm": random(DIM), "key_norm": random(DIM, seed=1)}
                query = rotate_and_store(qkv, cos, sin, pages[0], pages[1], slots, **options)
                expected = rotate_and_store_reference(qkv, cos, sin, pages[2], pages[3], slots, **options)
                close("queries", query, expected)
                # neighbouring float8 values lie an eighth apart
                for got, want in zip(pages[:2], pages[2:], strict=True):
                    close("pages", got, want, 0.13 if pages_dtype == FP8 else 0.03)
                return lambda: rotate_and_store(qkv, cos, sin, pages[0], pages[1], slots, **options), None

            moved = tokens * (2 * (HEADS + 2 * KV_HEADS) * DIM * 2 + 4 * DIM)
            if pages_dtype == FP8:
                moved -= tokens * 2 * KV_HEADS * DIM
            kind = ("fp8 pages" if pages_dtype == FP8 else "bf16 pages") + (", head norm" if norm else "")
            out.append(measure(f"rotate_and_store, {kind}, {tokens} tokens", make, moved))
    return out


def greedy_rows() -> list[Row]:
    out = []
    for dtype in (torch.bfloat16, torch.float32):
        for rows in ROWS:

            def make(seed: int, rows: int = rows, dtype: torch.dtype = dtype) -> tuple[Call, Call]:
                logits = random(rows, VOCABULARY, seed=seed, dtype=dtype)
                tokens, usable = greedy(logits)
                expected, _ = greedy_reference(logits.cpu())
                assert tokens.tolist() == expected.tolist(), "greedy tokens differ"
                assert usable.all()
                bad = logits[:1].clone()
                bad[0, VOCABULARY // 2] = float("nan")
                assert not greedy(bad)[1].any(), "NaN not seen"
                return lambda: greedy(logits), lambda: greedy_reference(logits)

            name = f"greedy, {'bf16' if dtype == torch.bfloat16 else 'fp32'}, {rows} rows"
            out.append(measure(name, make, rows * VOCABULARY * (2 if dtype == torch.bfloat16 else 4)))
    return out


def cumulative(logits: torch.Tensor, t: Any, k: Any, p: Any, m: Any) -> torch.Tensor:
    """The distribution as the reference cuts it, added up, float64 [N, V]; no looks at the data, so graphs hold it."""
    probabilities = (logits / t[:, None]).softmax(dim=-1)
    limit = torch.where(k > 0, k, logits.shape[1])
    probabilities = _top(probabilities, limit[:, None], p[:, None].double())
    floor = m[:, None] * probabilities.amax(dim=-1, keepdim=True)
    return probabilities.masked_fill(probabilities < floor, 0.0).cumsum(dim=-1, dtype=torch.float64)


def torch_draw(*given: torch.Tensor) -> torch.Tensor:
    total = cumulative(*given[:-1])
    return torch.searchsorted(total, given[-1][:, None] * total[:, -1:], right=True)[:, 0]


def check_draw(given: tuple[torch.Tensor, ...]) -> None:
    """Each token's stretch of the distribution holds the uniform number, to 1e-5: a flat token has 7e-6."""
    tokens, expected = draw(*given), draw_reference(*given)
    total = cumulative(*given[:-1])
    total = total / total[:, -1:]
    upper = total.gather(1, tokens[:, None])[:, 0]
    lower = torch.where(tokens > 0, total.gather(1, (tokens - 1).clamp(min=0)[:, None])[:, 0], 0.0)
    away = torch.maximum(lower - given[-1], given[-1] - upper).max().item()
    same = (tokens == expected).float().mean().item()
    print(f"    draws equal to the reference's: {same:.4f}, farthest from its number: {away:.2g}")
    assert away <= 1e-5, "a token that the number does not choose"
    assert (upper > lower).all(), "a token that was cut"


# temperature, top-k, top-p, min-p; spread of the logits: 3 is peaked as a model's, 0.5 the worst case, nearly flat
DRAWS = (
    ("temperature only", (0.7, 0, 1.0, 0.0), 3.0),
    ("k 20, p 0.8", (0.7, 20, 0.8, 0.0), 3.0),
    ("p 0.95", (1.0, 0, 0.95, 0.0), 3.0),
    ("p 0.95, flat", (1.0, 0, 0.95, 0.0), 0.5),
    ("min_p 0.05", (1.0, 0, 1.0, 0.05), 3.0),
)


def draw_rows() -> list[Row]:
    out = []
    for label, cut, spread in DRAWS:
        for rows in ROWS:

            def inputs(seed: int, rows: int = rows, cut: Any = cut, spread: float = spread) -> tuple[torch.Tensor, ...]:
                logits = spread * random(rows, VOCABULARY, seed=seed, dtype=torch.float32)
                generator = torch.Generator("cuda").manual_seed(seed)
                uniform = torch.rand(rows, dtype=torch.float64, device="cuda", generator=generator)
                kinds = (torch.float32, torch.int32, torch.float32, torch.float32)
                values = [torch.full((rows,), v, dtype=kind, device="cuda") for v, kind in zip(cut, kinds, strict=True)]
                return logits, *values, uniform

            def make(seed: int) -> tuple[Call, Call | None]:
                given = inputs(seed)
                if seed < 2:
                    check_draw(given)
                # sorting is slow; twice is enough
                return lambda: draw(*given), (lambda: torch_draw(*given)) if seed < 2 else None

            out.append(measure(f"draw, {label}, {rows} rows", make, rows * VOCABULARY * 4))
    return out


def vision_rows() -> list[Row]:
    mean, std = torch.tensor([122.8, 116.7, 104.1], device="cuda"), torch.tensor([68.5, 66.6, 70.3], device="cuda")

    def patches(seed: int) -> tuple[Call, Call]:
        pixels = torch.randint(0, 256, (5476, 3, 1, 196), dtype=torch.uint8, device="cuda")
        got = normalise_patches(pixels, mean, std, 2, torch.bfloat16)
        assert torch.equal(got, normalise_patches_reference(pixels, mean, std, 2, torch.bfloat16)), "patches differ"
        return (
            lambda: normalise_patches(pixels, mean, std, 2, torch.bfloat16),
            lambda: normalise_patches_reference(pixels, mean, std, 2, torch.bfloat16),
        )

    def frames(seed: int) -> tuple[Call, Call]:
        features = random(32, 16, 16, 5120, seed=seed)
        close("frame_similarity", frame_similarity(features), frame_similarity_reference(features), 1e-3)
        return lambda: frame_similarity(features), lambda: frame_similarity_reference(features)

    return [
        measure("normalise_patches, 1024 x 1024", patches, 5476 * (588 + 2352)),
        measure("frame_similarity, 32 x 256 x 5120", frames, 32 * 256 * 5120 * 2),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    parser.add_argument(
        "--only", default="", metavar="NAME", help="one part: norm, activation, rope, greedy, draw, vision"
    )
    args = parser.parse_args()
    begin = time.perf_counter()
    rows: list[Row] = []
    failed = []
    for part in (norm_rows, activation_rows, rope_rows, greedy_rows, draw_rows, vision_rows):
        if not part.__name__.startswith(args.only):
            continue
        try:
            rows += part()
        except Exception:
            failed.append(part.__name__)
            traceback.print_exc()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {time.perf_counter() - begin:.0f} s")
    print(f"{'':48} {'ours':>8} {'torch':>8} {'floor':>8} {'host':>8}   us")
    for row in rows:
        other = "" if row.torch is None else f"{row.torch:.2f}"
        print(f"{row.name:48} {row.ours:8.2f} {other:>8} {row.floor:8.2f} {row.host:8.1f}")
    if args.json:
        args.json.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
