"""The playground: a page at ``/`` to try the model in a browser. It uses the public endpoints alone.

Its sources are in ``client/page/src``; what is served is their build, ``client/page/dist``.
"""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter, Request
from fastapi.responses import Response
from starlette.staticfiles import StaticFiles

DIST = Path(__file__).parents[1] / "page" / "dist"

# Nothing but files of this origin, and the media that the reader attached (blob:). An answer that the page shows can
# load nothing, run nothing and send nothing, whatever the model wrote.
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' blob:",
        "media-src 'self' blob:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
_HEADERS = {
    "content-security-policy": POLICY,
    "cross-origin-opener-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=(self)",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}
# The page names its assets by their content: it is asked for anew each time, they never are.
_PAGE_CACHING = "no-cache"
_ASSET_CACHING = "public, max-age=31536000, immutable"


def router() -> APIRouter:
    """GET and HEAD of ``/`` and ``/assets/...``."""
    routes = APIRouter(include_in_schema=False)
    files = StaticFiles(directory=DIST)

    async def answer(request: Request, path: str, caching: str) -> Response:
        response = await files.get_response(path, request.scope)
        response.headers.update(_HEADERS | {"cache-control": caching})
        return response

    @routes.api_route("/", methods=["GET", "HEAD"], response_model=None)
    async def page(request: Request) -> Response:
        return await answer(request, "index.html", _PAGE_CACHING)

    @routes.api_route("/assets/{name}", methods=["GET", "HEAD"], response_model=None)
    async def asset(request: Request, name: str) -> Response:
        return await answer(request, f"assets/{name}", _ASSET_CACHING)

    return routes
