"""Arguments of ``chat`` and ``generate`` to a request of the contract."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, TypedDict

from triptych.python_models.contract import _check as check
from triptych.python_models.contract.errors import TriptychError, invalid
from triptych.python_models.contract.request import ChatRequest
from triptych.python_models.contract.sampling import SamplingParams

from . import messages

Prompt = str | Sequence[int]
"""A prompt as the model reads it, or its token ids."""

_SAMPLING = tuple(f.name for f in fields(SamplingParams))
_GRAMMARS = ("regex", "ebnf", "json_schema")
_REQUEST = ("timeout_s", "priority", "cache_salt")
_MODALITIES = {"images": "image", "videos": "video", "audios": "audio"}


class Options(TypedDict, total=False):
    """What every request may have.

    The fields of :class:`~triptych.python_models.contract.sampling.SamplingParams`; in place of ``grammar`` one of
    ``regex``, ``ebnf`` and ``json_schema``; and ``timeout_s``, ``priority`` and ``cache_salt`` of
    :class:`~triptych.python_models.contract.request.ChatRequest`. None is as if it were left out.
    """

    max_tokens: int | None
    min_tokens: int | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    repetition_penalty: float | None
    no_repeat_ngram_size: int | None
    no_repeat_ngram_window_size: int | None
    no_repeat_ngram_allowed_ids: Sequence[int] | None
    presence_penalty: float | None
    frequency_penalty: float | None
    seed: int | None
    stop: str | Sequence[str] | None
    stop_token_ids: Sequence[int] | None
    ignore_eos: bool | None
    logprobs: bool | None
    top_logprobs: int | None
    logit_bias: Mapping[int, float] | None
    skip_special_tokens: bool | None
    n: int | None
    speculative_tokens: int | None
    grammar: Mapping[str, Any] | None
    regex: str | None
    ebnf: str | None
    json_schema: Mapping[str, Any] | str | None
    timeout_s: float | None
    priority: int | None
    cache_salt: str | None


class ChatOptions(Options, total=False):
    """What a conversation may have beside.

    See :class:`~triptych.python_models.contract.request.TemplateInputs`; tools are in OpenAI's schema.
    """

    tools: Sequence[Mapping[str, Any]] | None
    tool_choice: str | Mapping[str, Any] | None
    parallel_tool_calls: bool | None
    reasoning_effort: str | None
    separate_reasoning: bool | None
    chat_template_kwargs: Mapping[str, Any] | None
    add_generation_prompt: bool | None
    continue_final_message: bool | None


class PromptOptions(Options, total=False):
    """What a raw prompt may have beside."""

    add_special_tokens: bool | None


_TEMPLATE = tuple(ChatOptions.__annotations__.keys() - Options.__annotations__.keys())


@dataclass(frozen=True)
class Call:
    """A checked request.

    Attributes:
        request: what goes to the ensemble.
        media: its blobs.
        names: what the caller calls fields of the contract that have other names there, for error messages.
    """

    request: ChatRequest
    media: tuple[bytes, ...]
    names: Mapping[str, str] = field(default_factory=dict)

    def in_callers_words(self, error: TriptychError) -> TriptychError:
        """The same error with the caller's names of fields."""
        return _renamed(error, self.names)


def chat_call(
    conversation: messages.Conversation,
    options: Mapping[str, Any],
    sampling: SamplingParams | Mapping[str, Any] | None,
    stream: bool,
) -> Call:
    """The request of a conversation.

    Raises:
        TriptychError: naming the argument at fault.
    """
    options = _given(options)
    check.known_keys(options, (*_SAMPLING, *_GRAMMARS, *_REQUEST, *_TEMPLATE), "")
    blobs: list[bytes] = []
    data = {"messages": messages.of(conversation, blobs), **{k: options[k] for k in _TEMPLATE if k in options}}
    return _call(data, blobs, options, sampling, stream, {})


def prompt_call(
    prompt: Prompt,
    media: Mapping[str, Any],
    options: Mapping[str, Any],
    sampling: SamplingParams | Mapping[str, Any] | None,
    stream: bool,
) -> Call:
    """The request of a prompt that no chat template is applied to.

    Args:
        prompt: text or token ids.
        media: "images", "videos" and "audios" -> one medium or a list of them, or None.
        options: see :class:`PromptOptions`.
        sampling: parameters that ``options`` win over.
        stream: deltas as they come.

    Raises:
        TriptychError: naming the argument at fault.
    """
    options = _given(options)
    check.known_keys(options, (*_SAMPLING, *_GRAMMARS, *_REQUEST, "add_special_tokens"), "")
    blobs: list[bytes] = []
    parts: list[dict[str, Any]] = []
    names: dict[str, str] = {}
    for argument, modality in _MODALITIES.items():
        for index, item in enumerate(_listed(media.get(argument))):
            names[f"prompt.media[{len(parts)}]"] = where = f"{argument}[{index}]"
            parts.append(messages.part(modality, item, where, blobs, {}))
    body: dict[str, Any] = {"text": prompt} if isinstance(prompt, str) else {"token_ids": _ids(prompt)}
    if parts:
        body["media"] = parts
    if "add_special_tokens" in options:
        body["add_special_tokens"] = options["add_special_tokens"]
    names |= {"prompt.text": "prompt", "prompt.token_ids": "prompt", "prompt.add_special_tokens": "add_special_tokens"}
    return _call({"prompt": body}, blobs, options, sampling, stream, names)


def _call(
    data: dict[str, Any],
    blobs: list[bytes],
    options: Mapping[str, Any],
    sampling: SamplingParams | Mapping[str, Any] | None,
    stream: bool,
    names: dict[str, str],
) -> Call:
    data |= {"sampling": _sampling(options, sampling), "stream": stream}
    data |= {name: options[name] for name in _REQUEST if name in options}
    grammar = next((name for name in _GRAMMARS if name in options), "grammar")
    names |= {f"sampling.{name}": name for name in _SAMPLING}
    names |= dict.fromkeys(("sampling.grammar.value", "sampling.grammar", "grammar"), grammar)
    try:
        text = json.dumps(data)
    except (TypeError, ValueError) as error:
        raise invalid(f"the request has a value that JSON has no form for: {error}") from None
    try:
        return Call(ChatRequest.from_json(text, len(blobs)), tuple(blobs), names)
    except TriptychError as error:
        raise _renamed(error, names) from None


def _given(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _sampling(options: Mapping[str, Any], sampling: SamplingParams | Mapping[str, Any] | None) -> dict[str, Any]:
    base = sampling.to_json() if isinstance(sampling, SamplingParams) else _given(sampling or {})
    found = {**base, **{name: options[name] for name in _SAMPLING if name in options}}
    given = [name for name in _GRAMMARS if name in options]
    if len(given) + ("grammar" in found) > 1:
        raise invalid(f"only one of {', '.join((*given, 'grammar'))} is allowed", given[-1])
    for name in given:
        found["grammar"] = {"type": name, "value": options[name]}
    return found


def _listed(value: Any) -> Sequence[Any]:
    """Media of one kind: a list is several, anything else is one."""
    if value is None:
        return ()
    return value if isinstance(value, list) else [value]


def _ids(prompt: Sequence[int]) -> list[Any]:
    # torch tensors and numpy arrays have it too
    return prompt.tolist() if hasattr(prompt, "tolist") else list(prompt)


def _renamed(error: TriptychError, names: Mapping[str, str]) -> TriptychError:
    """``error`` with other names of fields, in its message too."""
    for ours in sorted(names, key=len, reverse=True):
        if error.param is not None and (error.param == ours or error.param.startswith((f"{ours}.", f"{ours}["))):
            theirs = names[ours] + error.param[len(ours) :]
            return type(error)(error.kind, error.message.replace(error.param, theirs), theirs, error.stage)
    return error
