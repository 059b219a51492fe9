#!/bin/sh
# A picture by URL. The header Content-Type may be left out: the body is read as JSON in any case.
: "${TRIPTYCH_URL:=http://localhost:30000}"
: "${IMAGE_URL:=https://github.com/sgl-project/sglang/blob/main/test/lang/example_image.png?raw=true}"

curl -sS "$TRIPTYCH_URL/v1/chat/completions" \
  -H "Authorization: Bearer None" \
  -d '{
    "model": "default",
    "messages": [
      {
        "role": "user",
        "content": [
          {"type": "text", "text": "What’s in this image?"},
          {"type": "image_url", "image_url": {"url": "'"$IMAGE_URL"'"}}
        ]
      }
    ],
    "max_tokens": 300
  }'
