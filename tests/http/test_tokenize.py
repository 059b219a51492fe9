"""POST /tokenize and /detokenize, with vLLM's fields."""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

NAME = "tiny-omni"


def post(server: Any, path: str, body: Any) -> httpx.Response:
    return httpx.post(f"{server.url}{path}", json=body, timeout=120, trust_env=False)


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Path) -> Any:
    import transformers

    return transformers.AutoTokenizer.from_pretrained(checkpoint)


def test_a_prompt_and_back(server: Any, tokenizer: Any) -> None:
    text = "Grüße <|im_start|> 漢字 🙂"
    ids = tokenizer([text])["input_ids"][0]
    found = post(server, "/tokenize", {"model": NAME, "prompt": text, "return_token_strs": True}).json()
    assert found == {
        "count": len(ids),
        "max_model_len": 2048,
        "tokens": ids,
        "token_strs": tokenizer.convert_ids_to_tokens(ids),
    }
    assert post(server, "/tokenize", {"prompt": text}).json()["token_strs"] is None
    assert post(server, "/detokenize", {"model": NAME, "tokens": ids}).json() == {"prompt": text}
    assert post(server, "/detokenize", {"tokens": []}).json() == {"prompt": ""}
    assert post(server, "/tokenize", {"prompt": ""}).status_code == 400


def test_a_chat_with_media_is_what_is_generated_from(server: Any, parts: Any) -> None:
    messages = [{"role": "user", "content": [parts.image(1), parts.audio(2), parts.text("<|im_end|>?")]}]
    asked = post(server, "/tokenize", {"messages": messages})
    assert asked.status_code == 200, asked.text
    found = asked.json()
    answer = server.ask(messages=messages).json()
    assert found["count"] == len(found["tokens"]) == answer["usage"]["prompt_tokens"]
    open_end = post(server, "/tokenize", {"messages": messages, "add_generation_prompt": False}).json()
    assert found["tokens"][: open_end["count"]] == open_end["tokens"]
    assert open_end["count"] < found["count"]
    said = [*messages, {"role": "assistant", "content": "It is"}]
    going_on = post(server, "/tokenize", {"messages": said, "continue_final_message": True}).json()
    assert going_on["tokens"][: found["count"]] == found["tokens"]
    text = post(server, "/detokenize", {"tokens": going_on["tokens"]}).json()["prompt"]
    assert text.endswith("It is")


def test_a_prompt_may_be_longer_than_the_context(server: Any) -> None:
    found = post(server, "/tokenize", {"prompt": "word " * 5000}).json()
    assert found["count"] > found["max_model_len"]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": []}, "prompt"),
        ("/tokenize", {"prompt": ["a"]}, "prompt"),
        ("/tokenize", {"prompt": "a", "add_generation_prompt": True}, "add_generation_prompt"),
        ("/tokenize", {"messages": [], "model": NAME}, "messages"),
        (
            "/tokenize",
            {"messages": [{"role": "user", "content": "a"}], "add_special_tokens": True},
            "add_special_tokens",
        ),
        ("/tokenize", {"prompt": "a", "return_token_strs": 1}, "return_token_strs"),
        ("/tokenize", {"prompt": "a", "temperature": 1}, "temperature"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": "a"}, "tokens"),
        ("/detokenize", {"tokens": [1, "a"]}, "tokens[1]"),
        ("/detokenize", {"tokens": [1, -1]}, "tokens[1]"),
        ("/detokenize", {"tokens": [1, 10**9]}, "tokens[1]"),
        ("/detokenize", {"tokens": [1], "skip": True}, "skip"),
    ],
)
def test_refusals_name_the_field(server: Any, path: str, body: Any, param: str) -> None:
    answer = post(server, path, body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param


def test_a_client_that_goes_away_is_forgotten(server: Any, files: str) -> None:
    """While its picture is still being fetched."""
    part = {"type": "image_url", "image_url": {"url": f"{files}/slow.png"}}
    data = json.dumps({"messages": [{"role": "user", "content": [part]}]}).encode()
    host, port = server.url.removeprefix("http://").split(":")

    def fetching() -> float:
        found: float = server.metric("triptych_requests_running", stage="preprocess")
        return found

    def wait_for(count: int) -> None:
        until = time.monotonic() + 50
        while fetching() != count:
            assert time.monotonic() < until
            time.sleep(0.05)

    wait_for(0)
    with socket.create_connection((host, int(port))) as link:
        link.sendall(f"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)
        wait_for(1)
    wait_for(0)
    assert post(server, "/tokenize", {"prompt": "a"}).status_code == 200


def test_another_model_is_not_found(server: Any) -> None:
    assert post(server, "/tokenize", {"model": "nobody", "prompt": "a"}).status_code == 404
    assert post(server, "/detokenize", {"model": "nobody", "tokens": [1]}).status_code == 404
