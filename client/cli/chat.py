"""``triptych chat``: one question to a running server, the answer streamed to standard output."""

from __future__ import annotations

import argparse
import base64
import json
import mimetypes
import os
import sys
from pathlib import Path
from typing import Any

import httpx

from .access import ENVIRONMENT
from .parser import CommandError

SUMMARY = "ask a running server"
DESCRIPTION = (
    "Ask a question about pictures, videos and sounds; the answer is printed as it comes. A server with API keys gets "
    "the one in TRIPTYCH_API_KEY."
)
EXAMPLES = """examples:
  triptych chat "What can you do?"
  triptych chat --image cat.png --image dog.jpg "Which one is larger?"
  triptych chat --video clip.mp4 --audio voice.wav --max-tokens 64 "What happens, and what is said?" """

URL = "TRIPTYCH_URL"
_AUDIO_FORMATS = ("wav", "mp3", "flac", "ogg")


class _Append(argparse.Action):
    """Keeps media of all kinds in the order in which they were given."""

    def __call__(
        self, parser: argparse.ArgumentParser, args: argparse.Namespace, value: Any, option: str | None = None
    ) -> None:
        args.media = [*(args.media or []), (self.dest, value)]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("question", help="the question; - reads it from standard input")
    for kind, words in (("image", "picture"), ("video", "video"), ("audio", "sound")):
        parser.add_argument(f"--{kind}", action=_Append, metavar="FILE", help=f"a {words}; may be repeated")
    parser.add_argument(
        "--url",
        default=os.environ.get(URL, "http://127.0.0.1:30000"),
        help=f"the server (default: that of {URL}, else http://127.0.0.1:30000)",
    )
    parser.add_argument("--model", help="name of the model (default: the one it serves)")
    parser.add_argument("--system", metavar="TEXT", help="a system message before the question")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="tokens of the answer at most")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="X", help="0 is greedy (default %(default)s)")
    parser.set_defaults(media=None)


def run(args: argparse.Namespace) -> int:
    """Ask and print.

    Raises:
        CommandError: a file that cannot be read, a server that cannot be reached, or its error.
    """
    content = [_part(kind, Path(name)) for kind, name in args.media or []]
    question = sys.stdin.read() if args.question == "-" else args.question
    messages: list[dict[str, Any]] = [{"role": "system", "content": args.system}] if args.system else []
    messages.append({"role": "user", "content": [*content, {"type": "text", "text": question}]})
    url = args.url.rstrip("/").removesuffix("/v1")
    body = {
        "model": args.model or "default",
        "messages": messages,
        "stream": True,
        "temperature": args.temperature,
        **({"max_tokens": args.max_tokens} if args.max_tokens is not None else {}),
    }
    # A long video may take a while before the first byte; only connecting has to be quick.
    timeout = httpx.Timeout(None, connect=10.0)
    key = os.environ.get(ENVIRONMENT)
    headers = {"authorization": f"Bearer {key}"} if key else {}
    try:
        with (
            httpx.Client(timeout=timeout, trust_env=not _is_local(url)) as client,
            client.stream("POST", f"{url}/v1/chat/completions", json=body, headers=headers) as answer,
        ):
            if answer.status_code != 200:
                answer.read()
                raise CommandError(_message(answer.text, answer.status_code))
            for line in answer.iter_lines():
                if line.startswith("data: ") and line != "data: [DONE]":
                    _print(json.loads(line.removeprefix("data: ")))
    except (httpx.TransportError, httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
        raise CommandError(
            f"no answer from {url}: {error or type(error).__name__}",
            "start a server with `triptych serve`, or name a running one with --url",
        ) from None
    print()
    return 0


def _print(chunk: dict[str, Any]) -> None:
    if "error" in chunk:
        print()
        raise CommandError(str(chunk["error"]["message"]))
    for choice in chunk["choices"]:
        print(choice["delta"].get("content") or "", end="", flush=True)


def _message(text: str, status: int) -> str:
    try:
        return str(json.loads(text)["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return f"the server answered with status {status}: {text[:200]}"


def _part(kind: str, file: Path) -> dict[str, Any]:
    try:
        data = base64.b64encode(file.read_bytes()).decode()
    except OSError as error:
        raise CommandError(f"--{kind} {file}: {error.strerror}") from None
    if not data:
        raise CommandError(f"--{kind} {file}: the file is empty")
    suffix = file.suffix.lower().lstrip(".")
    if kind == "audio" and suffix in _AUDIO_FORMATS:
        return {"type": "input_audio", "input_audio": {"data": data, "format": suffix}}
    mime = mimetypes.guess_type(file.name)[0] or "application/octet-stream"
    return {"type": f"{kind}_url", f"{kind}_url": {"url": f"data:{mime};base64,{data}"}}


def _is_local(url: str) -> bool:
    return httpx.URL(url).host in ("127.0.0.1", "localhost", "::1")
