"""The body of POST /generate, with SGLang's names (``GenerateReqInput`` of github.com/sgl-project/sglang)."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from triptych.python_models.contract import _check as check
from triptych.python_models.contract.errors import ErrorKind, TriptychError, invalid
from triptych.python_models.contract.request import ChatRequest, MediaPart, RawPrompt, cache_salt, priority, prompt_ids
from triptych.python_models.contract.sampling import MAX_TOP_LOGPROBS, SamplingParams

from .. import parts
from ..errors import in_openai_words
from ..fields import json_object, only, optional_boolean, parse_sampling

DEFAULT_MAX_NEW_TOKENS = 128
MAX_PROMPTS = 256
MAX_RID = 128

_MEDIA = {"image": "image_data", "video": "video_data", "audio": "audio_data"}
_OWN = (
    *("text", "input_ids", "sampling_params", "rid", "stream", "priority", "extra_key", *_MEDIA.values()),
    *("return_logprob", "logprob_start_len", "top_logprobs_num", "return_text_in_logprobs", "modalities"),
)
# Fields without effect here, and the only value, beside null, that asks for nothing.
REFUSED: dict[str, Callable[[Any, str], None]] = {
    "custom_logit_processor": only(),
    "input_embeds": only(),
    "log_metrics": only(True, False),
    "lora_path": only(),
    "return_hidden_states": only(False),
    "session_params": only(),
    "token_ids_logprob": only(),
}
# SGLang's name of a sampling parameter -> that of the OpenAI endpoints
_SAME = (
    *("temperature", "top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty"),
    *("stop", "stop_token_ids", "n", "ignore_eos", "skip_special_tokens", "logit_bias", "regex", "ebnf"),
)
_RENAMED = {"max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens", "sampling_seed": "seed"}
_REFUSED_PARAMS: dict[str, Callable[[Any, str], None]] = {
    "custom_params": only(),
    "no_stop_trim": only(False),
    "spaces_between_special_tokens": only(True),
    "stop_regex": only(),
    "stream_interval": only(1),
    "structural_tag": only(),
}


@dataclass(frozen=True)
class LogprobOptions:
    """What is told of the likelihood of tokens: anything, and with their text."""

    wanted: bool = False
    text: bool = False


@dataclass(frozen=True)
class GenerateCall:
    """A checked body.

    Attributes:
        asks: (request, media) of each prompt.
        rids: the id of each.
        logprobs: what is told of each.
        batch: the body has lists, so the answer is one.
        stream: as events.
        names: see :func:`..errors.in_openai_words`.
        field: the one that has the prompts.
    """

    asks: tuple[tuple[ChatRequest, tuple[bytes, ...]], ...]
    rids: tuple[str, ...]
    logprobs: tuple[LogprobOptions, ...]
    batch: bool
    stream: bool
    names: Mapping[str, str]
    field: str

    def in_its_words(self, error: TriptychError) -> TriptychError:
        """An error of a stage with the names of this body's fields."""
        found = in_openai_words(error, self.names)
        return replace(found, param=self.field) if found.param == "prompt" else found


def parse(body: bytes, lease_s: float) -> GenerateCall:
    """Check a body.

    Raises:
        TriptychError: naming the field at fault and what is allowed.
    """
    data = json_object(body)
    check.known_keys(data, (*_OWN, *REFUSED), "")
    for name, rule in REFUSED.items():
        if data.get(name) is not None:
            rule(data[name], name)
    _modalities(data.get("modalities"))
    stream = optional_boolean(data, "stream")
    prompts, field, batch = _prompts(data)
    count = len(prompts)
    text = optional_boolean(data, "return_text_in_logprobs")
    names = {f"prompt.{'text' if field == 'text' else 'token_ids'}": field, "max_tokens": "max_new_tokens"}
    params = _each(data, "sampling_params", count, batch, {})
    wanted = _each(data, "return_logprob", count, batch, False)
    tops = _each(data, "top_logprobs_num", count, batch, 0)
    for index, start in enumerate(_each(data, "logprob_start_len", count, batch, -1)):
        where = _at("logprob_start_len", index, batch)
        if check.integer(start, where) != -1:
            message = f"{where} is not supported beyond -1: log probabilities of prompts are not computed"
            raise TriptychError(ErrorKind.UNSUPPORTED, message, where)
    media = {modality: _media_of_each(data, name, count, batch) for modality, name in _MEDIA.items()}
    asks, logprobs = [], []
    for index, prompt in enumerate(prompts):
        blobs: list[bytes] = []
        own: list[MediaPart] = []
        for modality, name in _MEDIA.items():
            for place, item in enumerate(media[modality][index]):
                where = f"{_at(name, index, batch)}[{place}]"
                ours = f"prompt.media[{index}][{len(own)}]" if count > 1 else f"prompt.media[{len(own)}]"
                names[ours] = where
                own.append(parts.item(modality, item, where, blobs))
        where = _at("return_logprob", index, batch)
        options = LogprobOptions(check.boolean(wanted[index], where), text)
        top = check.integer(tops[index], _at("top_logprobs_num", index, batch), 0, MAX_TOP_LOGPROBS)
        request = ChatRequest(
            (),
            _sampling(params[index], _at("sampling_params", index, batch), options.wanted, top),
            stream,
            lease_s,
            priority=0 if data.get("priority") is None else priority(data["priority"]),
            cache_salt=_extra_key(data.get("extra_key")),
            prompt=RawPrompt(prompt.text, prompt.token_ids, tuple(own)),
        )
        asks.append((request, tuple(blobs)))
        logprobs.append(options)
    return GenerateCall(tuple(asks), _rids(data.get("rid"), count, batch), tuple(logprobs), batch, stream, names, field)


def _at(name: str, index: int, batch: bool) -> str:
    return f"{name}[{index}]" if batch else name


def _prompts(data: Mapping[str, Any]) -> tuple[list[RawPrompt], str, bool]:
    """(prompts, field that has them, they are a list)."""
    given = [name for name in ("text", "input_ids") if data.get(name) is not None]
    if len(given) != 1:
        raise invalid("exactly one of text and input_ids is needed", "text")
    (field,) = given
    value = data[field]
    if field == "text":
        if isinstance(value, str):
            return [RawPrompt(_text(value, "text"))], field, False
        _check_batch(value, "text", "a string or a list of strings")
        return (
            [RawPrompt(_text(check.string(item, f"text[{k}]"), f"text[{k}]")) for k, item in enumerate(value)],
            field,
            True,
        )
    if isinstance(value, list) and value and type(value[0]) is int:
        return [RawPrompt(None, prompt_ids(value, field))], field, False
    _check_batch(value, field, "a list of token ids or a list of such lists")
    return [RawPrompt(None, prompt_ids(item, f"{field}[{k}]")) for k, item in enumerate(value)], field, True


def _check_batch(value: Any, field: str, what: str) -> None:
    if not isinstance(value, list) or not value:
        raise invalid(f"{field} must be {what}, not {'empty' if value == [] else check.json_type(value)}", field)
    if len(value) > MAX_PROMPTS:
        raise invalid(f"{field} has {len(value)} prompts; at most {MAX_PROMPTS} are allowed", field)


def _text(value: str, where: str) -> str:
    if not value:
        raise invalid(f"{where} must not be empty", where)
    return parts.text(value, where)


def _each(data: Mapping[str, Any], name: str, count: int, batch: bool, default: Any) -> list[Any]:
    """A field's value for each prompt: one for all, or a list."""
    value = data.get(name)
    if value is None:
        return [default] * count
    if not isinstance(value, list):
        return [value] * count
    if not batch:
        raise invalid(f"{name} must not be a list for one prompt", name)
    if len(value) != count:
        raise invalid(f"{name} has {len(value)} entries for {count} prompts", name)
    return [default if item is None else item for item in value]


def _media_of_each(data: Mapping[str, Any], name: str, count: int, batch: bool) -> list[list[Any]]:
    """Media of each prompt: for one prompt an item or a list, for several a list of either."""
    value = data.get(name)
    if value is None:
        return [[] for _ in range(count)]
    if not batch:
        return [value if isinstance(value, list) else [value]]
    if not isinstance(value, list) or len(value) != count:
        have = f"{len(value)} entries" if isinstance(value, list) else "one"
        raise invalid(f"{name} must be a list with an entry for each of the {count} prompts, but has {have}", name)
    return [[] if item is None else item if isinstance(item, list) else [item] for item in value]


def _modalities(value: Any) -> None:
    known = ("image", "multi-images", "video", "audio")
    for item in () if value is None else value if isinstance(value, list) else [value]:
        if item not in known:
            raise invalid(f"modalities must be a list of {', '.join(known)}, got {item!r}", "modalities")


def _rids(value: Any, count: int, batch: bool) -> tuple[str, ...]:
    if value is None:
        return tuple(uuid.uuid4().hex for _ in range(count))
    if isinstance(value, str) and count > 1:
        value = [f"{value}_{k}" for k in range(count)]
    given = value if isinstance(value, list) and batch else [value]
    if len(given) != count:
        raise invalid(f"rid has {len(given)} entries for {count} prompts", "rid")
    for index, item in enumerate(given):
        where = _at("rid", index, batch)
        if not 0 < len(parts.text(item, where)) <= MAX_RID:
            raise invalid(f"{where} must have 1 to {MAX_RID} characters", where)
    if len(set(given)) != count:
        raise invalid("rid holds an id twice", "rid")
    return tuple(given)


def _extra_key(value: Any) -> str:
    if value is None:
        return ""
    try:
        return parts.text(cache_salt(value), "extra_key")
    except TriptychError as error:
        raise in_openai_words(error, {"cache_salt": "extra_key"}) from None


def _sampling(value: Any, where: str, logprobs: bool, top: int) -> SamplingParams:
    """Sampling parameters by SGLang's names."""
    data = check.mapping(value, where)
    check.known_keys(data, (*_SAME, *_RENAMED, *_REFUSED_PARAMS, "json_schema"), where)
    for name, rule in _REFUSED_PARAMS.items():
        if data.get(name) is not None:
            rule(data[name], f"{where}.{name}")
    given = {name: data[name] for name in _SAME if data.get(name) is not None}
    given |= {ours: data[theirs] for theirs, ours in _RENAMED.items() if data.get(theirs) is not None}
    given.setdefault("max_tokens", DEFAULT_MAX_NEW_TOKENS)
    schema = data.get("json_schema")
    if schema is not None:
        given["response_format"] = {
            "type": "json_schema",
            "json_schema": {"name": "a", "schema": _schema(schema, where)},
        }
    if logprobs:
        given |= {"logprobs": True, "top_logprobs": top}
    try:
        return parse_sampling(given)[0]
    except TriptychError as error:
        raise _in_its_words(error, where) from None


def _schema(value: Any, where: str) -> Any:
    """SGLang takes a schema as text."""
    where = f"{where}.json_schema"
    try:
        return check.mapping(json.loads(value) if isinstance(value, str) else value, where)
    except (ValueError, RecursionError) as error:
        raise invalid(f"{where} is not JSON: {error}", where) from None


def _in_its_words(error: TriptychError, where: str) -> TriptychError:
    """An error about sampling parameters with SGLang's names."""
    names: dict[str, str] = {ours: f"{where}.{theirs}" for theirs, ours in _RENAMED.items()}
    names |= {name: f"{where}.{name}" for name in _SAME}
    names |= {"response_format.json_schema.schema": f"{where}.json_schema", "response_format": f"{where}.json_schema"}
    param = error.param or ""
    root = next((name for name in names if param == name or param.startswith((f"{name}.", f"{name}["))), None)
    if root is None:
        return error
    return replace(error, message=error.message.replace(root, names[root], 1), param=names[root] + param[len(root) :])
