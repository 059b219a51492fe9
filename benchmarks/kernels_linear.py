"""Linear layers of few rows on a GPU: ours against cuBLAS, by layer and for all layers of a decode step.

    python benchmarks/kernels_linear.py                            check, then measure with the launch table as it is
    python benchmarks/kernels_linear.py --tune all --out FILE      measure candidates, print entries for the table

Shapes are Qwen2.5-7B's. Every figure is from a CUDA graph that runs the layer once with the weights of every decoder
layer, so that no weight is in the L2 cache. "separate" is cuBLAS with the kernels of the norm, the activation and the
residual addition; "fused" is kernels.linear, which has them inside. A result of --tune is added to what FILE holds, so
``--tune fma`` and ``--tune dot`` can run one after the other.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import multiprocessing
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from triptych.kernels.activation import gated
from triptych.kernels.linear import linear, linear_reference
from triptych.kernels.linear.launch import launch, select
from triptych.kernels.linear.table import Dot, Entry, Fma
from triptych.kernels.norm import rms_norm

HIDDEN, FFN, QKV, VOCABULARY, LAYERS = 3584, 18944, 4608, 152064, 28
EPS = 1e-6
ROWS = (1, 2, 4, 8, 16, 32, 64, 128)
# bytes a sweep's graph reads at least; the L2 cache of an H200 holds 60 MB
ROTATION = 400e6


@dataclass(frozen=True)
class Layer:
    """One linear layer of the decoder, with what kernels.linear fuses into it."""

    name: str
    features: int
    width: int
    gate: str | None = None
    bias: bool = False
    norm: bool = False
    residual: bool = False
    copies: int = LAYERS

    @property
    def columns(self) -> int:
        return self.features // 2 if self.gate else self.features

    @property
    def bytes(self) -> int:
        return self.features * self.width * 2


QKV_PROJ = Layer("qkv", QKV, HIDDEN, bias=True, norm=True)
O_PROJ = Layer("o", HIDDEN, HIDDEN, residual=True)
GATE_UP = Layer("gate_up", 2 * FFN, HIDDEN, gate="silu", norm=True)
DOWN = Layer("down", HIDDEN, FFN, residual=True)
HEAD = Layer("head", VOCABULARY, HIDDEN, copies=1)
LAYER_KINDS = (QKV_PROJ, O_PROJ, GATE_UP, DOWN, HEAD)


def inputs(layer: Layer, rows: int, seed: int = 0) -> dict[str, Any]:
    """x and what is fused, as keyword arguments of ``linear``."""
    generator = torch.Generator("cuda").manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device="cuda", generator=generator).bfloat16()

    return {
        "x": draw(rows, layer.width),
        "bias": draw(layer.features) if layer.bias else None,
        "norm": (draw(layer.width), EPS, 0.0) if layer.norm else None,
        "residual": draw(rows, layer.columns) if layer.residual else None,
        "gate": layer.gate,
    }


def weights() -> dict[str, list[torch.Tensor]]:
    """Random weights of a whole model: 14.1 GB."""
    return {
        layer.name: [
            torch.empty(layer.features, layer.width, dtype=torch.bfloat16, device="cuda").normal_(0, layer.width**-0.5)
            for _ in range(layer.copies)
        ]
        for layer in LAYER_KINDS
    }


def milliseconds(work: Callable[[], Any], repeats: int = 7) -> float:
    """Median time of ``work`` as a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    graph.replay()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(2 * repeats)]
    for start, end in zip(marks[::2], marks[1::2], strict=True):
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in zip(marks[::2], marks[1::2], strict=True))


def check(layer: Layer, weight: torch.Tensor, rows: int, entry: Entry) -> str:
    """ "" or what is wrong: error against float64 at most 1.5 times that of separate ops, and the same bits twice."""
    given = inputs(layer, rows)
    x = given.pop("x")
    # a part of the head is enough
    weight = weight[: 16384 if layer is HEAD else layer.features]
    out = launch(x, weight, entry, **given)
    again = launch(x, weight, entry, **given)
    separate = linear_reference(x, weight, **given)
    exact = {key: value.double() if isinstance(value, torch.Tensor) else value for key, value in given.items()}
    wide = x.double()
    if layer.norm:
        norm, eps, _ = given["norm"]
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * norm.double()
    truth = wide @ weight.double().T
    if layer.bias:
        truth = truth + exact["bias"]
    if layer.gate:
        gate, up = truth.chunk(2, -1)
        truth = functional.silu(gate) * up
    if layer.residual:
        truth = truth + exact["residual"]
    error = float((out.double() - truth).square().mean().sqrt())
    other = float((separate.double() - truth).square().mean().sqrt())
    if not torch.equal(out, again):
        return "not the same bits twice"
    return "" if error <= 1.5 * other else f"error {error:.2e}, separate ops {other:.2e}"


def by_layer(model: dict[str, list[torch.Tensor]], all_rows: tuple[int, ...]) -> None:
    print(f"\n{'layer':8} {'rows':>4}  {'cuBLAS':>8} {'separate':>8} {'fused':>8}  TB/s  entry")
    for layer in LAYER_KINDS:
        for rows in all_rows:
            given = inputs(layer, rows)
            x = given.pop("x")
            rotation = model[layer.name]

            def alone(x: torch.Tensor = x, rotation: list[torch.Tensor] = rotation) -> None:
                for weight in rotation:
                    functional.linear(x, weight)

            def separate(
                x: torch.Tensor = x, rotation: list[torch.Tensor] = rotation, given: dict[str, Any] = given
            ) -> None:
                for weight in rotation:
                    linear_reference(x, weight, **given)

            entry = select(rows, layer.features, layer.width, x.dtype, x.device)
            times = [milliseconds(alone), milliseconds(separate)]
            wrong = ""
            if entry is not None:
                wrong = check(layer, rotation[0], rows, entry)

                def fused(
                    x: torch.Tensor = x,
                    rotation: list[torch.Tensor] = rotation,
                    given: dict[str, Any] = given,
                    entry: Entry = entry,
                ) -> None:
                    for weight in rotation:
                        launch(x, weight, entry, **given)

                times.append(milliseconds(fused))
            micro = [1e3 * value / layer.copies for value in times]
            columns = [f"{value:8.1f}" for value in micro] + ["       -"] * (3 - len(micro))
            rate = layer.bytes / micro[-1] / 1e6
            note = f"{entry}" + (f"  WRONG: {wrong}" if wrong else "")
            print(f"{layer.name:8} {rows:4}  {' '.join(columns)}  {rate:4.2f}  {note}", flush=True)


def step(model: dict[str, list[torch.Tensor]], rows: int, fused: bool) -> Callable[[], torch.Tensor]:
    """All linears of a decode step with norms, activations and residuals; attention is left out."""
    hidden = torch.randn(rows, HIDDEN, device="cuda").bfloat16()
    norm = torch.ones(HIDDEN, device="cuda").bfloat16()
    bias = torch.zeros(QKV, device="cuda").bfloat16()
    layers = list(zip(model["qkv"], model["o"], model["gate_up"], model["down"], strict=True))
    head = model["head"][0]

    def run_fused() -> torch.Tensor:
        h = hidden
        for qkv, o, gate_up, down in layers:
            heads = linear(h, qkv, norm=(norm, EPS, 0.0), bias=bias)
            h = linear(heads[:, :HIDDEN], o, residual=h)
            h = linear(linear(h, gate_up, norm=(norm, EPS, 0.0), gate="silu"), down, residual=h)
        return linear(rms_norm(h, norm, EPS)[0], head)

    def run_separate() -> torch.Tensor:
        h = hidden
        normed, _ = rms_norm(h, norm, EPS)
        for qkv, o, gate_up, down in layers:
            heads = functional.linear(normed, qkv, bias)
            normed, h = rms_norm(functional.linear(heads[:, :HIDDEN], o), norm, EPS, residual=h)
            normed, h = rms_norm(
                functional.linear(gated(functional.linear(normed, gate_up), "silu"), down), norm, EPS, residual=h
            )
        return functional.linear(normed, head)

    return run_fused if fused else run_separate


def compare(model: dict[str, list[torch.Tensor]], rows: int) -> str:
    """A step's logits from a graph: the same bits each time, and how far from those of separate ops.

    A kernel that read what the one before it had not written yet would show here.
    """
    torch.manual_seed(rows)
    work = step(model, rows, True)
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = work()
    found = []
    for _ in range(5):
        graph.replay()
        found.append(out.clone())
    torch.manual_seed(rows)
    separate = step(model, rows, False)().float()
    error = float((found[0].float() - separate).square().mean().sqrt() / separate.square().mean().sqrt())
    same = all(torch.equal(found[0], other) for other in found[1:])
    return f"{error:.1%}" + ("" if same else "  WRONG: not the same bits each time")


def by_step(model: dict[str, list[torch.Tensor]], all_rows: tuple[int, ...]) -> dict[int, dict[str, float]]:
    total = sum(layer.bytes * layer.copies for layer in LAYER_KINDS)
    figures = {}
    print(f"\nall linears of a step ({total / 1e9:.1f} GB), with norms, activations, residuals")
    print(f"{'rows':>4}  {'separate ms':>11} {'fused ms':>9}  {'TB/s':>4}  {'tok/s':>8}  difference of logits")
    for rows in all_rows:
        separate, fused = (milliseconds(step(model, rows, way)) for way in (False, True))
        figures[rows] = {"separate_ms": round(separate, 4), "fused_ms": round(fused, 4)}
        print(
            f"{rows:4}  {separate:11.3f} {fused:9.3f}  {total / fused / 1e9:4.2f}  {rows * 1e3 / fused:8.0f}  "
            f"{compare(model, rows)}",
            flush=True,
        )
    return figures


def fma_candidates(layer: Layer, rows: int) -> Iterator[Fma]:
    """Tiles by elements of a thread; x stays with the weight's threads at 256 columns a warp."""
    limit = {1: 64, 2: 32, 4: 16}[rows] // (2 if layer.gate else 1)
    for elements in (8, 16, 32, 64):
        for warps in (2, 4, 8):
            for block_n in (1, 2, 4, 8):
                block_k = elements * 32 * warps // block_n
                if elements <= limit and 256 * warps <= block_k < 2 * layer.width and elements * block_n <= 256:
                    yield Fma(block_n, block_k, warps)


def dot_candidates(layer: Layer, block_m: int) -> Iterator[Dot]:
    for block_n in (32, 64, 128):
        for block_k in (64, 128, 256):
            stage = 2 * block_k * (block_n * (2 if layer.gate else 1) + block_m)
            # as many stages as fit when one program has an SM for itself, and when two share it
            for stages in {min(limit * 1024 // stage, 8) for limit in (108, 220)}:
                if stages < 2 or (block_n == 32 and block_m > 32):
                    continue
                programs = math.ceil(layer.columns / block_n)
                wanted = {1} if programs >= 528 else {1, *(n for n in (2, 3, 4, 6, 8) if 120 <= programs * n <= 1100)}
                if programs < 100:
                    wanted -= {1}
                for splits in sorted(wanted):
                    yield Dot(block_n, block_k, 8 if block_n == 128 else 4, stages, splits)


def variants(entry: Entry, layer: Layer) -> Iterator[Entry]:
    """What needs no other binary."""
    values = asdict(entry)
    if isinstance(entry, Fma):
        for groups in (1, 2, 4, 8):
            for prefetch in (0, 1024, 4096, 16384):
                useless = prefetch and (
                    (entry.block_k >= layer.width and groups == 1) or prefetch > 2 * max(layer.width, 2048)
                )
                if (groups, prefetch) != (1, 0) and not useless:
                    yield Fma(**{**values, "groups": groups, "prefetch": prefetch})
    else:
        for prefetch in (512, 2048):
            yield Dot(**{**values, "prefetch": prefetch})


def _compile(layer: Layer, rows: int, entry: Entry) -> str:
    """In a worker: launch once with a short weight, which leaves the binary in Triton's cache; "" or an error."""
    try:
        torch.cuda.set_device(0)
        given = inputs(Layer(layer.name, 512, layer.width, layer.gate, layer.bias, layer.norm, layer.residual), rows)
        weight = torch.zeros(512, layer.width, dtype=torch.bfloat16, device="cuda")
        launch(given.pop("x"), weight, entry, **given)
        torch.cuda.synchronize()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def tune(model: dict[str, list[torch.Tensor]], ways: tuple[str, ...], out: Path | None, budget: float) -> None:
    end = time.monotonic() + budget
    jobs: list[list[tuple[Layer, int, Entry]]] = []
    for layer in LAYER_KINDS:
        if "fma" in ways:
            jobs += [[(layer, rows, entry) for entry in fma_candidates(layer, rows)] for rows in (1, 2, 4)]
        if "dot" in ways:
            jobs += [[(layer, rows, entry) for entry in dot_candidates(layer, rows)] for rows in (16, 32, 64, 128)]
    # in turn, so that every layer has some when the time is up
    order = [job for turn in range(max(map(len, jobs))) for group in jobs for job in group[turn : turn + 1]]
    binaries: dict[tuple[Any, ...], tuple[Layer, int, Entry]] = {}
    for layer, rows, entry in order:
        binaries.setdefault(_binary(layer, rows, entry), (layer, rows, entry))
    print(f"{len(order)} candidates, {len(binaries)} binaries")
    built = _build(binaries, end - 0.4 * budget)
    found: dict[tuple[str, int], list[Entry]] = {}
    for layer, rows, entry in order:
        if _binary(layer, rows, entry) in built:
            # with 16 rows' binary also fewer rows
            for fewer in (2, 4, 8, 16) if isinstance(entry, Dot) and rows == 16 else (rows,):
                found.setdefault((layer.name, fewer), []).append(entry)
    results = _measure(model, found, end)
    known: dict[str, Any] = json.loads(out.read_text()) if out is not None and out.exists() else {}
    for key, result in results.items():
        known[key] = [*known.get(key, []), *result]
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(known, indent=1) + "\n")
    _print_table(known)


def _binary(layer: Layer, rows: int, entry: Entry) -> tuple[Any, ...]:
    if isinstance(entry, Fma):
        return layer.name, rows, entry.block_n, entry.block_k, entry.warps
    return layer.name, rows, entry.block_n, entry.block_k, entry.warps, entry.stages, entry.splits > 1


def _build(binaries: dict[tuple[Any, ...], tuple[Layer, int, Entry]], end: float) -> set[tuple[Any, ...]]:
    start = time.monotonic()
    built: set[tuple[Any, ...]] = set()
    failed: list[str] = []
    workers = max((multiprocessing.cpu_count() or 2) - 2, 1)
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
    waiting: dict[Future[str], tuple[Any, ...]] = {
        pool.submit(_compile, *job): binary for binary, job in binaries.items()
    }
    while waiting and (left := end - time.monotonic()) > 0:
        for future in wait(waiting, left, FIRST_COMPLETED).done:
            binary = waiting.pop(future)
            error = future.exception() or future.result()
            if error:
                failed.append(f"{binary}: {error}")
            else:
                built.add(binary)
    pool.shutdown(wait=True, cancel_futures=True)
    print(f"{len(built)} built in {time.monotonic() - start:.0f} s, {len(failed)} failed, {len(waiting)} out of time")
    for line in failed[:3]:
        print("  ", line[:300])
    return built


def _measure(
    model: dict[str, list[torch.Tensor]], found: dict[tuple[str, int], list[Entry]], end: float
) -> dict[str, list[dict[str, Any]]]:
    layers = {layer.name: layer for layer in LAYER_KINDS}
    results: dict[str, list[dict[str, Any]]] = {}
    # a first share of the time for each, the best ones' variants last
    for place, ((name, rows), candidates) in enumerate(sorted(found.items(), key=lambda item: item[0][1])):
        layer = layers[name]
        share = time.monotonic() + (end - time.monotonic()) / (len(found) - place)
        rotation = model[name][: max(2, math.ceil(ROTATION / layer.bytes))]
        given = inputs(layer, rows)
        x = given.pop("x")

        def timed(
            entry: Entry | None,
            x: torch.Tensor = x,
            rotation: list[torch.Tensor] = rotation,
            given: dict[str, Any] = given,
        ) -> float:
            def work() -> None:
                for weight in rotation:
                    if entry is None:
                        linear_reference(x, weight, **given)
                    else:
                        launch(x, weight, entry, **given)

            return 1e3 * milliseconds(work, 5) / len(rotation)

        cublas = timed(None)
        times: dict[Entry, float] = {}
        for entry in candidates:
            if time.monotonic() < share:
                times[entry] = _tried(timed, entry)
        for entry in sorted(times, key=lambda entry: times[entry])[:4]:
            for variant in variants(entry, layer):
                if time.monotonic() < share:
                    times[variant] = _tried(timed, variant)
        best = sorted(times, key=lambda entry: times[entry])[:5]
        for entry in best[:1]:
            print(
                f"{name:8} {rows:4}  separate {cublas:7.1f}  best {times[entry]:7.1f} us "
                f"{layer.bytes / times[entry] / 1e6:5.2f} TB/s  {entry}  of {len(times)}",
                flush=True,
            )
        results[f"{layer.features},{layer.width},{rows}"] = [
            {
                "kind": type(entry).__name__,
                "entry": asdict(entry),
                "us": round(times[entry], 2),
                "separate_us": round(cublas, 2),
                "wrong": check(layer, rotation[0], rows, entry) if place_in == 0 else None,
            }
            for place_in, entry in enumerate(best)
        ]
    return results


def _tried(timed: Callable[[Entry], float], entry: Entry) -> float:
    try:
        return timed(entry)
    except Exception as error:
        print(f"   {entry}: {type(error).__name__}: {str(error)[:120]}")
        return math.inf


def _print_table(known: dict[str, Any]) -> None:
    """TABLE of kernels/linear/table.py, with None where cuBLAS is faster."""
    shapes: dict[tuple[int, int], dict[int, str]] = {}
    for key, results in known.items():
        features, width, rows = map(int, key.split(","))
        usable = [result for result in results if not result["wrong"]]
        best = min(usable, key=lambda result: result["us"]) if usable else None
        text = "None"
        if best is not None and best["us"] < best["separate_us"]:
            text = f"{best['kind']}({', '.join(str(value) for value in best['entry'].values())})"
        shapes.setdefault((features, width), {})[rows] = text
    print("\nTABLE: dict[tuple[int, int], tuple[tuple[int, Entry | None], ...]] = {")
    for shape, entries in shapes.items():
        print(f"    {shape}: (")
        for rows, text in sorted(entries.items()):
            print(f"        ({rows}, {text}),")
        print("    ),")
    print("}")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tune", choices=("fma", "dot", "all"))
    parser.add_argument("--out", type=Path, help="JSON file: figures, or the candidates --tune measured")
    parser.add_argument("--budget", type=float, default=150, help="seconds --tune may take")
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--steps-only", action="store_true", help="leave out the single layers")
    arguments = parser.parse_args()
    model = weights()
    # capturing a graph collects garbage, and there are many graphs
    gc.freeze()
    if arguments.tune:
        ways = ("fma", "dot") if arguments.tune == "all" else (arguments.tune,)
        tune(model, ways, arguments.out, arguments.budget)
        return
    if not arguments.steps_only:
        try:
            by_layer(model, tuple(arguments.rows))
        except Exception:
            traceback.print_exc()
    figures = by_step(model, tuple(arguments.rows))
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps({"device": torch.cuda.get_device_name(), "step": figures}, indent=1) + "\n")


if __name__ == "__main__":
    main()
