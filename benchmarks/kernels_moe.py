"""Mixture of experts on a GPU: ours against torch, and how far from the roofline.

    python benchmarks/kernels_moe.py [--out FILE] [--tune]

The shape is Qwen3-VL-30B-A3B's: hidden 2048, 128 experts of 768, 8 of them for a token, softmax router. Every figure is
from a CUDA graph that runs several layers' weights in turn, so that none is in the L2 cache. The baseline is, for few
tokens, the weights of each token's experts gathered and multiplied in one ``bmm`` (also in a graph), for many, a loop
over the experts, which synchronises with the host and so runs without a graph. The roofline is the time to read the
weights of the experts in use once at 4.6 TB/s, or to multiply at 690 TFLOP/s, whichever is longer.
--tune prints the time of other tiles.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from triptych.kernels.activation import gated
from triptych.kernels.moe import experts, experts_reference, route, route_reference
from triptych.kernels.moe.launch import Entry, Tile, launch_experts, select

HIDDEN, EXPERTS, TOP_K, FFN = 2048, 128, 8, 768
# 1.2 GB a layer
LAYERS = 3
TOKENS = (1, 8, 32, 128, 512, 2048, 8192)
READ, MULTIPLY = 4.6e12, 690e12

Weights = list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


def weights() -> Weights:
    """(router, gate_up, down) of LAYERS layers."""

    def draw(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device="cuda").normal_(0, shape[-1] ** -0.5)

    return [(draw(EXPERTS, HIDDEN), draw(EXPERTS, 2 * FFN, HIDDEN), draw(EXPERTS, HIDDEN, FFN)) for _ in range(LAYERS)]


def milliseconds(work: Callable[[], Any], graph: bool = True, repeats: int = 7) -> float:
    """Median time of ``work``."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work()
    torch.cuda.current_stream().wait_stream(side)
    run = work
    if graph:
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            work()
        run = captured.replay
    run()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def gathered(
    x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, chosen_weights: torch.Tensor, chosen: torch.Tensor
) -> torch.Tensor:
    """The experts' weights copied for every pair, then two ``bmm``."""
    hidden = gated(
        torch.bmm(gate_up[chosen.flatten()], x.repeat_interleave(TOP_K, 0).unsqueeze(-1)).squeeze(-1), "silu"
    )
    out = torch.bmm(down[chosen.flatten()], hidden.unsqueeze(-1)).view(len(x), TOP_K, HIDDEN)
    return (out * chosen_weights.unsqueeze(-1).to(out.dtype)).sum(1)


def check(model: Weights, tokens: int) -> str:
    """ "" or what is wrong: routes as the reference, error against float32 at most 1.5 times the reference's."""
    router, gate_up, down = model[0]
    x = torch.randn(tokens, HIDDEN, device="cuda").bfloat16()
    # in bfloat16 many would be equal, and of equal ones either may be taken
    logits = functional.linear(x.float(), router.float())
    chosen_weights, chosen = route(logits, TOP_K, renormalise=True, scoring="softmax")
    expected_weights, expected = route_reference(logits, TOP_K, renormalise=True, scoring="softmax")
    if not torch.allclose(chosen_weights, expected_weights, rtol=1e-5) or (chosen != expected).float().mean() > 0.01:
        return "another route than the reference"
    out = experts(x, gate_up, down, chosen_weights, chosen, activation="silu")
    again = experts(x, gate_up, down, chosen_weights, chosen, activation="silu")
    if not torch.equal(out, again):
        return "not the same bits twice"
    half = [
        experts(
            x,
            gate_up[first : first + EXPERTS // 2],
            down[first : first + EXPERTS // 2],
            chosen_weights,
            chosen,
            activation="silu",
            first_expert=first,
        )
        for first in (0, EXPERTS // 2)
    ]
    reference = experts_reference(x, gate_up, down, chosen_weights, chosen, activation="silu")
    truth = experts_reference(x.float(), gate_up.float(), down.float(), chosen_weights, chosen, activation="silu")
    errors = [float((got.float() - truth).square().mean().sqrt()) for got in (out, half[0] + half[1], reference)]
    if max(errors[0], errors[1]) > 1.5 * errors[2]:
        return f"errors {errors[0]:.2e}, in two halves {errors[1]:.2e}, reference {errors[2]:.2e}"
    return ""


def bound(chosen: torch.Tensor) -> float:
    """Roofline in ms of one layer."""
    used = len(chosen.unique())
    size = used * 3 * FFN * HIDDEN * 2
    flops = 2 * chosen.numel() * 3 * FFN * HIDDEN
    return 1e3 * max(size / READ, flops / MULTIPLY)


def measure(model: Weights, tokens: int) -> dict[str, Any]:
    """Times of one layer in µs."""
    x = torch.randn(tokens, HIDDEN, device="cuda").bfloat16()
    routes = [
        route(functional.linear(x, router).float(), TOP_K, renormalise=True, scoring="softmax")
        for router, _, _ in model
    ]

    def fused() -> None:
        for router, gate_up, down in model:
            chosen_weights, chosen = route(functional.linear(x, router), TOP_K, renormalise=True, scoring="softmax")
            experts(x, gate_up, down, chosen_weights, chosen, activation="silu")

    def only_experts() -> None:
        for (_, gate_up, down), (chosen_weights, chosen) in zip(model, routes, strict=True):
            experts(x, gate_up, down, chosen_weights, chosen, activation="silu")

    few = tokens <= 128

    def torch_experts() -> None:
        way = gathered if few else loop
        for (_, gate_up, down), (chosen_weights, chosen) in zip(model, routes, strict=True):
            way(x, gate_up, down, chosen_weights, chosen)

    return {
        "tokens": tokens,
        "layer_us": 1e3 * milliseconds(fused) / LAYERS,
        "experts_us": 1e3 * milliseconds(only_experts) / LAYERS,
        "torch_us": 1e3 * milliseconds(torch_experts, graph=few, repeats=3) / LAYERS,
        "roofline_us": 1e3 * sum(bound(chosen) for _, chosen in routes) / LAYERS,
    }


def loop(
    x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, chosen_weights: torch.Tensor, chosen: torch.Tensor
) -> torch.Tensor:
    """One expert after the other."""
    return experts_reference(x, gate_up, down, chosen_weights, chosen, activation="silu")


def tune(model: Weights, tokens: int, end: float) -> None:
    """Print the best tiles for ``tokens``, each projection on its own."""
    x = torch.randn(tokens, HIDDEN, device="cuda").bfloat16()
    router = model[0][0]
    chosen_weights, chosen = route(functional.linear(x, router).float(), TOP_K, renormalise=True, scoring="softmax")
    start = select(tokens * TOP_K, EXPERTS)
    sizes = sorted({start.block_m, max(start.block_m // 2, 16), min(start.block_m * 2, 128)})
    tiles = [
        Tile(block_n, block_k, warps, stages)
        for block_n, warps in ((64, 4), (128, 4), (128, 8))
        for block_k, stages in ((64, 3), (64, 5), (128, 2), (128, 3), (128, 4))
    ]
    found: list[tuple[float, Entry]] = []

    def tried(entry: Entry) -> None:
        def work() -> None:
            for _, gate_up, down in model:
                launch_experts(x, gate_up, down, chosen_weights, chosen, "silu", 0, entry)

        if time.monotonic() < end:
            try:
                found.append((1e3 * milliseconds(work) / LAYERS, entry))
            except Exception as error:
                print(f"   {entry}: {type(error).__name__}")

    for block_m in sizes:
        for tile in tiles:
            if tile.stages * tile.block_k * (2 * tile.block_n + block_m) * 2 <= 220_000:
                tried(Entry(block_m, tile, start.down))
    if found:
        best = min(found, key=lambda item: item[0])[1]
        for tile in tiles:
            tried(Entry(best.block_m, best.up, tile))
    for taken, entry in sorted(found, key=lambda item: item[0])[:3]:
        print(f"{tokens:5} tokens {taken:8.1f} us  {entry}", flush=True)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    parser.add_argument("--tune", action="store_true", help="also measure other tiles, for about two minutes")
    arguments = parser.parse_args()
    model = weights()
    figures = []
    for tokens in TOKENS:
        try:
            wrong = check(model, tokens)
            figures.append({**measure(model, tokens), "wrong": wrong})
        except Exception:
            traceback.print_exc()
    if arguments.tune:
        start = time.monotonic()
        for turn, tokens in enumerate(TOKENS[:-1]):
            tune(model, tokens, start + 20 * (turn + 1))
    print(f"\n{'tokens':>6} {'layer us':>9} {'experts':>9} {'torch':>9} {'roofline':>9}  of roofline")
    for row in figures:
        print(
            f"{row['tokens']:6} {row['layer_us']:9.1f} {row['experts_us']:9.1f} {row['torch_us']:9.1f} "
            f"{row['roofline_us']:9.1f}  {row['roofline_us'] / row['experts_us']:.0%}"
            + (f"  WRONG: {row['wrong']}" if row["wrong"] else "")
        )
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        result = {"device": torch.cuda.get_device_name(), "experts": figures}
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
