"""The preprocess stage against the plain processor of transformers, on the same files in one run.

    python benchmarks/preprocess.py [--families qwen2_5_vl,llava] [--kinds jpeg,png,video,album] [--profile]

Checkpoints are tiny, the processors' options those of the published models: what a picture costs is decided by them.
The sides take turns. The plain one decodes with Pillow (videos with PyAV) and calls the processor, one file after the
other, as its callers do; ``threads`` beside it does that in a thread for each core. The stage gets all files at once.
``album`` is one request with ten pictures from a web server that lets one of them wait for a second.
"""

from __future__ import annotations

import argparse
import cProfile
import http.server
import importlib.util
import io
import json
import os
import pstats
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import av
import numpy as np
import psutil
from PIL import Image as PILImage
from support import save

from triptych.python_models.contract.errors import TriptychError
from triptych.python_models.contract.request import ChatRequest, MediaPart, Message, TextPart
from triptych.python_models.contract.sampling import SamplingParams
from triptych.python_models.contract.settings import Settings
from triptych.python_models.families import torchvision_fix

torchvision_fix.install()

import transformers  # noqa: E402

from triptych.python_models.local import LocalEnsemble  # noqa: E402
from triptych.python_models.media.video import VideoInfo, frame_indices  # noqa: E402
from triptych.python_models.preprocess.stage import PreprocessStage  # noqa: E402
from triptych.python_models.stage import NoTelemetry  # noqa: E402

PUBLISHED: dict[str, dict[str, Any]] = {
    "qwen2_5_vl": {"patch_size": 14, "size": {"shortest_edge": 3136, "longest_edge": 12845056}},
    "llava": {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}},
    "internvl": {"size": {"height": 448, "width": 448}, "min_patches": 1, "max_patches": 12},
    "gemma3": {"size": {"height": 896, "width": 896}},
}
"""Options of the picture processors of Qwen2.5-VL-7B, LLaVA-1.5-7B, InternVL3-8B and gemma-3-4b."""
VIDEO: dict[str, dict[str, Any]] = {
    "qwen2_5_vl": {"patch_size": 14, "fps": 2.0, "max_frames": 768, "size": {"shortest_edge": 128 * 28 * 28,
                   "longest_edge": 768 * 28 * 28}, "cap_pixels_per_frame": True},
    "internvl": {"size": {"height": 448, "width": 448}},
}  # fmt: skip
PROCESSOR: dict[str, dict[str, Any]] = {
    "llava": {"patch_size": 14},
    "internvl": {"image_seq_length": 256},
    "gemma3": {"image_seq_length": 256},
}
QUESTION = "What is there to see?"


def checkpoint(name: str, folder: Path, published: bool = True) -> Path:
    """A tiny checkpoint; ``published``: its processor has the options of the published model, but no tower for them."""
    spec = importlib.util.spec_from_file_location(
        "tiny_build", Path(__file__).parent.parent / "tests" / "tiny" / "build.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.build(name, folder)
    if not published:
        return folder
    path = folder / "processor_config.json"
    options = json.loads(path.read_text())
    options.update(PROCESSOR.get(name, {}))
    options["image_processor"].update(PUBLISHED[name])
    if name in VIDEO:
        options["video_processor"].update(VIDEO[name])
    path.write_text(json.dumps(options))
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["text_config"]["max_position_embeddings"] = 131072
    path.write_text(json.dumps(config))
    return folder


def photo(seed: int, size: tuple[int, int] = (1920, 1080)) -> PILImage.Image:
    """Shapes of all sizes with a little noise: compresses about as a photograph does."""
    rng = np.random.default_rng(seed)
    width, height = size
    total = np.zeros((height, width, 3), np.float32)
    for k, share in ((9, 0.5), (40, 0.3), (200, 0.2)):
        coarse = rng.integers(0, 256, (max(2, k * height // width), k, 3), dtype=np.uint8)
        total += share * np.asarray(PILImage.fromarray(coarse).resize(size, PILImage.Resampling.BICUBIC), np.float32)
    total += rng.normal(0, 3, total.shape)
    return PILImage.fromarray(total.clip(0, 255).astype(np.uint8))


def encoded(picture: PILImage.Image, kind: str) -> bytes:
    """A file of this kind."""
    out = io.BytesIO()
    picture.save(out, kind.upper(), **({"quality": 90} if kind == "jpeg" else {}))
    return out.getvalue()


def clip(seed: int, seconds: int = 10, fps: int = 30, size: tuple[int, int] = (1280, 720)) -> bytes:
    """H.264 in MP4: a picture that moves."""
    out = io.BytesIO()
    wide = np.asarray(photo(seed, (size[0] + 2 * seconds * fps, size[1])))
    with av.open(out, "w", format="mp4") as file:
        stream: Any = file.add_stream("h264", rate=fps, options={"preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for k in range(seconds * fps):
            frame = np.ascontiguousarray(wide[:, 2 * k : 2 * k + size[0]])
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        file.mux(stream.encode(None))
    return out.getvalue()


class Answer:
    """Waits for the answer to one request."""

    def __init__(self) -> None:
        self.outputs: Mapping[str, Any] = {}
        self.error: TriptychError | None = None
        self.done = threading.Event()

    def send(self, answer: Any, *, final: bool) -> None:
        """See Responder."""
        self.outputs = answer
        self.done.set()

    def fail(self, error: TriptychError) -> None:
        """See Responder."""
        self.error = error
        self.done.set()

    def wait(self) -> Mapping[str, Any]:
        """The tensors."""
        self.done.wait()
        if self.error is not None:
            raise SystemExit(f"the stage refuses: {self.error.message}")
        return self.outputs


def request(modality: str, count: int = 1, urls: Sequence[str] = ()) -> ChatRequest:
    """Media, then a question."""
    parts = [MediaPart(modality, url=url) for url in urls] or [MediaPart(modality, blob=k) for k in range(count)]
    sampling = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
    return ChatRequest((Message("user", (*parts, TextPart(QUESTION)), plain=False),), sampling)


def through(stage: PreprocessStage, files: Sequence[bytes], modality: str) -> list[Mapping[str, Any]]:
    """The stage's answers to requests of one file each, all sent at once."""
    text = request(modality).to_json().encode()
    answers = [Answer() for _ in files]
    for k, (file, answer) in enumerate(zip(files, answers, strict=True)):
        stage.submit(str(k), {"request": [text], "media": [file]}, answer)
    return [answer.wait() for answer in answers]


class Plain:
    """Pillow or PyAV, and the checkpoint's processor."""

    def __init__(self, folder: Path, stage: PreprocessStage) -> None:
        self.processor = transformers.AutoProcessor.from_pretrained(folder)
        self.sampling = stage._preprocessor.frame_sampling  # type: ignore[attr-defined]

    def __call__(self, file: bytes, modality: str) -> Any:
        """The model's inputs."""
        content = [{"type": modality}, {"type": "text", "text": QUESTION}]
        text = self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        options: dict[str, Any] = {}
        bos = self.processor.tokenizer.bos_token
        if bos is not None and text.startswith(bos):
            options["add_special_tokens"] = False
        if modality == "image":
            return self.processor(
                text=[text], images=[PILImage.open(io.BytesIO(file)).convert("RGB")], return_tensors="pt", **options
            )
        frames, metadata = self._frames(file)
        return self.processor(
            text=[text],
            videos=[frames],
            videos_kwargs={"do_sample_frames": False, "video_metadata": [metadata]},
            return_tensors="pt",
            **options,
        )

    def _frames(self, file: bytes) -> tuple[Any, Any]:
        """The frames that the stage takes, uint8 [T, height, width, 3], and what the processor wants to know."""
        from transformers.video_utils import VideoMetadata

        with av.open(io.BytesIO(file)) as source:
            stream = source.streams.video[0]
            stream.thread_type = "AUTO"
            count, fps = stream.frames, float(stream.average_rate or 1)
            info = VideoInfo("mov", stream.width, stream.height, 0, count, count / fps, fps)
            wanted = frame_indices(info, self.sampling, 768)
            frames = {k: f.to_ndarray(format="rgb24") for k, f in enumerate(source.decode(stream)) if k in set(wanted)}
        metadata = VideoMetadata(
            total_num_frames=count, fps=fps, duration=count / fps, frames_indices=wanted,
            width=info.width, height=info.height,
        )  # fmt: skip
        return np.stack([frames[k] for k in wanted]), metadata


def seconds(work: Callable[[], Any]) -> tuple[float, float]:
    """(wall time, CPU time of this process and its decode workers)."""
    start, cpu = time.perf_counter(), cpu_time()
    work()
    return time.perf_counter() - start, cpu_time() - cpu


def cpu_time() -> float:
    """Seconds of all threads of this process and its children."""
    children = psutil.Process().children()
    return time.process_time() + sum(sum(child.cpu_times()[:2]) for child in children)


def compare(stage: PreprocessStage, plain: Plain, files: Sequence[bytes], modality: str, rounds: int) -> dict[str, Any]:
    """Items per second of every side; ratios are medians over rounds."""
    expected = plain(files[0], modality)["input_ids"]
    (found,) = through(stage, files[:1], modality)
    if found["input_ids"].tolist() != (expected[0].tolist() if hasattr(expected, "tolist") else list(expected[0])):
        raise SystemExit("the token ids differ")
    cores = os.cpu_count() or 1
    through(stage, files, modality)
    rates: dict[str, list[float]] = {"plain": [], "plain_threads": [], "stage": [], "stage_one_by_one": []}
    costs: dict[str, list[float]] = {name: [] for name in rates}
    with ThreadPoolExecutor(cores) as pool:
        for _ in range(rounds):
            sides: dict[str, Callable[[], Any]] = {
                "plain": lambda: [plain(file, modality) for file in files],
                "stage": lambda: through(stage, files, modality),
                "plain_threads": lambda: list(pool.map(lambda file: plain(file, modality), files)),
                "stage_one_by_one": lambda: [through(stage, [file], modality) for file in files],
            }
            for name, side in sides.items():
                wall, cpu = seconds(side)
                rates[name].append(len(files) / wall)
                costs[name].append(1000 * cpu / len(files))
    return {
        "tokens": int(found["input_ids"].size),
        "items_per_s_median": {name: round(statistics.median(values), 2) for name, values in rates.items()},
        "cpu_ms_per_item_median": {name: round(statistics.median(values), 1) for name, values in costs.items()},
        "cpu_plain_over_stage": ratio(costs["plain"], costs["stage"]),
        **{
            f"{name}_over_{other}": ratio(rates[name], rates[other])
            for name, other in (("stage", "plain"), ("stage_one_by_one", "plain"), ("stage", "plain_threads"))
        },
    }


def ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """Median over rounds."""
    return round(statistics.median(a / b for a, b in zip(above, below, strict=True)), 2)


@contextmanager
def web(files: Mapping[str, tuple[bytes, float]]) -> Iterator[tuple[str, str]]:
    """Serves path -> (body, seconds before it is sent); yields (URL before the path, "host:port")."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body, wait = files[self.path]
            time.sleep(wait)
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    place = f"127.0.0.1:{server.server_address[1]}"
    try:
        yield f"http://{place}", place
    finally:
        server.shutdown()
        server.server_close()


def album(folder: Path, rounds: int, size: tuple[int, int] = (1920, 1080)) -> dict[str, Any]:
    """Ten pictures of which one takes a second to come, the others 50 ms: preprocessed, and to the first token."""
    files = {}
    for k in range(20 * (rounds + 1)):
        files[f"/{k}.jpg"] = (encoded(photo(k, size), "jpeg"), 1.0 if k % 10 == 3 else 0.05)
    took: dict[str, list[float]] = {"preprocessed_s": [], "ttft_s": []}
    with web(files) as (address, place):
        settings = Settings(model=str(folder), device="cpu", allowed_media_hosts=(place,), max_queued_requests=64)
        local = LocalEnsemble(settings)
        try:
            for turn in range(rounds + 1):
                # what comes first must not be in a cache for what comes second
                first, second = (
                    request("image", urls=[f"{address}/{20 * turn + half + k}.jpg" for k in range(10)])
                    for half in (0, 10)
                )
                answer = Answer()
                start = time.perf_counter()
                local.stages["preprocess"].submit("0", {"request": [first.to_json().encode()]}, answer)
                answer.wait()
                preprocessed = time.perf_counter() - start
                start = time.perf_counter()
                next(delta for delta in local.chat(second) if delta.token_ids)
                if turn:
                    took["preprocessed_s"].append(preprocessed)
                    took["ttft_s"].append(time.perf_counter() - start)
        finally:
            local.close()
    return {
        "slowest_download_s": 1.0,
        **{name: round(statistics.median(values), 3) for name, values in took.items()},
        "ttft_over_slowest_download": round(statistics.median(took["ttft_s"]), 2),
    }


def profile(work: Callable[[], Any]) -> None:
    """Where the CPU time of this thread goes."""
    profiler = cProfile.Profile(time.thread_time)
    profiler.enable()
    work()
    profiler.disable()
    pstats.Stats(profiler).sort_stats("tottime").print_stats(22)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", default=",".join(PUBLISHED))
    parser.add_argument("--kinds", default="jpeg,png,video,album")
    parser.add_argument("--items", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--profile", action="store_true", help="print where the family's prepare() spends its time")
    parser.add_argument("--name", default="preprocess_cpu")
    args = parser.parse_args()
    kinds = args.kinds.split(",")
    load = os.getloadavg()[0]
    files = {kind: [encoded(photo(k), kind) for k in range(args.items)] for kind in kinds if kind in ("jpeg", "png")}
    if "video" in kinds:
        files["video"] = [clip(k) for k in range(2)]
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name in args.families.split(","):
            folder = checkpoint(name, Path(scratch) / name)
            stage = PreprocessStage(Settings(model=str(folder), gpu_preprocessing="off"), NoTelemetry(), "cpu")
            plain = Plain(folder, stage)
            for kind, own in files.items():
                modality = "video" if kind == "video" else "image"
                if modality == "video" and name not in VIDEO:
                    continue
                if args.profile:
                    prepare = stage._prepare

                    def profiled(*arguments: Any, prepare: Any = prepare) -> Any:
                        out: list[Any] = []
                        profile(lambda: out.append(prepare(*arguments)))
                        return out[0]

                    through(stage, own[:1], modality)
                    stage._prepare = profiled  # type: ignore[method-assign]
                    through(stage, own[:1], modality)
                    stage._prepare = prepare  # type: ignore[method-assign]
                    profile(lambda: plain(own[0], modality))  # noqa: B023
                    continue
                figures[f"{name}_{kind}"] = compare(stage, plain, own, modality, args.rounds)
                print(name, kind, figures[f"{name}_{kind}"], flush=True)
            stage.close()
        if "album" in kinds and not args.profile:
            figures["album"] = album(checkpoint("qwen2_5_vl", Path(scratch) / "album", published=False), 5)
            print("album", figures["album"], flush=True)
    if not args.profile:
        figures["load_average_before_and_after"] = [round(load, 1), round(os.getloadavg()[0], 1)]
        save(args.name, sys.argv, figures)


if __name__ == "__main__":
    main()
