"""The runner by itself on a GPU: is it right, and how long does a step take and why?

    python benchmarks/runner.py [--decoders fused transformers] [--profile FOLDER] [--json FILE]

Qwen2.5-7B's text shape, random weights, bfloat16. Checks first (captured steps against eager ones, fused layers
against transformers'), then times decode steps at a context of 1024 and prompts. "gpu ms" is the time between two
steps that are queued back to back, "cpu ms" what Python takes to queue one. --profile writes torch's kernel tables of
decode steps. A part that fails is reported and the rest goes on. --tiny runs the same on a CPU in seconds.
"""

from __future__ import annotations

import argparse
import json
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from triptych.kernels.sampling import greedy
from triptych.python_models.families import torchvision_fix
from triptych.python_models.language_model.runner.executor import make_executor
from triptych.python_models.language_model.runner.options import RunnerOptions
from triptych.python_models.language_model.runner.runner import DecoderRunner
from triptych.python_models.language_model.runner.step import Slice

BLOCK = 16
SHAPE = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
}
TINY = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
}


@dataclass
class Model:
    """A decoder as the runner takes it."""

    text_model: Any
    lm_head: Any
    config: Any
    table: Any
    num_axes: int = 1
    token_extras: Mapping[str, int | None] = field(default_factory=dict)
    token_arguments: Callable[[torch.Tensor], Mapping[str, torch.Tensor]] | None = None

    def embed(self, ids: torch.Tensor, is_media: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.table(ids.masked_fill(is_media, 0))
        return out


class Bench:
    """One decoder backend: its runner, with blocks of every request laid out in advance."""

    def __init__(self, decoder: str, device: str, tiny: bool) -> None:
        torchvision_fix.install()
        import transformers

        self.device, self.context = device, 40 if tiny else 1024
        self.batches = (1, 3) if tiny else (1, 32, 128)
        config = transformers.Qwen2Config(**(TINY if tiny else SHAPE), max_position_embeddings=4096)
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        torch.manual_seed(0)
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device):
                model = transformers.Qwen2ForCausalLM(config)
        finally:
            torch.set_default_dtype(before)
        model.eval().requires_grad_(False)
        parts = Model(model.base_model, model.lm_head, model.config, model.get_input_embeddings())
        options = RunnerOptions(context_length=4096, graph_batch=self.batches[-1])
        executor = make_executor(parts, decoder)
        self.runner = DecoderRunner(executor, 1, BLOCK, device, options)
        self.width = -(-(self.context * 2 + 64) // BLOCK)
        self.runner.allocate([self.batches[-1] * self.width])
        began = time.perf_counter()
        self.runner.warm_up(64 if tiny else 2048)
        self.start_s = time.perf_counter() - began
        self.vocab = self.runner.vocab_size

    def part(self, request: int, start: int, count: int, late: bool = False) -> Slice:
        ids = np.random.default_rng(request * 100_000 + start).integers(0, self.vocab, count)
        table = np.arange(request * self.width, (request + 1) * self.width, dtype=np.int32)
        positions = np.arange(start, start + count)[None]
        return Slice(ids, positions, start, (table,), request, first_on_device=late)

    def fill(self, requests: int) -> torch.Tensor:
        """Compute the prompts of so many requests; logits of the last."""
        for request in range(requests):
            out = self.runner.forward([self.part(request, 0, self.context)])
        return out

    def wait(self) -> None:
        if self.device != "cpu":
            torch.cuda.synchronize()

    def timed(self, step: Callable[[int], object], count: int) -> tuple[float, float]:
        """(ms of wall time, ms of Python) per step of ``count`` queued back to back."""
        for i in range(3):
            step(i)
        self.wait()
        began, queued = time.perf_counter(), 0.0
        for i in range(count):
            before = time.perf_counter()
            step(i)
            queued += time.perf_counter() - before
            # Python is not to run ahead without end, as the engine does not either
            if i % 2:
                self.wait()
        self.wait()
        return (time.perf_counter() - began) / count * 1e3, queued / count * 1e3

    def decode(self, batch: int, steps: int) -> tuple[float, float]:
        def step(i: int) -> None:
            logits = self.runner.forward([self.part(r, self.context + i, 1, late=True) for r in range(batch)])
            self.runner.last_tokens[:batch] = greedy(logits)[0]

        return self.timed(step, steps)

    def check_graphs(self) -> str:
        """Replayed and eager logits of the same step."""
        worst = 0.0
        same = []
        for batch in self.batches:
            parts = [self.part(r, self.context, 1) for r in range(batch)]
            replayed = self.runner.forward(parts).float().clone()
            graphs, self.runner._graphs = self.runner._graphs, None
            eager = self.runner.forward(parts).float()
            self.runner._graphs = graphs
            worst = max(worst, float((replayed - eager).abs().max() / eager.std()))
            same.append(float((replayed.argmax(-1) == eager.argmax(-1)).float().mean()))
        return f"replayed against eager: largest difference {worst:.4f} std, same tokens {min(same):.1%}"

    def profile(self, folder: Path, name: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        from torch.profiler import ProfilerActivity, profile

        for batch in self.batches:
            with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
                self.decode(batch, 10)
            table = found.key_averages().table(sort_by="self_device_time_total", row_limit=25, max_name_column_width=90)
            (folder / f"{name}_batch{batch}.txt").write_text(table)


def measure(
    decoder: str,
    arguments: argparse.Namespace,
    device: str,
    lines: list[str],
    results: dict[str, Any],
    ends: dict[str, torch.Tensor],
    attempt: Callable[[str, Callable[[], None]], None],
) -> None:
    """Every part of one decoder."""
    bench = Bench(decoder, device, arguments.tiny)
    results[decoder] = row = {"warm_up_s": bench.start_s}
    lines.append(f"{decoder:12} warm-up with capture: {bench.start_s:.1f} s")

    def prompts() -> None:
        ends[decoder] = bench.fill(bench.batches[-1]).float().cpu()
        one, _ = bench.timed(lambda i: bench.runner.forward([bench.part(0, 0, bench.context)]), 10)
        two = [bench.part(r, 0, bench.context) for r in range(2)]
        many, _ = bench.timed(lambda i: bench.runner.forward(two), 10)
        row["prompt_ms"], row["prefill_tok_s"] = one, 2 * bench.context / many * 1e3
        lines.append(f"{decoder:12} prompt of {bench.context}: {one:.2f} ms; two: {row['prefill_tok_s']:.0f} tok/s")

    def decodes() -> None:
        for batch in bench.batches:
            wall, python = bench.decode(batch, arguments.steps)
            row[f"decode_{batch}_gpu_ms"], row[f"decode_{batch}_cpu_ms"] = wall, python
            rate = batch / wall * 1e3
            lines.append(f"{decoder:12} batch {batch:3}: gpu {wall:.3f} ms, cpu {python:.3f} ms, {rate:.0f} tok/s")

    attempt(f"{decoder}: prompts", prompts)
    attempt(f"{decoder}: graphs", lambda: lines.append(f"{decoder:12} {bench.check_graphs()}"))
    attempt(f"{decoder}: decode", decodes)
    if arguments.profile:
        attempt(f"{decoder}: profile", lambda: bench.profile(arguments.profile, decoder))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--decoders", nargs="+", default=["fused", "transformers"])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--profile", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args()
    device = "cpu" if arguments.tiny else "cuda"
    if arguments.tiny:
        torch.set_num_threads(1)
    lines: list[str] = []
    results: dict[str, Any] = {"device": device if device == "cpu" else torch.cuda.get_device_name()}
    ends: dict[str, torch.Tensor] = {}

    def attempt(what: str, work: Callable[[], None]) -> None:
        try:
            with torch.inference_mode():
                work()
        except Exception:
            # the other parts are still worth running
            traceback.print_exc()
            lines.append(f"{what}: FAILED, see above")

    for decoder in arguments.decoders:
        # nothing of one decoder is left when the next one is made
        attempt(f"{decoder}: all", lambda name=decoder: measure(name, arguments, device, lines, results, ends, attempt))
        if device != "cpu":
            torch.cuda.empty_cache()
    if len(ends) == 2:
        first, second = ends.values()
        agreement = float(torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))[0, 1])
        lines.append(f"fused against transformers: correlation of logits {agreement:.5f}")
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
