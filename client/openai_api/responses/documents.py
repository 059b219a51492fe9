"""What the endpoints of responses take and answer, as JSON Schema."""

from __future__ import annotations

from triptych.python_models.contract.sampling import MAX_TOP_LOGPROBS

from ..documentation import Schema
from ..schemas import BOOLEAN, chat_fields, choice, integer, text
from .request import REFUSED, SAME

BODY: Schema = {
    "type": "object",
    "required": ["model", "input"],
    "properties": {
        "model": {"type": "string"},
        "input": {
            "anyOf": [{"type": "string"}, {"type": "array", "minItems": 1, "items": {"type": "object"}}],
            "description": "a question, or items: messages with input_text, input_image, input_audio and video_url "
            "parts, calls of functions and what they gave",
        },
        **chat_fields(*sorted({*SAME} - {"model"})),
        "instructions": text(),
        "previous_response_id": text(),
        "max_output_tokens": integer(1),
        "max_tool_calls": integer(1),
        "top_logprobs": integer(0, MAX_TOP_LOGPROBS),
        "include": {"type": ["array", "null"], "items": {"type": "string"}},
        "text": {"type": ["object", "null"], "description": "format: text, json_object or json_schema"},
        "reasoning": {"type": ["object", "null"], "description": "effort"},
        "tools": {"type": ["array", "null"], "items": {"type": "object"}},
        "tool_choice": {"type": ["string", "object", "null"]},
        "store": BOOLEAN,
        "stream_options": {
            "type": ["object", "null"],
            "properties": {"include_obfuscation": BOOLEAN},
            "additionalProperties": False,
        },
        **chat_fields("prompt_cache_options"),
        # what asks for nothing
        **{name: choice() for name in REFUSED},
        "background": choice(False),
        "truncation": choice("disabled"),
    },
    "additionalProperties": False,
}
RESPONSE: Schema = {
    "type": "object",
    "required": ["id", "object", "created_at", "status", "model", "output", "usage", "error", "incomplete_details"],
    "properties": {
        "id": {"type": "string"},
        "object": {"const": "response"},
        "created_at": {"type": "integer"},
        "status": {"enum": ["completed", "incomplete"]},
        "model": {"type": "string"},
        "output": {"type": "array", "items": {"type": "object"}},
        "usage": {"type": "object"},
    },
}
DELETED: Schema = {
    "type": "object",
    "required": ["id", "object", "deleted"],
    "properties": {"id": {"type": "string"}, "object": {"const": "response"}, "deleted": {"const": True}},
}
ITEMS: Schema = {
    "type": "object",
    "required": ["object", "data", "first_id", "last_id", "has_more"],
    "properties": {
        "object": {"const": "list"},
        "data": {"type": "array", "items": {"type": "object"}},
        "first_id": {"type": ["string", "null"]},
        "last_id": {"type": ["string", "null"]},
        "has_more": {"type": "boolean"},
    },
}
