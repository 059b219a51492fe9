"""Triptych for Python: ``Engine`` answers in this process, ``Client`` and ``AsyncClient`` ask a running server.

Names are imported when they are first used, so that a client never loads torch, and every module below this package
(``triptych.python_models`` ...) can be imported alone. See docs/python.md.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from triptych.client.calls import (
        AsyncStream,
        BatchError,
        Choice,
        ItemError,
        Result,
        Stream,
    )
    from triptych.client.sdk import TLS, AsyncClient, Client
    from triptych.python_models.contract.delta import Delta, TokenLogprob, Usage
    from triptych.python_models.contract.errors import ErrorKind, TriptychError
    from triptych.python_models.contract.sampling import SamplingParams
    from triptych.python_models.contract.tools import ToolCall

    from .engine import Engine

# In a wheel the folders kernels, python_models, backends and client lie in this one, in a checkout beside it.
_here = Path(__file__).parent
if not (_here / "client").is_dir():
    __path__.append(str(_here.parent))

_WHERE = {
    "AsyncClient": "triptych.client.sdk",
    "AsyncStream": "triptych.client.calls",
    "BatchError": "triptych.client.calls",
    "Choice": "triptych.client.calls",
    "Client": "triptych.client.sdk",
    "Delta": "triptych.python_models.contract.delta",
    "Engine": "triptych.engine",
    "ErrorKind": "triptych.python_models.contract.errors",
    "ItemError": "triptych.client.calls",
    "Result": "triptych.client.calls",
    "SamplingParams": "triptych.python_models.contract.sampling",
    "Stream": "triptych.client.calls",
    "TLS": "triptych.client.sdk",
    "ToolCall": "triptych.python_models.contract.tools",
    "TokenLogprob": "triptych.python_models.contract.delta",
    "TriptychError": "triptych.python_models.contract.errors",
    "Usage": "triptych.python_models.contract.delta",
}

__all__ = [
    "TLS",
    "AsyncClient",
    "AsyncStream",
    "BatchError",
    "Choice",
    "Client",
    "Delta",
    "Engine",
    "ErrorKind",
    "ItemError",
    "Result",
    "SamplingParams",
    "Stream",
    "TokenLogprob",
    "ToolCall",
    "TriptychError",
    "Usage",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("triptych")
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(import_module(_WHERE[name]), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})
