"""Tool calls and reasoning in the text of answers: one parser for each format, and what runs them."""

from .answer import AnswerParser
from .cursor import Arguments, Call, Event, Reasoning, Text
from .registry import TOOL_PARSERS

__all__ = ["TOOL_PARSERS", "AnswerParser", "Arguments", "Call", "Event", "Reasoning", "Text"]
