"""The tool parsers by name; contract/answer.py lists the names, families/answers.py finds a checkpoint's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from . import braces, objects, pythonic, sections, tags
from .cursor import Cursor, Steps
from .objects import Tools

ToolParser = Callable[[Cursor, Tools], Steps[None]]
"""Reads an answer to its end: gives on content and calls of the functions that there are."""

TOOL_PARSERS: Mapping[str, ToolParser] = MappingProxyType(
    {
        "deepseek_v3": sections.deepseek_v3,
        "deepseek_v31": sections.deepseek_v31,
        "functiongemma": braces.functiongemma,
        "gemma": pythonic.gemma,
        "gemma4": braces.gemma4,
        "glm45": tags.glm45,
        "hermes": objects.hermes,
        "json": objects.plain,
        "kimi_k2": sections.kimi_k2,
        "llama3_json": objects.llama3,
        "mistral": objects.mistral,
        "phi4": objects.phi4,
        "pythonic": pythonic.pythonic,
        "qwen3_coder": tags.qwen3_coder,
    }
)
