"""The FastAPI shim: OpenAI requests to ensemble calls and back."""

from .app import create_app
from .options import ShimOptions
from .service import Service

__all__ = ["Service", "ShimOptions", "create_app"]
