"""What the server adds: the whole path (shim + ensemble) against the same stages called in one process.

    python benchmarks/overhead.py [--model builtin] [--device cpu] [--name overhead_cpu]

Both sides answer the same requests in the same run, taking turns: one stream with a new picture each (time to first
token), then 16 clients (completion tokens per second), streaming and not. Both run with GOMP_SPINCOUNT=0, as
`triptych serve` sets it.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from itertools import count

from support import body, median, picture, save, server

from triptych.python_models.contract.request import ChatRequest, MediaPart, Message, TextPart
from triptych.python_models.contract.sampling import SamplingParams
from triptych.python_models.contract.settings import Settings
from triptych.python_models.local import LocalEnsemble

QUESTION = "What is in the picture?"


def http_request(url: str, png: bytes, max_tokens: int, stream: bool) -> tuple[float, int]:
    """(seconds to the first token where the answer streams, tokens).

    A plain client that parses one line only: on a small machine its own work would count as the server's.
    """
    start = time.perf_counter()
    first = 0.0
    tokens = 0
    request = body(png, QUESTION, max_tokens, stream)
    if stream:
        request["stream_options"] = {"include_usage": True}
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=600)
    connection.request("POST", "/v1/chat/completions", json.dumps(request))
    response = connection.getresponse()
    if response.status != 200:
        raise SystemExit(f"status {response.status}: {response.read().decode()}")
    if not stream:
        tokens = int(json.load(response)["usage"]["completion_tokens"])
    for line in response if stream else ():
        if not first and b'"content":"' in line and b'"content":""' not in line:
            first = time.perf_counter() - start
        if b'"usage":{' in line:
            tokens = int(json.loads(line[6:])["usage"]["completion_tokens"])
    connection.close()
    return first, tokens


def local_request(local: LocalEnsemble, png: bytes, max_tokens: int, stream: bool) -> tuple[float, int]:
    """As http_request, in process."""
    message = Message("user", (MediaPart("image", blob=0), TextPart(QUESTION)))
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    start = time.perf_counter()
    first = 0.0
    tokens = 0
    for delta in local.chat(ChatRequest((message,), sampling, stream=stream), [png]):
        if not first and delta.text:
            first = time.perf_counter() - start
        tokens += len(delta.token_ids)
    return first, tokens


def throughput(call: Callable[[int], tuple[float, int]], clients: int, each: int, seed: int) -> float:
    """Completion tokens per second of ``clients`` closed loops with ``each`` requests."""
    counts = [0] * clients

    def loop(k: int) -> None:
        for i in range(each):
            counts[k] += call(seed + k * each + i)[1]

    threads = [threading.Thread(target=loop, args=(k,)) for k in range(clients)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts) / (time.perf_counter() - start)


def _with(call: Callable[[int, int, bool], tuple[float, int]], n: int, stream: bool, seed: int) -> tuple[float, int]:
    return call(seed, n, stream)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="builtin")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--name", default="overhead_cpu")
    parser.add_argument("--requests", type=int, default=100, help="requests of the TTFT part, per side")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--each", type=int, default=4, help="requests of each client, per side and round")
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    if "GOMP_SPINCOUNT" not in os.environ:
        # OpenMP reads it when it is loaded, so this process has to start anew.
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {"GOMP_SPINCOUNT": "0"})

    settings = Settings(model=args.model, device=args.device)
    with server(args.model, "--device", args.device) as (url, _, _), LocalEnsemble(settings, args.device) as local:
        sides: dict[str, Callable[[int, int, bool], tuple[float, int]]] = {
            "server": lambda seed, n, stream: http_request(url, picture(seed), n, stream),
            "in_process": lambda seed, n, stream: local_request(local, picture(seed), n, stream),
        }
        for call in sides.values():
            for seed in range(3):
                call(seed, 4, True)
        ttft: dict[str, list[float]] = {name: [] for name in sides}
        for i in range(args.requests):
            for k, (name, call) in enumerate(sides.items()):
                ttft[name].append(call(1000 + 2 * i + k, 4, True)[0] * 1e3)
        rates: dict[bool, dict[str, list[float]]] = {stream: {name: [] for name in sides} for stream in (True, False)}
        seeds = count(10_000, 10_000)
        for _ in range(args.rounds):
            for stream, rate in rates.items():
                for name, call in sides.items():
                    one = partial(_with, call, args.max_tokens, stream)
                    rate[name].append(throughput(one, args.clients, args.each, next(seeds)))
    save(
        args.name,
        sys.argv,
        {
            "ttft_ms_median": {name: round(median(v), 2) for name, v in ttft.items()},
            "ttft_added_ms_median": round(
                median([a - b for a, b in zip(ttft["server"], ttft["in_process"], strict=True)]), 2
            ),
            "clients": args.clients,
            **{
                "streaming" if stream else "not_streaming": {
                    "tokens_per_s_median": {name: round(median(v), 1) for name, v in rate.items()},
                    "ratio_median": round(
                        median([a / b for a, b in zip(rate["server"], rate["in_process"], strict=True)]), 3
                    ),
                }
                for stream, rate in rates.items()
            },
        },
    )


if __name__ == "__main__":
    main()
