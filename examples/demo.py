"""Start the server on the built-in model, ask it about a picture, a video and a sound, print the streamed answers."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx

MEDIA = Path(__file__).parent / "media"
TRIPTYCH = Path(sys.executable).with_name("triptych")
QUESTIONS = [
    ("--image", MEDIA / "picture.png", "What is in the picture?"),
    ("--video", MEDIA / "clip.mp4", "What happens in the video?"),
    ("--audio", MEDIA / "digits.wav", "Which digits are spoken?"),
]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_ready(url: str, server: subprocess.Popen[bytes]) -> None:
    while True:
        if server.poll() is not None:
            sys.exit("the server stopped before it was ready; what it printed above says why")
        try:
            if httpx.get(f"{url}/health").status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.2)


def main() -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    print(f"$ triptych serve --port {port}", flush=True)
    server = subprocess.Popen([str(TRIPTYCH), "serve", "--port", str(port)])
    try:
        wait_ready(url, server)
        for option, path, question in QUESTIONS:
            print(f'\n$ triptych chat {option} examples/media/{path.name} "{question}"', flush=True)
            subprocess.run([str(TRIPTYCH), "chat", "--url", url, option, str(path), question], check=True)
    finally:
        server.send_signal(signal.SIGINT)
        server.wait()


if __name__ == "__main__":
    main()
