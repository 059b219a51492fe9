"""JSON Schema of what requests to chat completions hold; tests hold it against what :mod:`.fields` accepts."""

from __future__ import annotations

import inspect
import re
from typing import Any

from triptych.python_models.contract.request import DETAILS, MAX_SALT, MEDIA_OPTIONS, ROLES
from triptych.python_models.contract.sampling import (
    MAX_CHOICES,
    MAX_NGRAM_SIZE,
    MAX_SPECULATIVE_TOKENS,
    MAX_STOP_STRINGS,
    MAX_TOP_LOGPROBS,
    SamplingParams,
)
from triptych.python_models.contract.tools import CHOICES, MAX_TOOLS, REASONING_EFFORTS

from .fields import MAX_LABELS
from .parts import AUDIO_FORMATS

_INT32 = 2**31 - 1


def integer(low: int, high: int = _INT32) -> dict[str, Any]:
    """An integer within bounds, or null, as all below: null is as if a field were left out."""
    return {"type": ["integer", "null"], "minimum": low, "maximum": high}


def number(low: float, high: float) -> dict[str, Any]:
    """A number within bounds."""
    return {"type": ["number", "null"], "minimum": low, "maximum": high}


def above_zero(high: float) -> dict[str, Any]:
    """A number greater than 0."""
    return {"type": ["number", "null"], "exclusiveMinimum": 0, "maximum": high}


def text(description: str = "", **more: Any) -> dict[str, Any]:
    """A string."""
    return {"type": ["string", "null"]} | ({"description": description} if description else {}) | more


def choice(*values: Any, description: str = "") -> dict[str, Any]:
    """One of some values; none: null alone."""
    return {"enum": [*values, None]} | ({"description": description} if description else {})


BOOLEAN = {"type": ["boolean", "null"]}
_TOKEN_IDS = {"type": ["array", "null"], "items": {"type": "integer", "minimum": 0, "maximum": _INT32}}
_SAMPLING: dict[str, dict[str, Any]] = {
    "max_tokens": integer(1),
    "min_tokens": integer(0),
    "temperature": number(0, 2),
    "top_p": above_zero(1),
    "top_k": integer(-1),
    "min_p": number(0, 1),
    "repetition_penalty": above_zero(10),
    "no_repeat_ngram_size": integer(0, MAX_NGRAM_SIZE),
    "no_repeat_ngram_window_size": integer(0),
    "no_repeat_ngram_allowed_ids": _TOKEN_IDS,
    "presence_penalty": number(-2, 2),
    "frequency_penalty": number(-2, 2),
    "seed": integer(-(2**63), 2**63 - 1),
    "stop": {
        "anyOf": [
            {"type": ["string", "null"], "minLength": 1},
            {"type": "array", "maxItems": MAX_STOP_STRINGS, "items": {"type": "string", "minLength": 1}},
        ]
    },
    "stop_token_ids": _TOKEN_IDS,
    "ignore_eos": BOOLEAN,
    "logprobs": BOOLEAN,
    "top_logprobs": integer(0, MAX_TOP_LOGPROBS),
    "logit_bias": {
        "type": ["object", "null"],
        "propertyNames": {"pattern": r"^[0-9]{1,9}$"},
        "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
    },
    "skip_special_tokens": BOOLEAN,
    "n": integer(1, MAX_CHOICES),
    "speculative_tokens": integer(0, MAX_SPECULATIVE_TOKENS),
}


def sampling() -> dict[str, Any]:
    """Schema of every sampling field but ``grammar``, described as the contract does."""
    found: dict[str, str] = {}
    names: list[str] = []
    attributes = (inspect.getdoc(SamplingParams) or "").partition("Attributes:")[2]
    for line in attributes.splitlines():
        if match := re.match(r"    ((?:\w+, )*\w+): (.*)", line):
            names = match[1].split(", ")
            found |= dict.fromkeys(names, match[2])
        else:
            for name in names:
                found[name] += f" {line.strip()}"
    return {name: schema | {"description": found[name].strip()} for name, schema in _SAMPLING.items()}


def _source(modality: str) -> dict[str, Any]:
    """An object with a URL and the options of its medium."""
    options: dict[str, Any] = {name: integer(1) for name in MEDIA_OPTIONS[modality]}
    if "detail" in options:
        options["detail"] = choice(*DETAILS)
    if "fps" in options:
        options["fps"] = number(0.001, 1000)
    url = {"type": "string", "description": "http(s): or data: with base64"}
    return {
        "type": "object",
        "required": ["url"],
        "properties": {"url": url} | options,
        "additionalProperties": False,
    }


_BREAKPOINT = {
    "type": ["object", "null"],
    "required": ["mode"],
    "properties": {"mode": {"const": "explicit"}},
    "additionalProperties": False,
    "description": "accepted: every prompt is cached as far as it goes",
}


def _part(kind: str, value: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "required": ["type", kind],
        "properties": {"type": {"const": kind}, kind: value, "prompt_cache_breakpoint": _BREAKPOINT} | more,
        "additionalProperties": False,
    }


PART: dict[str, Any] = {
    "oneOf": [
        _part("text", {"type": "string"}),
        _part("refusal", {"type": "string", "description": "of an earlier answer; read as text"}),
        _part("image_url", _source("image"), modalities=choice("image", "multi-images")),
        _part("video_url", _source("video")),
        _part("audio_url", _source("audio")),
        _part(
            "input_audio",
            {
                "type": "object",
                "required": ["data", "format"],
                "properties": {"data": {"type": "string", "format": "byte"}, "format": {"enum": list(AUDIO_FORMATS)}},
                "additionalProperties": False,
            },
        ),
    ]
}
_CALL: dict[str, Any] = {
    "type": "object",
    "required": ["id", "type", "function"],
    "properties": {
        "id": {"type": "string"},
        "type": {"const": "function"},
        "function": {
            "type": "object",
            "required": ["name", "arguments"],
            "properties": {
                "name": {"type": "string"},
                "arguments": {"type": "string", "description": "text of a JSON object"},
            },
        },
    },
}
MESSAGE: dict[str, Any] = {
    "type": "object",
    "required": ["role"],
    "properties": {
        "role": {"enum": list(ROLES)},
        "content": {"anyOf": [{"type": ["string", "null"]}, {"type": "array", "minItems": 1, "items": PART}]},
        "name": text(),
        "tool_calls": {"type": ["array", "null"], "items": _CALL, "description": "of an assistant's message"},
        "tool_call_id": text("of a message of role `tool`: the call that it answers"),
        "reasoning_content": text("of an assistant's message"),
        # what clients give back of an answer
        **{name: {"enum": [None, ""]} for name in ("refusal", "audio", "function_call")},
        "annotations": {"type": ["array", "null"], "maxItems": 0},
    },
    "additionalProperties": False,
}
MESSAGES: dict[str, Any] = {"type": "array", "minItems": 1, "items": MESSAGE}
_NAMED: dict[str, Any] = {
    "type": "object",
    "required": ["type", "function"],
    "properties": {
        "type": {"const": "function"},
        "function": {
            "type": "object",
            "required": ["name"],
            "properties": {"name": {"type": "string"}},
            "additionalProperties": False,
        },
    },
    "additionalProperties": False,
}
TOOL_CHOICE: dict[str, Any] = {
    "anyOf": [
        choice(*CHOICES),
        _NAMED,
        {
            "type": "object",
            "required": ["type", "allowed_tools"],
            "properties": {
                "type": {"const": "allowed_tools"},
                "allowed_tools": {
                    "type": "object",
                    "required": ["mode", "tools"],
                    "properties": {
                        "mode": {"enum": ["auto", "required"]},
                        "tools": {"type": "array", "minItems": 1, "items": _NAMED},
                    },
                    "additionalProperties": False,
                },
            },
            "additionalProperties": False,
        },
    ]
}
TOOL: dict[str, Any] = {
    "type": "object",
    "required": ["type", "function"],
    "properties": {
        "type": {"const": "function"},
        "function": {
            "type": "object",
            "required": ["name"],
            "properties": {
                "name": {"type": "string", "pattern": "^[A-Za-z0-9_-]{1,64}$"},
                "description": text(),
                "parameters": {"type": ["object", "null"], "description": "JSON Schema of the arguments"},
                "strict": BOOLEAN,
            },
            "additionalProperties": False,
        },
    },
    "additionalProperties": False,
}
RESPONSE_FORMAT: dict[str, Any] = {
    "oneOf": [
        {"type": "null"},
        {
            "type": "object",
            "required": ["type"],
            "properties": {"type": {"enum": ["text", "json_object"]}},
            "additionalProperties": False,
        },
        {
            "type": "object",
            "required": ["type", "json_schema"],
            "properties": {
                "type": {"const": "json_schema"},
                "json_schema": {
                    "type": "object",
                    "required": ["schema"],
                    "properties": {
                        "name": text(),
                        "description": text(),
                        "schema": {"type": "object"},
                        "strict": BOOLEAN | {"description": "the schema is always kept to"},
                    },
                    "additionalProperties": False,
                },
            },
            "additionalProperties": False,
        },
    ]
}
STREAM_OPTIONS: dict[str, Any] = {
    "type": ["object", "null"],
    "properties": {
        "include_usage": BOOLEAN,
        "include_obfuscation": BOOLEAN,
        "continuous_usage_stats": choice(False),
    },
    "additionalProperties": False,
    "description": "only with `stream: true`",
}
# Those of OpenAI's fields that have no effect here, with the values that ask for nothing else.
_NEUTRAL: dict[str, dict[str, Any]] = {
    "audio": {"type": "null"},
    "function_call": choice("none", "auto"),
    "functions": {"type": ["array", "null"], "maxItems": 0},
    "metadata": {
        "type": ["object", "null"],
        "maxProperties": MAX_LABELS,
        "propertyNames": {"maxLength": 64},
        "additionalProperties": {"type": "string", "maxLength": 512},
    },
    "modalities": choice(["text"]),
    "moderation": {"type": "null"},
    "prediction": {"type": "null"},
    "prompt_cache_key": text("every prompt is cached"),
    "prompt_cache_options": {
        "type": ["object", "null"],
        "properties": {"mode": choice("implicit"), "ttl": {"type": "null"}},
        "additionalProperties": False,
    },
    "prompt_cache_retention": choice("in_memory", "24h"),
    "safety_identifier": text(),
    "service_tier": choice("auto", "default"),
    "store": choice(False),
    "user": text(),
    "verbosity": choice("medium"),
    "web_search_options": {"type": "null"},
}
_CHAT: dict[str, dict[str, Any]] = {
    "model": {"type": "string", "description": "the served name, or `default`"},
    "messages": MESSAGES,
    "stream": BOOLEAN | {"description": "answer as server-sent events"},
    "stream_options": STREAM_OPTIONS,
    "priority": integer(-(2**31)) | {"description": "requests with a higher one go first"},
    "cache_salt": text("share the prefix cache with requests of the same salt alone", maxLength=MAX_SALT),
    "return_timings": BOOLEAN | {"description": "tell at the end what the time went to"},
    "response_format": RESPONSE_FORMAT,
    "regex": text("the whole answer matches this; in place of `response_format`", minLength=1),
    "ebnf": text("a grammar (GBNF, start rule `root`); in place of `response_format`", minLength=1),
    "max_completion_tokens": integer(1) | {"description": "tokens of the answer at most; wins over `max_tokens`"},
    "tools": {"type": ["array", "null"], "maxItems": MAX_TOOLS, "items": TOOL},
    "tool_choice": TOOL_CHOICE,
    "parallel_tool_calls": BOOLEAN,
    "reasoning_effort": choice(*REASONING_EFFORTS),
    "separate_reasoning": BOOLEAN | {"description": "reasoning in `reasoning_content`, not in `content` (default)"},
    "stream_reasoning": BOOLEAN | {"description": "as it comes (default), not in one piece at its end"},
    "chat_template_kwargs": {"type": ["object", "null"], "description": "variables that the chat template reads"},
    "add_generation_prompt": BOOLEAN | {"description": "end where the assistant begins to speak (default)"},
    "continue_final_message": BOOLEAN | {"description": "go on with the last message, an assistant's"},
}


def chat_body() -> dict[str, Any]:
    """Schema of the body of a chat completion."""
    properties = _CHAT | sampling()
    neutral = {name: schema | {"x-no-effect": True} for name, schema in _NEUTRAL.items()}
    return {
        "type": "object",
        "required": ["model", "messages"],
        "properties": properties | neutral,
        "additionalProperties": False,
    }


def chat_fields(*names: str) -> dict[str, Any]:
    """Schemas of some fields of it, for endpoints that have them too."""
    properties = chat_body()["properties"]
    return {name: properties[name] for name in names}


_LOGPROBS = {"type": ["object", "null"], "properties": {"content": {"type": ["array", "null"]}}}
USAGE: dict[str, Any] = {
    "type": "object",
    "required": ["prompt_tokens", "completion_tokens", "total_tokens"],
    "properties": {
        "prompt_tokens": {"type": "integer"},
        "completion_tokens": {"type": "integer"},
        "total_tokens": {"type": "integer"},
        "prompt_tokens_details": {
            "type": ["object", "null"],
            "additionalProperties": {"type": "integer"},
            "description": "`cached_tokens`, and those of each kind of media",
        },
    },
}
CHAT_ANSWER: dict[str, Any] = {
    "type": "object",
    "required": ["id", "object", "created", "model", "choices", "usage"],
    "properties": {
        "id": {"type": "string"},
        "object": {"const": "chat.completion"},
        "created": {"type": "integer"},
        "model": {"type": "string"},
        "system_fingerprint": {"type": "string"},
        "choices": {
            "type": "array",
            "minItems": 1,
            "items": {
                "type": "object",
                "required": ["index", "message", "finish_reason"],
                "properties": {
                    "index": {"type": "integer"},
                    "message": {
                        "type": "object",
                        "required": ["role", "content"],
                        "properties": {"role": {"const": "assistant"}, "content": {"type": ["string", "null"]}},
                    },
                    "logprobs": _LOGPROBS,
                    "finish_reason": {"enum": ["stop", "length", "tool_calls"]},
                    "matched_stop": {"type": ["string", "integer", "null"]},
                },
            },
        },
        "usage": USAGE,
    },
}
