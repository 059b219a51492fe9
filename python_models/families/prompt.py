"""Messages -> prompt text -> token ids, with the text of a request taken literally.

Whatever a caller writes is plain characters, even ``<|im_end|>`` or an image placeholder. Every special token found
in a text is replaced, before the chat template sees it, by a stand-in: an added token with a name nobody can guess.
After tokenising, the stand-in's id is replaced by the ids of the literal characters. A text without special tokens
takes the path of transformers unchanged.

A family may name control tokens: special tokens that its published prompts are written with, such as
``<|grounding|>``. Those keep their meaning wherever a caller writes them. They never are a token that begins or ends
a turn, or stands for a medium.

A raw prompt is the other way round: its text goes to the tokenizer as it is. Its token ids must not be tokenised anew,
which might give others, so stand-ins take their places too: only what the processor looks for, media and the special
tokens around them, becomes text.
"""

from __future__ import annotations

import inspect
import json
import re
import secrets
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from types import MappingProxyType
from typing import Any

from ..contract.errors import ErrorKind, TriptychError, invalid
from ..contract.request import NO_INPUTS, MediaPart, Message, RawPrompt, TemplateInputs, TextPart
from .answers import Formats, Written
from .templates import TEMPLATES, ChatTemplate, inputs_of
from .turns import CallStyle

_TOOLS_IN_SYSTEM = re.compile(r"\bmessage(?:\[['\"]tools['\"]\]|\.tools\b)")
# Different special tokens that the texts of one request may hold together.
_STAND_INS = 256


@dataclass(frozen=True)
class Prompt:
    """The text of a request after the chat template.

    Attributes:
        text: for the processor.
        literals: a stand-in's id -> the ids it stands for.
        drop: what the tokenizer puts before and after any text and is not wanted.
        written: what the answer is written in; None where it is plain text.
    """

    text: str
    literals: dict[int, list[int]]
    drop: tuple[Sequence[int], Sequence[int]] = ((), ())
    written: Written | None = None

    def fill(self, ids: Sequence[int]) -> list[int]:
        """Token ids of :attr:`text` -> token ids of the prompt."""
        before, after = map(list, self.drop)
        if before and list(ids[: len(before)]) == before:
            ids = ids[len(before) :]
        if after and list(ids[-len(after) :]) == after:
            ids = ids[: -len(after)]
        if not self.literals:
            return list(ids)
        return [i for token in ids for i in self.literals.get(token, (token,))]


class PromptWriter:
    """Applies a checkpoint's chat template. Thread-safe after construction."""

    def __init__(
        self,
        processor: Any,
        name: str,
        control: frozenset[str] = frozenset(),
        template: ChatTemplate | None = None,
        media: Mapping[str, str] = MappingProxyType({}),
        parsers: tuple[str, str] = ("auto", "auto"),
    ) -> None:
        """Read the template.

        Args:
            processor: the checkpoint's, whose tokenizer gets the stand-ins.
            name: of the checkpoint.
            control: special tokens that keep their meaning in the texts of a request.
            template: None for the checkpoint's own.
            media: modality -> what the processor replaces by a medium's tokens.
            parsers: options tool_call_parser and reasoning_parser.

        Raises:
            TriptychError: UNSUPPORTED where the checkpoint has no chat template or no fast tokenizer,
                INVALID_REQUEST for one from a file that has no place for media.
        """
        from jinja2 import TemplateSyntaxError

        tokenizer = processor.tokenizer
        own = processor if getattr(processor, "chat_template", None) else tokenizer
        self._render: Callable[..., Any] = own.apply_chat_template
        self.stop: tuple[str, ...] = ()
        """Strings that end an answer beside the tokens that do."""
        text = own.chat_template
        if template is not None:
            self._render = _renderer(tokenizer, template, own, media)
            self.stop = template.end_strings(tokenizer)
            text = template.text
        if not text:
            raise TriptychError(
                ErrorKind.UNSUPPORTED,
                f"{name} has no chat template (chat_template.jinja, or chat_template in tokenizer_config.json or "
                "processor_config.json); name one with --chat-template, or add that of the instruction-tuned "
                "checkpoint of this family",
                "settings.model",
            )
        if not getattr(tokenizer, "is_fast", False):
            raise TriptychError(
                ErrorKind.UNSUPPORTED, f"{name} has no fast tokenizer (tokenizer.json)", "settings.model"
            )
        try:
            found = inputs_of(text)
        except TemplateSyntaxError as error:
            message = f"the chat template of {name} is not valid: {error} (line {error.lineno})"
            raise TriptychError(ErrorKind.UNSUPPORTED, message, "settings.model") from None
        self._inputs = found - {"messages", *inspect.signature(self._render).parameters}
        self._inputs -= set(tokenizer.special_tokens_map)
        whole = text if isinstance(text, str) else "\n".join(text.values())
        # some read them from the system message, as a text
        self._tools_in_system = "tools" not in found and _TOOLS_IN_SYSTEM.search(whole) is not None
        self._takes_tools = "tools" in found or self._tools_in_system
        self._knows_developer = "developer" in str(text)
        self._formats = Formats.of(whole, self._takes_tools, *parsers)
        # Read before the stand-ins join them.
        added = dict(tokenizer.added_tokens_decoder)
        special = {token.content for token in added.values() if token.special}
        special |= {getattr(processor, f"{m}_token", None) or "" for m in ("image", "video", "audio")}
        pattern = "|".join(re.escape(s) for s in sorted(special - control - {""}, key=len, reverse=True))
        self._special = re.compile(pattern or r"(?!)")
        self._plain = _plain_tokenizer(tokenizer)
        self._added = {int(number): str(token.content) for number, token in added.items()}
        self._added_ids = frozenset(added)
        self._frame = _frame(tokenizer)
        self._bos: str | None = tokenizer.bos_token
        self._tokenizer = tokenizer
        self._vocabulary = len(tokenizer)
        self._encode: Callable[[str], list[int]] = partial(_encode, tokenizer)
        self._places = {modality: (self._encode(token), token) for modality, token in media.items()}
        from tokenizers import AddedToken

        self._names = [f"<|{secrets.token_hex(12)}|>" for _ in range(_STAND_INS)]
        tokenizer.add_tokens([AddedToken(n, normalized=False, special=True) for n in self._names], special_tokens=True)
        self._ids = [int(tokenizer.convert_tokens_to_ids(n)) for n in self._names]

    def write(self, messages: Sequence[Message], template: TemplateInputs = NO_INPUTS) -> Prompt:
        """Apply the template.

        Raises:
            TriptychError: INVALID_REQUEST where the template refuses the messages (order of roles and so on) or does
                not read a variable, UNSUPPORTED where it takes no tools.
        """
        from jinja2.exceptions import TemplateError

        literals: dict[str, int] = {}
        conversation = [self._message(m, message, literals) for m, message in enumerate(messages)]
        options = self._options(template, literals)
        if self._tools_in_system and template.tools:
            conversation = _with_tools(conversation, options.pop("tools"))
        options["add_generation_prompt"] = template.add_generation_prompt
        if template.continue_final_message:
            options["continue_final_message"] = True
        try:
            text = self._render(conversation, tokenize=False, **options)
        except TemplateError as error:
            raise invalid(f"the checkpoint's chat template refuses these messages: {error}", "messages") from None
        except (TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
            if template.continue_final_message and "continue_final_message" in str(error):
                raise invalid(
                    "the checkpoint's chat template does not write the last message as it is given, so it cannot be "
                    "continued",
                    "continue_final_message",
                ) from None
            raise invalid(f"the checkpoint's chat template cannot render these messages: {error}", "messages") from None
        final = messages[-1].text if template.continue_final_message else ""
        return Prompt(
            str(text),
            {self._ids[k]: self._literal_ids(piece) for piece, k in literals.items()},
            written=self._formats.written(template, str(text), final),
        )

    def read(self, prompt: RawPrompt, modalities: Collection[str]) -> Prompt:
        """A prompt that is the model's own text or token ids already.

        Args:
            prompt: the caller's.
            modalities: of its media.

        Raises:
            TriptychError: INVALID_REQUEST for a token id that there is not, or too many media.
        """
        if prompt.token_ids is None:
            text = prompt.text or ""
            return Prompt(text, {}, ((), ()) if prompt.add_special_tokens else self._unwanted(text))
        self._check_ids(prompt.token_ids, "prompt.token_ids")
        runs: dict[tuple[int, ...], int] = {}
        text, start = "", 0
        for low, high, written in self._media_in(prompt.token_ids, modalities):
            text += self._run(prompt.token_ids[start:low], runs) + written
            start = high
        text += self._run(prompt.token_ids[start:], runs)
        return Prompt(text, {self._ids[k]: list(run) for run, k in runs.items()}, self._unwanted(text))

    def spell(self, ids: Sequence[int]) -> tuple[str, list[str]]:
        """See :meth:`.base.Preprocessor.spell`."""
        self._check_ids(ids, "detokenize")
        own = list(ids)
        strings = [str(token) for token in self._tokenizer.convert_ids_to_tokens(own)]
        text = self._tokenizer.decode(own, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return str(text), strings

    def _check_ids(self, ids: Sequence[int], field: str) -> None:
        for index, token in enumerate(ids):
            if not 0 <= token < self._vocabulary:
                where = f"{field}[{index}]"
                message = f"{where} must be a token id from 0 to {self._vocabulary - 1}, got {token}"
                raise invalid(message, where)

    def _unwanted(self, text: str) -> tuple[Sequence[int], Sequence[int]]:
        """What a processor puts around a text that is to stay alone; nothing where the text has begun the prompt."""
        return ((), ()) if self._bos is not None and text.startswith(self._bos) else self._frame

    def _run(self, ids: tuple[int, ...], runs: dict[tuple[int, ...], int]) -> str:
        """What stands for token ids in a prompt's text."""
        if not ids:
            return ""
        if ids not in runs and len(runs) == _STAND_INS:
            raise invalid(f"prompt.token_ids has too many media: at most {_STAND_INS - 1}", "prompt.token_ids")
        return self._names[runs.setdefault(ids, len(runs))]

    def _media_in(self, ids: tuple[int, ...], modalities: Collection[str]) -> list[tuple[int, int, str]]:
        """(start, end, text) of what the processor must see of token ids: places of media and special tokens around."""
        places = [self._places[modality] for modality in sorted(modalities) if modality in self._places]
        found: list[tuple[int, int, str]] = []
        index = 0
        while index < len(ids):
            own = next((p for p in places if tuple(p[0]) == ids[index : index + len(p[0])]), None)
            if own is None:
                index += 1
                continue
            low, high, text = index, index + len(own[0]), own[1]
            end = found[-1][1] if found else 0
            while low > end and ids[low - 1] in self._added:
                low -= 1
                text = self._added[ids[low]] + text
            while high < len(ids) and ids[high] in self._added and not any(ids[high] == p[0][0] for p in places):
                text += self._added[ids[high]]
                high += 1
            found.append((low, high, text))
            index = high
        return found

    def _options(self, template: TemplateInputs, literals: dict[str, int]) -> dict[str, Any]:
        """What the template gets beside the messages."""
        options = {}
        if template.tools:
            if not self._takes_tools:
                message = "this model's chat template takes no tools; name one that does with --chat-template"
                raise TriptychError(ErrorKind.UNSUPPORTED, message, "tools")
            options["tools"] = self._literally(list(template.tools), "tools", literals)
        for name, value in template.variables.items():
            where = f"chat_template_kwargs.{name}"
            if name not in self._inputs:
                known = ", ".join(sorted(self._inputs)) or "none"
                raise invalid(f"{where}: this model's chat template does not read it; it reads {known}", where)
            options[name] = self._literally(value, where, literals)
        if template.reasoning_effort:
            given = frozenset(template.variables)
            options |= self._formats.effort(template.reasoning_effort, self._inputs, given)
        return options

    def _literally(self, value: Any, where: str, literals: dict[str, int]) -> Any:
        """A JSON value with special tokens in its texts replaced."""
        if isinstance(value, str):
            return self._special.sub(lambda match: self._stand_in(match.group(), where, literals), value)
        if isinstance(value, Mapping):
            own = value.items()
            return {self._literally(k, where, literals): self._literally(v, where, literals) for k, v in own}
        return [self._literally(item, where, literals) for item in value] if isinstance(value, list) else value

    def _message(self, m: int, message: Message, literals: dict[str, int]) -> dict[str, Any]:
        role = message.role
        if role == "developer" and not self._knows_developer:
            role = "system"
        texts = iter(self._guard(message, f"messages[{m}]", literals))
        content = [
            {"type": part.modality} if isinstance(part, MediaPart) else {"type": "text", "text": next(texts)}
            for part in message.parts
        ]
        said = "".join(part["text"] for part in content) if message.plain else content
        if message.role == "tool" or message.tool_calls or message.reasoning or message.name:
            where = f"messages[{m}]"
            guard = partial(self._literally, literals=literals)
            return self._calls.turn(message, said, where, self._formats.form, guard) | {"role": role}
        return {"role": role, "content": said}

    @cached_property
    def _calls(self) -> CallStyle:
        """Found out when it is needed first."""
        return CallStyle.of(self._render, self._takes_tools and not self._tools_in_system)

    def _guard(self, message: Message, where: str, literals: dict[str, int]) -> list[str]:
        """The texts of a message with special tokens replaced, also those that neighbouring texts form together."""
        out: list[str] = []
        run: list[str] = []
        for part in (*message.parts, None):
            if isinstance(part, TextPart):
                run.append(part.text)
                continue
            joined = "".join(run)
            # Half-open ranges of special tokens, the next one last.
            special = [match.span() for match in self._special.finditer(joined)][::-1]
            start = 0
            for text in run:
                end = start + len(text)
                pieces: list[str] = []
                while special and special[-1][0] < end:
                    low, high = special.pop()
                    pieces += [joined[start:low], self._stand_in(joined[low : min(high, end)], where, literals)]
                    start = min(high, end)
                    if high > end:
                        # The rest of it is in the next text.
                        special.append((end, high))
                out.append("".join(pieces) + joined[start:end])
                start = end
            run = []
        return out

    def _stand_in(self, literal: str, where: str, literals: dict[str, int]) -> str:
        if literal not in literals and len(literals) == _STAND_INS:
            raise invalid(f"{where} holds too many different pieces of special tokens: at most {_STAND_INS}", where)
        return self._names[literals.setdefault(literal, len(literals))]

    def _literal_ids(self, text: str) -> list[int]:
        ids: list[int] = self._plain.encode(text, add_special_tokens=False).ids
        if self._added_ids.isdisjoint(ids):
            return ids
        # A vocabulary that holds the token as a whole: a single character can never be it.
        return [i for char in text for i in self._plain.encode(char, add_special_tokens=False).ids]


def _encode(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer([text], add_special_tokens=False)["input_ids"][0]
    return list(ids)


def _frame(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What a tokenizer puts before and after any text."""
    found = tokenizer.backend_tokenizer.encode("a")
    own = [k for k, special in enumerate(found.special_tokens_mask) if not special]
    return found.ids[: own[0]], found.ids[own[-1] + 1 :]


def _with_tools(conversation: list[dict[str, Any]], tools: list[Any]) -> list[dict[str, Any]]:
    """A conversation whose system message has the functions in its key ``tools``."""
    if conversation[0]["role"] != "system":
        conversation = [{"role": "system", "content": "You are a helpful assistant with some tools."}, *conversation]
    listed = json.dumps([tool["function"] for tool in tools], ensure_ascii=False)
    return [{**conversation[0], "tools": listed}, *conversation[1:]]


def _plain_tokenizer(tokenizer: Any) -> Any:
    """A copy of the tokenizer (of the tokenizers library) that knows no added tokens."""
    from tokenizers import Tokenizer

    data = json.loads(tokenizer.backend_tokenizer.to_str())
    data |= {"added_tokens": [], "post_processor": None, "truncation": None, "padding": None}
    return Tokenizer.from_str(json.dumps(data))


def _renderer(tokenizer: Any, template: ChatTemplate, own: Any, media: Mapping[str, str]) -> Callable[..., Any]:
    """``apply_chat_template`` with a template that is not the checkpoint's.

    Args:
        tokenizer: the checkpoint's.
        template: to render with.
        own: the processor or tokenizer that has the checkpoint's template, if there is one.
        media: see :class:`PromptWriter`.
    """
    render = partial(tokenizer.apply_chat_template, chat_template=template.text)
    if template in TEMPLATES.values():
        places = {m: _written(own, m, token) for m, token in media.items() if token not in template.text}
        return partial(render, places=places)
    if not _takes_parts(render):
        return joining(render, media)
    for modality, token in media.items():
        if not renders_parts(render, {modality: token}):
            raise invalid(
                f"the chat template of --chat-template writes no {token!r} for a part of type {modality}, which this "
                "model's processor needs",
                "settings.chat_template",
            )
    return render


def _takes_parts(render: Callable[..., Any]) -> bool:
    """Whether a chat template takes the content of a message as a list of parts."""
    from jinja2.exceptions import TemplateError

    mark = secrets.token_hex(8)
    conversation = [{"role": "user", "content": [{"type": "text", "text": mark}]}]
    try:
        text = str(render(conversation, tokenize=False))
    except (TemplateError, TypeError, ValueError, KeyError, IndexError, AttributeError):
        return False
    # one for texts may write the list as Python does
    return mark in text and "'type'" not in text


def _written(own: Any, modality: str, token: str) -> str:
    """What the checkpoint's own template writes for a medium, around the token for it."""
    from jinja2.exceptions import TemplateError

    marks = [secrets.token_hex(8) for _ in range(2)]
    parts = [{"type": "text", "text": marks[0]}, {"type": modality}, {"type": "text", "text": marks[1]}]
    try:
        text = str(own.apply_chat_template([{"role": "user", "content": parts}], tokenize=False))
    except (TemplateError, TypeError, ValueError, KeyError, IndexError, AttributeError):
        # there is none, or none for such content
        return token
    found = text.partition(marks[0])[2].partition(marks[1])[0]
    return found if found.count(token) == 1 else token


def joining(render: Callable[..., Any], tokens: Mapping[str, str]) -> Callable[..., Any]:
    """``render`` for messages of several parts, which become one text each. Args: see :func:`renders_parts`."""

    def joined(conversation: Sequence[Mapping[str, Any]], **options: Any) -> Any:
        return render([{**turn, "content": join_parts(turn["content"], tokens)} for turn in conversation], **options)

    return joined


def renders_parts(render: Callable[..., Any], tokens: Mapping[str, str]) -> bool:
    """Whether a chat template itself writes the tokens of a message's parts.

    Args:
        render: ``apply_chat_template`` with it.
        tokens: modality -> what stands for a medium.
    """
    from jinja2.exceptions import TemplateError

    parts = [{"type": "text", "text": "x"}, *({"type": modality} for modality in tokens)]
    try:
        text = str(render([{"role": "user", "content": parts}], tokenize=False))
    except (TemplateError, TypeError, ValueError, KeyError, IndexError, AttributeError):
        # it was not written for such content
        return False
    return all(token in text for token in tokens.values())


def join_parts(content: Any, tokens: Mapping[str, str]) -> str:
    """A message's content as one text."""
    if isinstance(content, str):
        return content
    return "".join(part["text"] if part["type"] == "text" else tokens[part["type"]] for part in content)
