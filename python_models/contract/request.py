"""What a caller sends into an ensemble: the JSON in tensor ``request`` beside the raw blobs in tensor ``media``.

The text of a request never holds media bytes: a content part names a blob by its index in ``media`` or gives an
http(s) URL that ``preprocess`` fetches::

    {"messages": [{"role": "user", "content": [{"type": "image", "blob": 0},
                                               {"type": "audio", "url": "https://example.com/a.wav"},
                                               {"type": "text", "text": "What is this?"}]}],
     "sampling": {"max_tokens": 64, "temperature": 0}, "stream": true, "lease_s": 10}

In place of ``messages`` a request may have a ``prompt`` that no chat template is applied to, as text or token ids, with
its media beside it::

    {"prompt": {"text": "<|vision_start|><|image_pad|><|vision_end|>A picture of", "media": [{"type": "image",
     "blob": 0}]}}
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from . import _check as check
from .errors import invalid
from .media_options import DETAILS as DETAILS
from .media_options import MEDIA_OPTIONS as MEDIA_OPTIONS
from .media_options import NO_OPTIONS as NO_OPTIONS
from .media_options import MediaOptions as MediaOptions
from .sampling import SamplingParams
from .tools import (
    ANY_CALLS,
    TURN_FIELDS,
    Calling,
    Tool,
    ToolCall,
    call_json,
    calling,
    check_unicode,
    choice_json,
    may_be_silent,
    reasoning_effort,
    tools,
    turn_fields,
)

ROLES = ("system", "developer", "user", "assistant", "tool")
MODALITIES = ("image", "video", "audio")
MAX_SALT = 256
MAX_PROMPT_IDS = 2**24
_CHAT_FIELDS = (
    *("tools", "tool_choice", "parallel_tool_calls", "reasoning_effort", "separate_reasoning"),
    *("chat_template_kwargs", "add_generation_prompt", "continue_final_message"),
)
_FIELDS = ("messages", "prompt", "sampling", "stream", *_CHAT_FIELDS)
_OPTIONAL = {"lease_s": None, "timeout_s": None, "priority": 0, "cache_salt": "", "heartbeats": True, "embed": False}


@dataclass(frozen=True)
class TextPart:
    """A piece of text, taken literally: special tokens written in it are plain characters."""

    text: str


@dataclass(frozen=True)
class MediaPart:
    """A picture, video or sound; exactly one of ``blob`` (index into ``media``) and ``url`` (http, https) is set."""

    modality: str
    blob: int | None = None
    url: str | None = None
    options: MediaOptions = NO_OPTIONS


Part = TextPart | MediaPart


@dataclass(frozen=True)
class Message:
    """One turn.

    Attributes:
        role: one of :data:`ROLES`.
        parts: its content; none where an assistant's turn has only calls or reasoning.
        plain: True where the caller gave a string, not a list of parts (templates may differ).
        name: of who speaks, or of the function that a message of role tool is the result of.
        reasoning: before an assistant's answer, for templates that read ``reasoning_content``.
        tool_calls: of an assistant's turn.
        tool_call_id: the call that a message of role tool answers.
    """

    role: str
    parts: tuple[Part, ...]
    plain: bool = False
    name: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str = ""

    @property
    def text(self) -> str:
        """All its text."""
        return "".join(part.text for part in self.parts if isinstance(part, TextPart))


@dataclass(frozen=True)
class RawPrompt:
    """A prompt that no chat template is applied to; exactly one of ``text`` and ``token_ids`` is set.

    Special tokens written in its text are special tokens: it is the caller's own prompt. A medium's place is where the
    prompt has what the checkpoint's processor expects for it (``<|image_pad|>``, ``<image>`` ...), once for each.

    Attributes:
        text: as the model is to read it.
        token_ids: the same as token ids; they are kept as they are, but for those of the media.
        media: in the order of their places.
        add_special_tokens: put those in front of a text that the tokenizer puts there, unless it has them already.
            Token ids never get any.
    """

    text: str | None = None
    token_ids: tuple[int, ...] | None = None
    media: tuple[MediaPart, ...] = ()
    add_special_tokens: bool = True


@dataclass(frozen=True)
class TemplateInputs:
    """What the chat template gets beside the messages. Special tokens written in any text of it are plain characters.

    Attributes:
        tools: functions in OpenAI's schema that the model may call.
        variables: name -> JSON value; each must be one that the template reads, such as ``enable_thinking``.
        add_generation_prompt: end where the assistant begins to speak.
        continue_final_message: end with the last message, an assistant's, left open, so that the answer goes on with
            it; not with ``add_generation_prompt``.
        calling: how the tools may be called.
        reasoning_effort: how much the model is to reason, for templates that can say so; "" is as they have it.
        separate_reasoning: the caller sets reasoning apart from the answer: it is told how, and tokens are counted.
    """

    tools: tuple[Tool, ...] = ()
    variables: Mapping[str, Any] = field(default_factory=dict)
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    calling: Calling = ANY_CALLS
    reasoning_effort: str = ""
    separate_reasoning: bool = False


NO_INPUTS = TemplateInputs()


@dataclass(frozen=True)
class ChatRequest:
    """One request to the ensembles ``chat`` and ``chat_text``: a conversation, or a prompt as the model reads it.

    Attributes:
        messages: the conversation, oldest first; none where there is a ``prompt``.
        sampling: how to choose tokens.
        stream: send deltas as they come; otherwise one delta with the whole answer.
        lease_s: end the request unless it is renewed (``renew`` input of language_model) at least this often;
            None: no lease.
        timeout_s: end the request after this many seconds in any case; None: the server's limit.
        priority: waiting requests with a higher one are admitted first, and lose their KV blocks last.
        cache_salt: requests share the prefix cache only with those of the same salt.
        heartbeats: send a delta on acceptance, and others that say nothing while nothing else is sent. Without them and
            without ``stream`` there is one response for each choice.
        template: fields ``tools``, ``tool_choice``, ``parallel_tool_calls``, ``reasoning_effort``,
            ``separate_reasoning``, ``chat_template_kwargs``, ``add_generation_prompt``, ``continue_final_message``.
        prompt: in place of messages.
        embed: give an embedding of all of it, the decoder's last hidden state, instead of an answer; no sampling.
    """

    messages: tuple[Message, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stream: bool = True
    lease_s: float | None = None
    timeout_s: float | None = None
    priority: int = 0
    cache_salt: str = ""
    heartbeats: bool = True
    template: TemplateInputs = field(default_factory=TemplateInputs)
    prompt: RawPrompt | None = None
    embed: bool = False

    @property
    def content(self) -> tuple[Message, ...] | RawPrompt:
        """What is to be answered."""
        return self.messages if self.prompt is None else self.prompt

    @property
    def content_field(self) -> str:
        """The field that has it."""
        return "messages" if self.prompt is None else "prompt"

    def media(self) -> Iterator[tuple[str, MediaPart]]:
        """(field name, part) of every medium in prompt order."""
        if self.prompt is not None:
            yield from ((f"prompt.media[{p}]", medium) for p, medium in enumerate(self.prompt.media))
        for m, message in enumerate(self.messages):
            for p, part in enumerate(message.parts):
                if isinstance(part, MediaPart):
                    yield f"messages[{m}].content[{p}]", part

    @classmethod
    def from_json(cls, text: str | bytes, num_blobs: int) -> ChatRequest:
        """Parse and validate the ``request`` tensor.

        Raises:
            TriptychError: INVALID_REQUEST naming the field.
        """
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise invalid(f"request is not JSON: {error}", "request") from None
        data = check.mapping(data, "request")
        check.known_keys(data, (*_FIELDS, *_OPTIONAL), "")
        if ("messages" in data) == ("prompt" in data):
            raise invalid("the request needs exactly one of messages and prompt", "messages")
        messages: tuple[Message, ...] = ()
        prompt = None
        if "prompt" in data:
            prompt = _prompt(data["prompt"])
            for name in _CHAT_FIELDS:
                if name in data:
                    raise invalid(f"{name} is only allowed with messages: a prompt has no chat template", name)
        else:
            messages = _messages(data["messages"])
        request = cls(
            messages=messages,
            sampling=SamplingParams.from_json(data.get("sampling", {})),
            stream=check.boolean(data.get("stream", True), "stream"),
            lease_s=_optional_seconds(data.get("lease_s"), "lease_s"),
            timeout_s=_optional_seconds(data.get("timeout_s"), "timeout_s"),
            priority=priority(data.get("priority", 0)),
            cache_salt=cache_salt(data.get("cache_salt", "")),
            heartbeats=check.boolean(data.get("heartbeats", True), "heartbeats"),
            template=_template(data, messages),
            prompt=prompt,
            embed=check.boolean(data.get("embed", False), "embed"),
        )
        if request.embed and data.get("sampling"):
            raise invalid("sampling is not allowed with embed, which generates nothing", "sampling")
        for where, part in request.media():
            if part.blob is not None and part.blob >= num_blobs:
                raise invalid(f"{where}.blob is {part.blob} but the request has {num_blobs} media blobs", where)
        return request

    def to_json(self) -> str:
        """The ``request`` tensor's text."""
        data: dict[str, Any] = (
            {"messages": [_message_json(m) for m in self.messages]}
            if self.prompt is None
            else {"prompt": _prompt_json(self.prompt)}
        )
        if sampling := self.sampling.to_json():
            data["sampling"] = sampling
        if not self.stream:
            data["stream"] = False
        for name, default in _OPTIONAL.items():
            if (value := getattr(self, name)) != default:
                data[name] = value
        data |= choice_json(self.template.tools, self.template.calling)
        if self.template.reasoning_effort:
            data["reasoning_effort"] = self.template.reasoning_effort
        if self.template.separate_reasoning:
            data["separate_reasoning"] = True
        if self.template.variables:
            data["chat_template_kwargs"] = self.template.variables
        if not self.template.add_generation_prompt:
            data["add_generation_prompt"] = False
        if self.template.continue_final_message:
            data["continue_final_message"] = True
        return json.dumps(data, ensure_ascii=False)


def _optional_seconds(value: Any, param: str) -> float | None:
    return None if value is None else check.number(value, param, 0.001, 86400)


def priority(value: Any) -> int:
    """Field ``priority``, checked."""
    return check.integer(value, "priority", -(2**31), 2**31 - 1)


def cache_salt(value: Any) -> str:
    """Field ``cache_salt``, checked."""
    if len(check.string(value, "cache_salt")) > MAX_SALT:
        raise invalid(f"cache_salt has {len(value)} characters; at most {MAX_SALT} are allowed", "cache_salt")
    return str(value)


def template_variables(value: Any) -> Mapping[str, Any]:
    """Field ``chat_template_kwargs``, checked; which names there are, the template says."""
    found = check.mapping(value, "chat_template_kwargs")
    check_unicode(found, "chat_template_kwargs")
    return found


def continuation(add: bool | None, go_on: bool, messages: Sequence[Message]) -> tuple[bool, bool]:
    """Fields ``add_generation_prompt`` (None: not given) and ``continue_final_message``, checked.

    Raises:
        TriptychError: INVALID_REQUEST where both are set, or the last message is none that could go on.
    """
    if not go_on:
        return add is None or add, False
    if add:
        raise invalid(
            "add_generation_prompt must be false, or left out, with continue_final_message: the answer either goes on "
            "with the last message or begins a new one",
            "add_generation_prompt",
        )
    last = messages[-1]
    end = last.parts[-1] if last.parts else None
    if last.role != "assistant" or last.tool_calls or not isinstance(end, TextPart) or not end.text.strip():
        raise invalid(
            "continue_final_message needs a last message of role assistant that ends with a text",
            "continue_final_message",
        )
    return False, True


def _template(data: Mapping[str, Any], messages: Sequence[Message]) -> TemplateInputs:
    add = (
        check.boolean(data["add_generation_prompt"], "add_generation_prompt")
        if "add_generation_prompt" in data
        else None
    )
    go_on = check.boolean(data.get("continue_final_message", False), "continue_final_message")
    variables = template_variables(data.get("chat_template_kwargs", {}))
    given, how = calling(tools(data.get("tools", [])), data.get("tool_choice"), data.get("parallel_tool_calls"))
    return TemplateInputs(
        given,
        variables,
        *continuation(add, go_on, messages),
        how,
        reasoning_effort(data.get("reasoning_effort")),
        check.boolean(data.get("separate_reasoning", False), "separate_reasoning"),
    )


def _prompt(value: Any) -> RawPrompt:
    data = check.mapping(value, "prompt")
    check.known_keys(data, ("text", "token_ids", "media", "add_special_tokens"), "prompt")
    if ("text" in data) == ("token_ids" in data):
        raise invalid("prompt needs exactly one of text and token_ids", "prompt")
    media = data.get("media", [])
    if not isinstance(media, list):
        raise invalid(f"prompt.media must be a list, not {check.json_type(media)}", "prompt.media")
    parts = []
    for index, item in enumerate(media):
        part = _part(item, f"prompt.media[{index}]")
        if isinstance(part, TextPart):
            where = f"prompt.media[{index}].type"
            raise invalid(f"{where} must be one of {', '.join(MODALITIES)}, got 'text'", where)
        parts.append(part)
    special = check.boolean(data.get("add_special_tokens", True), "prompt.add_special_tokens")
    if "text" in data:
        text = check.string(data["text"], "prompt.text")
        check_unicode(text, "prompt.text")
        return RawPrompt(text, None, tuple(parts), special)
    return RawPrompt(None, prompt_ids(data["token_ids"], "prompt.token_ids"), tuple(parts), special)


def prompt_ids(value: Any, where: str) -> tuple[int, ...]:
    """Token ids of a prompt, checked but for the size of the vocabulary."""
    if not isinstance(value, list) or not value:
        raise invalid(f"{where} must be a list with at least one token id", where)
    if len(value) > MAX_PROMPT_IDS:
        raise invalid(f"{where} has {len(value)} token ids; at most {MAX_PROMPT_IDS} are allowed", where)
    for index, item in enumerate(value):
        # not check.integer for each: there may be many
        if type(item) is not int or not 0 <= item < 2**31:
            field = f"{where}[{index}]"
            raise invalid(f"{field} must be a token id, an integer from 0, got {check.json_type(item)}", field)
    return tuple(value)


def _prompt_json(prompt: RawPrompt) -> dict[str, Any]:
    data: dict[str, Any] = {"text": prompt.text} if prompt.token_ids is None else {"token_ids": list(prompt.token_ids)}
    if prompt.media:
        data["media"] = [_part_json(part) for part in prompt.media]
    if not prompt.add_special_tokens:
        data["add_special_tokens"] = False
    return data


def _messages(value: Any) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise invalid("messages must be a list with at least one message", "messages")
    return tuple(_message(item, f"messages[{i}]") for i, item in enumerate(value))


def _message(value: Any, where: str) -> Message:
    data = check.mapping(value, where)
    check.known_keys(data, ("role", "content", *TURN_FIELDS), where)
    role = data.get("role")
    if role not in ROLES:
        raise invalid(f"{where}.role must be one of {', '.join(ROLES)}, got {role!r}", f"{where}.role")
    turn = turn_fields(data, role, where)
    content = data.get("content")
    if isinstance(content, str):
        return Message(role, (TextPart(content),), True, **turn)
    if content is None and may_be_silent(turn):
        return Message(role, (), True, **turn)
    if not isinstance(content, list) or not content:
        raise invalid(f"{where}.content must be a string or a list with at least one part", f"{where}.content")
    return Message(role, tuple(_part(item, f"{where}.content[{i}]") for i, item in enumerate(content)), **turn)


def _part(value: Any, where: str) -> Part:
    data = check.mapping(value, where)
    kind = data.get("type")
    if kind == "text":
        check.known_keys(data, ("type", "text"), where)
        return TextPart(check.string(data.get("text"), f"{where}.text"))
    if kind not in MODALITIES:
        raise invalid(f"{where}.type must be one of text, {', '.join(MODALITIES)}, got {kind!r}", f"{where}.type")
    check.known_keys(data, ("type", "blob", "url", *MEDIA_OPTIONS[kind]), where)
    if ("blob" in data) == ("url" in data):
        raise invalid(f"{where} needs exactly one of blob and url", where)
    given = {name: value for name, value in data.items() if name not in ("type", "blob", "url")}
    options = MediaOptions.from_json(kind, given, where)
    if "blob" in data:
        return MediaPart(kind, blob=check.integer(data["blob"], f"{where}.blob", 0), options=options)
    return MediaPart(kind, url=check.string(data["url"], f"{where}.url"), options=options)


def _message_json(message: Message) -> dict[str, Any]:
    data: dict[str, Any] = {"role": message.role}
    if message.plain and len(message.parts) == 1 and isinstance(message.parts[0], TextPart):
        data["content"] = message.parts[0].text
    else:
        data["content"] = [_part_json(part) for part in message.parts] or None
    given = {"name": message.name, "reasoning_content": message.reasoning, "tool_call_id": message.tool_call_id}
    data |= {name: value for name, value in given.items() if value}
    if message.tool_calls:
        data["tool_calls"] = [call_json(call) for call in message.tool_calls]
    return data


def _part_json(part: Part) -> dict[str, Any]:
    if isinstance(part, TextPart):
        return {"type": "text", "text": part.text}
    source = {"blob": part.blob} if part.blob is not None else {"url": part.url}
    return {"type": part.modality, **source, **part.options.to_json()}
