"""A picture of this machine, in the request itself."""

import base64
import os
from pathlib import Path

from openai import OpenAI

PICTURE = Path(os.environ.get("IMAGE", Path(__file__).parents[1] / "media" / "picture.png"))

client = OpenAI(base_url=os.environ.get("TRIPTYCH_URL", "http://localhost:30000") + "/v1", api_key="None")
encoded = base64.b64encode(PICTURE.read_bytes()).decode()
response = client.chat.completions.create(
    model="default",
    messages=[
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "What is in this image?"},
                {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encoded}", "detail": "high"}},
            ],
        }
    ],
    max_tokens=300,
)
print(response.choices[0])
