"""litellm and langchain-openai, as their users have them, against the running server.

They run in an environment of their own (``make clients``), since they want an older openai package than the tests do.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

NAME = "tiny-omni"
ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-clients" / "bin" / "python"
SCRIPTS = ROOT / "tests" / "clients"


@pytest.fixture(scope="module")
def clients() -> Path:
    """The python of the client packages' environment."""
    assert PYTHON.exists(), "the client packages are not installed; run: make clients"
    return PYTHON


def run(python: Path, script: str, *args: Any) -> dict[str, Any]:
    # without the network: litellm would fetch its table of prices
    environment = os.environ | {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "NO_PROXY": "*"}
    command = [str(python), str(SCRIPTS / script), *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def said(server: Any, *content: Any, messages: Any = None, **change: Any) -> str:
    asked = messages or [{"role": "user", "content": content[0] if isinstance(content[0], str) else list(content)}]
    answer = server.ask(**({"messages": asked, "max_tokens": 6} | change))
    assert answer.status_code == 200, answer.text
    text: str = answer.json()["choices"][0]["message"]["content"]
    return text


def test_litellm(server: Any, clients: Path, parts: Any, tmp_path: Path) -> None:
    picture = tmp_path / "picture.png"
    picture.write_bytes(parts.picture(3))
    found = run(clients, "litellm_client.py", server.url, NAME, picture)
    hello = said(server, "hello")
    assert found["text"] == found["streamed"] == found["async"] == hello
    assert found["usage"] == 0
    assert found["streamed_usage"] == 6
    assert found["picture"] == said(server, parts.image(3), parts.text("what?"))
    assert found["choices"] == [6, 6]
    assert found["form"] == ["name", "strength"]
    assert found["response"] == found["response_streamed"] == said(server, "hello", max_tokens=16)
    assert found["errors"] == ["NotFoundError", "BadRequestError", "BadRequestError"]


def test_langchain(server: Any, clients: Path, parts: Any, tmp_path: Path) -> None:
    picture, sound = tmp_path / "picture.png", tmp_path / "sound.wav"
    picture.write_bytes(parts.picture(3))
    sound.write_bytes(parts.sound(4))
    found = run(clients, "langchain_client.py", server.url, NAME, picture, sound)
    hello = said(server, "hello")
    assert found["text"] == found["streamed"] == found["response"] == found["response_streamed"] == hello
    assert found["batch"] == [hello, hello]
    conversation = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "hi"},
        {"role": "user", "content": "you?"},
    ]
    assert found["turns"] == said(server, messages=conversation)
    assert found["finish"] in ("stop", "length")
    assert found["usage"] == found["streamed_usage"] == found["logprobs"] == 6
    text, image = parts.text("what?"), parts.image(3)
    assert found["media"] == said(server, text, image, parts.input_audio(4), image)
    assert found["response_media"] == said(server, text, image, image)
    assert found["form"] == ["name", "strength"]
    assert found["continued"] == said(
        server,
        messages=[
            {"role": "user", "content": "hello"},
            {"role": "assistant", "content": hello},
            {"role": "user", "content": "and?"},
        ],
    )
