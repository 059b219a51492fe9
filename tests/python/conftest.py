"""An engine on a tiny checkpoint that sees and hears, and what transformers answers in its place."""

from __future__ import annotations

import io
import wave
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from triptych import Engine

RATE = 16000


def pixels(seed: int = 0, width: int = 60, height: int = 44) -> Any:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def samples(seed: int = 0, seconds: float = 0.6) -> Any:
    return (np.random.default_rng(seed).standard_normal(int(seconds * RATE)) * 0.1).astype(np.float32)


def frames(seed: int = 0, count: int = 4) -> Any:
    return np.random.default_rng(seed).integers(0, 256, (count, 48, 64, 3), dtype=np.uint8)


def png(array: Any) -> bytes:
    out = io.BytesIO()
    Image.fromarray(array).save(out, "PNG")
    return out.getvalue()


def wav(values: Any) -> bytes:
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes(values.tobytes())
    return out.getvalue()


class Make:
    """Makers of media."""

    pixels, samples, frames, png, wav = map(staticmethod, (pixels, samples, frames, png, wav))


@pytest.fixture(scope="session")
def make() -> type[Make]:
    return Make


@pytest.fixture(scope="session")
def checkpoint(tiny_checkpoint: Callable[[str], Path]) -> Path:
    return tiny_checkpoint("qwen2_5_omni")


@pytest.fixture(scope="session")
def engine(checkpoint: Path) -> Iterator[Engine]:
    with Engine(checkpoint, device="cpu", torch_threads=1, kv_cache_tokens=4096, max_running_requests=4) as made:
        yield made


class Truth:
    """transformers' own ``generate``, greedy."""

    def __init__(self, checkpoint: Path) -> None:
        import torch

        from triptych.python_models.families import torchvision_fix

        torchvision_fix.install()
        import transformers

        load = transformers.Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained
        self.model = load(checkpoint, dtype=torch.float32).eval()
        self.processor = transformers.AutoProcessor.from_pretrained(checkpoint)

    def generate(self, text: str, count: int, **media: Any) -> list[int]:
        """Tokens after a prompt as the model reads it."""
        import torch

        inputs = self.processor(text=[text], return_tensors="pt", **media)
        with torch.no_grad():
            out = self.model.generate(**inputs, max_new_tokens=count, do_sample=False)
        found: list[int] = out[0, inputs["input_ids"].shape[1] :].tolist()
        return found

    def chat(self, content: list[dict[str, Any]], count: int, **media: Any) -> list[int]:
        """Tokens of the answer to one message."""
        messages = [{"role": "user", "content": content}]
        text = self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return self.generate(text, count, **media)


@pytest.fixture(scope="session")
def truth(checkpoint: Path) -> Truth:
    return Truth(checkpoint)
