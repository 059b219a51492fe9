"""Several turns about a picture and a sound, each answer streamed."""

import base64
import os
from pathlib import Path

from openai import OpenAI

MEDIA = Path(__file__).parents[1] / "media"
client = OpenAI(base_url=os.environ.get("TRIPTYCH_URL", "http://localhost:30000") + "/v1", api_key="None")


def encoded(name):
    return base64.b64encode((MEDIA / name).read_bytes()).decode()


def say(messages):
    """Print the answer as it comes, and add it to the conversation."""
    text = ""
    stream = client.chat.completions.create(
        model="default", messages=messages, max_tokens=64, temperature=0, stream=True
    )
    for chunk in stream:
        piece = chunk.choices[0].delta.content or ""
        print(piece, end="", flush=True)
        text += piece
    print()
    messages.append({"role": "assistant", "content": text})


messages = [{"role": "system", "content": "Answer briefly."}]
picture = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encoded('picture.png')}"}}
messages.append({"role": "user", "content": [picture, {"type": "text", "text": "What is in the picture?"}]})
say(messages)
messages.append({"role": "user", "content": "How many shapes are there?"})
say(messages)
sound = {"type": "input_audio", "input_audio": {"data": encoded("digits.wav"), "format": "wav"}}
messages.append({"role": "user", "content": [sound, {"type": "text", "text": "Which digits are spoken?"}]})
say(messages)
