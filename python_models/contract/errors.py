"""One error type for the whole system, and its form on the wire.

Triton carries an error as a code and a message; over a gRPC stream only the message survives, and an ensemble
prefixes it with ``in ensemble 'chat', ``. What the shim needs to answer an OpenAI error object therefore travels at
the end of the message as a tag, e.g.::

    messages[0].content[1]: not an image [triptych kind=invalid_media param=messages[0].content[1]]
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum


class ErrorKind(Enum):
    """What went wrong; the value is its name on the wire and the ``code`` of the OpenAI error object."""

    INVALID_REQUEST = "invalid_request"
    INVALID_MEDIA = "invalid_media"
    CONTEXT_LENGTH_EXCEEDED = "context_length_exceeded"
    UNSUPPORTED = "unsupported"
    MODEL_NOT_FOUND = "model_not_found"
    NOT_FOUND = "not_found"
    TOO_LARGE = "too_large"
    OVERLOADED = "overloaded"
    CANCELLED = "cancelled"
    TIMEOUT = "timeout"
    STAGE_FAILED = "stage_failed"
    STAGE_DEAD = "stage_dead"

    @property
    def status(self) -> int:
        """HTTP status of the OpenAI error answer."""
        return _CODES[self][0]

    @property
    def triton_code(self) -> str:
        """Name of the attribute of ``pb_utils.TritonError``."""
        return _CODES[self][1]


_CODES = {
    ErrorKind.INVALID_REQUEST: (400, "INVALID_ARG"),
    ErrorKind.INVALID_MEDIA: (400, "INVALID_ARG"),
    ErrorKind.CONTEXT_LENGTH_EXCEEDED: (400, "INVALID_ARG"),
    ErrorKind.UNSUPPORTED: (400, "UNSUPPORTED"),
    ErrorKind.MODEL_NOT_FOUND: (404, "NOT_FOUND"),
    ErrorKind.NOT_FOUND: (404, "NOT_FOUND"),
    ErrorKind.TOO_LARGE: (413, "INVALID_ARG"),
    ErrorKind.OVERLOADED: (503, "UNAVAILABLE"),
    ErrorKind.CANCELLED: (499, "CANCELLED"),
    ErrorKind.TIMEOUT: (504, "UNAVAILABLE"),
    ErrorKind.STAGE_FAILED: (500, "INTERNAL"),
    ErrorKind.STAGE_DEAD: (503, "UNAVAILABLE"),
}
_KINDS = {kind.value: kind for kind in ErrorKind}
_TAG = re.compile(r"\s*\[triptych kind=(?P<kind>\w+)(?: stage=(?P<stage>\w+))?(?: param=(?P<param>\S+?))?\]\s*$")
_ENSEMBLE = re.compile(r"^(?:in ensemble '[^']*', )+")


@dataclass
class TriptychError(Exception):
    """An error with a cause the caller can act on.

    Attributes:
        kind: what went wrong; decides the HTTP status and Triton code.
        message: a sentence that names what was wrong and what is allowed.
        param: the field of the request at fault, in the caller's own words (``messages[0].content[1]``), or None.
        stage: the stage that failed, or None where no stage is to blame.
    """

    kind: ErrorKind
    message: str
    param: str | None = None
    stage: str | None = None

    def __str__(self) -> str:
        return self.message

    def to_wire(self) -> str:
        """The message with its machine-readable tag."""
        tag = f"[triptych kind={self.kind.value}"
        if self.stage:
            tag += f" stage={self.stage}"
        if self.param:
            tag += f" param={self.param.replace(' ', '_')}"
        return f"{self.message} {tag}]"

    @classmethod
    def from_wire(cls, text: str) -> TriptychError:
        """Parse what :meth:`to_wire` wrote, or any message of the Triton server itself."""
        text = _ENSEMBLE.sub("", text.strip())
        match = _TAG.search(text)
        if match and match["kind"] in _KINDS:
            return cls(_KINDS[match["kind"]], text[: match.start()], match["param"], match["stage"])
        lowered = text.lower()
        if "not healthy" in lowered:
            return cls(ErrorKind.STAGE_DEAD, text)
        if "exceeds maximum queue size" in lowered:
            return cls(ErrorKind.OVERLOADED, text)
        if "is not ready" in lowered or "unknown model" in lowered or "is not found" in lowered:
            return cls(ErrorKind.STAGE_DEAD, text)
        if "cancelled" in lowered:
            return cls(ErrorKind.CANCELLED, text)
        return cls(ErrorKind.STAGE_FAILED, text)


def invalid(message: str, param: str | None = None) -> TriptychError:
    """A 400 that names the field."""
    return TriptychError(ErrorKind.INVALID_REQUEST, message, param)
