"""What ``Engine``, ``Client`` and ``AsyncClient`` have in common: how they are called and what they give back."""

from .batch import BatchError, ItemError
from .request import Call, ChatOptions, Options, PromptOptions
from .results import Choice, Result
from .stream import AsyncStream, Handle, Sink, Stream
from .surface import AsyncCalls, SyncCalls

__all__ = [
    "AsyncCalls",
    "AsyncStream",
    "BatchError",
    "Call",
    "ChatOptions",
    "Choice",
    "Handle",
    "ItemError",
    "Options",
    "PromptOptions",
    "Result",
    "Sink",
    "Stream",
    "SyncCalls",
]
