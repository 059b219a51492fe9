"""CPU time of the engine per step with many requests decoding: planning, slices, reading, text, deltas.

    python benchmarks/engine_cpu.py

The model and the sampler are left out: they answer at once, with the same token. What remains is what the engine's
thread must do between two steps of a GPU. ``--profile`` prints where it goes.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from triptych.python_models.contract.delta import Delta
from triptych.python_models.contract.errors import TriptychError
from triptych.python_models.contract.sampling import SamplingParams
from triptych.python_models.language_model.engine import engine as engine_module
from triptych.python_models.language_model.engine.config import EngineConfig
from triptych.python_models.language_model.engine.engine import Engine, Submission
from triptych.python_models.language_model.engine.request import Prompt
from triptych.python_models.language_model.engine.sampler import Sampled
from triptych.python_models.language_model.runner.step import KVGroup, Slice
from triptych.python_models.stage import NoTelemetry


class NoModel:
    """A runner that computes nothing."""

    vocab_size = 1000
    kv_groups = (KVGroup((0,)),)
    last_tokens = torch.zeros(1024, dtype=torch.int64)

    def forward(self, slices: Sequence[Slice]) -> torch.Tensor:
        return self.last_tokens

    def scrub(self, group: int, blocks: Sequence[int]) -> None:
        pass


class NoSampler:
    """A sampler that chooses token 7."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self.count = 0

    def launch(self, logits: torch.Tensor, rows: Sequence[Any], last_tokens: torch.Tensor) -> NoSampler:
        self.count = len(rows)
        return self

    def result(self) -> list[Sampled]:
        return [Sampled(7)] * self.count


class Words:
    """A tokenizer that costs nothing."""

    def decode(self, token_ids: list[int], **options: Any) -> str:
        return "a" * len(token_ids)

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str | None]:
        return ["a"] * len(ids)


class Deaf:
    """A responder that throws answers away."""

    def send(self, answer: Mapping[str, Any] | Delta, *, final: bool) -> None:
        pass

    def fail(self, error: TriptychError) -> None:
        raise error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 32, 128])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--prompt", type=int, default=1024)
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    engine_module.Sampler = NoSampler  # type: ignore[misc, assignment]
    print(f"{'requests':>8} {'overlap':>8} {'ms per step: median':>20} {'p99':>6}")
    for batch in options.batch:
        for overlap in (False, True):
            times = measure(batch, overlap, options)
            p99 = sorted(times)[int(len(times) * 0.99)]
            print(f"{batch:8d} {overlap!s:>8} {1000 * statistics.median(times):20.3f} {1000 * p99:6.2f}", flush=True)


def measure(batch: int, overlap: bool, options: argparse.Namespace) -> list[float]:
    """Seconds of each step in which ``batch`` requests decode."""
    config = EngineConfig(
        num_blocks=(100_000,),
        block_size=16,
        context_length=32_768,
        max_running=batch,
        max_queued=0,
        max_step_tokens=8192,
        heartbeat_s=1000.0,
        timeout_s=1000.0,
        eos_token_ids=frozenset({0}),
        overlap=overlap,
    )
    engine = Engine(NoModel(), Words(), config, NoTelemetry())
    # from here on this thread is the engine's
    engine.close()
    engine._closing = engine._stopped = False
    rng = np.random.default_rng(0)
    positions = np.arange(options.prompt, dtype=np.int64)[None]
    for number in range(batch):
        ids = rng.integers(0, 1000, options.prompt)
        sampling = SamplingParams(max_tokens=options.steps + 100, temperature=0, ignore_eos=True)
        engine.submit(Submission(f"{number}", Prompt(ids, positions), sampling, Deaf()))
    while not engine._answers or any(r.num_pending > 1 for a in engine._answers for r in a.choices):
        engine._iterate()
    for _ in range(20):
        engine._iterate()
    profiler = cProfile.Profile()
    if options.profile:
        profiler.enable()
    times = []
    for _ in range(options.steps):
        start = time.perf_counter()
        engine._iterate()
        times.append(time.perf_counter() - start)
    if options.profile:
        profiler.disable()
        pstats.Stats(profiler).sort_stats("tottime").print_stats(22)
    engine._fail_all = lambda error: None  # type: ignore[method-assign]
    return times


if __name__ == "__main__":
    main()
