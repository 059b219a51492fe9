"""Items of a Responses request as messages of a chat completion, and errors about them in the items' words."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from triptych.python_models.contract import _check as check
from triptych.python_models.contract.errors import ErrorKind, TriptychError, invalid

ROLES = ("user", "assistant", "system", "developer")
PART_TYPES = ("input_text", "input_image", "input_audio", "output_text", "refusal", "video_url", "audio_url")
ITEM_TYPES = ("message", "function_call", "function_call_output", "reasoning")
_STATES = ("in_progress", "completed", "incomplete")
_PLACE = re.compile(r"messages\[(\d+)\]((?:\.(?:content|tool_calls)(?:\[\d+\])?)?)((?:\.[\w.]+)?)")
# What fields inside of parts and calls are called in chat completions, and here.
_FIELDS = {
    ".image_url.url": ".image_url",
    ".image_url.detail": ".detail",
    ".function.name": ".name",
    ".function.arguments": ".arguments",
    ".tool_call_id": ".call_id",
    ".reasoning_content": ".content",
}


@dataclass
class Messages:
    """Messages in the making.

    Attributes:
        found: chat messages.
        places: for each, what the caller calls it: itself, its content, and each of its tool calls.
    """

    found: list[dict[str, Any]] = field(default_factory=list)
    places: list[tuple[str, str, list[str]]] = field(default_factory=list)

    def add(self, message: dict[str, Any], place: str, content: str | None = None) -> None:
        """Append a message; ``content`` is the caller's name of its content where that is not ``place.content``."""
        self.found.append(message)
        self.places.append((place, f"{place}.content" if content is None else content, []))

    def assistant(self, place: str) -> dict[str, Any]:
        """The assistant's message that calls and thoughts belong to: the last one, or a new one."""
        if not self.found or self.found[-1]["role"] != "assistant":
            self.add({"role": "assistant", "content": None}, place)
        return self.found[-1]

    def rename(self, text: str) -> str:
        """The text with the caller's names for messages and what is in them."""

        def name(match: re.Match[str]) -> str:
            place, content, calls = self.places[int(match[1])]
            inner, rest = match[2], _FIELDS.get(match[3], match[3])
            if inner.startswith(".content"):
                return content + inner.removeprefix(".content") + rest
            if inner.startswith(".tool_calls[") and calls:
                return calls[int(inner[len(".tool_calls[") : -1])] + rest
            return place + inner + rest

        return _PLACE.sub(name, text)


def add_input(value: Any, messages: Messages, where: str = "input") -> list[dict[str, Any]]:
    """Append what field ``input`` says.

    Args:
        value: a string or a list of items.
        messages: to append to.
        where: what the caller calls it.

    Returns:
        Its items, as a later request may continue them.

    Raises:
        TriptychError: naming the item or field.
    """
    if isinstance(value, str):
        messages.add({"role": "user", "content": value}, where, where)
        return [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": value}]}]
    if not isinstance(value, list) or not value:
        raise invalid(f"{where} must be a string or a list with at least one item", where)
    for index, item in enumerate(value):
        add_item(item, messages, f"{where}[{index}]")
    return value


def add_item(value: Any, messages: Messages, where: str) -> None:
    """Append one item of a conversation.

    Raises:
        TriptychError: naming the field.
    """
    # null is how the openai package writes a field of an item that is not there
    item = {name: field for name, field in check.mapping(value, where).items() if field is not None}
    kind = item.get("type", "message" if "role" in item else None)
    if kind not in ITEM_TYPES:
        raise invalid(f"{where}.type must be one of {', '.join(ITEM_TYPES)}, got {kind!r}", f"{where}.type")
    if item.get("status", "completed") not in _STATES:
        raise invalid(f"{where}.status must be one of {', '.join(_STATES)}, got {item['status']!r}", f"{where}.status")
    if "id" in item:
        check.string(item["id"], f"{where}.id")
    _ADD[kind](item, messages, where)


def _add_message(item: Mapping[str, Any], messages: Messages, where: str) -> None:
    # a phase tells what an answer was for; no template has a word for it
    check.known_keys(item, ("type", "role", "content", "id", "status", "phase"), where)
    role = item.get("role")
    if role not in ROLES:
        raise invalid(f"{where}.role must be one of {', '.join(ROLES)}, got {role!r}", f"{where}.role")
    if item.get("phase") not in (None, "commentary", "final_answer"):
        raise invalid(f"{where}.phase must be commentary or final_answer, got {item['phase']!r}", f"{where}.phase")
    content = item.get("content")
    if not isinstance(content, str):
        content = _parts(content, f"{where}.content", role)
    last = messages.found[-1] if messages.found else {}
    if role == "assistant" and last.get("role") == role and last["content"] == "" and "reasoning_content" in last:
        # its thoughts came as an item before it
        last["content"] = content
        messages.places[-1] = (where, f"{where}.content", [])
        return
    messages.add({"role": role, "content": content}, where)


def _parts(value: Any, where: str, role: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value:
        raise invalid(f"{where} must be a string or a list with at least one part", where)
    return [_part(item, f"{where}[{i}]") for i, item in enumerate(value)]


def _part(value: Any, where: str) -> dict[str, Any]:
    part = {name: field for name, field in check.mapping(value, where).items() if field is not None}
    kind = part.pop("type", None)
    if kind == "input_file":
        raise TriptychError(
            ErrorKind.UNSUPPORTED,
            f"{where}.type: input_file is not supported; send pages as pictures (input_image)",
            f"{where}.type",
        )
    if kind not in PART_TYPES:
        raise invalid(f"{where}.type must be one of {', '.join(PART_TYPES)}, got {kind!r}", f"{where}.type")
    if kind == "output_text":
        check.known_keys(part, ("text", "annotations", "logprobs"), where)
        return {"type": "text", "text": part.get("text")}
    if kind == "input_text":
        check.known_keys(part, ("text", "prompt_cache_breakpoint"), where)
        return {"type": "text", **part}
    if kind == "input_image":
        return _image(part, where)
    return {"type": kind, **part}


def _image(part: dict[str, Any], where: str) -> dict[str, Any]:
    check.known_keys(part, ("detail", "image_url", "file_id", "prompt_cache_breakpoint"), where)
    if "file_id" in part:
        raise TriptychError(
            ErrorKind.UNSUPPORTED,
            f"{where}.file_id is not supported; give image_url, an http(s) or data: URL",
            f"{where}.file_id",
        )
    url = check.string(part.pop("image_url", None), f"{where}.image_url")
    detail = part.pop("detail", None)
    return {"type": "image_url", "image_url": {"url": url} | ({"detail": detail} if detail else {}), **part}


def _add_call(item: Mapping[str, Any], messages: Messages, where: str) -> None:
    check.known_keys(item, ("type", "id", "call_id", "name", "arguments", "status"), where)
    for name in ("call_id", "name", "arguments"):
        check.string(item.get(name), f"{where}.{name}")
    message = messages.assistant(where)
    messages.places[-1][2].append(where)
    message.setdefault("tool_calls", []).append(
        {
            "id": item["call_id"],
            "type": "function",
            "function": {"name": item["name"], "arguments": item["arguments"]},
        }
    )


def _add_output(item: Mapping[str, Any], messages: Messages, where: str) -> None:
    check.known_keys(item, ("type", "id", "call_id", "output", "status"), where)
    output = item.get("output")
    if not isinstance(output, str):
        output = _parts(output, f"{where}.output", "tool")
    call = check.string(item.get("call_id"), f"{where}.call_id")
    messages.add({"role": "tool", "tool_call_id": call, "content": output}, where, f"{where}.output")


def _add_thoughts(item: Mapping[str, Any], messages: Messages, where: str) -> None:
    check.known_keys(item, ("type", "id", "summary", "content", "encrypted_content", "status"), where)
    if "encrypted_content" in item:
        raise TriptychError(
            ErrorKind.UNSUPPORTED,
            f"{where}.encrypted_content is not supported; leave it out",
            f"{where}.encrypted_content",
        )
    if item.get("summary"):
        raise TriptychError(
            ErrorKind.UNSUPPORTED,
            f"{where}.summary is not supported; this server's reasoning is in content, its summary empty",
            f"{where}.summary",
        )
    texts = []
    for i, value in enumerate(item.get("content") or ()):
        place = f"{where}.content[{i}]"
        part = check.mapping(value, place)
        check.known_keys(part, ("type", "text"), place)
        if part.get("type") != "reasoning_text":
            raise invalid(f"{place}.type must be reasoning_text, got {part.get('type')!r}", f"{place}.type")
        texts.append(check.string(part.get("text"), f"{place}.text"))
    if texts:
        messages.add({"role": "assistant", "content": "", "reasoning_content": "".join(texts)}, where)


_ADD = {
    "message": _add_message,
    "function_call": _add_call,
    "function_call_output": _add_output,
    "reasoning": _add_thoughts,
}
