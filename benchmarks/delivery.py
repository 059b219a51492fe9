"""What sending costs: a scripted engine (no model) streams through the real server, over gRPC and through the shim.

    python benchmarks/delivery.py [--streams 1 32 128] [--steps 140] [--out benchmarks/results/delivery.json]

Each step gives every stream a token. For each load: tokens/s that arrived, responses/s they came in, the time to the
first token, what the engine's thread needed for a step (of which ``--work`` ms stand for its own Python) and CPU
seconds per second of the processes that send. Clients run in processes of their own and read without parsing.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import grpc
import psutil
from support import free_port, machine, median

from triptych.client.launcher import TritonServer, find_server
from triptych.client.sdk import wire
from triptych.python_models.contract.request import ChatRequest
from triptych.python_models.contract.settings import Settings

MESSAGES = [{"role": "user", "content": "hello"}]
PROCESSES = 4
Found = tuple[float, int, int]
"""Seconds to the first token, tokens, responses."""


async def ask_grpc(stub: Any, number: int, tokens: int) -> Found:
    """One stream into the ensemble."""
    request = ChatRequest.from_json(json.dumps({"messages": MESSAGES, "sampling": {"max_tokens": tokens}}), 0)
    message = wire.chat_message(f"r{number}", request, ())

    async def once() -> Any:
        yield message

    start = time.perf_counter()
    first, count, responses = 0.0, 0, 0
    async for answer in stub.ModelStreamInfer(once()):
        if answer.error_message:
            raise RuntimeError(answer.error_message)
        response = answer.infer_response
        names = [output.name for output in response.outputs]
        if names:
            found = len(response.raw_output_contents[names.index("token_ids")]) // 4
            first = first or (time.perf_counter() - start if found else 0.0)
            count += found
            responses += bool(found)
    return first, count, responses


async def ask_http(url: str, tokens: int) -> Found:
    """One stream from the shim."""
    host, port = url.removeprefix("http://").split(":")
    body = {"model": "default", "messages": MESSAGES, "max_tokens": tokens, "stream": True}
    text = json.dumps(body)
    start = time.perf_counter()
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(text)}\r\n\r\n{text}".encode())
    first, count, responses = 0.0, 0, 0
    tail = b""
    while b"[DONE]" not in tail:
        data = await reader.read(65536)
        if not data:
            raise RuntimeError(f"the stream ended early: {tail!r}")
        found = data.count(b" token")
        first = first or (time.perf_counter() - start if found else 0.0)
        count += found
        responses += data.count(b'"content":" token')
        tail = (tail + data)[-200:]
    writer.close()
    return first, count, responses


def client(kind: str, url: str, numbers: list[int], tokens: int, start: Any, results: Any) -> None:
    """A client process with some of the streams."""
    from tritonclient.grpc import service_pb2_grpc as rpc

    async def run() -> list[Found]:
        start.wait()
        if kind == "http":
            return await asyncio.gather(*(ask_http(url, tokens) for _ in numbers))
        async with grpc.aio.insecure_channel(url, options=wire.CHANNEL_OPTIONS) as channel:
            stub = rpc.GRPCInferenceServiceStub(channel)
            return await asyncio.gather(*(ask_grpc(stub, number, tokens) for number in numbers))

    try:
        results.put(asyncio.run(run()))
    except Exception as error:
        results.put(f"{type(error).__name__}: {error}")


def load(kind: str, url: str, streams: int, tokens: int, watched: dict[str, psutil.Process]) -> dict[str, float]:
    """All streams at once, once each."""
    context = multiprocessing.get_context("spawn")
    start, results = context.Event(), context.Queue()
    shares = [list(range(k, streams, PROCESSES)) for k in range(min(PROCESSES, streams))]
    clients = [
        context.Process(target=client, args=(kind, url, share, tokens, start, results), daemon=True) for share in shares
    ]
    for process in clients:
        process.start()
    time.sleep(3.0)
    before = {name: sum(p.cpu_times()[:2]) for name, p in watched.items()}
    began = time.perf_counter()
    start.set()
    found: list[Found] = []
    for _ in clients:
        answer = results.get(timeout=300)
        if isinstance(answer, str):
            raise RuntimeError(answer)
        found += answer
    seconds = time.perf_counter() - began
    used = {f"cpu {name}": (sum(p.cpu_times()[:2]) - before[name]) / seconds for name, p in watched.items()}
    for process in clients:
        process.join()
    wrong = sum(count != tokens for _, count, _ in found)
    if wrong:
        raise RuntimeError(f"{wrong} of {streams} streams did not bring {tokens} tokens")
    return {
        "tokens_s": sum(count for _, count, _ in found) / seconds,
        "responses_s": sum(count for _, _, count in found) / seconds,
        "ttft_ms_p50": 1000 * median([first for first, _, _ in found]),
        **used,
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 32, 128])
    parser.add_argument("--steps", type=float, default=140, help="steps/s the engine tries (default %(default)s)")
    parser.add_argument("--work", type=float, default=1.5, help="ms of Python in a step (default %(default)s)")
    parser.add_argument("--seconds", type=float, default=6, help="length of each load (default %(default)s)")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    figures: dict[str, dict[str, float | str]] = {}
    folder = Path(tempfile.mkdtemp(prefix="delivery-"))
    report = folder / "report.jsonl"
    report.touch()
    # settings that no scripted stage needs carry what it is told
    settings = Settings(model=str(report), request_timeout_s=args.steps, heartbeat_s=args.work)
    here = Path(__file__).with_name("scripted.py")
    names = {"preprocess": "Preprocess", "language_model": "LanguageModel"}
    classes = {
        stage: f"{here}:{names.get(stage, 'Encoder')}"
        for stage in ("preprocess", "vision_encoder", "audio_encoder", "language_model")
    }
    with TritonServer(find_server(), settings, stage_classes=classes, log=folder / "server.log") as server:
        server.wait_ready(120, lambda text: None)
        port = free_port()
        command = [str(Path(sys.executable).with_name("triptych")), "serve", "--triton-url", server.grpc_url]
        command += ["--port", str(port), "--served-model-name", "scripted"]
        shim = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            assert shim.stdout is not None
            while "ready: " not in (line := shim.stdout.readline()):
                if not line:
                    raise SystemExit("the shim did not start")
            for streams in args.streams:
                for kind, url in (("grpc", server.grpc_url), ("http", f"http://127.0.0.1:{port}")):
                    name = f"{kind}, {streams} streams"
                    lines = len(report.read_text().splitlines())
                    try:
                        # a machine too busy to answer probes gets its stages loaded anew
                        watched = {"engine": _stub(server.pid), "tritonserver": psutil.Process(server.pid)}
                        watched["shim"] = psutil.Process(shim.pid)
                        found: dict[str, Any] = load(kind, url, streams, round(args.steps * args.seconds), watched)
                        while len(said := report.read_text().splitlines()) == lines:
                            time.sleep(0.05)
                        found = found | json.loads(said[-1])
                        figures[name] = {key: round(value, 2) for key, value in found.items()}
                    except Exception as error:
                        figures[name] = {"failed": f"{type(error).__name__}: {error}"}
                    print(name, figures[name], flush=True)
        finally:
            shim.terminate()
            shim.wait()
    _table(figures)
    if args.out:
        result = {
            "benchmark": "delivery",
            "date": time.strftime("%Y-%m-%d"),
            "command": " ".join(sys.argv),
            "machine": machine(),
            "figures": figures,
        }
        args.out.write_text(json.dumps(result, indent=2) + "\n")


def _stub(server: int) -> psutil.Process:
    """The process of the language model."""
    for process in psutil.Process(server).children(recursive=True):
        if any(part.startswith("language_model_0") for part in process.cmdline()):
            return process
    raise SystemExit("the language model has no process")


def _table(figures: dict[str, dict[str, float | str]]) -> None:
    columns = ("tokens_s", "responses_s", "ttft_ms_p50", "steps_s", "step_ms_p50", "step_ms_p99", "send_ms_mean")
    columns += ("cpu engine", "cpu tritonserver", "cpu shim")
    print(f"\n{'':20}" + "".join(f"{name:>14}" for name in columns))
    for name, row in figures.items():
        cells = "".join(f"{row.get(column, '-'):>14}" for column in columns)
        print(f"{name:20}{cells}{row.get('failed', '')}")


if __name__ == "__main__":
    main()
