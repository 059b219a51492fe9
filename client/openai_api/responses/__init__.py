"""OpenAI's Responses API, on the same requests and answers as chat completions."""

from .endpoint import router

__all__ = ["router"]
