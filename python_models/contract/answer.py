"""How an answer is written: which formats of tool calls and reasoning there are, and which one an answer is in.

``preprocess`` finds out from the chat template and the prompt (see families/answers.py). The language model keeps the
special tokens that mark calls and reasoning in the text, counts reasoning tokens and hands the syntax to the caller
with the first delta. The parsers are the caller's (client/openai_api/tool_parsers).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class Marks:
    """What stands before and after reasoning; ``tokens`` are special tokens in it that are not the whole mark."""

    start: str
    end: str
    tokens: tuple[str, ...] = ()


_THINK = Marks("<think>", "</think>")

REASONING_PARSERS: Mapping[str, Marks] = MappingProxyType(
    {
        "deepseek-r1": _THINK,
        "ernie45": _THINK,
        "gemma4": Marks("<|channel>thought\n", "<channel|>", ("<|channel>",)),
        "glm45": _THINK,
        "kimi": Marks("◁think▷", "◁/think▷"),
        "mimo": _THINK,
        "mistral": Marks("[THINK]", "[/THINK]"),
        "nano-nemotron": _THINK,
        "qwen3": _THINK,
        "step3": _THINK,
    }
)
"""Name -> marks. Those with the same marks are one format under the names of the models that write it."""

TOOL_PARSERS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "deepseek_v3": (
            "<｜tool▁calls▁begin｜>",
            "<｜tool▁call▁begin｜>",
            "<｜tool▁sep｜>",
            "<｜tool▁call▁end｜>",
            "<｜tool▁calls▁end｜>",
        ),
        "deepseek_v31": (
            "<｜tool▁calls▁begin｜>",
            "<｜tool▁call▁begin｜>",
            "<｜tool▁sep｜>",
            "<｜tool▁call▁end｜>",
            "<｜tool▁calls▁end｜>",
        ),
        "functiongemma": ("<start_function_call>", "<end_function_call>", "<escape>"),
        "gemma": (),
        "gemma4": ("<|tool_call>", "<tool_call|>", '<|"|>'),
        "glm45": ("<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
        "hermes": ("<tool_call>", "</tool_call>"),
        "json": (),
        "kimi_k2": (
            "<|tool_calls_section_begin|>",
            "<|tool_call_begin|>",
            "<|tool_call_argument_begin|>",
            "<|tool_call_end|>",
            "<|tool_calls_section_end|>",
        ),
        "llama3_json": ("<|python_tag|>",),
        "mistral": ("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"),
        "phi4": ("<|tool_call|>", "<|/tool_call|>"),
        "pythonic": ("<|python_start|>", "<|python_end|>"),
        "qwen3_coder": ("<tool_call>", "</tool_call>"),
    }
)
"""Name -> special tokens that the format is written with where a tokenizer has them."""

TOOL_PARSER_ALIASES: Mapping[str, str] = MappingProxyType(
    {
        "deepseekv3": "deepseek_v3",
        "deepseekv31": "deepseek_v31",
        "glm": "glm45",
        "llama3": "llama3_json",
        "llama4_pythonic": "pythonic",
        "phi4_mini_json": "phi4",
        "qwen": "hermes",
        "qwen25": "hermes",
        "qwen3": "hermes",
        "qwen3_xml": "qwen3_coder",
    }
)
"""Names that SGLang's and vLLM's options have for the same formats."""

REASONING_PARSER_ALIASES: Mapping[str, str] = MappingProxyType(
    {
        "deepseek_r1": "deepseek-r1",
        "kimi_vl": "kimi",
        "nano_v3": "nano-nemotron",
        "nemotron": "nano-nemotron",
        "qwen3-thinking": "qwen3",
    }
)


@dataclass(frozen=True)
class Syntax:
    """What an answer is written in.

    Attributes:
        tools: name of the tool parser, a key of :data:`TOOL_PARSERS`; "" where no calls are to be looked for.
        reasoning: name of the reasoning parser, a key of :data:`REASONING_PARSERS`; "" where nothing is set apart.
        reasons: the prompt ends inside reasoning: the answer's first text is part of it.
    """

    tools: str = ""
    reasoning: str = ""
    reasons: bool = False

    @property
    def marks(self) -> Marks | None:
        """Around reasoning."""
        return REASONING_PARSERS[self.reasoning] if self.reasoning else None

    @property
    def tokens(self) -> frozenset[str]:
        """Special tokens that belong to the text."""
        marks = self.marks
        around = () if marks is None else (marks.start, marks.end, *marks.tokens)
        return frozenset((*TOOL_PARSERS.get(self.tools, ()), *around))
