"""Options for prompts and media through the whole path: a real server with other ones than the defaults."""

from __future__ import annotations

import base64
import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from PIL import Image

NAME = "controls"
TIMEOUT_S = 2.0
TEMPLATE = (
    "{% if tools %}<|im_start|>tools\n{{ tools | tojson }}<|im_end|>\n{% endif %}{% for m in messages %}"
    "<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}"
    "{% if p.type == 'text' %}{{ p.text }}{% else %}{{ {'image': '<|image_pad|>', 'video': '<|video_pad|>', "
    "'audio': '<|audio_pad|>'}[p.type] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n{{ style | default('') }}"
)
TOOL = {"type": "function", "function": {"name": "find", "parameters": {"type": "object"}}}


@pytest.fixture(scope="module")
def server(
    start: Callable[..., Any], checkpoint: Path, files: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Any]:
    template = tmp_path_factory.mktemp("template") / "own.jinja"
    template.write_text(TEMPLATE)
    with start(
        str(checkpoint),
        f"--served-model-name={NAME}",
        "--port=0",
        f"--chat-template={template}",
        "--mm-process-config",
        json.dumps({"image": {"max_pixels": 4096}, "video": {"num_frames": 4}}),
        "--limit-mm-data-per-request",
        '{"image": 2}',
        f"--mm-per-request-timeout={TIMEOUT_S}",
        "--mm-max-concurrent-calls=1",
        f"--allowed-media-host={files.removeprefix('http://')}",
    ) as served:
        served.url = served.wait_for("ready: ").split()[1]
        yield served


@pytest.fixture
def client(server: Any) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as made:
        yield made


def image(width: int = 160, height: int = 120, **options: Any) -> dict[str, Any]:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(out.getvalue()).decode()}"
    return {"type": "image_url", "image_url": {"url": url, **options}}


def prompt_tokens(client: openai.OpenAI, content: Any, **more: Any) -> int:
    answer = client.chat.completions.create(
        model=NAME, messages=[{"role": "user", "content": content}], max_tokens=1, temperature=0, **more
    )
    assert answer.usage is not None
    return answer.usage.prompt_tokens


def test_pixels_of_the_server_and_of_a_request(client: openai.OpenAI) -> None:
    base = prompt_tokens(client, [{"type": "text", "text": "x"}])
    rows = prompt_tokens(client, [image(), {"type": "text", "text": "x"}]) - base
    # squares of 16 pixels
    assert 8 <= rows <= 4096 // 256
    fewer = prompt_tokens(client, [image(max_pixels=1500), {"type": "text", "text": "x"}]) - base
    assert 0 < fewer < rows
    # never more than the server allows, and each picture as it asks
    both = prompt_tokens(client, [image(max_pixels=1500), image(max_pixels=90_000), {"type": "text", "text": "x"}])
    assert both - base == fewer + rows


def test_frames_of_the_server_and_of_a_request(client: openai.OpenAI, parts: Any) -> None:
    def rows(**options: Any) -> int:
        part = parts.video(0)
        part["video_url"] |= options
        return prompt_tokens(client, [part])

    assert rows(num_frames=2) < rows() == rows(num_frames=4) < rows(num_frames=8)


def test_tools_and_variables_reach_the_template(client: openai.OpenAI) -> None:
    plain = prompt_tokens(client, "x")
    assert prompt_tokens(client, "x", tools=[TOOL]) > plain + 10
    assert prompt_tokens(client, "x", tools=[TOOL], tool_choice="none") == plain
    assert prompt_tokens(client, "x", extra_body={"chat_template_kwargs": {"style": "y"}}) == plain + 1
    with pytest.raises(openai.BadRequestError, match="it reads style"):
        prompt_tokens(client, "x", extra_body={"chat_template_kwargs": {"colour": "y"}})


def test_too_many_of_a_kind(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="has 3 media of type image; at most 2"):
        prompt_tokens(client, [image(), image(), image()])


def test_a_medium_that_takes_too_long_is_a_504_and_the_next_has_its_turn(client: openai.OpenAI, files: str) -> None:
    """There is one place: it is free again as soon as the time is over."""
    failures: list[Any] = []

    def slow() -> None:
        try:
            prompt_tokens(client, [{"type": "image_url", "image_url": {"url": f"{files}/slow.png"}}])
        except openai.APIStatusError as error:
            failures.append(error)

    begin = time.monotonic()
    thread = threading.Thread(target=slow)
    thread.start()
    time.sleep(0.3)
    assert prompt_tokens(client, "text does not wait")
    assert time.monotonic() - begin < TIMEOUT_S
    assert prompt_tokens(client, [image()])
    assert TIMEOUT_S <= time.monotonic() - begin < TIMEOUT_S + 20
    thread.join()
    (error,) = failures
    assert error.status_code == 504
    assert (error.body["code"], error.body["param"]) == ("timeout", "messages[0].content[0]")
    assert f"{TIMEOUT_S:g} s (mm_per_request_timeout)" in error.body["message"]
