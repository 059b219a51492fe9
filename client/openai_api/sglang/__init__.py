"""SGLang's native endpoints: POST /generate, and what its users ask of a server."""

from .router import router

__all__ = ["router"]
