"""What a caller sends into an ensemble: the JSON in tensor ``request`` beside the raw blobs in tensor ``media``.

The text of a request never holds media bytes: a content part names a blob by its index in ``media`` or gives an
http(s) URL that ``preprocess`` fetches::

    {"messages": [{"role": "user", "content": [{"type": "image", "blob": 0},
                                               {"type": "audio", "url": "https://example.com/a.wav"},
                                               {"type": "text", "text": "What is this?"}]}],
     "sampling": {"max_tokens": 64, "temperature": 0}, "stream": true, "lease_s": 10}
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from . import _check as check
from .errors import invalid
from .sampling import SamplingParams

ROLES = ("system", "developer", "user", "assistant")
MODALITIES = ("image", "video", "audio")
MAX_SALT = 256
MAX_TOOLS = 128
_TOOL_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_FIELDS = ("messages", "sampling", "stream", "tools", "chat_template_kwargs")
_OPTIONAL = {"lease_s": None, "timeout_s": None, "priority": 0, "cache_salt": ""}


@dataclass(frozen=True)
class TextPart:
    """A piece of text, taken literally: special tokens written in it are plain characters."""

    text: str


@dataclass(frozen=True)
class MediaOptions:
    """What a caller asks for one medium; None is as the checkpoint and the deployment have it.

    Attributes:
        detail: of a picture, OpenAI's: "low" gives it at most 512 x 512 pixels, and one tile where there are tiles;
            "high" and "auto" change nothing.
        min_pixels, max_pixels: of a picture, once it is resized.
        min_dynamic_patch, max_dynamic_patch: tiles that a picture is cut into, beside a small one of the whole.
        fps: frames of a video for each second; not with ``num_frames``.
        num_frames: frames of a video.
        max_frames: frames of a video at most.
    """

    detail: str = "auto"
    min_pixels: int | None = None
    max_pixels: int | None = None
    min_dynamic_patch: int | None = None
    max_dynamic_patch: int | None = None
    fps: float | None = None
    num_frames: int | None = None
    max_frames: int | None = None

    @classmethod
    def from_json(cls, modality: str, data: Mapping[str, Any], where: str) -> MediaOptions:
        """Check the options of a medium.

        Args:
            modality: of the medium.
            data: option -> value; null is as if it were left out.
            where: field that holds them.

        Raises:
            TriptychError: INVALID_REQUEST naming the option.
        """
        check.known_keys(data, MEDIA_OPTIONS[modality], where)
        given: dict[str, Any] = {}
        for name, value in data.items():
            field = f"{where}.{name}"
            if value is None:
                continue
            if name == "detail":
                if value not in DETAILS:
                    raise invalid(f"{field} must be one of {', '.join(DETAILS)}, got {value!r}", field)
                given[name] = value
            elif name == "fps":
                given[name] = check.number(value, field, 0.001, 1000)
            else:
                given[name] = check.integer(value, field, 1, 2**31 - 1)
        for low, high in (("min_pixels", "max_pixels"), ("min_dynamic_patch", "max_dynamic_patch")):
            if low in given and high in given and given[low] > given[high]:
                raise invalid(
                    f"{where}.{low} must be at most {high} ({given[high]}), got {given[low]}", f"{where}.{low}"
                )
        if "fps" in given and "num_frames" in given:
            raise invalid(f"{where}: only one of fps and num_frames is allowed", f"{where}.num_frames")
        return cls(**given)

    def to_json(self) -> dict[str, Any]:
        """Those that are given."""
        return {name: value for name, value in asdict(self).items() if value != _DEFAULTS[name]}

    @property
    def key(self) -> str:
        """The same for options that ask for the same, "" for nothing."""
        return json.dumps({name: value for name, value in self.to_json().items() if value != "high"}) if self else ""

    def __bool__(self) -> bool:
        return any(value != "high" for value in self.to_json().values())


_DEFAULTS = {f.name: f.default for f in fields(MediaOptions)}
DETAILS = ("auto", "low", "high")
MEDIA_OPTIONS = {
    "image": ("detail", "min_pixels", "max_pixels", "min_dynamic_patch", "max_dynamic_patch"),
    "video": ("fps", "num_frames", "max_frames"),
    "audio": (),
}
NO_OPTIONS = MediaOptions()


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
    """One turn. ``plain`` is True where the caller gave a string, not a list of parts (templates may differ)."""

    role: str
    parts: tuple[Part, ...]
    plain: bool = False


@dataclass(frozen=True)
class TemplateInputs:
    """What the chat template gets beside the messages. Special tokens written in any text of it are plain characters.

    Attributes:
        tools: functions in OpenAI's schema that the model may call.
        variables: name -> JSON value; each must be one that the template reads, such as ``enable_thinking``.
    """

    tools: tuple[Mapping[str, Any], ...] = ()
    variables: Mapping[str, Any] = field(default_factory=dict)


NO_INPUTS = TemplateInputs()


@dataclass(frozen=True)
class ChatRequest:
    """One request to the ensembles ``chat`` and ``chat_text``.

    Attributes:
        messages: the conversation, oldest first.
        sampling: how to choose tokens.
        stream: send deltas as they come; otherwise one delta with the whole answer.
        lease_s: end the request unless it is renewed (``renew`` input of language_model) at least this often;
            None: no lease.
        timeout_s: end the request after this many seconds in any case; None: the server's limit.
        priority: waiting requests with a higher one are admitted first, and lose their KV blocks last.
        cache_salt: requests share the prefix cache only with those of the same salt.
        template: fields ``tools`` and ``chat_template_kwargs``.
    """

    messages: tuple[Message, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stream: bool = True
    lease_s: float | None = None
    timeout_s: float | None = None
    priority: int = 0
    cache_salt: str = ""
    template: TemplateInputs = field(default_factory=TemplateInputs)

    def media(self) -> Iterator[tuple[str, MediaPart]]:
        """(field name, part) of every medium in prompt order."""
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
        messages = data.get("messages")
        if not isinstance(messages, list) or not messages:
            raise invalid("messages must be a list with at least one message", "messages")
        request = cls(
            messages=tuple(_message(item, f"messages[{i}]") for i, item in enumerate(messages)),
            sampling=SamplingParams.from_json(data.get("sampling", {})),
            stream=check.boolean(data.get("stream", True), "stream"),
            lease_s=_optional_seconds(data.get("lease_s"), "lease_s"),
            timeout_s=_optional_seconds(data.get("timeout_s"), "timeout_s"),
            priority=priority(data.get("priority", 0)),
            cache_salt=cache_salt(data.get("cache_salt", "")),
            template=TemplateInputs(
                tools(data.get("tools", [])), template_variables(data.get("chat_template_kwargs", {}))
            ),
        )
        for where, part in request.media():
            if part.blob is not None and part.blob >= num_blobs:
                raise invalid(f"{where}.blob is {part.blob} but the request has {num_blobs} media blobs", where)
        return request

    def to_json(self) -> str:
        """The ``request`` tensor's text."""
        data: dict[str, Any] = {"messages": [_message_json(m) for m in self.messages]}
        if sampling := self.sampling.to_json():
            data["sampling"] = sampling
        if not self.stream:
            data["stream"] = False
        for name, default in _OPTIONAL.items():
            if (value := getattr(self, name)) != default:
                data[name] = value
        if self.template.tools:
            data["tools"] = self.template.tools
        if self.template.variables:
            data["chat_template_kwargs"] = self.template.variables
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


def tools(value: Any) -> tuple[Mapping[str, Any], ...]:
    """Field ``tools``, checked."""
    if not isinstance(value, list):
        raise invalid(f"tools must be a list, not {check.json_type(value)}", "tools")
    if len(value) > MAX_TOOLS:
        raise invalid(f"tools has {len(value)} entries; at most {MAX_TOOLS} are allowed", "tools")
    for index, item in enumerate(value):
        where = f"tools[{index}]"
        tool = check.mapping(item, where)
        check.known_keys(tool, ("type", "function"), where)
        if tool.get("type") != "function":
            raise invalid(f"{where}.type must be function, got {tool.get('type')!r}", f"{where}.type")
        where += ".function"
        function = check.mapping(tool.get("function"), where)
        check.known_keys(function, ("name", "description", "parameters", "strict"), where)
        if not _TOOL_NAME.fullmatch(check.string(function.get("name"), f"{where}.name")):
            raise invalid(f"{where}.name must be 1 to 64 letters, digits, underscores and dashes", f"{where}.name")
        if function.get("description") is not None:
            check.string(function["description"], f"{where}.description")
        if function.get("parameters") is not None:
            check.mapping(function["parameters"], f"{where}.parameters")
        if function.get("strict") is not None:
            check.boolean(function["strict"], f"{where}.strict")
    _check_unicode(value, "tools")
    return tuple(value)


def template_variables(value: Any) -> Mapping[str, Any]:
    """Field ``chat_template_kwargs``, checked; which names there are, the template says."""
    found = check.mapping(value, "chat_template_kwargs")
    _check_unicode(found, "chat_template_kwargs")
    return found


def _check_unicode(value: Any, where: str) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise invalid(f"{where} is not valid Unicode: it has an unpaired surrogate", where) from None


def _message(value: Any, where: str) -> Message:
    data = check.mapping(value, where)
    check.known_keys(data, ("role", "content"), where)
    role = data.get("role")
    if role not in ROLES:
        raise invalid(f"{where}.role must be one of {', '.join(ROLES)}, got {role!r}", f"{where}.role")
    content = data.get("content")
    if isinstance(content, str):
        return Message(role, (TextPart(content),), plain=True)
    if not isinstance(content, list) or not content:
        raise invalid(f"{where}.content must be a string or a list with at least one part", f"{where}.content")
    return Message(role, tuple(_part(item, f"{where}.content[{i}]") for i, item in enumerate(content)))


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
    if message.plain and len(message.parts) == 1 and isinstance(message.parts[0], TextPart):
        return {"role": message.role, "content": message.parts[0].text}
    return {"role": message.role, "content": [_part_json(part) for part in message.parts]}


def _part_json(part: Part) -> dict[str, Any]:
    if isinstance(part, TextPart):
        return {"type": "text", "text": part.text}
    source = {"blob": part.blob} if part.blob is not None else {"url": part.url}
    return {"type": part.modality, **source, **part.options.to_json()}
