"""NVIDIA's load generators, as they come, against a running server: perf_analyzer, genai-perf and aiperf.

    python benchmarks/perf_tools.py --perf-analyzer /opt/perf/bin/perf_analyzer --genai-perf /opt/perf/bin/genai-perf \\
        --aiperf /opt/aiperf/bin/aiperf

Each tool lives in an environment of its own (docs/triton.md says how they were installed); the figures of one that is
not named stay as they were. Every run's command is kept beside its figures, and how busy the machine was.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import csv
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.grpc as grpc
from support import RESULTS, free_port, picture, save, server

TOKENIZER = Path(__file__).parents[1] / "python_models" / "builtin" / "checkpoint"
PLACE = "<|vision_start|><|image_pad|><|vision_end|>"
MODEL = "triptych-builtin"
# runs of tools that are not named stay in it
KEPT = RESULTS / "perf_tools.json"
# of the generated answers, and of the prompts that the tools make up
ANSWER, PROMPT = 32, 32
SIZE = (112, 112)


class Runs:
    """Runs tools one after the other and keeps what they found."""

    def __init__(self, folder: Path, http: str, grpc_url: str, count: int, concurrency: int) -> None:
        """Args: a folder for the tools' files; the endpoint; Triton's gRPC; requests of a run; how many at once."""
        self.folder = folder
        self.http = http
        self.grpc = grpc_url
        self.count, self.concurrency = count, concurrency
        self.figures: dict[str, Any] = {}

    def run(self, name: str, command: list[str], read: Callable[[Path], dict[str, Any]]) -> None:
        """One run; ``{out}`` in the command is a folder of its own, which ``read`` gets.

        Raises:
            SystemExit: the tool failed; its output's end says why.
        """
        out = self.folder / name.replace(" ", "_")
        out.mkdir()
        done = subprocess.run(
            [part.replace("{out}", str(out)) for part in command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=out,
        )
        if done.returncode != 0:
            raise SystemExit(f"{name}: ended with {done.returncode}\n{done.stdout[-3000:]}")
        shown = [Path(command[0]).name, *command[1:]]
        shown = [part.replace(str(TOKENIZER), "TOKENIZER").replace(str(self.folder), "DATA") for part in shown]
        self.figures[name] = {
            "command": " ".join(shown).replace(self.http, "HTTP").replace(self.grpc, "GRPC"),
            "load_average": os.getloadavg()[0],
            **read(out),
        }
        print(f"{name}: {json.dumps(self.figures[name], indent=2)}", flush=True)


def analyzer_runs(runs: Runs, tool: str) -> None:
    """perf_analyzer: streams of ``generate``, of text and of pictures; preprocess and vision encoder alone."""
    shown = [picture(seed, SIZE) for seed in range(runs.count)]
    sampling = json.dumps({"max_tokens": ANSWER, "min_tokens": ANSWER, "temperature": 0})
    asked = {"stream": [True], "sampling_parameters": [sampling]}
    text = [{"text_input": [f"Number {k}: what is shown?"], **asked} for k in range(runs.count)]
    pictures = [
        {"text_input": [f"{PLACE}What is shown?"], "image": one(base64.b64encode(png)), **asked} for png in shown
    ]
    request = json.dumps({"prompt": {"text": PLACE, "media": [{"type": "image", "blob": 0}]}})
    raw = [{"request": [request], "media": one(png)} for png in shown]
    features = [features_of(runs.grpc, request, png) for png in shown]
    streaming = ["--async", "--streaming"]
    for name, model, data, options in (
        ("perf_analyzer generate, text", "generate", text, streaming),
        ("perf_analyzer generate, a picture", "generate", pictures, streaming),
        ("perf_analyzer preprocess alone, a picture", "preprocess", raw, []),
        ("perf_analyzer vision_encoder alone, a picture", "vision_encoder", features, []),
    ):
        path = runs.folder / f"{name.replace(' ', '_')}.json"
        path.write_text(json.dumps({"data": data}))
        command = [tool, "-m", model, "-u", runs.grpc, "-i", "grpc", *options, "--input-data", str(path)]
        command += ["--concurrency-range", str(runs.concurrency), "--request-count", str(runs.count)]
        command += ["-f", "{out}/report.csv"]
        # with what stages answer by themselves it is no JSON
        command += ["--profile-export-file", "{out}/profile.json"] if options else []
        runs.run(name, command, analyzer)


def one(data: bytes) -> dict[str, Any]:
    """perf_analyzer's form for a STRING tensor of one element."""
    raw = len(data).to_bytes(4, "little") + data
    return {"content": {"b64": base64.b64encode(raw).decode()}, "shape": [1]}


def features_of(url: str, request: str, png: bytes) -> dict[str, Any]:
    """What preprocess hands to the vision encoder for a picture, as perf_analyzer's input."""
    tensors = []
    for name, value in (("request", request.encode()), ("media", png)):
        tensors.append(grpc.InferInput(name, [1], "BYTES"))
        tensors[-1].set_data_from_numpy(np.array([value], np.object_))
    with grpc.InferenceServerClient(url, channel_args=[("grpc.enable_http_proxy", 0)]) as client:
        features = client.infer("preprocess", tensors).as_numpy("vision_features")
    encoded = {"b64": base64.b64encode(features.tobytes()).decode()}
    return {"vision_features": {"content": encoded, "shape": list(features.shape)}}


def analyzer(out: Path) -> dict[str, Any]:
    """The figures of perf_analyzer's report; of a stream, latency is that of the first response."""
    (row,) = csv.DictReader((out / "report.csv").open())
    found: dict[str, Any] = {
        "requests_per_s": float(row["Inferences/Second"]),
        "latency_p50_ms": float(row["p50 latency"]) / 1000,
        "latency_p99_ms": float(row["p99 latency"]) / 1000,
    }
    if (path := out / "profile.json").is_file():
        experiments = json.loads(path.read_text())["experiments"]
        times = [request["response_timestamps"] for experiment in experiments for request in experiment["requests"]]
        began = min(request["timestamp"] for experiment in experiments for request in experiment["requests"])
        responses = sum(map(len, times))
        found |= {"requests": len(times), "responses": responses}
        found["responses_per_s"] = responses * 1e9 / (max(own[-1] for own in times) - began)
    return found


def genai_runs(runs: Runs, tool: str) -> None:
    """genai-perf (which drives the perf_analyzer in its PATH): Triton's own door, then the OpenAI endpoint."""
    load = ["--streaming", "--tokenizer", str(TOKENIZER), "--request-count", str(runs.count), "--concurrency"]
    load += [str(runs.concurrency), "--synthetic-input-tokens-mean", str(PROMPT), "--output-tokens-mean", str(ANSWER)]
    load += ["--artifact-dir", "{out}"]
    endpoint = [*load, "-u", runs.http, "--extra-inputs", "ignore_eos:true", "-m", MODEL]
    size = ["--image-width-mean", str(SIZE[0]), "--image-height-mean", str(SIZE[1]), "--image-format", "png"]
    kserve = ["--endpoint-type", "kserve", "--backend", "vllm", "--output-tokens-mean-deterministic"]
    for name, command in (
        ("genai-perf kserve vllm", [*kserve, *load, "-u", runs.grpc, "-m", "generate"]),
        ("genai-perf openai chat", ["--endpoint-type", "chat", *endpoint]),
        ("genai-perf openai completions", ["--endpoint-type", "completions", *endpoint]),
        ("genai-perf openai multimodal", ["--endpoint-type", "multimodal", *size, *endpoint]),
    ):
        runs.run(name, [tool, "profile", *command], lambda out: common(out, "*/profile_export_genai_perf.json"))


def aiperf_runs(runs: Runs, tool: str) -> None:
    """aiperf: the OpenAI endpoint, with pictures and with sounds."""
    load = ["-m", MODEL, "-u", runs.http, "--streaming", "--tokenizer", str(TOKENIZER), "--request-count"]
    load += [str(runs.count), "--concurrency", str(runs.concurrency), "--synthetic-input-tokens-mean", str(PROMPT)]
    load += ["--output-tokens-mean", str(ANSWER), "--ui", "none", "--artifact-dir", "{out}"]
    # its own count of the text's tokens is less by those that end characters
    load += ["--use-server-token-count"]
    longest = ["--extra-inputs", "ignore_eos:true"]
    size = ["--image-width-mean", str(SIZE[0]), "--image-height-mean", str(SIZE[1]), "--image-format", "png"]
    for name, command in (
        ("aiperf chat", ["--endpoint-type", "chat", *longest]),
        ("aiperf chat, a picture", ["--endpoint-type", "chat", *size, *longest]),
        ("aiperf chat, a sound", ["--endpoint-type", "chat", "--audio-length-mean", "1", *longest]),
        ("aiperf completions", ["--endpoint-type", "completions", *longest]),
    ):
        runs.run(name, [tool, "profile", *command, *load], lambda out: common(out, "profile_export_aiperf.json"))


def common(out: Path, pattern: str) -> dict[str, Any]:
    """The figures that genai-perf and aiperf have in common."""
    (path,) = out.glob(pattern)
    found = json.loads(path.read_text())
    names = {
        "request_count": ("requests", "avg"),
        "request_throughput": ("requests_per_s", "avg"),
        "output_token_throughput": ("tokens_per_s", "avg"),
        "time_to_first_token": ("first_token_p50_ms", "p50"),
        "inter_token_latency": ("inter_token_p50_ms", "p50"),
        "request_latency": ("latency_p50_ms", "p50"),
        "output_sequence_length": ("answer_tokens", "avg"),
        "error_request_count": ("errors", "avg"),
    }
    return {ours: found[name][key] for name, (ours, key) in names.items() if found.get(name)}


def version(command: list[str]) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return done.stdout.strip().splitlines()[-1] if done.stdout.strip() else f"ended with {done.returncode}"


def main() -> None:
    """Start a server, run what is named, save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--perf-analyzer", metavar="PATH")
    parser.add_argument("--genai-perf", metavar="PATH")
    parser.add_argument("--aiperf", metavar="PATH")
    parser.add_argument("--attach", nargs=2, metavar=("URL", "GRPC"), help="a server of the built-in model that runs")
    parser.add_argument("--count", type=int, default=32, help="requests of a run (default %(default)s)")
    parser.add_argument("--concurrency", type=int, default=4, help="at once (default %(default)s)")
    options = parser.parse_args()
    tools = {
        "perf_analyzer": (options.perf_analyzer, "--version", analyzer_runs),
        "genai-perf": (options.genai_perf, "--version", genai_runs),
        "aiperf": (options.aiperf, "--version", aiperf_runs),
    }
    tools = {name: tool for name, tool in tools.items() if tool[0]}
    if not tools:
        parser.error("name at least one tool")
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        url, address = options.attach or ("", f"127.0.0.1:{free_port()}")
        if not url:
            url, _, _ = stack.enter_context(server("builtin", "--grpc-port", address.partition(":")[2]))
        runs = Runs(Path(folder), url, address, options.count, options.concurrency)
        try:
            for path, _, run in tools.values():
                run(runs, path)
        finally:
            known = json.loads(KEPT.read_text())["figures"] if KEPT.is_file() else {"tools": {}, "runs": {}}
            found = {name: version([path, option]) for name, (path, option, _) in tools.items()}
            figures = {"tools": known["tools"] | found, "runs": known["runs"] | runs.figures}
            save(KEPT.stem, ["python", sys.argv[0]], figures)


if __name__ == "__main__":
    main()
