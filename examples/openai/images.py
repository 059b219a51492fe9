"""Two pictures in one question, by URL, with the package openai."""

import os

from openai import OpenAI

MEDIA = "https://raw.githubusercontent.com/sgl-project/sglang/main"
FIRST = os.environ.get("IMAGE_URL", f"{MEDIA}/test/lang/example_image.png")
SECOND = os.environ.get("IMAGE_URL_2", f"{MEDIA}/assets/logo.png")

client = OpenAI(base_url=os.environ.get("TRIPTYCH_URL", "http://localhost:30000") + "/v1", api_key="None")
response = client.chat.completions.create(
    model="default",
    messages=[
        {
            "role": "user",
            "content": [
                # "modalities" tells some models that the pictures belong together; it may be left out
                {"type": "image_url", "image_url": {"url": FIRST}, "modalities": "multi-images"},
                {"type": "image_url", "image_url": {"url": SECOND}, "modalities": "multi-images"},
                {"type": "text", "text": "Describe the first image in one sentence, then the second in another."},
            ],
        }
    ],
    temperature=0,
    max_tokens=300,
)
print(response.choices[0].message.content)
print(response.usage.prompt_tokens, "tokens of prompt, pictures included")
