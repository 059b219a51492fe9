"""Limits on decoded media that every decoder keeps, and the errors they raise."""

from __future__ import annotations

from ..contract.errors import ErrorKind, TriptychError

MAX_ASPECT = 200
"""Longer side / shorter side; beyond it the processors of several checkpoints divide by zero."""

MAX_REQUEST_BYTES = 2 * 2**30
"""Fetched and decoded bytes that the media of one request may take in memory."""


def unreadable(message: str) -> TriptychError:
    """INVALID_MEDIA; the caller adds the field of the request."""
    return TriptychError(ErrorKind.INVALID_MEDIA, message)


def too_large(message: str) -> TriptychError:
    """TOO_LARGE; the caller adds the field of the request."""
    return TriptychError(ErrorKind.TOO_LARGE, message)


def check_size(width: int, height: int, max_pixels: int, what: str) -> None:
    """Refuse sizes that no decoder or processor should see.

    Args:
        width, height: in pixels, as the file's header says.
        max_pixels: limit on width * height.
        what: "picture" or "video", for the message.

    Raises:
        TriptychError: INVALID_MEDIA for an empty or extremely narrow one, TOO_LARGE over the limit.
    """
    if width < 1 or height < 1:
        raise unreadable(f"the {what} is {width}x{height} pixels; it needs at least 1x1")
    if width * height > max_pixels:
        raise too_large(f"the {what} is {width}x{height} = {width * height} pixels; at most {max_pixels} are allowed")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise unreadable(f"the {what} is {width}x{height} pixels; one side may be at most {MAX_ASPECT} times the other")
