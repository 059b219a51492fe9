"""Messages of the OpenAI chat schema to the contract's: media in data: URLs become blobs, the rest stays text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from triptych.client.calls.data_url import of_base64, of_data_url
from triptych.python_models.contract import _check as check
from triptych.python_models.contract.errors import ErrorKind, TriptychError, invalid
from triptych.python_models.contract.request import (
    MEDIA_OPTIONS,
    ROLES,
    MediaOptions,
    MediaPart,
    Message,
    Part,
    TextPart,
)
from triptych.python_models.contract.tools import TURN_FIELDS, may_be_silent, turn_fields

AUDIO_FORMATS = ("wav", "mp3", "flac", "ogg")
PART_TYPES = ("text", "image_url", "video_url", "audio_url", "input_audio")
# What an OpenAI client sends back when it appends an answer to the conversation; nothing here makes any of them.
_EMPTY_IN_MESSAGE = ("refusal", "audio", "function_call", "annotations")


def messages(value: Any, blobs: list[bytes]) -> tuple[Message, ...]:
    """The conversation.

    Args:
        value: field ``messages`` of the body.
        blobs: decoded media are appended here; parts name them by index.

    Raises:
        TriptychError: naming the field.
    """
    if not isinstance(value, list) or not value:
        raise invalid("messages must be a list with at least one message", "messages")
    return tuple(_message(item, f"messages[{i}]", blobs) for i, item in enumerate(value))


def text(value: Any, where: str) -> str:
    """A string that can be written as UTF-8."""
    found = check.string(value, where)
    try:
        found.encode()
    except UnicodeEncodeError as error:
        raise invalid(
            f"{where} is not valid Unicode: unpaired surrogate {found[error.start]!r} at index {error.start}", where
        ) from None
    return found


def item(modality: str, value: Any, where: str, blobs: list[bytes]) -> MediaPart:
    """A medium that stands alone: a URL, base64, or an object with either in ``url`` beside the medium's options.

    Args:
        modality: of it.
        value: as the caller has it.
        where: the field.
        blobs: decoded media are appended here.

    Raises:
        TriptychError: naming the field.
    """
    if isinstance(value, Mapping):
        check.known_keys(value, ("url", *MEDIA_OPTIONS[modality]), where)
        given = {name: option for name, option in value.items() if name != "url"}
        options = MediaOptions.from_json(modality, given, where)
        return replace(item(modality, value.get("url"), f"{where}.url", blobs), options=options)
    if ":" in check.string(value, where)[:16]:
        return _from_url(modality, {"url": value}, where, blobs)
    return _blob(modality, of_base64(value, where), where, blobs)


def _message(value: Any, where: str, blobs: list[bytes]) -> Message:
    data = check.mapping(value, where)
    check.known_keys(data, ("role", "content", *TURN_FIELDS, *_EMPTY_IN_MESSAGE), where)
    role = data.get("role")
    if role not in ROLES:
        raise invalid(f"{where}.role must be one of {', '.join(ROLES)}, got {role!r}", f"{where}.role")
    for key in _EMPTY_IN_MESSAGE:
        if data.get(key):
            raise TriptychError(
                ErrorKind.UNSUPPORTED, f"{where}.{key} is not supported; leave it out or empty", f"{where}.{key}"
            )
    turn = turn_fields(data, role, where)
    content = data.get("content")
    if isinstance(content, str) and (content or not may_be_silent(turn)):
        return Message(role, (TextPart(text(content, f"{where}.content")),), True, **turn)
    if not content and may_be_silent(turn):
        return Message(role, (), True, **turn)
    if not isinstance(content, list) or not content:
        raise invalid(f"{where}.content must be a string or a list with at least one part", f"{where}.content")
    parts = tuple(_part(item, f"{where}.content[{i}]", blobs) for i, item in enumerate(content))
    return Message(role, parts, **turn)


def _part(value: Any, where: str, blobs: list[bytes]) -> Part:
    data = check.mapping(value, where)
    kind = data.get("type")
    if "prompt_cache_breakpoint" in data:
        _check_breakpoint(data["prompt_cache_breakpoint"], f"{where}.prompt_cache_breakpoint")
        data = {name: item for name, item in data.items() if name != "prompt_cache_breakpoint"}
    # "refusal" is how a client gives back an answer of another server
    if kind in ("text", "refusal"):
        check.known_keys(data, ("type", kind), where)
        return TextPart(text(data.get(kind), f"{where}.{kind}"))
    if kind == "image_url":
        return _image(data, where, blobs)
    if kind in ("video_url", "audio_url"):
        check.known_keys(data, ("type", kind), where)
        return _medium(kind.removesuffix("_url"), data, where, blobs)
    if kind == "input_audio":
        return _input_audio(data, where, blobs)
    if kind == "file":
        raise TriptychError(
            ErrorKind.UNSUPPORTED,
            f"{where}.type: files are not supported; send pages as pictures (image_url)",
            f"{where}.type",
        )
    raise invalid(f"{where}.type must be one of {', '.join(PART_TYPES)}, got {kind!r}", f"{where}.type")


def _check_breakpoint(value: Any, where: str) -> None:
    """Every block of a prompt is cached in any case; for how long cannot be promised."""
    if value is None:
        return
    data = check.mapping(value, where)
    check.known_keys(data, ("mode",), where)
    if data.get("mode") != "explicit":
        raise invalid(f"{where}.mode must be explicit, got {data.get('mode')!r}", f"{where}.mode")


def _image(data: Mapping[str, Any], where: str, blobs: list[bytes]) -> MediaPart:
    check.known_keys(data, ("type", "image_url", "modalities"), where)
    modalities = data.get("modalities")
    if modalities not in (None, "image", "multi-images"):
        raise invalid(
            f"{where}.modalities must be 'image' or 'multi-images', got {modalities!r}; send a video as video_url",
            f"{where}.modalities",
        )
    return _medium("image", data, where, blobs)


def _input_audio(data: Mapping[str, Any], where: str, blobs: list[bytes]) -> MediaPart:
    check.known_keys(data, ("type", "input_audio"), where)
    source = _source(data, "input_audio", ("data", "format"), where)
    form = source.get("format")
    if form not in AUDIO_FORMATS:
        raise invalid(
            f"{where}.input_audio.format must be one of {', '.join(AUDIO_FORMATS)}, got {form!r}",
            f"{where}.input_audio.format",
        )
    field = f"{where}.input_audio.data"
    return _blob("audio", of_base64(check.string(source.get("data"), field), field), field, blobs)


def _source(data: Mapping[str, Any], kind: str, keys: Iterable[str], where: str) -> Mapping[str, Any]:
    value = data.get(kind)
    field = f"{where}.{kind}"
    if not isinstance(value, Mapping):
        first = next(iter(keys))
        raise invalid(f'{field} must be an object such as {{"{first}": "..."}}, not {check.json_type(value)}', field)
    check.known_keys(value, keys, field)
    return value


def _medium(modality: str, data: Mapping[str, Any], where: str, blobs: list[bytes]) -> MediaPart:
    kind = f"{modality}_url"
    source = _source(data, kind, ("url", *MEDIA_OPTIONS[modality]), where)
    given = {name: value for name, value in source.items() if name != "url"}
    if given.get("detail") == "original":
        # no other resizing than the checkpoint's own
        given["detail"] = "high"
    options = MediaOptions.from_json(modality, given, f"{where}.{kind}")
    return replace(_from_url(modality, source, f"{where}.{kind}.url", blobs), options=options)


def _from_url(modality: str, source: Mapping[str, Any], field: str, blobs: list[bytes]) -> MediaPart:
    url = check.string(source.get("url"), field)
    if url[:5].lower() == "data:":
        # megabytes, which base64 alone is to read
        return _blob(modality, of_data_url(url, field), field, blobs)
    url = text(url, field).strip()
    scheme = url.partition(":")[0].lower() if ":" in url else ""
    if scheme == "data":
        return _blob(modality, of_data_url(url, field), field, blobs)
    if scheme in ("http", "https"):
        return MediaPart(modality, url=url)
    found = f"a URL with scheme {scheme!r}" if scheme.isalnum() and scheme else "no URL"
    raise invalid(
        f"{field} must be an http://, https:// or data:<type>;base64,... URL, but is {found}; "
        "this server reads no files by path",
        field,
    )


def _blob(modality: str, data: bytes, field: str, blobs: list[bytes]) -> MediaPart:
    if not data:
        raise TriptychError(ErrorKind.INVALID_MEDIA, f"{field} is empty", field)
    blobs.append(data)
    return MediaPart(modality, blob=len(blobs) - 1)
