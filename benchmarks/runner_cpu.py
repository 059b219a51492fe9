"""CPU time of preparing a decode step: slices of 1, 32 and 128 requests to tensors, and the padded graph's upload.

    python benchmarks/runner_cpu.py [--device cuda] [--context 1200] [--steps 200]

Prints microseconds per step, median and 90th percentile, of the Python thread alone; nothing is computed with the
tensors. On a GPU the copies are queued, not waited for.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch

from triptych.python_models.language_model.runner.inputs import StepInputs
from triptych.python_models.language_model.runner.step import Slice

BLOCK = 16


def decode_slices(count: int, context: int, groups: int, axes: int) -> list[Slice]:
    """One token of each of ``count`` requests, not known to the host, at about the same context."""
    generator = np.random.default_rng(0)
    slices = []
    for slot in range(count):
        start = context + slot % BLOCK
        table = generator.integers(0, 10_000, start // BLOCK + 1, dtype=np.int32)
        positions = np.full((axes, 1), start, dtype=np.int64)
        slices.append(Slice(np.zeros(1, np.int64), positions, start, (table,) * groups, slot, first_on_device=True))
    return slices


def measure(step: Callable[[], object], steps: int) -> tuple[float, float]:
    """Median and 90th percentile in microseconds."""
    times = []
    for _ in range(steps):
        began = time.perf_counter()
        step()
        times.append((time.perf_counter() - began) * 1e6)
    return statistics.median(times), sorted(times)[int(steps * 0.9)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--context", type=int, default=1200)
    parser.add_argument("--steps", type=int, default=200)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print("requests groups axes |   prepare us (p90) | prepare + upload us (p90)")
    for groups, axes in ((1, 1), (2, 3)):
        for count in (1, 32, 128):
            inputs = StepInputs(axes, BLOCK, [10_000] * groups, arguments.device)
            slices = decode_slices(count, arguments.context, groups, axes)
            for _ in range(5):
                inputs.upload(inputs.prepare(slices))
            host = measure(lambda: inputs.prepare(slices), arguments.steps)  # noqa: B023 - called here
            both = measure(lambda: inputs.upload(inputs.prepare(slices)), arguments.steps)  # noqa: B023
            print(f"{count:8} {groups:6} {axes:4} | {host[0]:9.0f} ({host[1]:5.0f}) | {both[0]:12.0f} ({both[1]:5.0f})")


if __name__ == "__main__":
    main()
