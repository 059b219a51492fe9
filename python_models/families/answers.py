"""What a checkpoint's answers are written in: formats of calls and reasoning, told by the chat template."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from ..contract.answer import (
    REASONING_PARSER_ALIASES,
    REASONING_PARSERS,
    TOOL_PARSER_ALIASES,
    Syntax,
)
from ..contract.errors import ErrorKind, TriptychError, invalid
from ..contract.request import TemplateInputs
from ..contract.sampling import Grammar
from . import call_grammars

_log = logging.getLogger(__name__)

# (what a template has, all of it; the tool parser; the form of its calls where there are several). The first fits.
_TOOLS: tuple[tuple[tuple[str, ...], str, str], ...] = (
    (("[TOOL_CALLS]", "[ARGS]"), "mistral", "mistral_args"),
    (("[TOOL_CALLS]",), "mistral", "mistral"),
    (("<｜tool▁call▁begin｜>", "```json"), "deepseek_v3", ""),
    (("<｜tool▁call▁begin｜>",), "deepseek_v31", ""),
    (("<|tool_calls_section_begin|>",), "kimi_k2", ""),
    (("<arg_key>",), "glm45", ""),
    (("<function=", "<parameter="), "qwen3_coder", ""),
    (("<|tool_call>",), "gemma4", ""),
    (("<start_function_call>",), "functiongemma", ""),
    (("<|tool_call|>",), "phi4", "phi4_token"),
    (("<|tool|>",), "phi4", "phi4_token"),
    (("functools",), "phi4", "phi4"),
    (("<tool_call>",), "hermes", ""),
    (("tool_code",), "gemma", ""),
    (("func_name1(",), "pythonic", ""),
    (("<|python_start|>",), "pythonic", ""),
    (("<|python_tag|>",), "llama3_json", ""),
    (('"parameters": dictionary of argument name',), "llama3_json", ""),
)
_REASONING: tuple[tuple[tuple[str, ...], str], ...] = (
    (("◁think▷",), "kimi"),
    (("[THINK]",), "mistral"),
    (("<|channel>", "thought"), "gemma4"),
    (("<think>", "<arg_key>"), "glm45"),
    (("<think>", "<｜Assistant｜>"), "deepseek-r1"),
    (("<think>",), "qwen3"),
    (("</think>", "<｜Assistant｜>"), "deepseek-r1"),
    (("</think>",), "qwen3"),
)
_SWITCHES = ("enable_thinking", "thinking")


@dataclass(frozen=True)
class Written:
    """What one answer is written in.

    Attributes:
        syntax: for the caller.
        form: of calls, a key of :data:`.call_grammars.FORMS`; "" where none is known.
    """

    syntax: Syntax
    form: str = ""

    def constrain(self, template: TemplateInputs, grammar: Grammar | None) -> Grammar | None:
        """The grammar of the answer: what the request asks for, with calls and reasoning beside it.

        Args:
            template: of the request.
            grammar: what it asks for of the text.

        Raises:
            TriptychError: UNSUPPORTED where calls of this model cannot be kept to what is asked of them.
        """
        body: dict[str, Any] | None = None if grammar is None else call_grammars.of_text(grammar)
        how = template.calling
        strict = any(tool["function"].get("strict") for tool in template.tools)
        free = False
        if template.tools and how.required:
            body = call_grammars.calls(self.form, template.tools, how.parallel, strict=True)
        elif template.tools and (strict or not how.parallel or (body is not None and self.syntax.tools)):
            if not call_grammars.constrainable(self.form):
                raise self._unconstrained(strict, how.parallel)
            if body is None:
                free = True
                body = call_grammars.text_and_calls(self.form, template.tools, how.parallel)
            else:
                either = [call_grammars.calls(self.form, template.tools, how.parallel), body]
                body = {"type": "or", "elements": either}
        if body is None:
            return None
        if (marks := self.syntax.marks) is not None and (self.syntax.reasons or not free):
            body = call_grammars.after_reasoning(marks, self.syntax.reasons, body)
        elif not template.tools:
            return grammar
        return call_grammars.whole(body)

    def _unconstrained(self, strict: bool, parallel: bool) -> TriptychError:
        field, allowed = "response_format", "leave it out"
        if strict:
            field, allowed = "tools", "leave out strict"
        elif not parallel:
            field, allowed = "parallel_tool_calls", "leave it out"
        message = (
            f"{field}: calls as this model writes them ({self.syntax.tools or 'in a format that is not known'}) cannot "
            f"be constrained beside free text; {allowed}, or set tool_choice to required or a function"
        )
        return TriptychError(ErrorKind.UNSUPPORTED, message, field)


@dataclass(frozen=True)
class Formats:
    """What a checkpoint writes.

    Attributes:
        tools: name of the tool parser, "" for none.
        form: of its calls, a key of :data:`.call_grammars.FORMS`, or "" where calls cannot be constrained.
        reasoning: name of the reasoning parser, "" for none.
    """

    tools: str = ""
    form: str = ""
    reasoning: str = ""

    @classmethod
    def of(cls, template: str, takes_tools: bool, tool_parser: str = "auto", reasoning_parser: str = "auto") -> Formats:
        """Find them.

        Args:
            template: text of the chat template.
            takes_tools: it reads ``tools``.
            tool_parser, reasoning_parser: options of the deployment: "auto", "none" or a name.
        """
        found = next((own for own in _TOOLS if all(mark in template for mark in own[0])), ((), "", ""))
        tools, form = found[1:] if takes_tools else ("", "")
        told = "--tool-call-parser"
        if tool_parser == "auto":
            told = "the chat template"
        elif (name := TOOL_PARSER_ALIASES.get(tool_parser, tool_parser)) != tools:
            tools, form = ("" if name == "none" else name), ""
        reasoning = next((own for marks, own in _REASONING if all(mark in template for mark in marks)), "")
        if reasoning_parser != "auto":
            name = REASONING_PARSER_ALIASES.get(reasoning_parser, reasoning_parser)
            reasoning = "" if name == "none" else name
        form = form or tools
        made = cls(tools, form if form in call_grammars.FORMS else "", reasoning)
        if tools:
            _log.info("tool calls are parsed as %s, by %s", tools, told)
        elif takes_tools:
            _log.info("the chat template takes tools, but no parser of calls is known for it: calls are left as text")
        if reasoning:
            _log.info("reasoning is parsed as %s", reasoning)
        return made

    def written(self, template: TemplateInputs, prompt: str, final_text: str = "") -> Written | None:
        """What an answer to a prompt is written in; None where that is plain text.

        Args:
            template: of the request.
            prompt: its text.
            final_text: of the last message, where the answer goes on with it.
        """
        tools, form = (self.tools, self.form) if template.tools else ("", "")
        if template.calling.required and template.tools and not form:
            tools = form = "json"
        reasoning, reasons = (self.reasoning if template.separate_reasoning else ""), False
        if reasoning:
            marks = REASONING_PARSERS[reasoning]
            end, text = prompt.rstrip(), final_text
            if template.continue_final_message:
                reasons = text.rfind(marks.start) > text.rfind(marks.end)
            else:
                reasons = end.endswith(marks.start.rstrip())
            if not reasons and (template.continue_final_message or end.endswith(marks.end)):
                reasoning = ""
        if not tools and not reasoning and not template.tools:
            return None
        return Written(Syntax(tools, reasoning, reasons), form)

    def effort(self, value: str, inputs: frozenset[str], variables: frozenset[str]) -> dict[str, Any]:
        """What the template gets for ``reasoning_effort``.

        Args:
            value: of the field.
            inputs: variables that the template reads.
            variables: those that the request sets itself.

        Raises:
            TriptychError: INVALID_REQUEST where the template has no variable for it, saying what is allowed.
        """
        field = "reasoning_effort"
        name = next((name for name in (field, *_SWITCHES) if name in inputs), None)
        if name is None:
            if value == "none" and not self.reasoning:
                return {}
            allowed = "only none is allowed" if not self.reasoning else "leave it out"
            raise invalid(f"{field}: this model's chat template has no variable for it; {allowed}", field)
        if name in variables:
            raise invalid(f"{field}: chat_template_kwargs.{name} says it already; give one of them", field)
        if name in _SWITCHES:
            # it can reason or not, and nothing between
            return {name: value != "none"}
        return {name: value}
