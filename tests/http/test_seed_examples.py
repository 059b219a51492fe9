"""What SGLang's documents show works as it is written there, but for host, model and URLs of media.

The examples of ``examples/openai`` have the same forms: cURL without a content type, requests, the openai package, one
picture and several, base64, turns, the field ``modalities``, videos and sounds.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-clients" / "bin" / "python"
EXAMPLES = ROOT / "examples" / "openai"


@pytest.fixture(scope="module")
def environment(server: Any, files: str) -> dict[str, str]:
    return {
        **os.environ,
        "NO_PROXY": "*",
        "TRIPTYCH_URL": server.url,
        "IMAGE_URL": f"{files}/example_image.png?raw=true",
        "IMAGE_URL_2": f"{files}/logo.png",
        "VIDEO_URL": f"{files}/jobs_presenting_ipod.mp4",
    }


def shell(script: str, environment: dict[str, str]) -> str:
    done = subprocess.run(
        [str(EXAMPLES / script)], capture_output=True, text=True, timeout=120, env=environment, check=True
    )
    return done.stdout


def said(server: Any, *content: Any, **change: Any) -> str:
    answer = server.ask(**({"messages": [{"role": "user", "content": list(content)}], "max_tokens": 300} | change))
    assert answer.status_code == 200, answer.text
    text: str = answer.json()["choices"][0]["message"]["content"]
    return text


def test_curl(server: Any, environment: dict[str, str], files: str) -> None:
    answer = json.loads(shell("curl_image.sh", environment))
    assert answer["object"] == "chat.completion"
    assert answer["choices"][0]["message"]["role"] == "assistant"
    assert answer["usage"]["prompt_tokens_details"]["image_tokens"] > 0
    events = shell("curl_stream.sh", environment).split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert json.loads(events[-3].removeprefix("data: "))["usage"]["completion_tokens"] > 0


def test_python(server: Any, environment: dict[str, str], files: str, parts: Any) -> None:
    assert PYTHON.exists(), "the client packages are not installed; run: make clients"
    command = [PYTHON, ROOT / "tests" / "clients" / "examples.py", *sorted(EXAMPLES.glob("*.py"))]
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, timeout=400, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, str] = json.loads(done.stdout)
    assert set(found) == {path.name for path in EXAMPLES.glob("*.py")}
    for kind in ("image_url", "video_url", "audio_url"):
        assert kind in found["requests_media.py"]
    # those at temperature 0 say what the same question says otherwise
    picture = {"type": "image_url", "image_url": {"url": environment["IMAGE_URL"]}}
    other = {"type": "image_url", "image_url": {"url": environment["IMAGE_URL_2"]}}
    question = parts.text("Describe the first image in one sentence, then the second in another.")
    assert said(server, picture, other, question) in found["images.py"]
    assert "ChoiceLogprobs" not in found["base64_image.py"]
    assert "matched_stop=" in found["base64_image.py"]
    assert found["responses.py"].strip()
    assert found["conversation.py"].strip()


def test_parts_and_fields_of_the_documents(server: Any, files: str, parts: Any) -> None:
    video = {"type": "video_url", "video_url": {"url": f"{files}/video.mp4"}}
    sound = {"type": "audio_url", "audio_url": {"url": f"{files}/sound.wav"}}
    jpeg = {"type": "image_url", "image_url": {"url": parts.data_url(parts.picture(1, form="JPEG"), "image/jpeg")}}
    for content in ([parts.text(), video], [sound, parts.text()], [jpeg, parts.text(), video, sound]):
        assert said(server, *content, max_tokens=4) is not None
    for modality in ("image", "multi-images"):
        one = jpeg | {"modalities": modality}
        assert said(server, one, parts.text(), max_tokens=4) == said(server, jpeg, parts.text(), max_tokens=4)
