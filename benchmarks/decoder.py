"""A step of the decoder by itself: fused layers against transformers' modules, in the runner, without the engine.

    python benchmarks/decoder.py                                    # the built-in model on the CPU
    python benchmarks/decoder.py --device cuda --shape qwen2.5-7b   # random weights; checks the layers first

Decode steps go through the runner as the engine's do (with CUDA graphs on a GPU), prefill steps eagerly. Sides take
turns; each figure is the median. On a GPU it also counts the kernels that a layer launches.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

import numpy as np
from support import save

from triptych.python_models.contract.settings import Settings
from triptych.python_models.families import torchvision_fix

torchvision_fix.install()

import torch  # noqa: E402
import transformers  # noqa: E402

from triptych.python_models.families.base import Decoder  # noqa: E402
from triptych.python_models.families.registry import load_family  # noqa: E402
from triptych.python_models.language_model.runner import fused  # noqa: E402
from triptych.python_models.language_model.runner.executor import Executor, ModulesExecutor  # noqa: E402
from triptych.python_models.language_model.runner.options import RunnerOptions  # noqa: E402
from triptych.python_models.language_model.runner.runner import DecoderRunner  # noqa: E402
from triptych.python_models.language_model.runner.step import Slice  # noqa: E402

BLOCK = 16
SHAPES: dict[str, Callable[[], Any]] = {
    "qwen2.5-7b": lambda: transformers.Qwen2Config(
        vocab_size=152064,
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        max_position_embeddings=32768,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=False,
    ),
    "qwen3-30b-a3b": lambda: transformers.Qwen3MoeConfig(
        vocab_size=151936,
        hidden_size=2048,
        num_hidden_layers=48,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        num_experts=128,
        num_experts_per_tok=8,
        moe_intermediate_size=768,
        norm_topk_prob=True,
        max_position_embeddings=32768,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=False,
    ),
}


class Bench:
    """One executor in a runner."""

    def __init__(self, executor: Executor, axes: int, device: str, context: int, most: int) -> None:
        self.device, self.axes = device, axes
        options = RunnerOptions(context_length=context + 64, graph_batch=most if device != "cpu" else 0)
        self.runner = DecoderRunner(executor, axes, BLOCK, device, options)
        self.per_request = -(-(context + 64) // BLOCK)
        self.runner.allocate([most * self.per_request] * len(self.runner.kv_groups))
        self.runner.warm_up(context)

    def slices(self, requests: int, start: int, count: int) -> list[Slice]:
        ids = np.arange(count, dtype=np.int64) % 200 + 100
        positions = np.broadcast_to(np.arange(start, start + count, dtype=np.int64), (self.axes, count)).copy()
        used = -(-(start + count) // BLOCK)
        tables = [np.arange(used, dtype=np.int32) + i * self.per_request for i in range(requests)]
        groups = len(self.runner.kv_groups)
        return [Slice(ids, positions, start, (table,) * groups) for table in tables]

    def step(self, slices: list[Slice], repeat: int) -> float:
        """Milliseconds of a step; of CPU time where one thread does it all, which other processes change less."""
        clock = time.thread_time if self.device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
        began = clock()
        for _ in range(repeat):
            self.runner.forward(slices)
        if self.device != "cpu":
            torch.cuda.synchronize()
        return (clock() - began) * 1000 / repeat


def launches(bench: Bench, slices: list[Slice], layers: int) -> str:
    """Kernels per layer of an eager step, and those that take the most time."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        bench.step(slices, 1)
    events = [e for e in recorded.key_averages() if e.device_type.name == "CUDA" and "Mem" not in e.key]
    count = sum(e.count for e in events) / layers
    top = sorted(events, key=lambda e: -e.self_device_time_total)[:8]
    table = "\n".join(f"    {e.self_device_time_total / 1000:8.2f} ms {e.count:5} x {e.key[:80]}" for e in top)
    return f"{count:.1f} kernels per layer\n{table}"


def executors(args: argparse.Namespace, dtype: torch.dtype) -> tuple[dict[str, Executor], int]:
    """Fused and transformers' executors over the same weights, and the axes of positions."""
    if args.shape:
        began = time.perf_counter()
        decoder: Any = fused.random_decoder(SHAPES[args.shape](), args.device, dtype)
        print(f"random weights in {time.perf_counter() - began:.1f} s")
    else:
        settings = Settings(model=args.model)
        loaded: Decoder = load_family(settings).load_decoder(args.device, dtype)
        decoder = loaded
    began = time.perf_counter()
    built = fused.build(decoder, check=not args.no_check)
    print(f"fused{'' if args.no_check else ' and checked'} in {time.perf_counter() - began:.1f} s")
    if isinstance(built, str):
        print(f"THE FUSED LAYERS DO NOT AGREE: {built}")
        built = fused.build(decoder, check=False)
        if isinstance(built, str):
            raise SystemExit(f"not fused: {built}")
    made: dict[str, Executor] = {"fused": built}
    if not args.fused_only:
        made["modules"] = ModulesExecutor(decoder)
    return made, decoder.num_axes


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="builtin")
    parser.add_argument("--shape", choices=sorted(SHAPES), help="random weights of this shape instead of a model")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", help="default: float32 on a CPU, bfloat16 on a GPU")
    parser.add_argument("--rows", type=int, nargs="*", default=None, help="requests of a decode step")
    parser.add_argument("--context", type=int, default=None)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--fused-only", action="store_true")
    parser.add_argument("--no-check", action="store_true")
    parser.add_argument("--name", help="write the figures to results/NAME.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    cpu = args.device == "cpu"
    dtype = getattr(torch, args.dtype or ("float32" if cpu else "bfloat16"))
    rows = args.rows or ([1, 8] if cpu else [1, 8, 32, 64, 128])
    context = args.context or (128 if cpu else 1024)
    made, axes = executors(args, dtype)
    layers = len(made["fused"].layers)
    benches = {
        name: Bench(executor, axes, args.device, max(context, 2048), max(rows)) for name, executor in made.items()
    }
    cases = {f"decode, {count} x {context}": (count, context, 1) for count in rows}
    cases |= {f"prefill, {n} tokens": (1, 0, n) for n in ((128,) if cpu else (512, 2048))}
    report: list[str] = []
    found: dict[str, dict[str, float]] = {}
    for case, (requests, start, count) in cases.items():
        figures: dict[str, list[float]] = {name: [] for name in benches}
        try:
            for turn in range(args.turns + 1):
                for name, bench in benches.items():
                    with torch.inference_mode():
                        taken = bench.step(bench.slices(requests, start, count), args.steps if count == 1 else 2)
                    if turn:
                        figures[name].append(taken)
            medians = {name: statistics.median(times) for name, times in figures.items()}
            found[case] = {f"{name}_ms": round(value, 3) for name, value in medians.items()}
            line = "  ".join(f"{name} {value:8.3f} ms" for name, value in medians.items())
            if len(medians) > 1:
                line += f"  ratio {medians['modules'] / medians['fused']:.2f}"
            report.append(f"{case:24} {line}")
        except Exception:
            traceback.print_exc()
            report.append(f"{case:24} failed")
    if not cpu:
        for name, bench in benches.items():
            try:
                with torch.inference_mode():
                    print(f"{name}, prefill of 2048:", launches(bench, bench.slices(1, 0, 2048), layers))
            except Exception:
                traceback.print_exc()
    if args.name:
        save(args.name, sys.argv, found)
    print("\n".join(report))


if __name__ == "__main__":
    main()
