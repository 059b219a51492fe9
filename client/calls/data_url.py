"""Base64 and ``data:`` URLs, megabytes at a time."""

from __future__ import annotations

import binascii
from urllib.parse import unquote_to_bytes

import pybase64

from triptych.python_models.contract.errors import invalid

_WHITESPACE = str.maketrans("", "", " \t\r\n")


def of_data_url(url: str, where: str) -> bytes:
    """The bytes in a ``data:`` URL.

    Args:
        url: begins with ``data:``, in whatever case.
        where: the field that holds it.

    Raises:
        TriptychError: INVALID_REQUEST naming the field.
    """
    head, comma, payload = url.partition(",")
    if not comma:
        raise invalid(f"{where} is not a data: URL: it has no comma before its data", where)
    if head.lower().endswith(";base64"):
        if "%" in payload:
            payload = unquote_to_bytes(_utf8(payload, where)).decode("ascii", "replace")
        return of_base64(payload, where)
    return unquote_to_bytes(_utf8(payload, where))


def of_base64(data: str, where: str) -> bytes:
    """Decoded base64; line breaks are common where it is made by hand and change nothing.

    Raises:
        TriptychError: INVALID_REQUEST naming the field.
    """
    try:
        return pybase64.b64decode(data, validate=True)
    except (binascii.Error, ValueError):
        pass
    try:
        return pybase64.b64decode(data.translate(_WHITESPACE), validate=True)
    except (binascii.Error, ValueError) as error:
        raise invalid(f"{where} is not valid base64: {error}", where) from None


def _utf8(text: str, where: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise invalid(f"{where} is not valid Unicode: it has an unpaired surrogate", where) from None
