"""The body of POST /v1/responses, field by field, as a chat completion's: what is allowed there is allowed here."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from triptych.python_models.contract import _check as check
from triptych.python_models.contract.errors import TriptychError, invalid

from ..errors import in_openai_words
from ..fields import CHAT_EXTRAS, NEUTRAL, ChatCall, json_object, only, optional_boolean, parse_fields, unsupported
from . import items
from .store import Store, Stored

# Fields that chat completions have under the same name and with the same meaning.
SAME = (
    *("model", "metadata", "parallel_tool_calls", "temperature", "top_p", "stream"),
    *("moderation", "prompt_cache_key", "prompt_cache_retention", "safety_identifier", "service_tier", "user"),
    *CHAT_EXTRAS,
)
_OWN = (
    *("input", "instructions", "include", "max_output_tokens", "max_tool_calls", "previous_response_id"),
    *("prompt_cache_options", "reasoning", "store", "stream_options", "text", "tool_choice", "tools", "top_logprobs"),
)
# Fields without effect here: the only value is the one that asks for nothing.
REFUSED: dict[str, Callable[[Any, str], None]] = {
    "access_programs": only(),
    "background": only(False),
    "background_options": only(),
    "context_management": only(),
    "conversation": only(),
    "image": only(),
    "prompt": only(),
    "truncation": only("disabled"),
}
# A function whose schema is not given, as answers repeat it.
_TOOL = {"type": "function", "description": None, "parameters": None, "strict": False}
_LOGPROBS = "message.output_text.logprobs"
# pictures of the input are always there
_INCLUDE = (_LOGPROBS, "message.input_image.image_url")
# What chat completions call fields that have other names here, for error messages.
_NAMES = (
    (re.compile(r"\bresponse_format\.json_schema\b"), "text.format"),
    (re.compile(r"\bresponse_format\b"), "text.format"),
    (re.compile(r"\b(tools\[\d+\])\.function\b"), r"\1"),
    (re.compile(r"\btool_choice\.(function|allowed_tools)\b"), "tool_choice"),
    (re.compile(r"\breasoning_effort\b"), "reasoning.effort"),
    (re.compile(r"(?<!text\.)\bverbosity\b"), "text.verbosity"),
    (re.compile(r"\bmax_(completion_)?tokens\b"), "max_output_tokens"),
    (re.compile(r"\bmessages\b(?!\[)"), "input"),
)


@dataclass(frozen=True)
class ResponseCall:
    """A checked body.

    Attributes:
        chat: the chat completion that it asks for.
        echo: what the answer repeats of the request.
        input_items: field ``input`` as items.
        before: the response that it continues.
        store: keep the response.
        include_obfuscation: random characters in the events of text, so that their size does not tell its length.
        in_its_words: an error about the chat completion, with the names that this body has.
    """

    chat: ChatCall
    echo: dict[str, Any]
    input_items: list[dict[str, Any]]
    before: Stored | None
    store: bool
    include_obfuscation: bool
    in_its_words: Callable[[TriptychError], TriptychError]


def parse(body: bytes, served_model_name: str, lease_s: float, store: Store) -> ResponseCall:
    """Check a request body.

    Args:
        body: the raw body.
        served_model_name: the only model there is.
        lease_s: see ``ChatRequest.lease_s``.
        store: where ``previous_response_id`` is looked up.

    Raises:
        TriptychError: naming the field at fault and what is allowed.
    """
    data = json_object(body)
    check.known_keys(data, (*SAME, *_OWN, *REFUSED), "")
    for name, rule in REFUSED.items():
        if data.get(name) is not None:
            rule(data[name], name)
    messages = items.Messages()
    if data.get("instructions") is not None:
        text = check.string(data["instructions"], "instructions")
        messages.add({"role": "system", "content": text}, "instructions", "instructions")
    before = _before(data, store)
    if before is not None:
        for item in before.conversation():
            items.add_item(item, messages, "previous_response_id")
    if data.get("input") is None:
        raise invalid("input must be a string or a list with at least one item", "input")
    given = items.add_input(data["input"], messages)
    names: dict[str, str] = {}

    def in_its_words(error: TriptychError) -> TriptychError:
        error = in_openai_words(error, names)
        param = _rename(error.param, messages) if error.param else None
        return TriptychError(error.kind, _rename(error.message, messages), param, error.stage)

    chat_body = _chat_body(data, messages)
    try:
        chat = parse_fields(chat_body, served_model_name, lease_s)
    except TriptychError as error:
        raise in_its_words(error) from None
    names |= chat.names
    return ResponseCall(
        chat,
        _echo(data, chat),
        given,
        before,
        _keeps(data, store),
        _obfuscation(data, chat.request.stream),
        in_its_words,
    )


def _rename(text: str, messages: items.Messages) -> str:
    text = messages.rename(text)
    for pattern, theirs in _NAMES:
        text = pattern.sub(theirs, text)
    return text


def _before(data: Mapping[str, Any], store: Store) -> Stored | None:
    if data.get("previous_response_id") is None:
        return None
    field = "previous_response_id"
    found = store.get(check.string(data[field], field))
    if found is None:
        raise invalid(
            f"there is no response {data[field]!r}: it was made with store: false, was deleted, or is not among the "
            f"last {store.max_bytes / 2**20:g} MiB of responses that this server keeps",
            field,
        )
    return found


def _keeps(data: Mapping[str, Any], store: Store) -> bool:
    wanted = data.get("store")
    if wanted is not None and check.boolean(wanted, "store") and not store.max_bytes:
        raise unsupported("store", "false: this server keeps no responses (--response-store-mb 0)")
    return bool(store.max_bytes) and wanted is not False


def _obfuscation(data: Mapping[str, Any], stream: bool) -> bool:
    if data.get("stream_options") is None:
        return False
    options = check.mapping(data["stream_options"], "stream_options")
    if not stream:
        raise invalid("stream_options is only allowed with stream: true", "stream_options")
    check.known_keys(options, ("include_obfuscation",), "stream_options")
    return optional_boolean(options, "include_obfuscation", "stream_options")


def _chat_body(data: Mapping[str, Any], messages: items.Messages) -> dict[str, Any]:
    """The chat completion's fields; those that are null here are left out there."""
    chat = {name: data[name] for name in SAME if name in data} | {"messages": messages.found}
    chat["max_completion_tokens"] = data.get("max_output_tokens")
    for name, rule in (("max_tool_calls", _at_least_one), ("prompt_cache_options", NEUTRAL["prompt_cache_options"])):
        if data.get(name) is not None:
            rule(data[name], name)
    chat |= _logprobs(data) | _form(data) | _reasoning(data)
    if data.get("tools") is not None:
        chat["tools"] = _tools(data["tools"])
    if data.get("tool_choice") is not None:
        chat["tool_choice"] = _tool_choice(data["tool_choice"])
    return chat


def _at_least_one(value: Any, field: str) -> None:
    """Calls of tools that run on the server, of which there are none."""
    check.integer(value, field, 1)


def _logprobs(data: Mapping[str, Any]) -> dict[str, Any]:
    include = data.get("include") or []
    if not isinstance(include, list):
        raise invalid(f"include must be a list, not {check.json_type(include)}", "include")
    for index, item in enumerate(include):
        if item not in _INCLUDE:
            raise unsupported(f"include[{index}]", " and ".join(_INCLUDE))
    top = data.get("top_logprobs")
    if _LOGPROBS not in include and not top:
        return {}
    return {"logprobs": True, "top_logprobs": top}


def _form(data: Mapping[str, Any]) -> dict[str, Any]:
    """``text``: what the answer looks like, and how long it is."""
    if data.get("text") is None:
        return {}
    text = check.mapping(data["text"], "text")
    check.known_keys(text, ("format", "verbosity"), "text")
    chat: dict[str, Any] = {"verbosity": text.get("verbosity")}
    if text.get("format") is None:
        return chat
    form = dict(check.mapping(text["format"], "text.format"))
    if form.get("type") == "json_schema":
        check.known_keys(form, ("type", "name", "description", "schema", "strict"), "text.format")
        return chat | {"response_format": {"type": form.pop("type"), "json_schema": form}}
    return chat | {"response_format": form}


def _reasoning(data: Mapping[str, Any]) -> dict[str, Any]:
    if data.get("reasoning") is None:
        return {}
    reasoning = check.mapping(data["reasoning"], "reasoning")
    check.known_keys(reasoning, ("effort", "summary", "generate_summary", "context", "mode"), "reasoning")
    for name, rule in (
        ("summary", only()),
        ("generate_summary", only()),
        ("context", only("auto")),
        ("mode", only("standard")),
    ):
        if reasoning.get(name) is not None:
            rule(reasoning[name], f"reasoning.{name}")
    return {"reasoning_effort": reasoning.get("effort")}


def _tools(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise invalid(f"tools must be a list, not {check.json_type(value)}", "tools")
    found = []
    for index, item in enumerate(value):
        where = f"tools[{index}]"
        tool = dict(check.mapping(item, where))
        kind = tool.pop("type", None)
        if kind != "function":
            raise unsupported(f"{where}.type", f"function, and there is none of type {kind!r} on this server")
        check.known_keys(tool, ("name", "description", "parameters", "strict"), where)
        found.append({"type": "function", "function": {k: v for k, v in tool.items() if v is not None}})
    return found


def _tool_choice(value: Any) -> Any:
    if isinstance(value, str):
        return value
    choice = dict(check.mapping(value, "tool_choice"))
    kind = choice.pop("type", None)
    if kind == "allowed_tools":
        choice["tools"] = _tools(choice.get("tools"))
        return {"type": kind, kind: choice}
    if kind != "function":
        raise unsupported("tool_choice.type", "function and allowed_tools")
    return {"type": kind, kind: choice}


def _echo(data: Mapping[str, Any], chat: ChatCall) -> dict[str, Any]:
    """What every response object says of its request."""
    sampling = chat.request.sampling
    text = data.get("text") or {}
    reasoning = data.get("reasoning") or {}
    return {
        "background": False,
        "instructions": data.get("instructions"),
        "max_output_tokens": sampling.max_tokens,
        "max_tool_calls": data.get("max_tool_calls"),
        "metadata": data.get("metadata") or {},
        "parallel_tool_calls": data.get("parallel_tool_calls") is not False,
        "previous_response_id": data.get("previous_response_id"),
        "prompt_cache_key": data.get("prompt_cache_key"),
        "reasoning": {"effort": reasoning.get("effort"), "summary": None},
        "safety_identifier": data.get("safety_identifier"),
        "service_tier": "default",
        "temperature": sampling.temperature,
        "text": {"format": text.get("format") or {"type": "text"}, "verbosity": text.get("verbosity") or "medium"},
        "tool_choice": data.get("tool_choice") or "auto",
        "tools": [_TOOL | tool for tool in data.get("tools") or ()],
        "top_logprobs": sampling.top_logprobs,
        "top_p": sampling.top_p,
        "truncation": "disabled",
        "user": data.get("user"),
    }
