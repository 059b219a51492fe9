"""Ask a running server over gRPC, streamed and many at once: ``triptych serve --grpc-port 8001`` starts one."""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path
from typing import Any

from triptych import AsyncClient, Client

MEDIA = Path(__file__).parent / "media"


def ask(question: str, *media: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [*media, question]}]


async def many(url: str) -> None:
    async with AsyncClient(url) as client:
        questions = ["What is in the picture?", "How many shapes are there?", "What colour is the circle?"]
        picture = {"type": "image", "image": MEDIA / "picture.png"}
        answers = await asyncio.gather(
            *(client.chat(ask(question, picture), max_tokens=32, temperature=0) for question in questions)
        )
        for question, answer in zip(questions, answers, strict=True):
            print(f"{question} {answer.text}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="127.0.0.1:8001", help="gRPC address (default %(default)s)")
    url = parser.parse_args().url
    with Client(url) as client:
        clip = {"type": "video", "video": MEDIA / "clip.mp4"}
        with client.stream_chat(ask("What happens in the video?", clip), max_tokens=64, temperature=0) as stream:
            for delta in stream:
                print(delta.text, end="", flush=True)
            print(f" ({stream.result().usage.completion_tokens} tokens)")
    asyncio.run(many(url))


if __name__ == "__main__":
    main()
