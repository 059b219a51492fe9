"""Answer in this process, without a server: a picture, a video, a sound, a batch with a progress bar, a stream."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from triptych import Engine, ItemError

MEDIA = Path(__file__).parent / "media"


def ask(question: str, *media: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [*media, question]}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="builtin", help="a folder or hub id (default: the built-in model)")
    model = parser.parse_args().model
    with Engine(model) as engine:
        picture = Image.open(MEDIA / "picture.png")
        conversations = [
            ask("What is in the picture?", picture),
            # the same picture as an array of its pixels
            ask("How many shapes are there?", {"type": "image", "image": np.asarray(picture.convert("RGB"))}),
            ask("What happens in the video?", {"type": "video", "video": MEDIA / "clip.mp4"}),
            ask("Which digits are spoken?", {"type": "audio", "audio": MEDIA / "digits.wav"}),
            ask("What is this?", {"type": "image", "image": MEDIA / "README.md"}),
        ]
        answers = engine.chat(conversations, max_tokens=64, temperature=0, return_exceptions=True, progress=True)
        for conversation, answer in zip(conversations, answers, strict=True):
            if isinstance(answer, ItemError):
                print(f"{conversation[0]['content'][-1]} failed: {answer.message}")
            else:
                print(f"{conversation[0]['content'][-1]} {answer.text} ({answer.usage.prompt_tokens} tokens read)")
        for delta in engine.stream_chat("What can you do?", max_tokens=64, temperature=0):
            print(delta.text, end="", flush=True)
        print()


if __name__ == "__main__":
    main()
