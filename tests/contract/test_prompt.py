"""Raw prompts on the wire."""

from __future__ import annotations

import json
from typing import Any

import pytest

from triptych.python_models.contract.errors import TriptychError
from triptych.python_models.contract.request import ChatRequest, MediaPart, RawPrompt

IMAGE = {"type": "image", "blob": 0}


def parsed(data: dict[str, Any], num_blobs: int = 1) -> ChatRequest:
    return ChatRequest.from_json(json.dumps(data), num_blobs)


@pytest.mark.parametrize(
    "prompt",
    [
        RawPrompt("a <|im_start|> b"),
        RawPrompt("x", None, (MediaPart("image", blob=0), MediaPart("audio", url="http://a/b")), False),
        RawPrompt(None, (1, 2, 3), (MediaPart("image", blob=0),)),
    ],
)
def test_there_and_back(prompt: RawPrompt) -> None:
    request = ChatRequest((), stream=False, prompt=prompt)
    again = parsed(json.loads(request.to_json()))
    assert again == request
    assert again.content is again.prompt
    assert [part for _, part in again.media()] == list(prompt.media)


@pytest.mark.parametrize(
    ("data", "param"),
    [
        ({}, "messages"),
        ({"prompt": {"text": "a"}, "messages": [{"role": "user", "content": "a"}]}, "messages"),
        ({"prompt": "a"}, "prompt"),
        ({"prompt": {}}, "prompt"),
        ({"prompt": {"text": "a", "token_ids": [1]}}, "prompt"),
        ({"prompt": {"text": 1}}, "prompt.text"),
        ({"prompt": {"text": "\ud800"}}, "prompt.text"),
        ({"prompt": {"token_ids": []}}, "prompt.token_ids"),
        ({"prompt": {"token_ids": [1, True]}}, "prompt.token_ids[1]"),
        ({"prompt": {"token_ids": [2**31]}}, "prompt.token_ids[0]"),
        ({"prompt": {"text": "a", "media": IMAGE}}, "prompt.media"),
        ({"prompt": {"text": "a", "media": [{"type": "text", "text": "b"}]}}, "prompt.media[0].type"),
        ({"prompt": {"text": "a", "media": [{"type": "image", "blob": 1}]}}, "prompt.media[0]"),
        ({"prompt": {"text": "a", "add_special_tokens": 1}}, "prompt.add_special_tokens"),
        ({"prompt": {"text": "a", "txt": 1}}, "prompt.txt"),
        ({"prompt": {"text": "a"}, "tools": []}, "tools"),
        ({"prompt": {"text": "a"}, "continue_final_message": True}, "continue_final_message"),
        ({"messages": [{"role": "user", "content": "a"}], "continue_final_message": True}, "continue_final_message"),
        (
            {
                "messages": [{"role": "assistant", "content": "a"}],
                "continue_final_message": True,
                "add_generation_prompt": True,
            },
            "add_generation_prompt",
        ),
    ],
)
def test_refusals_name_the_field(data: dict[str, Any], param: str) -> None:
    with pytest.raises(TriptychError) as caught:
        parsed(data)
    assert caught.value.param == param


def test_ends_of_chats() -> None:
    chat = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    assert parsed(chat).template.add_generation_prompt
    going_on = parsed(chat | {"continue_final_message": True})
    assert going_on.template.continue_final_message
    assert not going_on.template.add_generation_prompt
    assert parsed(json.loads(going_on.to_json())) == going_on
    open_end = parsed(chat | {"add_generation_prompt": False})
    assert not open_end.template.add_generation_prompt
    assert parsed(json.loads(open_end.to_json())) == open_end
