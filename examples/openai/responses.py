"""OpenAI's newer API: a response about a picture, and one that continues it."""

import base64
import os
from pathlib import Path

from openai import OpenAI

PICTURE = Path(__file__).parents[1] / "media" / "picture.png"
client = OpenAI(base_url=os.environ.get("TRIPTYCH_URL", "http://localhost:30000") + "/v1", api_key="None")
url = "data:image/png;base64," + base64.b64encode(PICTURE.read_bytes()).decode()
first = client.responses.create(
    model="default",
    input=[
        {
            "role": "user",
            "content": [
                {"type": "input_image", "image_url": url, "detail": "auto"},
                {"type": "input_text", "text": "What is in the picture?"},
            ],
        }
    ],
    max_output_tokens=64,
)
print(first.output_text)
stream = client.responses.create(
    model="default",
    previous_response_id=first.id,
    input="How many shapes are there?",
    max_output_tokens=64,
    stream=True,
)
for event in stream:
    if event.type == "response.output_text.delta":
        print(event.delta, end="", flush=True)
print()
