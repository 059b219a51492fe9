"""The FastAPI shim: OpenAI requests to ensemble calls and back."""
