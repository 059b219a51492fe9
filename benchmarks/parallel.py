"""Tensor and expert parallel on GPUs of one machine: sums over ranks, decode of a dense and of a sparse model.

    python benchmarks/parallel.py                        # two GPUs, a few minutes
    python benchmarks/parallel.py --device cpu           # tiny shapes over gloo, to try the script

Weights are random and drawn on the devices. Every part runs in a process of its own, so one that fails leaves the
others alone. Decode goes through the runner with CUDA graphs, greedily, one step queued ahead of the one that runs, as
the engine does it; the prompt is prefilled first.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import psutil

from triptych.python_models.families import torchvision_fix

torchvision_fix.install()

import torch  # noqa: E402
import transformers  # noqa: E402
from decoder import BLOCK, SHAPES  # noqa: E402
from support import save  # noqa: E402

from triptych.kernels.sampling import greedy  # noqa: E402
from triptych.python_models.families.loading import outline  # noqa: E402
from triptych.python_models.families.weights import RandomSource  # noqa: E402
from triptych.python_models.language_model.runner import fused  # noqa: E402
from triptych.python_models.language_model.runner.options import RunnerOptions  # noqa: E402
from triptych.python_models.language_model.runner.parallel.member import Member, Recipe  # noqa: E402
from triptych.python_models.language_model.runner.parallel.runner import ParallelRunner  # noqa: E402
from triptych.python_models.language_model.runner.runner import DecoderRunner  # noqa: E402
from triptych.python_models.language_model.runner.step import Slice  # noqa: E402

PROMPT, STEPS, WARM = 1024, 96, 16
SUMS = {"7 KB": 3584, "230 KB": 3584 * 32, "1 MB": 2**19}
CLASSES = {"qwen2.5-7b": "Qwen2ForCausalLM", "qwen3-30b-a3b": "Qwen3MoeForCausalLM"}
# part: (shape, batches, tp, ep, one_shot)
PARTS: dict[str, tuple[str, list[int], int, int, bool]] = {
    "7B on 1 GPU": ("qwen2.5-7b", [1], 1, 1, True),
    "7B tp=2": ("qwen2.5-7b", [1], 2, 1, True),
    "30B-A3B tp=2 ep=2": ("qwen3-30b-a3b", [1, 32], 2, 2, True),
    "7B tp=2, NCCL only": ("qwen2.5-7b", [1], 2, 1, False),
    "30B-A3B on 1 GPU": ("qwen3-30b-a3b", [1, 32], 1, 1, True),
}


class Bare:
    """What the fused decoder needs of a model without weights."""

    def __init__(self, model: Any) -> None:
        self.text_model, self.lm_head = model.get_decoder(), model.lm_head
        self.config, self.num_axes = model.config, 1
        self.token_extras: dict[str, int | None] = {}
        self.token_arguments = None

    def embed(self, ids: torch.Tensor, is_media: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


def build(member: Member, folder: str, cls: str, batch: int) -> DecoderRunner:
    """A rank's runner."""
    on_gpu = member.device != "cpu"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    if on_gpu:
        torch.cuda.set_device(member.device)
    else:
        torch.set_num_threads(1)
    whole = getattr(transformers, cls)
    config = whole.config_class.from_pretrained(folder)
    model = outline(whole, config, lambda m: ["lm_head", "model"], dtype)
    source = RandomSource(model, "model", member.device, dtype)
    shard = fused.Shard(member.rank, member.size, member.expert_parallel)
    built = fused.build(Bare(model), shard, member.collectives, source, check=False)
    if isinstance(built, str):
        raise ValueError(built)
    options = RunnerOptions(context_length=PROMPT + 512, graph_batch=batch if on_gpu else 0)
    return DecoderRunner(built, 1, BLOCK, member.device, options)


class Timing:
    """A "runner" that measures sums over ranks while it is built, on all ranks at once."""

    bytes_per_token = (1,)

    def __init__(self, member: Member) -> None:
        group: Any = member.collectives
        self.figures: dict[str, float] = {}
        for name, count in SUMS.items():
            dtype = torch.bfloat16 if member.device != "cpu" else torch.float32
            tensor = torch.ones(count, device=member.device, dtype=dtype)
            ways = {"nccl" if member.device != "cpu" else "gloo": group._sum}
            if group.how == "symmetric memory":
                ways["symmetric memory"] = group.all_reduce
            for way, reduce in ways.items():
                self.figures[f"{name} {way} us"] = _time_sum(reduce, tensor)

    def free(self) -> None:
        """It holds nothing."""


def _time_sum(reduce: Callable[[torch.Tensor], torch.Tensor], tensor: torch.Tensor, repeats: int = 50) -> float:
    """Microseconds of one sum, inside a CUDA graph where there is one."""

    def run() -> None:
        for _ in range(repeats):
            reduce(tensor)

    run()
    if tensor.is_cuda:
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            run()
        times = []
        for _ in range(12):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end) * 1000 / repeats)
        return statistics.median(times[2:])
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) / repeats * 1e6


def time_sums(member: Member) -> Timing:
    """The recipe's function for the sums."""
    return Timing(member)


def devices(device: str, count: int) -> list[str]:
    return ["cpu"] * count if device == "cpu" else [f"cuda:{rank}" for rank in range(count)]


def sums(device: str) -> None:
    """Print microseconds of sums as JSON."""
    group = ParallelRunner(Recipe("parallel:time_sums", {}, dtype="bfloat16"), devices(device, 2), lost)
    try:
        print(json.dumps(group._local.figures), flush=True)  # type: ignore[attr-defined]
    finally:
        group.close()


def lost(error: Any) -> None:
    """A device may wait for a rank that is gone: end this part."""
    print(error, file=sys.stderr, flush=True)
    os._exit(1)


def decode(device: str, part: str) -> None:
    """Print as JSON: milliseconds of a decode step, and tokens/s, at each batch."""
    shape, batches, tp, ep, one_shot = PARTS[part]
    config = SHAPES[shape]()
    if device == "cpu":
        values = config.to_dict() | {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
        values |= {"vocab_size": 320, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
        if "num_experts" in values:
            values |= {"num_experts": 8, "moe_intermediate_size": 32}
        config = type(config)(**(values | {"layer_types": None}))
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        options = {"folder": folder, "cls": CLASSES[shape], "batch": max(batches)}
        runner: Any
        if tp == 1:
            runner = build(Member(0, 1, False, devices(device, 1)[0], fused.Alone()), **options)
        else:
            recipe = Recipe("parallel:build", options, expert_parallel=ep > 1, one_shot=one_shot)
            runner = ParallelRunner(recipe, devices(device, tp), lost)
    try:
        per_request = -(-(PROMPT + 256) // BLOCK)
        runner.allocate([per_request * max(batches)] * len(runner.kv_groups))
        runner.warm_up(PROMPT)
        figures = {"start s": time.perf_counter() - start}
        for batch in batches:
            figures |= {f"{name} batch {batch}": value for name, value in drive(runner, batch, per_request).items()}
        if device != "cpu":
            figures["GPU 0 GiB"] = torch.cuda.max_memory_allocated(0) / 2**30
        # said before the end, which may fail too
        print(json.dumps(figures), flush=True)
    finally:
        if tp > 1:
            runner.close()


@torch.inference_mode()
def drive(runner: Any, batch: int, per_request: int) -> dict[str, float]:
    on_gpu = runner.last_tokens.is_cuda
    rng = np.random.default_rng(0)
    tables = [
        tuple(np.arange(i * per_request, (i + 1) * per_request, dtype=np.int32) for _ in runner.kv_groups)
        for i in range(batch)
    ]

    def step(slices: list[Slice]) -> None:
        tokens, _ = greedy(runner.forward(slices))
        runner.last_tokens[slices[0].slot : slices[0].slot + len(slices)] = tokens

    def mark() -> Any:
        return torch.cuda.current_stream().record_event() if on_gpu else None

    prefills = []
    for index in range(batch):
        ids = rng.integers(0, runner.vocab_size, PROMPT)
        begin = time.perf_counter()
        step([Slice(ids, np.arange(PROMPT)[None], 0, tables[index], slot=index)])
        if on_gpu:
            torch.cuda.synchronize()
        prefills.append(time.perf_counter() - begin)
    nothing = np.zeros(1, dtype=np.int64)
    host, marks, begin = 0.0, [], 0.0
    for number in range(WARM + STEPS):
        if number == WARM:
            if on_gpu:
                torch.cuda.synchronize()
            begin, host = time.perf_counter(), 0.0
        place = np.array([[PROMPT + number]])
        slices = [Slice(nothing, place, PROMPT + number, tables[i], slot=i, first_on_device=True) for i in range(batch)]
        before = time.perf_counter()
        step(slices)
        host += time.perf_counter() - before
        marks.append(mark())
        if on_gpu and number > 0:
            # one step ahead, as the engine
            marks[number - 1].synchronize()
    if on_gpu:
        torch.cuda.synchronize()
    took = (time.perf_counter() - begin) / STEPS
    return {
        "ms a step": took * 1000,
        "tok/s": batch / took,
        "host ms": host / STEPS * 1000,
        "prefill ms": statistics.median(prefills) * 1000,
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--part", help="run one part in this process and print its figures as JSON")
    parser.add_argument("--only", nargs="*", help="names of parts")
    parser.add_argument("--seconds", type=float, default=600, help="for all parts together (default %(default)s)")
    parser.add_argument("--part-seconds", type=float, default=240, help="for one (default %(default)s)")
    args = parser.parse_args()
    if args.part:
        if args.part == "sums":
            sums(args.device)
        else:
            decode(args.device, args.part)
        return
    began, table = time.perf_counter(), {}
    for part in ["sums", *PARTS]:
        left = args.seconds - (time.perf_counter() - began)
        if args.only and part not in args.only:
            continue
        if left < 15:
            table[part] = {"skipped": "no time left"}
            continue
        table[part] = run_part(args.device, part, min(left, args.part_seconds))
        print(part, table[part], flush=True)
    one, two = (table.get(part, {}).get("tok/s batch 1") for part in ("7B on 1 GPU", "7B tp=2"))
    if one and two:
        table["7B tp=2 over 1 GPU, batch 1"] = {"ratio": round(two / one, 3)}
    if args.device == "cuda":
        save("parallel", sys.argv, table)
    print(f"\n{'part':30} figures   ({time.perf_counter() - began:.0f} s in all)")
    for part, figures in table.items():
        print(f"{part:30} " + ", ".join(f"{name} {value}" for name, value in figures.items()))


def run_part(device: str, part: str, timeout_s: float) -> dict[str, Any]:
    command = [sys.executable, __file__, "--device", device, "--part", part]
    # on SIGABRT every rank says where it is
    process = psutil.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONFAULTHANDLER": "1"})
    try:
        out, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        for one in (*process.children(recursive=True), process):
            one.send_signal(signal.SIGABRT)
        out, _ = process.communicate()
    figures: dict[str, float] = json.loads(out.splitlines()[-1]) if out.strip() else {}
    known: dict[str, Any] = {name: round(value, 2) for name, value in figures.items()}
    if process.returncode:
        return known | {"failed": f"exit code {process.returncode}, see above"}
    return known


if __name__ == "__main__":
    main()
