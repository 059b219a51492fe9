"""The language model's engine by itself, no server: decode, prefill and mixed load, random weights, greedy.

    python benchmarks/shapes.py qwen2.5-vl-7b /tmp/shape
    python benchmarks/engine.py /tmp/shape --device cuda

Prompts are random tokens, no two alike; every answer has its full length. ``decode phase`` counts the tokens after
the last request got its first one. Each case runs once to warm up and once for its figure.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from support import record

from triptych.python_models.contract.delta import Delta
from triptych.python_models.contract.errors import TriptychError
from triptych.python_models.contract.sampling import SamplingParams
from triptych.python_models.contract.settings import Settings
from triptych.python_models.families import torchvision_fix

torchvision_fix.install()

import torch  # noqa: E402

from triptych.python_models.language_model.engine.engine import Submission  # noqa: E402
from triptych.python_models.language_model.engine.request import Prompt  # noqa: E402
from triptych.python_models.language_model.stage import LanguageModelStage  # noqa: E402
from triptych.python_models.stage import NoTelemetry  # noqa: E402


@dataclass
class Answer:
    """A responder that keeps the times of tokens."""

    start: float = 0.0
    times: list[float] = field(default_factory=list)
    tokens: int = 0
    error: TriptychError | None = None
    done: threading.Event = field(default_factory=threading.Event)
    on_end: Callable[[], None] | None = None

    def send(self, answer: Mapping[str, Any] | Delta, *, final: bool) -> None:
        count = len(answer.token_ids) if isinstance(answer, Delta) else 0
        if count:
            self.tokens += count
            self.times.extend([time.perf_counter()] * count)
        if final:
            self.end()

    def fail(self, error: TriptychError) -> None:
        self.error = error
        self.end()

    def end(self) -> None:
        self.done.set()
        if self.on_end:
            self.on_end()

    def wait(self) -> None:
        if not self.done.wait(300):
            raise RuntimeError("no answer within 300 s")
        if self.error:
            raise RuntimeError(f"a request failed: {self.error.message}")


class Bench:
    """A stage and the cases that run on it."""

    def __init__(self, settings: Settings, device: str) -> None:
        start = time.perf_counter()
        self.stage = LanguageModelStage(settings, NoTelemetry(), device)
        self.load_s = time.perf_counter() - start
        self.rng = random.Random(0)
        self.number = 0

    def submit(self, length: int, tokens: int, on_end: Callable[[], None] | None = None) -> Answer:
        self.number += 1
        ids = np.array([self.rng.randrange(300, self.stage._vocab_size) for _ in range(length)], dtype=np.int64)
        axes = self.stage._num_axes
        positions = np.broadcast_to(np.arange(length, dtype=np.int64), (axes, length)).copy()
        answer = Answer(time.perf_counter(), on_end=on_end)
        sampling = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)
        self.stage.engine.submit(Submission(str(self.number), Prompt(ids, positions), sampling, answer))
        return answer

    def together(self, count: int, length: int, tokens: int) -> dict[str, float]:
        """``count`` requests at once."""
        begin = time.perf_counter()
        answers = [self.submit(length, tokens) for _ in range(count)]
        for answer in answers:
            answer.wait()
        end = max(a.times[-1] for a in answers)
        first = max(a.times[0] for a in answers)
        later = sum(sum(t > first for t in a.times) for a in answers)
        figures = {
            "aggregate_tok_s": sum(a.tokens for a in answers) / (end - begin),
            "prompt_tok_s": count * length / (first - begin),
            "ttft_ms": 1000 * statistics.median(a.times[0] - a.start for a in answers),
        }
        if tokens > 1:
            figures["decode_tok_s"] = later / (end - first)
        return figures

    def closed_loop(self, clients: int, length: int, tokens: int, requests: int) -> dict[str, float]:
        """``clients`` at a time, each asking again as soon as it is answered."""
        answers: list[Answer] = []
        lock = threading.Lock()
        room = threading.Semaphore(clients)
        begin = time.perf_counter()
        for _ in range(requests):
            room.acquire()
            with lock:
                answers.append(self.submit(length, tokens, room.release))
        for answer in answers:
            answer.wait()
        end = time.perf_counter()
        gaps = [b - a for x in answers for a, b in zip(x.times, x.times[1:], strict=False)]
        return {
            "output_tok_s": requests * tokens / (end - begin),
            "ttft_p50_ms": 1000 * statistics.median(a.times[0] - a.start for a in answers),
            "tpot_p50_ms": 1000 * statistics.median((a.times[-1] - a.times[0]) / (tokens - 1) for a in answers),
            "itl_p99_ms": 1000 * sorted(gaps)[int(len(gaps) * 0.99)],
        }

    def profile(self, name: str, batch: int, length: int, tokens: int, folder: Path) -> None:
        """Torch's table of kernels to FOLDER/profile-NAME.txt: of decode steps, or of prompts where ``tokens`` is 1."""
        from torch.profiler import ProfilerActivity, profile

        answers = [self.submit(length, tokens) for _ in range(batch)] if tokens > 1 else []
        while any(a.tokens < 10 for a in answers):
            time.sleep(0.001)
        before = sum(a.tokens for a in answers)
        start = time.perf_counter()
        with profile(activities=[ProfilerActivity.CUDA]) as recorded:
            if tokens == 1:
                answers = [self.submit(length, 1) for _ in range(batch)]
                for answer in answers:
                    answer.wait()
            else:
                time.sleep(0.05 if batch < 64 else 0.1)
            torch.cuda.synchronize()
            seconds = time.perf_counter() - start
            count = sum(a.tokens for a in answers) - before
        for answer in answers:
            answer.wait()
        table = recorded.key_averages().table(sort_by="cuda_time_total", row_limit=40, max_name_column_width=70)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"profile-{name}.txt").write_text(f"{count} tokens in about {1000 * seconds:.1f} ms\n{table}")


def cases(bench: Bench, args: argparse.Namespace) -> dict[str, Callable[[], dict[str, float]]]:
    long, answer, prefill = args.prompt, args.answer, args.prefill
    return {
        "batch 1": lambda: bench.together(1, long, answer),
        "batch 32": lambda: bench.together(32, long, answer),
        "batch 128": lambda: bench.together(128, long, answer),
        "prefill 64": lambda: bench.together(64, prefill, 1),
        "closed loop 32": lambda: bench.closed_loop(32, long, answer, 96),
        "closed loop 128": lambda: bench.closed_loop(128, long, answer, 384),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="checkpoint folder")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", nargs="*", help="names of cases")
    parser.add_argument("--prompt", type=int, default=1024, help="tokens (default %(default)s)")
    parser.add_argument("--answer", type=int, default=256, help="tokens (default %(default)s)")
    parser.add_argument("--prefill", type=int, default=2048, help="tokens of the prefill case (default %(default)s)")
    parser.add_argument("--settings", default="{}", help="JSON of more settings")
    parser.add_argument("--profile", type=Path, help="folder for torch profiles of prefill and decode")
    parser.add_argument("--no-warm-up", action="store_true")
    parser.add_argument("--weights", action="store_true", help="read the folder's weights instead of random ones")
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    args = parser.parse_args(argv)
    settings = Settings.from_dict(
        {
            "model": args.model,
            "load_format": "auto" if args.weights else "dummy",
            "context_length": 4096,
            "max_running_requests": 128,
            "prefix_cache": False,
            **json.loads(args.settings),
        }
    )
    bench = Bench(settings, args.device)
    figures: dict[str, Any] = {"load and capture s": round(bench.load_s, 2)}
    print(f"loaded in {bench.load_s:.1f} s", flush=True)
    for name, case in cases(bench, args).items():
        if args.only and name not in args.only:
            continue
        try:
            if not args.no_warm_up:
                case()
            figures[name] = {key: round(value, 2) for key, value in case().items()}
            print(f"{name:16} {figures[name]}", flush=True)
        except Exception:
            traceback.print_exc()
            figures[name] = {"failed": traceback.format_exc(limit=1)}
    if args.profile:
        for batch in (1, 32, 128):
            bench.profile(f"decode-{batch}", batch, args.prompt, 60, args.profile)
        bench.profile("prefill", 8, args.prefill, 1, args.profile)
    bench.stage.close()
    if args.out:
        command = ["benchmarks/engine.py", *(argv or sys.argv[1:])]
        record(args.out, "engine", command, figures, settings=json.loads(settings.to_json()))


if __name__ == "__main__":
    main()
