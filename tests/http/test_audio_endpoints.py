"""Transcriptions and translations, by the official client and by hand; and what this server does not make."""

from __future__ import annotations

import json
import warnings
from typing import Any

import httpx
import openai
import pytest

from triptych.client.openai_api import audio, form
from triptych.python_models.contract.errors import ErrorKind, TriptychError
from triptych.python_models.contract.request import MediaPart, TextPart
from triptych.python_models.families.base import refuse_modality

NAME = "tiny-omni"
FILE = ("voice.wav", b"RIFF", "audio/wav")


def encoded(fields: Any = (), files: Any = None) -> tuple[bytes, str]:
    """A form as a client sends it: (body, content type)."""
    request = httpx.Request("POST", "http://x", data=dict(fields), files={"file": FILE} if files is None else files)
    return request.read(), request.headers["content-type"]


def parsed(translate: bool = False, files: Any = None, **fields: Any) -> audio.AudioCall:
    body, content_type = encoded({"model": "m"} | fields, files)
    return audio.parse(body, content_type, translate, "m", 10.0)


def test_what_the_model_is_asked() -> None:
    call = parsed(language="de", prompt="Straße", seed=3, temperature=0.5, max_completion_tokens=7)
    assert call.file == b"RIFF"
    [message] = call.request.messages
    assert message.parts[0] == MediaPart("audio", blob=0)
    assert isinstance(message.parts[1], TextPart)
    assert "de" in message.parts[1].text
    assert "Straße" in message.parts[1].text
    sampling = call.request.sampling
    assert (sampling.seed, sampling.temperature, sampling.max_tokens) == (3, 0.5, 7)
    assert not call.request.stream
    assert parsed().request.sampling.temperature == 0
    assert "English" in audio.instruction(translate=True)
    assert "English" not in audio.instruction(translate=False)
    assert parsed(stream="true", **{"include[]": "logprobs"}).request.sampling.logprobs


@pytest.mark.parametrize(
    ("fields", "param", "kind"),
    [
        ({"model": "other"}, "model", ErrorKind.MODEL_NOT_FOUND),
        ({"model": ""}, "model", ErrorKind.INVALID_REQUEST),
        ({"response_format": "verbose_json"}, "response_format", ErrorKind.UNSUPPORTED),
        ({"response_format": "xml"}, "response_format", ErrorKind.INVALID_REQUEST),
        ({"timestamp_granularities[]": "word"}, "timestamp_granularities", ErrorKind.UNSUPPORTED),
        ({"chunking_strategy": "auto"}, "chunking_strategy", ErrorKind.UNSUPPORTED),
        ({"temperature": "hot"}, "temperature", ErrorKind.INVALID_REQUEST),
        ({"temperature": "nan"}, "temperature", ErrorKind.INVALID_REQUEST),
        ({"temperature": "3"}, "temperature", ErrorKind.INVALID_REQUEST),
        ({"top_p": "0"}, "top_p", ErrorKind.INVALID_REQUEST),
        ({"seed": "1.5"}, "seed", ErrorKind.INVALID_REQUEST),
        ({"seed": "²"}, "seed", ErrorKind.INVALID_REQUEST),
        ({"seed": "9" * 5000}, "seed", ErrorKind.INVALID_REQUEST),
        ({"max_completion_tokens": "0"}, "max_completion_tokens", ErrorKind.INVALID_REQUEST),
        ({"stream": "yes"}, "stream", ErrorKind.INVALID_REQUEST),
        ({"stream": "true", "response_format": "text"}, "stream", ErrorKind.INVALID_REQUEST),
        ({"include": "words"}, "include", ErrorKind.INVALID_REQUEST),
        ({"language": ["de", "fr"]}, "language", ErrorKind.INVALID_REQUEST),
        ({"best_of": "2"}, "best_of", ErrorKind.INVALID_REQUEST),
        ({"file": "a name"}, "file", ErrorKind.INVALID_REQUEST),
    ],
)
def test_a_wrong_field_is_named(fields: dict[str, Any], param: str, kind: ErrorKind) -> None:
    with pytest.raises(TriptychError) as caught:
        parsed(**fields)
    assert (caught.value.param, caught.value.kind) == (param, kind)


@pytest.mark.parametrize("files", [{}, {"other": FILE}, {"file": ("a.wav", b"")}, [("file", FILE), ("file", FILE)]])
def test_it_takes_one_file(files: Any) -> None:
    # without any file the client would send no multipart form
    body, content_type = encoded({"model": "m"}, files or {"prompt": (None, "p")})
    with pytest.raises(TriptychError) as caught:
        audio.parse(body, content_type, False, "m", 10.0)
    assert caught.value.param in ("file", "other")


def test_a_model_without_ears_says_so_of_the_file() -> None:
    """What the stages say of the chat that was made of the form is told of the form."""
    refused = audio._in_its_words(refuse_modality("messages[0].content[0]", "audio", "llava", {"image"}))
    assert (refused.kind.status, refused.param) == (400, "file")
    assert refused.message == "file: llava takes images, not audio"
    too_long = TriptychError(ErrorKind.CONTEXT_LENGTH_EXCEEDED, "the prompt has 9 tokens", "messages")
    assert audio._in_its_words(too_long).param == "file"
    limit = TriptychError(ErrorKind.INVALID_REQUEST, "max_tokens must be at most 7", "sampling.max_tokens")
    assert audio._in_its_words(limit).param == "max_completion_tokens"


def test_a_translation_has_no_language() -> None:
    for name in ("language", "stream"):
        with pytest.raises(TriptychError, match=name):
            parsed(translate=True, **{name: "de"})


def test_a_form_keeps_bytes_and_bounds() -> None:
    content = bytes(range(256)) * 40 + b"\r\n--x\r\n"
    body, content_type = encoded({"a": "ä\r\nb"}, {"file": ("f", content)})
    found = form.parse(body, content_type, ("a",), ("file",))
    assert found.file("file") == content
    assert found.text("a") == "ä\r\nb"
    for broken in (body[:-30], b"", b"no form", body.replace(b"name=", b"game=")):
        with pytest.raises(TriptychError) as caught:
            form.parse(broken, content_type, ("a",), ("file",))
        assert caught.value.kind is ErrorKind.INVALID_REQUEST
    for wrong in (
        "multipart/form-data",
        "multipart/form-data; boundary=",
        f"multipart/form-data; boundary={'x' * 999}",
    ):
        with pytest.raises(TriptychError):
            form.parse(body, wrong, ("a",), ("file",))
    many, content_type = encoded({}, [("a", (None, "x")) for _ in range(100)])
    with pytest.raises(TriptychError, match="64 parts"):
        form.parse(many, content_type, ("a",), ())
    latin, content_type = encoded({}, [("a", (None, b"\xff"))])
    with pytest.raises(TriptychError, match="UTF-8"):
        form.parse(latin, content_type, ("a",), ())


def test_the_official_client(client: openai.OpenAI, parts: Any) -> None:
    sound = ("voice.wav", parts.sound(), "audio/wav")
    found = client.audio.transcriptions.create(
        model=NAME, file=sound, language="en", prompt="Triptych", extra_body={"max_completion_tokens": 5}
    )
    assert found.usage.type == "tokens"
    assert found.usage.output_tokens == 5
    assert found.usage.input_token_details.audio_tokens > 0
    assert found.usage.total_tokens == found.usage.input_tokens + 5
    # the same words as a chat that asks for them
    chat = client.chat.completions.create(
        model=NAME,
        messages=[{"role": "user", "content": [parts.audio(), parts.text(audio.instruction(False, "en", "Triptych"))]}],
        max_tokens=5,
        temperature=0,
    )
    assert found.text == chat.choices[0].message.content
    with warnings.catch_warnings():
        # the client's newer releases would rather not have this method
        warnings.simplefilter("ignore", DeprecationWarning)
        translated = client.audio.translations.create(model=NAME, file=sound, extra_body={"max_completion_tokens": 5})
    assert isinstance(translated.text, str)
    as_text = client.audio.transcriptions.create(
        model=NAME, file=sound, language="en", prompt="Triptych", response_format="text",
        extra_body={"max_completion_tokens": 5},
    )  # fmt: skip
    assert as_text == f"{found.text}\n"


def test_a_transcript_streams(client: openai.OpenAI, parts: Any) -> None:
    events = list(
        client.audio.transcriptions.create(
            model=NAME,
            file=("voice.wav", parts.sound()),
            stream=True,
            include=["logprobs"],
            extra_body={"max_completion_tokens": 6},
        )
    )
    assert [event.type for event in events[:-1]] == ["transcript.text.delta"] * (len(events) - 1)
    done = events[-1]
    assert done.type == "transcript.text.done"
    assert done.text == "".join(event.delta for event in events[:-1])
    assert done.usage.output_tokens == len(done.logprobs) == 6
    assert sum(len(event.logprobs) for event in events[:-1]) == 6


def test_what_a_client_gets_wrong(server: Any, parts: Any) -> None:
    url = f"{server.url}/v1/audio/transcriptions"

    def ask(file: bytes = b"no sound", **fields: str) -> httpx.Response:
        return httpx.post(url, data={"model": NAME} | fields, files={"file": file}, trust_env=False, timeout=60)

    answer = ask()
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "file"
    assert "messages" not in answer.text
    assert ask(parts.sound(), response_format="srt").json()["error"]["param"] == "response_format"
    too_large = ask(b"x" * 5 * 2**20)
    assert too_large.status_code == 413
    as_json = httpx.post(url, json={"model": NAME}, trust_env=False)
    assert (as_json.status_code, as_json.json()["error"]["code"]) == (415, "unsupported_media_type")
    assert "multipart/form-data" in as_json.json()["error"]["message"]
    assert ask(parts.sound(), max_completion_tokens="1").status_code == 200, "and the server goes on"


def test_what_it_does_not_make(client: openai.OpenAI) -> None:
    calls = [
        lambda: client.images.generate(model=NAME, prompt="a cat"),
        lambda: client.images.edit(model=NAME, image=b"png", prompt="a cat"),
        lambda: client.audio.speech.create(model=NAME, voice="alloy", input="hello"),
    ]
    for call in calls:
        with pytest.raises(openai.BadRequestError, match=f"{NAME}.*makes no (pictures|speech)") as caught:
            call()
        assert caught.value.code == "unsupported"
        assert json.loads(caught.value.response.text)["error"]["param"] == "model"
