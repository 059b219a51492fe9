"""Conversations as Python callers write them, with media of any kind in any form, to the contract's messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from triptych.python_models.contract import _check as check
from triptych.python_models.contract.errors import invalid
from triptych.python_models.contract.request import MODALITIES

from . import media
from .data_url import of_base64

Conversation = str | Sequence[Mapping[str, Any]]
"""Messages, oldest first; a string is one message of the user."""

_URL_PARTS = {f"{modality}_url": modality for modality in MODALITIES}


def of(conversation: Conversation, blobs: list[bytes]) -> list[Any]:
    """The messages of a request.

    Args:
        conversation: ``content`` of a message is a string or a list of parts: OpenAI's (``text``, ``image_url``,
            ``video_url``, ``audio_url``, ``input_audio``), ``{"type": "image", "image": X}`` and its like, strings and
            PIL images. Wherever a medium is named, it may be anything that :func:`.media.encode` takes.
        blobs: encoded media are appended here; parts name them by index.

    Raises:
        TriptychError: naming the part. All else is checked with the request itself.
    """
    if isinstance(conversation, str):
        return [{"role": "user", "content": conversation}]
    found = []
    for m, message in enumerate(conversation):
        content = message.get("content") if isinstance(message, Mapping) else None
        if isinstance(content, Sequence) and not isinstance(content, (str, bytes)):
            where = f"messages[{m}].content"
            message = {**message, "content": [_part(item, f"{where}[{i}]", blobs) for i, item in enumerate(content)]}
        found.append(message)
    return found


def part(modality: str, value: Any, where: str, blobs: list[bytes], options: Mapping[str, Any]) -> dict[str, Any]:
    """A content part of the contract; the bytes of its medium, where there are any, are appended to ``blobs``.

    Raises:
        TriptychError: naming the part.
    """
    source = media.encode(modality, value, where)
    if isinstance(source, str):
        return {"type": modality, "url": source, **options}
    blobs.append(source)
    return {"type": modality, "blob": len(blobs) - 1, **options}


def _part(value: Any, where: str, blobs: list[bytes]) -> Any:
    if isinstance(value, str):
        return {"type": "text", "text": value}
    if isinstance(value, Image.Image):
        return part("image", value, where, blobs, {})
    if not isinstance(value, Mapping):
        raise invalid(f"{where} must be a string, a PIL image or a content part, not {check.json_type(value)}", where)
    kind = value.get("type")
    if kind in MODALITIES:
        return part(kind, *_named(value, (kind, "url", "path"), where), blobs, _rest(value, (kind, "url", "path")))
    if kind in _URL_PARTS:
        check.known_keys(value, ("type", kind), where)
        field = f"{where}.{kind}"
        source = value.get(kind)
        if not isinstance(source, Mapping):
            # the medium itself in place of {"url": ...}
            source = {"url": source}
        return part(_URL_PARTS[kind], *_named(source, ("url",), field), blobs, _rest(source, ("url",)))
    if kind == "input_audio":
        check.known_keys(value, ("type", "input_audio"), where)
        field = f"{where}.input_audio"
        source = check.mapping(value["input_audio"], field) if "input_audio" in value else {}
        check.known_keys(source, ("data", "format"), field)
        data = of_base64(check.string(source.get("data"), f"{field}.data"), f"{field}.data")
        return part("audio", data, where, blobs, {})
    if kind == "text":
        return value
    allowed = ("text", *MODALITIES, *_URL_PARTS, "input_audio")
    raise invalid(f"{where}.type must be one of {', '.join(allowed)}, got {kind!r}", f"{where}.type")


def _named(source: Mapping[str, Any], names: Sequence[str], where: str) -> tuple[Any, str]:
    """(the medium, where) of a part that has it under exactly one of these names."""
    given = [name for name in names if source.get(name) is not None]
    if len(given) != 1:
        raise invalid(f"{where} needs {'exactly one of ' if len(names) > 1 else ''}{', '.join(names)}", where)
    return source[given[0]], where


def _rest(source: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {name: value for name, value in source.items() if name not in ("type", *names)}
