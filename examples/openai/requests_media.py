"""A picture and a video by URL, a sound in the request itself, with the package requests."""

import base64
import os
from pathlib import Path

import requests

URL = os.environ.get("TRIPTYCH_URL", "http://localhost:30000") + "/v1/chat/completions"
MEDIA = "https://github.com/sgl-project"
SOUND = base64.b64encode((Path(__file__).parents[1] / "media" / "digits.wav").read_bytes()).decode()
ASKED = {
    "image_url": os.environ.get("IMAGE_URL", f"{MEDIA}/sglang/blob/main/test/lang/example_image.png?raw=true"),
    "video_url": os.environ.get(
        "VIDEO_URL", f"{MEDIA}/sgl-test-files/raw/refs/heads/main/videos/jobs_presenting_ipod.mp4"
    ),
    "audio_url": f"data:audio/wav;base64,{SOUND}",
}

for kind, url in ASKED.items():
    data = {
        "model": "default",
        "messages": [
            {
                "role": "user",
                "content": [{"type": "text", "text": "What is in it?"}, {"type": kind, kind: {"url": url}}],
            }
        ],
        "max_tokens": 300,
    }
    response = requests.post(URL, json=data, timeout=600)
    response.raise_for_status()
    print(kind, response.json()["choices"][0]["message"]["content"])
