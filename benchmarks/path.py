"""Load through the whole path: HTTP through the shim, or gRPC streams into the ensemble.

    python benchmarks/shapes.py qwen2.5-vl-7b /tmp/shape
    python benchmarks/path.py /tmp/shape --device cuda --streams 32 128
    python benchmarks/path.py /tmp/shape --device cuda --streams 1 16 --picture 1024 --answer 64

Closed loops in several client processes, so that the clients' own work is not the limit. Compare with
benchmarks/engine.py on the same shape: that is the engine without a server.
"""

from __future__ import annotations

import argparse
import base64
import http.client
import io
import itertools
import json
import multiprocessing
import random
import re
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
from PIL import Image
from support import free_port, median, record, server

from triptych.client.sdk import Client


def text_of(tokens: int, seed: int, tokenizer: Any) -> str:
    """Random letters that are about ``tokens`` tokens."""
    rng = random.Random(seed)
    text = "".join(rng.choice("bcdfghjklmnpqrstvwxz") for _ in range(4 * tokens))
    ids = tokenizer(text)["input_ids"]
    return text[: round(len(text) * tokens / len(ids))]


def picture_of(size: int, seed: int) -> bytes:
    """An uncompressed picture: decoding it is a copy."""
    pixels = random.Random(seed).randbytes(3 * 64 * 64)
    buffer = io.BytesIO()
    Image.frombytes("RGB", (64, 64), pixels).resize((size, size), Image.Resampling.BILINEAR).save(buffer, "BMP")
    return buffer.getvalue()


def ask_http(url: str, text: str, picture: bytes | None, answer: int) -> tuple[float, int]:
    """(seconds to the first token, tokens)."""
    content: list[dict[str, Any]] = [{"type": "text", "text": text}]
    if picture:
        data = base64.b64encode(picture).decode()
        content.insert(0, {"type": "image_url", "image_url": {"url": f"data:image/bmp;base64,{data}"}})
    return ask_content(url, content, answer)


def ask_content(url: str, content: list[dict[str, Any]], answer: int) -> tuple[float, int]:
    """The same for any content of a message."""
    body = json.dumps(
        {
            "model": "default",
            "messages": [{"role": "user", "content": content}],
            "max_tokens": answer,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    )
    start = time.perf_counter()
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=600)
    connection.request("POST", "/v1/chat/completions", body)
    response = connection.getresponse()
    if response.status != 200:
        raise RuntimeError(f"status {response.status}: {response.read().decode()}")
    first = 0.0
    tail = b""
    while data := response.read1(65536):
        if not first and b'"content":"' in data.replace(b'"content":""', b""):
            first = time.perf_counter() - start
        tail = (tail + data)[-4096:]
    connection.close()
    usage = next(line for line in reversed(tail.split(b"\n")) if b'"usage":{' in line)
    return first, int(json.loads(usage[6:])["usage"]["completion_tokens"])


def ask_grpc(url: str, text: str, picture: bytes | None, answer: int) -> tuple[float, int]:
    """(seconds to the first token, tokens), by the Python client."""
    host = url.removeprefix("http://")
    client = _clients.get(threading.get_ident())
    if client is None:
        client = _clients[threading.get_ident()] = Client(host)
    start = time.perf_counter()
    first, tokens = 0.0, 0
    content: list[dict[str, Any]] = [{"type": "text", "text": text}]
    if picture:
        content.insert(0, {"type": "image", "image": picture})
    messages = [{"role": "user", "content": content}]
    for delta in client.stream_chat(messages, max_tokens=answer, temperature=0.0, ignore_eos=True):
        if delta.token_ids and not first:
            first = time.perf_counter() - start
        tokens += len(delta.token_ids)
    return first, tokens


_clients: dict[int, Client] = {}


def worker(
    ask: Callable[..., tuple[float, int]],
    url: str,
    jobs: Any,
    results: Any,
    threads: int,
) -> None:
    """A client process: ``threads`` loops over the common list of jobs."""

    def loop() -> None:
        while True:
            job = jobs.get()
            if job is None:
                return
            try:
                results.put(ask(url, *job))
            except Exception as error:  # the parent reports it
                results.put(f"{type(error).__name__}: {error}")

    running = [threading.Thread(target=loop) for _ in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()


def load(
    ask: Callable[..., tuple[float, int]], url: str, streams: int, requests: list[tuple[str, bytes | None, int]]
) -> dict[str, float]:
    """Run all requests in ``streams`` closed loops."""
    context = multiprocessing.get_context("spawn")
    jobs, results = context.Queue(), context.Queue()
    processes = min(streams, 8)
    threads = -(-streams // processes)
    workers = [
        context.Process(target=worker, args=(ask, url, jobs, results, threads), daemon=True) for _ in range(processes)
    ]
    for request in requests[:processes]:
        jobs.put(request)
    for process in workers:
        process.start()
    # the first round only gets everybody started
    for _ in requests[:processes]:
        results.get(timeout=300)
    start = time.perf_counter()
    for request in requests[processes:]:
        jobs.put(request)
    answers = [results.get(timeout=300) for _ in requests[processes:]]
    seconds = time.perf_counter() - start
    for _ in range(processes * threads):
        jobs.put(None)
    for process in workers:
        process.join()
    if wrong := [a for a in answers if isinstance(a, str)]:
        raise RuntimeError(f"{len(wrong)} requests failed, the first with {wrong[0]}")
    return {
        "output_tok_s": round(sum(tokens for _, tokens in answers) / seconds, 1),
        "requests_s": round(len(answers) / seconds, 2),
        "ttft_p50_ms": round(1000 * median([first for first, _ in answers]), 1),
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--streams", type=int, nargs="+", default=[32, 128])
    parser.add_argument("--prompt", type=int, default=1000, help="tokens of text (default %(default)s)")
    parser.add_argument("--answer", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3, help="requests of each stream")
    parser.add_argument("--picture", type=int, help="edge of a picture beside a short text")
    parser.add_argument("--protocols", nargs="+", default=["http", "grpc"], choices=["http", "grpc"])
    parser.add_argument("--options", default="--load-format dummy --context-length 4096", help="of triptych serve")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    from triptych.python_models.families import torchvision_fix

    torchvision_fix.install()
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    figures: dict[str, Any] = {}
    # nothing is asked twice, so no cache answers
    seeds = itertools.count()
    grpc_port = free_port()
    options = [*args.options.split(), "--device", args.device, "--grpc-port", str(grpc_port)]
    with server(args.model, *options) as (url, _, ready_s):
        figures["start s"] = round(ready_s, 1)
        print(f"ready after {ready_s:.1f} s", flush=True)
        before = _stage_times(url)
        for streams in args.streams:
            for protocol in args.protocols:
                count = streams * (args.rounds if streams > 1 else 12) + min(streams, 8)
                prompt = 20 if args.picture else args.prompt
                requests = [
                    (
                        text_of(prompt, next(seeds), tokenizer),
                        picture_of(args.picture, next(seeds)) if args.picture else None,
                        args.answer,
                    )
                    for _ in range(count)
                ]
                ask, where = (ask_http, url) if protocol == "http" else (ask_grpc, f"http://127.0.0.1:{grpc_port}")
                name = f"{protocol}, {streams} streams"
                try:
                    figures[name] = load(ask, where, streams, requests)
                except Exception as error:
                    figures[name] = {"failed": f"{type(error).__name__}: {error}"}
                print(f"{name:20} {figures[name]}", flush=True)
                before = _show_stages(url, before)
    if args.out:
        record(args.out, "path", sys.argv, figures)


def _stage_times(url: str) -> dict[str, tuple[float, float]]:
    """(seconds, requests) that each stage has counted."""
    text = httpx.get(f"{url}/metrics").text
    found: dict[str, dict[str, float]] = {}
    for kind, stage, value in re.findall(r'triptych_stage_seconds_(sum|count)\{.*?stage="(\w+)".*?\} (\S+)', text):
        found.setdefault(stage, {})[kind] = float(value)
    return {stage: (v["sum"], v["count"]) for stage, v in found.items() if len(v) == 2}


def _show_stages(url: str, before: dict[str, tuple[float, float]]) -> dict[str, tuple[float, float]]:
    """Print the mean time of requests in each stage since ``before``."""
    time.sleep(0.5)
    now = _stage_times(url)
    means = []
    for stage, (seconds, count) in now.items():
        old = before.get(stage, (0.0, 0.0))
        if count > old[1]:
            means.append(f"{stage} {1000 * (seconds - old[0]) / (count - old[1]):.1f}")
    print(f"{'':20} ms in stages: {', '.join(means)}", flush=True)
    return now


if __name__ == "__main__":
    main()
