"""What users of langchain-openai do, against one server. Arguments: its URL, the model's name, a picture, a sound.

Prints JSON.
"""

import base64
import json
import sys
from pathlib import Path
from typing import Literal

from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI
from pydantic import BaseModel

URL, MODEL, PICTURE, SOUND = sys.argv[1:]


class Colour(BaseModel):
    """A colour."""

    name: Literal["red", "green"]
    strength: Literal[1, 2, 3]


def encoded(path: str) -> str:
    return base64.b64encode(Path(path).read_bytes()).decode()


def chat(**change: object) -> ChatOpenAI:
    arguments = {"base_url": f"{URL}/v1", "api_key": "none", "model": MODEL, "temperature": 0, "max_tokens": 6}
    return ChatOpenAI(**(arguments | {"max_retries": 0} | change))


def main() -> None:
    found = {}
    model = chat()
    found["text"] = model.invoke("hello").content
    conversation = [SystemMessage("be brief"), HumanMessage("hello", name="ada"), AIMessage("hi"), HumanMessage("you?")]
    answer = model.invoke(conversation)
    found["turns"] = answer.content
    found["finish"] = answer.response_metadata["finish_reason"]
    found["usage"] = answer.usage_metadata["output_tokens"]
    seen = HumanMessage(
        [
            {"type": "text", "text": "what?"},
            {"type": "image", "base64": encoded(PICTURE), "mime_type": "image/png"},
            {"type": "audio", "base64": encoded(SOUND), "mime_type": "audio/wav"},
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encoded(PICTURE)}"}},
        ]
    )
    found["media"] = model.invoke([seen]).content
    chunks = list(chat(stream_usage=True).stream("hello"))
    found["streamed"] = "".join(chunk.content for chunk in chunks)
    found["streamed_usage"] = sum(chunk.usage_metadata["output_tokens"] for chunk in chunks if chunk.usage_metadata)
    found["batch"] = [answer.content for answer in model.batch(["hello", "hello"])]
    formed = chat(max_tokens=400).with_structured_output(Colour, method="json_schema").invoke("a colour")
    found["form"] = sorted(formed.model_dump())
    found["logprobs"] = len(model.bind(logprobs=True).invoke("hello").response_metadata["logprobs"]["content"])
    responses = chat(use_responses_api=True)
    found["response"] = responses.invoke("hello").text
    # langchain-openai leaves sounds out of what it sends there
    pictures = HumanMessage([part for part in seen.content if part["type"] != "audio"])
    found["response_media"] = responses.invoke([pictures]).text
    found["response_streamed"] = "".join(chunk.text for chunk in responses.stream("hello"))
    first = responses.invoke("hello")
    found["continued"] = responses.bind(previous_response_id=first.response_metadata["id"]).invoke("and?").text
    print(json.dumps(found))


main()
