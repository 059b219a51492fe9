"""Paged attention against the reference, and against what the GPU's memory and tensor cores can give.

    python3 benchmarks/kernels_attention.py                 # checks, then times (under a minute)
    python3 benchmarks/kernels_attention.py --tune          # best launch parameters, as lines of the launch table
    python3 benchmarks/kernels_attention.py --json FILE     # the table's rows for benchmarks/results

The shape is Qwen2.5-7B's attention (28 heads, 4 kv heads of 128) unless a row says otherwise. A row's calls walk
through block tables that together point to more memory than the L2 cache holds, as the layers of a model do, and run in
a CUDA graph. Decode is measured by bytes: keys and values once; prefill by FLOPs: 4 * visible pairs * heads * head dim.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from triptych.kernels import attention
from triptych.kernels.attention import launch as launching
from triptych.kernels.attention.launch import MAX_SHORT_QUERY, Launch

FP8 = torch.float8_e4m3fn
# bytes that a row's calls read before they come back to the same place: several times the L2 of an H200
COLD = 256 << 20
MAX_SETS = 64
# largest error over the root mean square of the result
ALLOWED = 0.03


@dataclasses.dataclass
class Row:
    """One shape.

    Attributes:
        contexts: tokens of each request, the new ones included.
        queries: new tokens of each request; None is decode.
        spans: length of pictures: tokens see forward within every second stretch of this length.
        width: tokens that the block table has room for, what a captured graph would have.
    """

    name: str
    contexts: list[int]
    queries: list[int] | None = None
    heads: int = 28
    kv_heads: int = 4
    dim: int = 128
    page: int = 16
    pages: torch.dtype = torch.bfloat16
    window: int | None = None
    spans: int = 0
    width: int = 8192
    pdl: bool = True
    sdpa: bool = False


def rows() -> list[Row]:
    out = []
    for dtype, kind in ((torch.bfloat16, "bf16"), (FP8, "fp8")):
        for batch in (1, 32, 128):
            for context in (256, 1152, 8192):
                out.append(Row(f"decode {kind} {batch} x {context}", [context] * batch, pages=dtype))
    ragged = [64 + (i * 929) % 2177 for i in range(128)]
    out += [
        Row("decode bf16 1 x 1024", [1024]),
        Row("decode bf16 1 x 1024, no PDL", [1024], pdl=False),
        Row("decode bf16 1 x 1024, pages of 64", [1024], page=64),
        Row("decode bf16 128 x 1152, pages of 64", [1152] * 128, page=64),
        Row(f"decode bf16 128, {min(ragged)} to {max(ragged)}", ragged),
        Row("decode bf16 32 x 8192, window 1024", [8192] * 32, window=1024),
        Row("decode D 64, 64/8 heads, 32 x 1152", [1152] * 32, heads=64, kv_heads=8, dim=64),
        Row("decode D 256, 16/8 heads, 32 x 1152", [1152] * 32, heads=16, kv_heads=8, dim=256),
        Row("verify 5 tokens, 1 x 1024", [1024], [5]),
        Row("verify 5 tokens, 32 x 1152", [1152] * 32, [5] * 32),
        Row("prefill 4 x 2048", [2048] * 4, [2048] * 4, sdpa=True),
        Row("prefill 4 x 2048, pages of 64", [2048] * 4, [2048] * 4, page=64),
        Row("prefill 4 x 2048, fp8 pages", [2048] * 4, [2048] * 4, pages=FP8),
        Row("prefill 1 x 1024", [1024], [1024], sdpa=True),
        Row("prefill 1 x 8192", [8192], [8192], sdpa=True),
        Row("prefill 16 x 512 after 1024", [1536] * 16, [512] * 16),
        Row("prefill 1 x 128 after 4096", [4224], [128]),
        Row("prefill 4 x 2048, window 512", [2048] * 4, [2048] * 4, window=512),
        Row("prefill 4 x 2048, pictures of 256", [2048] * 4, [2048] * 4, spans=256),
        Row("prefill D 256, 16/8 heads, 4 x 2048", [2048] * 4, [2048] * 4, heads=16, kv_heads=8, dim=256),
        Row("prefill D 64, 64/8 heads, 4 x 2048", [2048] * 4, [2048] * 4, heads=64, kv_heads=8, dim=64),
    ]
    return out


class Problem:
    """A row's tensors: one query, and several block tables into one pool of pages."""

    def __init__(self, row: Row, device: str = "cuda") -> None:
        self.row = row
        counts = row.queries or [1] * len(row.contexts)
        self.max_query_len = max(counts)
        per_set = sum(-(-length // row.page) for length in row.contexts)
        element = row.pages.itemsize
        set_bytes = per_set * row.page * row.kv_heads * row.dim * element * 2
        sets = min(MAX_SETS, max(1, -(-COLD // set_bytes)))
        shape = (per_set * sets + 1, row.kv_heads, row.page, row.dim)
        self.key_pages, self.value_pages = (
            torch.randn(shape, device=device, dtype=torch.bfloat16).to(row.pages) for _ in range(2)
        )
        order = torch.randperm(per_set * sets, dtype=torch.int32)
        width = -(-max(row.width, *row.contexts) // row.page)
        self.tables = []
        for chosen in order.split(per_set):
            table = torch.full((len(row.contexts), width), per_set * sets, dtype=torch.int32)
            at = 0
            for request, length in enumerate(row.contexts):
                blocks = -(-length // row.page)
                table[request, :blocks] = chosen[at : at + blocks]
                at += blocks
            self.tables.append(table.to(device))
        self.context_lens = torch.tensor(row.contexts, dtype=torch.int32, device=device)
        starts = torch.tensor([0, *counts]).cumsum(0).to(torch.int32)
        self.starts = starts.to(device)
        self.query = torch.randn(int(starts[-1]), row.heads, row.dim, device=device, dtype=torch.bfloat16)
        # pairs of query and key that see each other, and keys that are read at all
        self.pairs, self.keys = 0, 0
        spans = torch.zeros(int(starts[-1]), 2, dtype=torch.int32)
        for request, (length, count) in enumerate(zip(row.contexts, counts, strict=True)):
            position = torch.arange(length - count, length)
            low = (position + 1 - row.window).clamp(min=0) if row.window else torch.zeros_like(position)
            high = position + 1
            if row.spans:
                begin = position // row.spans * row.spans
                picture = begin // row.spans % 2 == 1
                part = spans[starts[request] : starts[request + 1]]
                part[picture, 0] = begin[picture].to(torch.int32)
                part[picture, 1] = (begin[picture] + row.spans).to(torch.int32)
                high = torch.where(picture, (begin + row.spans).clamp(max=length), high)
            self.pairs += int((high - low).sum())
            self.keys += length - int(low.min())
        self.spans = spans.to(device) if row.spans else None

    @property
    def bytes(self) -> int:
        kept = self.keys * self.row.kv_heads * self.row.dim * 2 * self.key_pages.element_size()
        return kept + 2 * self.query.numel() * self.query.element_size()

    @property
    def flops(self) -> int:
        return 4 * self.pairs * self.row.heads * self.row.dim

    @property
    def short(self) -> bool:
        return self.max_query_len <= MAX_SHORT_QUERY

    def kernel(self, which: int, params: Launch | None = None) -> torch.Tensor:
        """What ``attention.decode`` and ``attention.prefill`` launch."""
        return launching.launch(
            self.query,
            self.key_pages,
            self.value_pages,
            self.tables[which],
            self.context_lens,
            None if self.row.queries is None else self.starts,
            self.max_query_len,
            scaling=self.row.dim**-0.5,
            window=self.row.window,
            softcap=None,
            sinks=None,
            spans=self.spans,
            key_scale=1.0,
            value_scale=1.0,
            params=params,
        )

    def error(self) -> float:
        """Largest error over the root mean square of the reference's first requests, on the last block table."""
        requests = min(len(self.row.contexts), 8)
        tokens = int(self.starts[requests])
        expected = attention.prefill_reference(
            self.query[:tokens],
            self.key_pages,
            self.value_pages,
            self.tables[-1][:requests],
            self.context_lens[:requests],
            self.starts[: requests + 1],
            scaling=self.row.dim**-0.5,
            window=self.row.window,
            spans=None if self.spans is None else self.spans[:tokens],
        ).float()
        got = self.kernel(len(self.tables) - 1)[:tokens].float()
        excess = (got - expected).abs() - ALLOWED * expected.abs()
        error = float(excess.max() / expected.square().mean().sqrt())
        return math.inf if math.isnan(float(got.sum())) else max(error, 0.0)

    def sdpa(self) -> Callable[[], torch.Tensor]:
        """torch's own attention over dense keys and values, heads repeated beforehand."""
        batch, length = len(self.row.contexts), self.row.contexts[0]
        shape = (batch, self.row.heads, length, self.row.dim)
        q, k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(3))
        return lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)


def seconds(calls: Sequence[Callable[[], Any]], budget: float = 0.08) -> float:
    """Time of one call: all of them in one CUDA graph, the median of several replays."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def replay(times: int) -> float:
        begin.record()
        for _ in range(times):
            graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / times / len(calls)

    replay(2)
    once = replay(2) * len(calls)
    times = max(1, min(50, int(budget / 5 / max(once, 1e-6))))
    return sorted(replay(times) for _ in range(5))[2]


def timed(problem: Problem, params: Launch | None = None, budget: float = 0.08) -> float:
    return seconds([lambda i=i: problem.kernel(i, params) for i in range(len(problem.tables))], budget)


def ceilings() -> tuple[float, float]:
    """(bytes/s of a device copy, FLOP/s of a bf16 8192^3 product), measured here."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copied = 2 * source.numel() / seconds([lambda: target.copy_(source)])
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return copied, 2 * 8192**3 / seconds([lambda: a @ b], 0.3)


def host_us() -> float:
    """What one split decode launch (two kernels) costs the CPU, outside of a graph."""
    problem = Problem(Row("", [1024]))
    problem.kernel(0)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(300):
        problem.kernel(0)
    spent = time.perf_counter() - start
    torch.cuda.synchronize()
    return spent / 300 * 1e6


def measure(problem: Problem, copy: float, gemm: float) -> dict[str, Any]:
    row, with_pdl = problem.row, launching.pdl
    if not row.pdl:
        launching.pdl = lambda tensor: False
    try:
        error = problem.error()
        spent = timed(problem)
    finally:
        launching.pdl = with_pdl
    record: dict[str, Any] = {"row": row.name, "us": round(spent * 1e6, 2), "error": round(error, 4)}
    record["ok"] = error <= ALLOWED
    if problem.short:
        record |= {"TB/s": round(problem.bytes / spent / 1e12, 3), "of_copy": round(problem.bytes / spent / copy, 3)}
    else:
        record |= {"TFLOP/s": round(problem.flops / spent / 1e12), "of_gemm": round(problem.flops / spent / gemm, 3)}
    if row.sdpa:
        record["sdpa_us"] = round(seconds([problem.sdpa()]) * 1e6, 2)
    return record


def table(records: list[dict[str, Any]]) -> str:
    lines = [f"{'row':42} {'us':>9} {'rate':>14} {'of ceiling':>10} {'sdpa us':>9}  check"]
    for record in records:
        if "us" not in record:
            lines.append(f"{record['row']:42} FAILED: {record['failed']}")
            continue
        rate = f"{record['TB/s']:.2f} TB/s" if "TB/s" in record else f"{record['TFLOP/s']:.0f} TFLOP/s"
        share = record.get("of_copy", record.get("of_gemm"))
        check = "ok" if record["ok"] else f"WRONG {record['error']}"
        sdpa = f"{record['sdpa_us']:.1f}" if "sdpa_us" in record else ""
        lines.append(f"{record['row']:42} {record['us']:9.1f} {rate:>14} {share:10.0%} {sdpa:>9}  {check}")
    return "\n".join(lines)


def candidates(problem: Problem) -> list[Launch]:
    """What is worth trying for a row."""
    if problem.short:
        shapes = [(32, 4, 3), (32, 4, 5), (64, 4, 2), (64, 4, 3), (64, 4, 4), (128, 4, 2), (128, 8, 2), (128, 8, 3)]
        per_sm = (1, 4) if len(problem.row.contexts) == 1 else (2, 8)
        return [Launch(64, n, warps, stages, programs) for n, warps, stages in shapes for programs in per_sm]
    shapes = [(128, 64, 8, 2), (128, 64, 8, 3), (128, 32, 8, 3), (128, 128, 8, 2), (64, 64, 4, 2), (64, 64, 4, 3)]
    shapes += [(64, 32, 4, 3), (64, 128, 4, 2), (128, 64, 4, 2), (128, 64, 16, 2)]
    return [Launch(*shape, 1) for shape in shapes]


def tune(limit: float) -> str:
    """Lines of the launch table, the best of what was tried within ``limit`` seconds; the present entry competes."""
    wanted = [
        Row("decode", [1024]),
        Row("decode", [1152] * 32),
        Row("decode", [1152] * 128),
        Row("decode", [1024], pages=FP8),
        Row("decode", [1152] * 32, pages=FP8),
        Row("decode", [1152] * 128, pages=FP8),
        Row("prefill", [2048] * 4, [2048] * 4),
        Row("prefill", [1088] * 16, [64] * 16),
        Row("prefill", [2048] * 4, [2048] * 4, pages=FP8),
        Row("decode", [1152] * 32, heads=64, kv_heads=8, dim=64),
        Row("prefill", [2048] * 4, [2048] * 4, heads=64, kv_heads=8, dim=64),
        Row("decode", [1152] * 32, heads=16, kv_heads=8, dim=256),
        Row("prefill", [2048] * 4, [2048] * 4, heads=16, kv_heads=8, dim=256),
    ]
    start = time.perf_counter()
    lines = []
    for row in wanted:
        if time.perf_counter() - start > limit:
            lines.append(f"# out of time before {row.name} D {row.dim} {row.pages}")
            continue
        problem = Problem(row)
        size = len(row.contexts) * row.kv_heads if problem.short else problem.max_query_len
        key = (row.dim, row.pages.itemsize, size)
        present = launching.choose(launching.kind_of(problem.max_query_len), torch.cuda.get_device_capability(), *key)
        tried = list(dict.fromkeys([present, *candidates(problem)]))
        with ThreadPoolExecutor(16) as pool:
            # compiles them side by side; what does not fit the GPU drops out
            fitting = [found for found in pool.map(lambda p, problem=problem: _fits(problem, p), tried) if found]
        times = {params: timed(problem, params, 0.02) for params in fitting}
        best = min(times, key=lambda params: times[params])
        shown = ", ".join(str(value) for value in dataclasses.astuple(best))
        lines.append(
            f"{row.name:8} {key}: Launch({shown}),  # {times[best] * 1e6:.1f} us; present {times[present] * 1e6:.1f} us"
        )
        print(lines[-1], flush=True)
        for params in sorted(times, key=lambda params: times[params])[1:4]:
            print(f"    then {dataclasses.astuple(params)} {times[params] * 1e6:.1f} us", flush=True)
    return "\n".join(lines)


def _fits(problem: Problem, params: Launch) -> Launch | None:
    from triton.runtime.errors import OutOfResources

    try:
        problem.kernel(0, params)
    except OutOfResources:
        return None
    return params


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tune", action="store_true", help="search launch parameters instead")
    parser.add_argument("--seconds", type=float, default=100.0, help="begin no further row of --tune after this long")
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--json", type=Path, help="write the rows here")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("needs an NVIDIA GPU")
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    if args.tune:
        print(tune(args.seconds))
        return
    start = time.perf_counter()
    copy, gemm = ceilings()
    records = []
    problems = [Problem(row) for row in rows() if args.only in row.name]
    with ThreadPoolExecutor(16) as pool:
        # compiles side by side; what fails, fails again where it is reported
        pool.map(lambda problem: problem.kernel(0), problems)
    for problem in problems:
        try:
            records.append(measure(problem, copy, gemm))
        except Exception as error:
            # the other rows are still worth having
            traceback.print_exc()
            records.append({"row": problem.row.name, "ok": False, "failed": f"{type(error).__name__}: {error}"[:100]})
    print(table(records))
    device = torch.cuda.get_device_name()
    print(
        f"{device}, torch {torch.__version__}: copy {copy / 1e12:.2f} TB/s, GEMM {gemm / 1e12:.0f} TFLOP/s; "
        f"a split decode costs the CPU {host_us():.0f} us outside of graphs; {time.perf_counter() - start:.0f} s in all"
    )
    if args.json:
        ceiling = {"copy_TB/s": round(copy / 1e12, 2), "gemm_TFLOP/s": round(gemm / 1e12)}
        args.json.write_text(json.dumps({"device": device, **ceiling, "rows": records}, indent=1) + "\n")
    sys.exit(0 if all(record["ok"] for record in records) else 1)


if __name__ == "__main__":
    main()
