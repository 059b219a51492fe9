"""Memory of every process at rest, after a warm-up, and after 1,000 requests more (there should be no growth).

    python benchmarks/memory.py [--model builtin] [--requests 1000]

Requests take turns: text, a new picture, a picture seen before. Figures: resident MiB of each process.
"""

from __future__ import annotations

import argparse
import sys
from concurrent.futures import ThreadPoolExecutor

import httpx
import psutil
from support import body, picture, save, server


def label(process: psutil.Process) -> str:
    line = " ".join(process.cmdline())
    for stage in ("preprocess", "vision_encoder", "audio_encoder", "language_model"):
        if "stub" in line and f"{stage}_" in line:
            return stage
    if "tritonserver" in process.name():
        return "tritonserver"
    return "shim" if "triptych serve" in line or "triptych" in line.split(" ")[:2][-1] else f"other:{process.name()}"


def measure(root: psutil.Process) -> dict[str, float]:
    out: dict[str, float] = {}
    for process in (root, *root.children(recursive=True)):
        try:
            name = label(process)
            out[name] = round(out.get(name, 0) + process.memory_info().rss / 2**20, 1)
        except psutil.NoSuchProcess:
            continue
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="builtin")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--name", default="memory_cpu")
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--warm-up", type=int, default=200)
    args = parser.parse_args()

    with server(args.model, "--device", args.device, "--mm-cache-size-mb", "4") as (url, process, _):
        client = httpx.Client(timeout=600, limits=httpx.Limits(max_connections=None))

        def ask(i: int) -> None:
            png = [None, picture(i), picture(7)][i % 3]
            answer = client.post(f"{url}/v1/chat/completions", json=body(png, "What is this?", 8, stream=False))
            answer.raise_for_status()

        rest = measure(process)
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(ask, range(args.warm_up)))
            warm = measure(process)
            list(pool.map(ask, range(args.warm_up, args.warm_up + args.requests // 2)))
            half = measure(process)
            list(pool.map(ask, range(args.warm_up + args.requests // 2, args.warm_up + args.requests)))
        after = measure(process)
    figures = {"at_rest": rest, "warm": warm, "after_half": half, "after_all": after, "requests": args.requests}
    save(args.name, sys.argv, figures)


if __name__ == "__main__":
    main()
