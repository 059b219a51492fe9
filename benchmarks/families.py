"""One published shape of each family behind the real server: does it load and serve, how fast, with what memory.

    python benchmarks/families.py --device cuda [--only qwen3-vl-8b ...] [--together 3]
    python benchmarks/families.py --device cpu --layers 1 --small --only llava-1.5-7b kimi-vl-a3b

Weights are random (published.py has the configurations). Each family is asked about new pictures of 1024 x 1024 pixels
or sounds of ten seconds: by one stream, then by eight. A family that fails is recorded with what its server said, and
the next one follows. --together starts several at once and then measures one after the other.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import io
import itertools
import math
import random
import re
import subprocess
import sys
import tempfile
import time
import wave
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
from memory import label, measure
from path import ask_content, picture_of
from published import SHAPES
from shapes import write
from support import RESULTS, median, record, server

# what differs most comes first, should time run out
ORDER = (
    "qwen2.5-vl-7b",
    "gemma3-12b",
    "internvl3-8b",
    "llama-3.2-11b-vision",
    "qwen2-audio-7b",
    "deepseek-vl2-small",
    "qwen3-vl-30b-a3b",
    "glm-4.1v-9b",
    "nemotron-nano-12b-v2-vl",
    "llava-1.5-7b",
    "kimi-vl-a3b",
    "mistral-small-3.1-24b",
    "qwen3-vl-8b",
)
OPTIONS = (
    "--load-format dummy --context-length 4096 --max-running-requests 8 --kv-cache-tokens 32768 "
    "--torch-threads 4 --max-server-restarts 0"
)
# KV cache, towers at work and CUDA itself, beside the weights
BESIDE_WEIGHTS_GB = 20
TAIL_LINES = 12


@dataclass(frozen=True)
class Load:
    """How much is asked."""

    side: int
    seconds: float
    answer: int
    alone: int
    streams: int
    rounds: int


FULL = Load(side=1024, seconds=10, answer=64, alone=4, streams=8, rounds=2)
SMALL = Load(side=256, seconds=1, answer=8, alone=1, streams=2, rounds=1)


class Asker:
    """Asks one server; no two questions are the same, so no cache answers."""

    def __init__(self, url: str, modality: str, load: Load) -> None:
        self.url, self.modality, self.load = url, modality, load
        self._numbers = itertools.count()

    def _content(self) -> list[dict[str, Any]]:
        number = next(self._numbers)
        if self.modality == "image":
            data = base64.b64encode(picture_of(self.load.side, number)).decode()
            part: dict[str, Any] = {"type": "image_url", "image_url": {"url": f"data:image/bmp;base64,{data}"}}
        else:
            data = base64.b64encode(sound_of(self.load.seconds, number)).decode()
            part = {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}
        return [part, {"type": "text", "text": f"What is this? ({number})"}]

    def _ask(self, content: list[dict[str, Any]]) -> tuple[float, float, int]:
        start = time.perf_counter()
        first, tokens = ask_content(self.url, content, self.load.answer)
        return first, time.perf_counter() - start, tokens

    def warm_up(self) -> None:
        """A request alone, then as many as come later: kernels are compiled and tuned for both."""
        self._ask(self._content())
        self._at_once(self.load.streams, 1)

    def alone(self) -> dict[str, float]:
        """One request after the other."""
        answers = [self._ask(self._content()) for _ in range(self.load.alone)]
        decode = [(tokens - 1) / (whole - first) for first, whole, tokens in answers]
        return {
            "ttft_p50_ms": round(1000 * median([first for first, _, _ in answers]), 1),
            "decode_tok_s": round(median(decode), 1),
        }

    def together(self) -> dict[str, float]:
        """Several streams."""
        return self._at_once(self.load.streams, self.load.rounds)

    def _at_once(self, streams: int, rounds: int) -> dict[str, float]:
        contents = [self._content() for _ in range(streams * rounds)]
        with ThreadPoolExecutor(streams) as pool:
            start = time.perf_counter()
            answers = list(pool.map(self._ask, contents))
            seconds = time.perf_counter() - start
        return {
            "requests_s": round(len(answers) / seconds, 2),
            "output_tok_s": round(sum(tokens for _, _, tokens in answers) / seconds, 1),
            "ttft_p50_ms": round(1000 * median([first for first, _, _ in answers]), 1),
        }


def sound_of(seconds: float, seed: int) -> bytes:
    """Noise, 16 kHz, as a WAV file."""
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16000)
        file.writeframes(random.Random(seed).randbytes(2 * int(16000 * seconds)))
    return buffer.getvalue()


def memory_of(url: str, process: psutil.Process) -> dict[str, dict[str, float]]:
    """By stage: GiB its tensors hold on the GPU, as it reports them, and all its process has there where the driver
    tells; MiB resident in main memory.
    """
    text = httpx.get(f"{url}/metrics").text
    tensors: dict[str, float] = {}
    for stage, value in re.findall(r'triptych_gpu_memory_bytes\{.*?stage="(\w+)".*?\} (\S+)', text):
        tensors[stage] = round(tensors.get(stage, 0) + float(value) / 2**30, 2)
    stages = {child.pid: label(child) for child in process.children(recursive=True)}
    processes: dict[str, float] = {}
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        query = ["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
        for line in subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout.splitlines():
            pid, _, mib = line.partition(",")
            # in a container these may be numbers of another name space
            if pid.isdigit() and int(pid) in stages and mib.strip().isdigit():
                processes[stages[int(pid)]] = round(int(mib) / 1024, 2)
    found = {"gpu_tensors_gib": tensors, "gpu_process_gib": processes, "resident_mib": measure(process)}
    return {name: values for name, values in found.items() if values}


class Family:
    """A family and its server, or why there is none."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder
        self.stack = contextlib.ExitStack()
        self.failure = ""

    def write(self, layers: int | None) -> None:
        """Its checkpoint."""
        model = self.folder / "model"
        model.mkdir(parents=True)
        try:
            write(self.name, model, layers)
        except Exception as error:  # such as a class that this version of transformers lacks
            self.failure = f"{type(error).__name__}: {error}"

    def start(self, options: list[str], timeout_s: float) -> None:
        """Its server."""
        if self.failure:
            return
        try:
            errors = self.stack.enter_context((self.folder / "errors.log").open("w"))
            command = [*options, "--server-log", str(self.folder / "server.log")]
            running = server(str(self.folder / "model"), *command, timeout_s=timeout_s, errors=errors)
            self.url, self.process, self.ready_s = self.stack.enter_context(running)
        except (SystemExit, Exception) as error:
            self.failure = f"{type(error).__name__}: {error}"

    def figures(self, load: Load) -> dict[str, Any]:
        """Ask it, then stop it."""
        with self.stack:
            shape = SHAPES[self.name]
            found: dict[str, Any] = {
                "model": shape.model,
                "billion_parameters": shape.parameters,
                "rows_per_medium": shape.rows,
            }
            try:
                if not self.failure:
                    found["ready_s"] = round(self.ready_s, 1)
                    asker = Asker(self.url, shape.modality, load)
                    asker.warm_up()
                    found["alone"] = asker.alone()
                    found[f"{load.streams} streams"] = asker.together()
                    found["memory"] = memory_of(self.url, self.process)
            except Exception as error:
                self.failure = f"{type(error).__name__}: {error}"
            if self.failure:
                found["failed"] = self.failure
                found["said"] = [line for name in ("server.log", "errors.log") for line in self._tail(name)]
        return found

    def _tail(self, name: str) -> list[str]:
        """The last lines, of the server's log those that tell of an error."""
        path = self.folder / name
        text = path.read_text(errors="replace") if path.is_file() else ""
        lines = [line[:400] for line in text.splitlines() if line.strip()]
        if name == "server.log":
            lines = [line for line in lines if re.search("^E[0-9]|[Ee]rror", line)]
        return lines[-TAIL_LINES:]


def groups(names: list[str], together: int, memory_gb: float) -> Iterator[list[str]]:
    """In their order, at most ``together`` that fit the memory side by side."""
    group: list[str] = []
    used = 0.0
    for name in names:
        needs = 2 * SHAPES[name].parameters + BESIDE_WEIGHTS_GB
        if group and (len(group) == together or used + needs > memory_gb):
            yield group
            group, used = [], 0.0
        group.append(name)
        used += needs
    yield group


def line_of(name: str, found: dict[str, Any]) -> str:
    """A row of the printed table."""
    if "failed" in found:
        return f"{name:24} {[found['failed'], *found['said']][-1][:200]}"
    alone = found["alone"]
    (many,) = (values for key, values in found.items() if key.endswith(" streams"))
    memory = found["memory"]
    used = memory.get("gpu_tensors_gib") or memory.get("resident_mib", {})
    stages = ", ".join(f"{stage} {value:g}" for stage, value in used.items())
    return (
        f"{name:24} {found['ready_s']:6.1f} {alone['ttft_p50_ms']:8.1f} {alone['decode_tok_s']:7.1f} "
        f"{many['ttft_p50_ms']:8.1f} {many['output_tok_s']:8.1f} {many['requests_s']:6.2f}   {stages}"
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", nargs="+", choices=sorted(SHAPES), default=list(ORDER), metavar="NAME")
    parser.add_argument("--together", type=int, default=1, help="servers that start at once (default %(default)s)")
    parser.add_argument("--memory-gb", type=float, default=130, help="of the GPU, for those (default %(default)s)")
    parser.add_argument("--start-timeout-s", type=float, default=60)
    parser.add_argument("--limit-s", type=float, default=math.inf, help="begin no more servers after so long")
    parser.add_argument("--layers", type=int, help="of the decoder, instead of all")
    parser.add_argument("--small", action="store_true", help="small media and few, to try this script")
    parser.add_argument("--options", default=OPTIONS, help="of triptych serve (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS / "families_h200.json")
    args = parser.parse_args()
    load = SMALL if args.small else FULL
    began = time.perf_counter()
    options = [*args.options.split(), "--device", args.device]
    figures: dict[str, Any] = {}
    print(
        f"{'':24} {'ready':>6} {'alone':>8} {'decode':>7} {f'{load.streams} streams':>8}\n"
        f"{'':24} {'s':>6} {'TTFT ms':>8} {'tok/s':>7} {'TTFT ms':>8} {'tok/s':>8} {'req/s':>6}   by stage: "
        f"{'GiB on the GPU' if args.device.startswith('cuda') else 'MiB resident'}",
        flush=True,
    )
    for group in groups(args.only, args.together, args.memory_gb):
        if time.perf_counter() - began > args.limit_s:
            print(f"no time for {', '.join(group)}")
            continue
        with tempfile.TemporaryDirectory() as place, ThreadPoolExecutor(len(group)) as pool:
            servers = [Family(name, Path(place) / name) for name in group]
            for started in servers:
                started.write(args.layers)
            list(pool.map(lambda one: one.start(options, args.start_timeout_s), servers))
            try:
                for started in servers:
                    figures[started.name] = started.figures(load)
                    print(line_of(started.name, figures[started.name]), flush=True)
                    record(args.out, "families", sys.argv, figures, options=args.options)
            finally:
                for started in servers:
                    started.stack.close()
    print(f"{time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
