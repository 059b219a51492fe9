"""Embeddings by the openai package and by plain HTTP, of texts, token ids and pictures."""

from __future__ import annotations

from typing import Any

import httpx
import numpy as np
import openai
import pytest

NAME = "tiny-omni"


def post(server: Any, **body: Any) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/embeddings", json={"model": NAME} | body, timeout=60, trust_env=False)


def vectors(server: Any, **body: Any) -> np.ndarray:
    answer = post(server, **body)
    assert answer.status_code == 200, answer.text
    data = answer.json()["data"]
    assert [item["index"] for item in data] == list(range(len(data)))
    return np.array([item["embedding"] for item in data])


def test_openai_package(client: openai.OpenAI, server: Any) -> None:
    texts = ["a picture of a cat", "hello", "a picture of a cat"]
    answer = client.embeddings.create(model=NAME, input=texts)  # asks for base64
    found = np.array([item.embedding for item in answer.data])
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(found[0], found[2], atol=1e-5)
    assert np.abs(found[0] - found[1]).max() > 0.01
    assert answer.usage.prompt_tokens == answer.usage.total_tokens > 3
    np.testing.assert_allclose(vectors(server, input=texts), found, atol=1e-5)
    np.testing.assert_allclose(vectors(server, input="hello")[0], found[1], atol=1e-5)


def test_token_ids_are_the_text(server: Any) -> None:
    ids = httpx.post(f"{server.url}/tokenize", json={"model": NAME, "prompt": "hello"}, trust_env=False).json()[
        "tokens"
    ]
    one, two = vectors(server, input=[ids, ids[:1]])
    np.testing.assert_allclose(one, vectors(server, input="hello")[0], atol=1e-5)
    np.testing.assert_allclose(vectors(server, input=ids[:1])[0], two, atol=1e-5)


def test_dimensions(server: Any) -> None:
    whole = vectors(server, input="hello")[0]
    part = vectors(server, input="hello", dimensions=8)[0]
    np.testing.assert_allclose(part, whole[:8] / np.linalg.norm(whole[:8]), atol=1e-5)
    answer = post(server, input="hello", dimensions=len(whole) + 1)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "dimensions"
    assert f"at most {len(whole)}" in answer.json()["error"]["message"]


def test_pictures(server: Any, parts: Any) -> None:
    def url(seed: int) -> str:
        return str(parts.data_url(parts.picture(seed), "image/png"))

    found = vectors(
        server, input=[{"image": url(1)}, {"image": url(2)}, {"text": "hello", "image": url(1)}, {"text": "hello"}]
    )
    for k in range(4):
        for m in range(k):
            assert np.abs(found[k] - found[m]).max() > 1e-4
    messages = [{"role": "user", "content": [parts.image(1), parts.text("hello")]}]
    np.testing.assert_allclose(vectors(server, messages=messages)[0], found[2], atol=1e-5)


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({}, "input", "exactly one of input and messages"),
        ({"input": "a", "messages": [{"role": "user", "content": "a"}]}, "input", "exactly one"),
        ({"input": ""}, "input", "not an empty string"),
        ({"input": []}, "input", "1 to 256"),
        ({"input": ["a", 3]}, "input[1]", "not a"),
        ({"input": [{"pictures": "x"}]}, "input[0].pictures", "image"),
        ({"input": [{}]}, "input[0]", "at least one of text, image, video, audio"),
        ({"input": [{"image": "/etc/passwd"}]}, "input[0]", "http"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format", "float or base64"),
        ({"input": "a", "dimensions": 0}, "dimensions", "1"),
        ({"input": "a", "temperature": 1}, "temperature", "unknown"),
        ({"input": [[10**6]]}, "input", "from 0 to 479"),
        ({"input": "a", "model": "other"}, "model", NAME),
    ],
)
def test_bad_input(server: Any, body: dict[str, Any], param: str, words: str) -> None:
    answer = post(server, **body)
    assert answer.status_code in (400, 404), answer.text
    error = answer.json()["error"]
    assert (error["param"] or "").startswith(param), error
    assert words in error["message"], error
