#!/bin/sh
# An answer as server-sent events, with the token counts in the last chunk.
: "${TRIPTYCH_URL:=http://localhost:30000}"

curl -sSN "$TRIPTYCH_URL/v1/chat/completions" \
  -H "Content-Type: application/json" \
  -d '{
    "model": "default",
    "messages": [{"role": "user", "content": "Say hello."}],
    "max_tokens": 16,
    "stream": true,
    "stream_options": {"include_usage": true}
  }'
