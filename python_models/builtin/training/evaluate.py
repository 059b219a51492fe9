"""Ask the model about held-out pictures, clips and sounds, and print how many answers are right.

    python -m triptych.python_models.builtin.training.evaluate --url http://127.0.0.1:30000
    python -m triptych.python_models.builtin.training.evaluate --local python_models/builtin/checkpoint --n 50

Samples are real files made in memory: PNG, JPEG and WebP of 64 to 1024 px, H.264 clips of 1 to 6 s at 5 to 30 frames a
second, WAV and MP3 at 8 to 48 kHz spoken by voices that training did not hear. The spoken digits come from a cached
file (see speech.py). With `--local` transformers answers in this process instead of a server.
"""

import argparse
import base64
import io
import json
import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import av
import librosa
import numpy as np
import soundfile
from PIL import Image

from . import data, questions, speech
from .speech import Array

RATES = (8000, 11025, 16000, 22050, 24000, 32000, 44100, 48000)
BUSY = (429, 503)  # overloaded, or still loading: ask again
GOALS = {"colour": 95, "shape": 95, "count": 95, "text": 80, "motion": 95, "tones": 95, "digits": 95}


@dataclass(slots=True)
class Sample:
    """A question with files: (kind, MIME type, bytes), kind being image, video or audio."""

    task: str
    question: str
    answer: str
    files: list[tuple[str, str, bytes]]


# ---- held-out samples ----


def picture_file(rng: random.Random, scene: data.Scene) -> tuple[str, str, bytes]:
    """The scene as a picture file, on a plain or noisy ground."""
    picture, cover = data.render(scene)
    if rng.random() < 0.5:
        picture = data.add_noise(rng, picture, cover)
    kind = rng.choice(("PNG", "JPEG", "WEBP"))
    return "image", f"image/{kind.lower()}", data.encode(picture, kind, rng.randint(75, 95))


def about_picture(rng: random.Random, task: str) -> Sample | None:
    """One question about one picture."""
    size = data.picture_size(rng)
    scene = data.text_scene(rng, *size, shapes=False) if task == "text" else data.shapes_scene(rng, *size)
    if task == "text" and scene.size < 24:
        return None
    turn = questions.scene_turn(rng, scene, task)
    if turn is None:
        return None
    return Sample(task, turn.question, turn.answer, [picture_file(rng, scene)])


def encode_clip(frames: Array, fps: int, crf: int) -> bytes:
    """Frames [n, height, width, 3] as an H.264 MP4 file."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as target:
        stream = target.add_stream("libx264", rate=Fraction(fps), options={"crf": str(crf)})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        for pixels in frames:
            target.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        target.mux(stream.encode())
    return file.getvalue()


def clip_file(rng: random.Random, moment: data.Clip) -> bytes:
    """The clip as a file of 1 to 6 s at 5 to 30 frames a second."""
    fps = rng.randint(5, 30)
    count = max(5, round(rng.uniform(1, 6) * fps))
    frames = data.render_frames(rng, moment, np.linspace(0, 1, count), rng.random() < 0.5)
    return encode_clip(frames, fps, rng.randint(18, 28))


def about_clip(rng: random.Random, task: str) -> Sample:
    """One question about one clip."""
    width, height = (v // 2 * 2 for v in data.picture_size(rng, 96, 640))
    moment = data.clip(rng, width, height)
    turn = questions.clip_turns(rng, moment, 1, "motion")[0]
    return Sample(task, turn.question, turn.answer, [("video", "video/mp4", clip_file(rng, moment))])


def encode_sound(samples: Array, rate: int, kind: str) -> bytes:
    """Sound at 16 kHz as a WAV or MP3 file of another rate."""
    file = io.BytesIO()
    samples = librosa.resample(samples, orig_sr=data.RATE, target_sr=rate)
    soundfile.write(file, np.clip(samples, -1, 1), rate, format=kind.upper())
    return file.getvalue()


def sound_file(rng: random.Random, samples: Array) -> tuple[str, str, bytes]:
    """Sound at 16 kHz as a file of any usual kind and rate."""
    rate, kind = rng.choice(RATES), rng.choice(("wav", "mp3"))
    return "audio", "audio/wav" if kind == "wav" else "audio/mpeg", encode_sound(samples, rate, kind)


def about_sound(rng: random.Random, task: str, voices: list[list[Array]]) -> Sample:
    """One question about a tone or spoken digits."""
    length = int(data.RATE * rng.uniform(1, 8))
    sound = data.tone(rng, length) if task == "tones" else data.digits(rng, length, voices)
    if rng.random() < 0.6:
        source = np.random.default_rng(rng.getrandbits(40))
        sound.samples += source.standard_normal(length, np.float32) * 10 ** rng.uniform(-4, -2)
    turn = questions.sound_turns(rng, sound, 1, "main")[0]
    return Sample(task, turn.question, turn.answer, [sound_file(rng, sound.samples)])


def about_pair(rng: random.Random, task: str) -> Sample:
    """One question that compares two pictures."""
    counts = (1, 1) if rng.random() < 0.5 else (rng.randint(1, 4), rng.randint(1, 4))
    pair = data.make_pair(rng, data.picture_size(rng, 64, 448), data.picture_size(rng, 64, 448), counts)
    turn = questions.pair_turns(rng, pair, 1)[0]
    return Sample(task, turn.question, turn.answer, [picture_file(rng, scene) for scene in pair])


def about_nothing(rng: random.Random, task: str) -> Sample:
    """Small talk, or a question whose answer the model cannot know, at times beside a picture."""
    files: list[tuple[str, str, bytes]] = []
    if task == "small talk":
        turn = questions.small_talk(rng)
    elif task == "no media":
        turn = questions.absent_media(rng)
    else:
        turn = questions.unknown(rng)
        if rng.random() < 0.5:
            files = [picture_file(rng, data.shapes_scene(rng, *data.picture_size(rng, 64, 448)))]
    return Sample(task, turn.question, turn.answer, files)


def tasks(clips: Path) -> dict[str, Callable[[random.Random, str], Sample | None]]:
    """Every task and what makes its samples."""

    @cache
    def voices() -> list[list[Array]]:
        # only sounds need the file
        return speech.load(str(clips), "test")

    table: dict[str, Callable[[random.Random, str], Sample | None]]
    table = dict.fromkeys(("colour", "shape", "count", "where", "text"), about_picture)
    table |= {
        "motion": about_clip,
        "tones": lambda r, t: about_sound(r, t, voices()),
        "digits": lambda r, t: about_sound(r, t, voices()),
    }
    return table | {
        "two pictures": about_pair,
        "small talk": about_nothing,
        "no media": about_nothing,
        "don't know": about_nothing,
    }


def samples(task: str, make: Callable[[random.Random, str], Sample | None], count: int, seed: str) -> list[Sample]:
    """The first `count` samples of a task."""
    found: list[Sample] = []
    number = 0
    while len(found) < count:
        sample = make(random.Random(f"{seed}/{task}/{number}"), task)
        number += 1
        if sample is not None:
            found.append(sample)
    return found


# ---- answers ----


def content(sample: Sample) -> list[dict[str, Any]]:
    """The OpenAI message parts of a sample."""
    parts: list[dict[str, Any]] = []
    for kind, mime, raw in sample.files:
        text = base64.b64encode(raw).decode()
        if kind == "audio":
            parts.append(
                {"type": "input_audio", "input_audio": {"data": text, "format": "mp3" if "mpeg" in mime else "wav"}}
            )
        else:
            parts.append({"type": f"{kind}_url", f"{kind}_url": {"url": f"data:{mime};base64,{text}"}})
    return [*parts, {"type": "text", "text": sample.question}]


class Server:
    """Answers from the OpenAI endpoint of a running server."""

    def __init__(self, url: str, name: str):
        import httpx

        self.client = httpx.Client(base_url=url.rstrip("/"), timeout=300)
        self.name = name or self.client.get("/v1/models").raise_for_status().json()["data"][0]["id"]

    def __call__(self, sample: Sample) -> str:
        """One answer."""
        body = {
            "model": self.name,
            "messages": [{"role": "user", "content": content(sample)}],
            "temperature": 0,
            "max_tokens": 64,
        }
        until = time.monotonic() + 300
        while (
            reply := self.client.post("/v1/chat/completions", json=body)
        ).status_code in BUSY and time.monotonic() < until:
            time.sleep(1)
        if reply.status_code != 200:
            return f"HTTP {reply.status_code}: {reply.text[:200]}"
        return str(reply.json()["choices"][0]["message"]["content"] or "")


class Local:
    """Answers from transformers' processor and generate in this process."""

    def __init__(self, folder: str, device: str):
        import torch

        from ...families import torchvision_fix

        torchvision_fix.install()
        import transformers

        auto: Any = transformers

        self.torch, self.device = torch, device
        self.processor = auto.AutoProcessor.from_pretrained(folder)
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        self.model = auto.AutoModelForMultimodalLM.from_pretrained(folder, dtype=dtype).to(device).eval()

    def frames(self, raw: bytes) -> tuple[Array, float]:
        """Sampled frames [n, 3, h, w] and sampled frames per second, by the rule of the server."""
        with av.open(io.BytesIO(raw)) as source:
            frames = [frame.to_ndarray(format="rgb24") for frame in source.decode(video=0)]
            duration = len(frames) / float(source.streams.video[0].average_rate)
        video = self.processor.video_processor
        chosen, rate = data.sample_indices(duration, len(frames), video.fps, video.min_frames, video.max_frames)
        return np.stack([frames[i] for i in chosen]).transpose(0, 3, 1, 2), rate

    def __call__(self, sample: Sample) -> str:
        """One answer."""
        parts: list[dict[str, str]] = [{"type": kind} for kind, _, _ in sample.files]
        message = {"role": "user", "content": [*parts, {"type": "text", "text": sample.question}]}
        text = self.processor.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
        media: dict[str, Any] = {}
        for kind, _, raw in sample.files:
            if kind == "image":
                media.setdefault("images", []).append(Image.open(io.BytesIO(raw)).convert("RGB"))
            elif kind == "video":
                frames, rate = self.frames(raw)
                size = dict(self.processor.video_processor.size)
                media |= {"videos": [frames], "videos_kwargs": {"size": size, "do_sample_frames": False, "fps": rate}}
            else:
                sound, rate = soundfile.read(io.BytesIO(raw), dtype="float32", always_2d=True)
                media["audio"] = [librosa.resample(sound.mean(1), orig_sr=rate, target_sr=data.RATE)]
        inputs = self.processor(text=[text], return_tensors="pt", **media)
        if "video_second_per_grid" in inputs:
            inputs["video_second_per_grid"] = self.torch.tensor(
                np.array(inputs["video_second_per_grid"]), dtype=self.torch.float32
            )
        inputs = inputs.to(self.device)
        self.model.model.rope_deltas = None
        with self.torch.inference_mode():
            ids = self.model.generate(**inputs, max_new_tokens=64, do_sample=False)
        text = self.processor.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return str(text)


def plain(answer: str) -> str:
    """An answer without what does not matter."""
    return answer.strip().rstrip(".").lower()


def main() -> None:
    """Ask, count and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:30000")
    parser.add_argument("--model", default="", help="model name; the server's first one by default")
    parser.add_argument("--local", help="a checkpoint folder to run in this process instead")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--n", type=int, default=200, help="samples of each task")
    parser.add_argument("--tasks", default="", help="comma-separated; all by default")
    parser.add_argument("--parallel", type=int, default=8, help="requests in flight")
    parser.add_argument(
        "--speech", type=Path, default=speech.ASSETS / "speech.npz", help="spoken digits, made by speech.py"
    )
    parser.add_argument("--seed", default="held-out")
    parser.add_argument("--json", type=Path, help="write every question and answer here")
    parser.add_argument("--wrong", type=int, default=3, help="wrong answers to print for each task")
    options = parser.parse_args()
    table = tasks(options.speech)
    chosen = [t for t in options.tasks.split(",") if t] or list(table)
    answer: Callable[[Sample], str] = (
        Local(options.local, options.device) if options.local else Server(options.url, options.model)
    )
    rows, records = [], []
    for task in chosen:
        asked = samples(task, table[task], options.n, options.seed)
        start = time.time()
        with ThreadPoolExecutor(1 if options.local else options.parallel) as pool:
            answers = list(pool.map(answer, asked))
        right = [plain(a) == plain(s.answer) for s, a in zip(asked, answers, strict=True)]
        rows.append((task, 100 * sum(right) / len(right), len(right), time.time() - start))
        goal = f" (goal {GOALS[task]})" if task in GOALS else ""
        print(f"{task:14s} {rows[-1][1]:6.1f} % of {len(right)}{goal}, {rows[-1][3]:.0f} s", flush=True)
        wrong = [(s.question, s.answer, a) for s, a, ok in zip(asked, answers, right, strict=True) if not ok]
        for question, expected, got in wrong[: options.wrong]:
            print(f"    {question!r}: {expected!r}, got {got!r}")
        records += [
            {"task": task, "question": s.question, "expected": s.answer, "answer": a, "right": ok}
            for s, a, ok in zip(asked, answers, right, strict=True)
        ]
    print("\n| task | right | samples |\n|---|---|---|")
    for task, share, count, _ in rows:
        print(f"| {task} | {share:.1f} % | {count} |")
    if options.json:
        options.json.write_text(
            json.dumps({"accuracy": {t: s for t, s, *_ in rows}, "answers": records}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
