"""The body of a chat completion, checked field by field: nothing that a caller asks for is ignored in silence."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from triptych.python_models.contract import _check as check
from triptych.python_models.contract.errors import ErrorKind, TriptychError, invalid
from triptych.python_models.contract.request import (
    ChatRequest,
    Message,
    TemplateInputs,
    cache_salt,
    continuation,
    priority,
    template_variables,
)
from triptych.python_models.contract.sampling import SamplingParams
from triptych.python_models.contract.tools import calling, reasoning_effort, tools

from . import parts
from .errors import in_openai_words

# Answers to the name that SGLang's clients send when they do not care which model it is.
ANY_MODEL = "default"
# Keys of ``metadata``, as OpenAI has it.
MAX_LABELS = 16

_SAMPLING = frozenset(f.name for f in fields(SamplingParams)) - {"max_tokens", "grammar"}
# What the text must look like; the last two are SGLang's names.
_GRAMMARS = ("response_format", "regex", "ebnf")
_TOKEN_LIMITS = ("max_completion_tokens", "max_tokens")
# Fields that other endpoints of this server's take too, beside OpenAI's own.
CHAT_EXTRAS = (
    *sorted(_SAMPLING - {"n", "logprobs", "top_logprobs", "temperature", "top_p"}),
    *("regex", "ebnf", "priority", "cache_salt", "chat_template_kwargs", "separate_reasoning", "stream_reasoning"),
)
# What the chat template gets; the last three are SGLang's and vLLM's names.
_TEMPLATE = (
    *("tools", "tool_choice", "parallel_tool_calls", "reasoning_effort"),
    *("chat_template_kwargs", "add_generation_prompt", "continue_final_message"),
)
# What becomes of reasoning: SGLang's names.
_REASONING = ("separate_reasoning", "stream_reasoning")
_OWN = (
    *("model", "messages", "stream", "stream_options", "priority", "cache_salt", "return_timings"),
    *(*_GRAMMARS, *_TOKEN_LIMITS, *_TEMPLATE, *_REASONING),
)


@dataclass(frozen=True)
class StreamOptions:
    """What a stream holds beside the answer.

    Attributes:
        include_usage: a usage chunk at the end.
        include_obfuscation: random characters in every chunk, so that its size does not tell how long its text is.
    """

    include_usage: bool = False
    include_obfuscation: bool = False


@dataclass(frozen=True)
class ChatCall:
    """A checked request body.

    Attributes:
        request: what goes to the ensemble (lease not yet set).
        media: its blobs.
        stream_options: what the stream holds beside the answer.
        names: what the body calls fields of the contract that have other names there, for error messages.
        service_tier: what the answer says of it: null where the request did not ask.
        return_timings: say at the end what the time went to.
        stream_reasoning: send reasoning as it comes, not in one piece at its end.
    """

    request: ChatRequest
    media: tuple[bytes, ...]
    stream_options: StreamOptions
    names: Mapping[str, str]
    service_tier: str | None = None
    return_timings: bool = False
    stream_reasoning: bool = True


def parse(body: bytes, served_model_name: str, lease_s: float) -> ChatCall:
    """Check a request body.

    Args:
        body: the raw body; its content type does not matter.
        served_model_name: the only model there is (beside :data:`ANY_MODEL`).
        lease_s: see ``ChatRequest.lease_s``.

    Raises:
        TriptychError: naming the field at fault and what is allowed.
    """
    return parse_fields(json_object(body), served_model_name, lease_s)


def parse_fields(data: Mapping[str, Any], served_model_name: str, lease_s: float) -> ChatCall:
    """As :func:`parse`, of a body that is read already."""
    check.known_keys(data, (*_OWN, *_SAMPLING, *NEUTRAL), "")
    check_model(data, served_model_name)
    for name, rule in NEUTRAL.items():
        if data.get(name) is not None:
            rule(data[name], name)
    stream = optional_boolean(data, "stream")
    stream_options = parse_stream_options(data, stream)
    sampling, names = parse_sampling(data)
    blobs: list[bytes] = []
    messages = parts.messages(data.get("messages"), blobs)
    request = ChatRequest(
        messages,
        sampling,
        stream,
        lease_s,
        **priority_and_salt(data),
        template=_template(data, messages),
    )
    if request.template.tools:
        names = {"grammar": "tools", **names}
    tier = None if data.get("service_tier") is None else "default"
    timed = optional_boolean(data, "return_timings")
    streamed = data.get("stream_reasoning") is None or check.boolean(data["stream_reasoning"], "stream_reasoning")
    return ChatCall(request, tuple(blobs), stream_options, names, tier, timed, streamed)


def json_object(body: bytes) -> Mapping[str, Any]:
    """A request body as JSON; raises TriptychError where it is none, or no object."""
    try:
        data = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise invalid(f"the request body is not JSON: {error}") from None
    if not isinstance(data, Mapping):
        raise invalid(f"the request body must be a JSON object, not {check.json_type(data)}")
    return data


def check_model(data: Mapping[str, Any], served_model_name: str) -> None:
    """Field ``model``: the server's only one."""
    if data.get("model") is None:
        raise invalid(f"model is missing; this server has {served_model_name!r}", "model")
    model = check.string(data["model"], "model")
    if model not in (served_model_name, ANY_MODEL):
        raise TriptychError(
            ErrorKind.MODEL_NOT_FOUND, f"model {model!r} does not exist; this server has {served_model_name!r}", "model"
        )


def _template(data: Mapping[str, Any], messages: Sequence[Message]) -> TemplateInputs:
    given, how = calling(
        tools(data["tools"]) if data.get("tools") is not None else (),
        data.get("tool_choice"),
        data.get("parallel_tool_calls"),
    )
    variables = data.get("chat_template_kwargs")
    given_add = data.get("add_generation_prompt") is not None
    add = optional_boolean(data, "add_generation_prompt") if given_add else None
    ending = continuation(add, optional_boolean(data, "continue_final_message"), messages)
    return TemplateInputs(
        given,
        {} if variables is None else template_variables(variables),
        *ending,
        how,
        reasoning_effort(data.get("reasoning_effort")),
        data.get("separate_reasoning") is None or check.boolean(data["separate_reasoning"], "separate_reasoning"),
    )


def parse_stream_options(data: Mapping[str, Any], stream: bool) -> StreamOptions:
    """Field ``stream_options``, checked."""
    if data.get("stream_options") is None:
        return StreamOptions()
    options = check.mapping(data["stream_options"], "stream_options")
    if not stream:
        raise invalid("stream_options is only allowed with stream: true", "stream_options")
    check.known_keys(options, ("include_usage", "include_obfuscation", "continuous_usage_stats"), "stream_options")
    if optional_boolean(options, "continuous_usage_stats", "stream_options"):
        raise unsupported("stream_options.continuous_usage_stats", "false")
    return StreamOptions(
        optional_boolean(options, "include_usage", "stream_options"),
        optional_boolean(options, "include_obfuscation", "stream_options"),
    )


def parse_sampling(data: Mapping[str, Any]) -> tuple[SamplingParams, Mapping[str, str]]:
    """(fields of the sampling parameters and of what the text must look like, ``names`` of :class:`ChatCall`)."""
    given = {name: data[name] for name in _SAMPLING if data.get(name) is not None}
    # OpenAI's newer name wins where both are given, as in its own API.
    limit = next((name for name in _TOKEN_LIMITS if data.get(name) is not None), "max_tokens")
    if data.get(limit) is not None:
        given["max_tokens"] = check.integer(data[limit], limit, 1, 2**31 - 1)
    if given.get("top_logprobs") is not None and given.get("logprobs") is not True:
        raise invalid("top_logprobs is only allowed with logprobs: true", "top_logprobs")
    for item in given["stop"] if isinstance(given.get("stop"), list) else [given.get("stop")]:
        if isinstance(item, str):
            parts.text(item, "stop")
    names = {"max_tokens": limit}
    if (grammar := _grammar(data)) is not None:
        names["grammar"], given["grammar"] = grammar
    try:
        params = SamplingParams.from_json(given, "")
        if params.grammar is not None:
            parts.text(params.grammar.value, "grammar")
    except TriptychError as error:
        raise in_openai_words(error, names) from None
    return params, names


def _grammar(data: Mapping[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """(field that names it, the contract's ``grammar``), or None where the text is free."""
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    if data.get("response_format") is not None and (form := _response_format(data["response_format"])) is not None:
        found["response_format"] = form
    for name in ("regex", "ebnf"):
        if data.get(name) is not None:
            found[name] = name, {"type": name, "value": data[name]}
    if len(found) > 1:
        raise invalid(f"only one of {', '.join(found)} is allowed", list(found)[1])
    return next(iter(found.values()), None)


def _response_format(value: Any) -> tuple[str, dict[str, Any]] | None:
    where = "response_format"
    data = check.mapping(value, where)
    kind = data.get("type")
    if kind not in ("text", "json_object", "json_schema"):
        raise invalid(f"{where}.type must be one of text, json_object, json_schema, got {kind!r}", f"{where}.type")
    check.known_keys(data, ("type", "json_schema") if kind == "json_schema" else ("type",), where)
    if kind != "json_schema":
        return (where, {"type": kind}) if kind == "json_object" else None
    where = f"{where}.json_schema"
    form = check.mapping(data.get("json_schema"), where)
    check.known_keys(form, ("name", "description", "schema", "strict"), where)
    for name in ("name", "description"):
        if form.get(name) is not None:
            check.string(form[name], f"{where}.{name}")
    # a schema is always kept to, strict or not
    optional_boolean(form, "strict", where)
    schema = check.mapping(form.get("schema"), f"{where}.schema")
    return f"{where}.schema", {"type": "json_schema", "value": schema}


def priority_and_salt(data: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a ``ChatRequest`` that a body names as the contract does, where it gives them.

    Raises:
        TriptychError: INVALID_REQUEST naming the field.
    """
    given: dict[str, Any] = {}
    if data.get("priority") is not None:
        given["priority"] = priority(data["priority"])
    if data.get("cache_salt") is not None:
        given["cache_salt"] = parts.text(cache_salt(data["cache_salt"]), "cache_salt")
    return given


def optional_boolean(data: Mapping[str, Any], name: str, where: str = "") -> bool:
    """A field that is true, false or left out, which is false."""
    field = f"{where}.{name}" if where else name
    return data.get(name) is not None and check.boolean(data[name], field)


def unsupported(field: str, allowed: str) -> TriptychError:
    """A 400 for a value that OpenAI's API has and this server has not."""
    return TriptychError(ErrorKind.UNSUPPORTED, f"{field} is not supported beyond {allowed}", field)


def only(*allowed: Any) -> Callable[[Any, str], None]:
    """Only values that ask for nothing this server does not do."""
    words = " or ".join(json.dumps(value) for value in allowed) or "null"

    def rule(value: Any, field: str) -> None:
        # True == 1 in Python, but not in JSON.
        if not any(value == item and type(value) is type(item) for item in allowed):
            raise unsupported(field, words)

    return rule


def _labels(value: Any, field: str) -> None:
    """OpenAI's ``metadata``: a caller's own notes."""
    data = check.mapping(value, field)
    if len(data) > MAX_LABELS:
        raise invalid(f"{field} has {len(data)} keys; at most {MAX_LABELS} are allowed", field)
    for key, item in data.items():
        if len(key) > 64 or len(check.string(item, f"{field}.{key}")) > 512:
            raise invalid(f"{field}: keys have at most 64 characters, values 512; not so {key!r}", f"{field}.{key}")


def _cache_options(value: Any, field: str) -> None:
    data = check.mapping(value, field)
    check.known_keys(data, ("mode", "ttl"), field)
    if data.get("mode") is not None:
        only("implicit")(data["mode"], f"{field}.mode")
    if data.get("ttl") is not None:
        only()(data["ttl"], f"{field}.ttl")


# Fields of OpenAI's schema without effect here: any value of the right type, or only the one that asks for nothing.
NEUTRAL: dict[str, Callable[[Any, str], Any]] = {
    "audio": only(),
    "function_call": only("none", "auto"),
    "functions": only([]),
    "metadata": _labels,
    "modalities": only(["text"]),
    "moderation": only(),
    "prediction": only(),
    # every prompt is cached, for as long as there is room
    "prompt_cache_key": check.string,
    "prompt_cache_options": _cache_options,
    "prompt_cache_retention": only("in_memory", "24h"),
    "safety_identifier": check.string,
    "service_tier": only("auto", "default"),
    "store": only(False),
    "user": check.string,
    "verbosity": only("medium"),
    "web_search_options": only(),
}
