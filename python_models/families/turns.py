"""How a chat template takes calls and their results, found out by trying."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..contract.errors import ErrorKind, TriptychError, invalid
from ..contract.request import Message
from . import call_grammars

Guard = Callable[[Any, str], Any]
_REFUSALS = (TypeError, ValueError, KeyError, IndexError, AttributeError)


@dataclass(frozen=True)
class CallStyle:
    """What a template can do with calls.

    Attributes:
        calls: it writes those of an assistant's turn.
        results: it writes messages of role tool.
        as_text: it takes arguments as JSON text; else as an object.
        silent: what it takes for the content of a turn that has none: "", or None where the key must be missing.
    """

    calls: bool = False
    results: bool = False
    as_text: bool = False
    silent: str | None = ""

    @classmethod
    def of(cls, render: Callable[..., Any], takes_tools: bool) -> CallStyle:
        """Try it out. Args: ``apply_chat_template`` with it; whether it reads ``tools``."""
        name, key, value, result = (f"x{secrets.token_hex(6)}" for _ in range(4))
        options: dict[str, Any] = {"tokenize": False, "add_generation_prompt": True}
        if takes_tools:
            schema = {"type": "object", "properties": {"x": {"type": "string", "description": "x"}}, "required": ["x"]}
            function = {"name": "x", "description": "x", "parameters": schema}
            options["tools"] = [{"type": "function", "function": function}]

        def shown(turns: list[dict[str, Any]]) -> str:
            from jinja2.exceptions import TemplateError

            try:
                return str(render([{"role": "user", "content": "x"}, *turns], **options))
            except (TemplateError, *_REFUSALS):
                return ""

        for as_text in (False, True):
            for silent in ("", None):
                arguments: Any = {key: value}
                if as_text:
                    arguments = json.dumps(arguments)
                # nine characters, as Mistral's templates want it
                call = {"id": "x12345678", "type": "function", "function": {"name": name, "arguments": arguments}}
                turns: list[dict[str, Any]] = [{"role": "assistant", "content": silent, "tool_calls": [call]}]
                answer = {"role": "tool", "content": result, "name": name, "tool_call_id": "x12345678"}
                alone, both = shown(turns), shown([*turns, answer])
                text = alone or both
                good = all(mark in text for mark in (name, key, value))
                # an object as Python writes it, a text written as a JSON string, and no content as a word
                bad = (f"'{key}'", f'\\"{key}', "None")
                if good and not any(mark in text for mark in bad):
                    return cls(True, result in both, as_text, silent)
        return cls(results=result in shown([{"role": "tool", "content": result, "name": name, "tool_call_id": ""}]))

    def turn(self, message: Message, content: Any, where: str, form: str, guard: Guard) -> dict[str, Any]:
        """A message as the template takes it.

        Calls that it would not write are written into the content, as the model writes them itself.

        Args:
            message: of the request.
            content: of it, guarded, as a text or as parts.
            where: field that names it.
            form: of the model's calls, see :mod:`.call_grammars`; "" where none is known.
            guard: (JSON value, field) -> the same with special tokens in its texts made plain characters.

        Raises:
            TriptychError: UNSUPPORTED where the template writes no such message, INVALID_REQUEST for arguments that
                are no object where it takes one.
        """
        if message.role == "tool" and not self.results:
            raise _unsupported("messages of role tool", f"{where}.role")
        turn: dict[str, Any] = {"role": message.role, "content": content if message.parts else self.silent}
        if message.tool_calls and self.calls:
            turn["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": arguments}}
                for call, arguments in (
                    (call, self._arguments(call.arguments, f"{where}.tool_calls[{index}].function.arguments"))
                    for index, call in enumerate(message.tool_calls)
                )
            ]
        elif message.tool_calls:
            calls = [(guard(call.name, where), guard(call.arguments, where)) for call in message.tool_calls]
            written = call_grammars.write(form, calls)
            if not written:
                raise _unsupported("calls of tools", f"{where}.tool_calls")
            parts = isinstance(content, list) and content
            turn["content"] = [*content, {"type": "text", "text": written}] if parts else f"{content or ''}{written}"
        for name, value in (
            ("name", message.name),
            ("tool_call_id", message.tool_call_id),
            ("reasoning_content", message.reasoning),
        ):
            if value:
                turn[name] = value
        return {name: value if name == "content" else guard(value, where) for name, value in turn.items()}

    def _arguments(self, text: str, where: str) -> Any:
        if self.as_text:
            return text
        try:
            found = json.loads(text) if text.strip() else {}
        except (ValueError, RecursionError) as error:
            raise invalid(f"{where} must be the text of a JSON object: {error}", where) from None
        if not isinstance(found, dict):
            raise invalid(f"{where} must be the text of a JSON object, got {text[:40]!r}", where)
        return found


def _unsupported(what: str, where: str) -> TriptychError:
    return TriptychError(ErrorKind.UNSUPPORTED, f"{where}: this model's chat template writes no {what}", where)
