"""What users of litellm do, against one server. Arguments: its URL, the model's name, a picture. Prints JSON."""

import asyncio
import base64
import json
import sys
from pathlib import Path
from typing import Literal

import litellm
from pydantic import BaseModel

URL, MODEL, PICTURE = sys.argv[1:]
COMMON = {"model": f"openai/{MODEL}", "api_base": f"{URL}/v1", "api_key": "none", "temperature": 0}
HELLO = [{"role": "user", "content": "hello"}]
picture = base64.b64encode(Path(PICTURE).read_bytes()).decode()
SEEN = [
    {
        "role": "user",
        "content": [
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture}"}},
            {"type": "text", "text": "what?"},
        ],
    }
]


class Colour(BaseModel):
    name: Literal["red", "green"]
    strength: Literal[1, 2, 3]


def main() -> None:
    found = {}
    answer = litellm.completion(messages=HELLO, max_tokens=6, **COMMON)
    found["text"] = answer.choices[0].message.content
    found["usage"] = answer.usage.total_tokens - answer.usage.prompt_tokens - answer.usage.completion_tokens
    found["picture"] = litellm.completion(messages=SEEN, max_tokens=6, **COMMON).choices[0].message.content

    options = {"include_usage": True}
    chunks = list(litellm.completion(messages=HELLO, max_tokens=6, stream=True, stream_options=options, **COMMON))
    found["streamed"] = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    found["streamed_usage"] = litellm.stream_chunk_builder(chunks, messages=HELLO).usage.completion_tokens

    async def ask() -> str:
        return (await litellm.acompletion(messages=HELLO, max_tokens=6, **COMMON)).choices[0].message.content

    found["async"] = asyncio.run(ask())
    several = litellm.completion(messages=HELLO, max_tokens=6, n=2, logprobs=True, top_logprobs=2, **COMMON)
    found["choices"] = [len(choice.logprobs.content) for choice in several.choices]
    formed = litellm.completion(messages=HELLO, max_tokens=400, response_format=Colour, **COMMON)
    found["form"] = sorted(Colour.model_validate_json(formed.choices[0].message.content).model_dump())
    # litellm asks for 16 tokens at least, as OpenAI does
    response = litellm.responses(input="hello", max_output_tokens=16, **COMMON)
    found["response"] = response.output[0].content[0].text
    events = list(litellm.responses(input="hello", max_output_tokens=16, stream=True, **COMMON))
    found["response_streamed"] = "".join(e.delta for e in events if e.type == "response.output_text.delta")
    found["errors"] = []
    for change in ({"model": "openai/other"}, {"max_tokens": 10_000_000}, {"extra_body": {"unknown": 1}}):
        try:
            litellm.completion(**({"messages": HELLO, "max_tokens": 1, "max_retries": 0} | COMMON | change))
        except (litellm.NotFoundError, litellm.BadRequestError) as error:
            found["errors"].append(type(error).__name__)
    print(json.dumps(found))


main()
