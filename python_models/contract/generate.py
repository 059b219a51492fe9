"""The ensemble ``generate``: tensors named and meant as those of Triton's vLLM backend.

In: a prompt that the model reads as it is, pictures, ``sampling_parameters`` under vLLM's names (or as parameters of
the request) and what is to be answered beside the text. Out: arrays with one element for each of the ``n`` answers.
``preprocess`` reads the former with :func:`read`; ``language_model`` makes the latter with a :class:`Renderer`, whose
:class:`Form` travels in the plan.
"""

from __future__ import annotations

import binascii
import json
import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import pybase64

from . import _check as check
from . import vllm_sampling
from .delta import Delta, TokenLogprob
from .errors import TriptychError, invalid
from .request import ChatRequest, MediaPart, RawPrompt

PARAMETERS = "parameters"
"""The request's own parameters (not a tensor), as JSON text; see ``StageSpec.parameters_with``."""
_BASE64 = (string.ascii_letters + string.digits + "+/=" + string.whitespace).encode()
_URL = re.compile(rb"https?://", re.IGNORECASE)
# parameters that the server itself adds, or that say nothing about the answer
_NOT_OURS = re.compile(r"id|sequence_\w+|triton_\w+|headers|binary_data_output|traceparent|tracestate")


@dataclass(frozen=True)
class Form:
    """What the answer to a ``generate`` request looks like.

    Attributes:
        prompt: what the text of a whole answer begins with.
        stream: a response for each piece; otherwise one with everything.
        choices: answers.
        has_logprobs: log probabilities were asked for by ``logprobs`` of the sampling parameters.
        finish_reason, cumulative_logprob, logprobs, num_input_tokens, num_output_tokens: the output is wanted.
    """

    prompt: str = ""
    stream: bool = False
    choices: int = 1
    has_logprobs: bool = False
    finish_reason: bool = False
    cumulative_logprob: bool = False
    logprobs: bool = False
    num_input_tokens: bool = False
    num_output_tokens: bool = False


_EXTRAS = tuple(f.name for f in fields(Form) if f.name not in ("prompt", "stream", "choices", "has_logprobs"))


@dataclass(frozen=True)
class Generate:
    """A ``generate`` request: in the words of the contract, its blobs, and the form of its answer."""

    request: ChatRequest
    blobs: tuple[bytes, ...]
    form: Form


def read(inputs: Mapping[str, Any]) -> Generate:
    """The tensors of a request (STRING as sequences of bytes, BOOL as arrays) and its :data:`PARAMETERS`.

    Raises:
        TriptychError: INVALID_REQUEST or UNSUPPORTED, naming the tensor and the field in it.
    """
    try:
        text = inputs["text_input"][0].decode()
    except UnicodeDecodeError as error:
        raise invalid(f"text_input is not UTF-8: {error}", "text_input") from None
    media: list[MediaPart] = []
    blobs: list[bytes] = []
    for index, item in enumerate(inputs.get("image") or ()):
        if _URL.match(item):
            media.append(MediaPart("image", url=_url(item, f"image[{index}]")))
        else:
            media.append(MediaPart("image", blob=len(blobs)))
            blobs.append(_picture(item, f"image[{index}]"))
    sampling = vllm_sampling.read(_sampling(inputs), "sampling_parameters")
    stream = _flag(inputs, "stream")
    exclude = _flag(inputs, "exclude_input_in_output", stream)
    if stream and not exclude:
        raise invalid(
            "exclude_input_in_output must be true, or left out, where stream is true: a stream has the answer alone",
            "exclude_input_in_output",
        )
    form = Form(
        prompt="" if exclude else text,
        stream=stream,
        choices=sampling.n,
        has_logprobs=sampling.logprobs,
        **{name: _flag(inputs, f"return_{name}") for name in _EXTRAS},
    )
    if form.cumulative_logprob:
        sampling = replace(sampling, logprobs=True)
    request = ChatRequest((), sampling, stream, prompt=RawPrompt(text, media=tuple(media)))
    return Generate(request, tuple(blobs), form)


def in_caller_words(error: TriptychError) -> None:
    """Name tensors where an error names fields of the request that :func:`read` made."""
    for ours, theirs in ((r"\bprompt\.media\[", "image["), (r"\bprompt(\.text)?$", "text_input")):
        if error.param is not None:
            error.param = re.sub(ours, theirs, error.param)
    error.message = re.sub(r"\bprompt\.media\[", "image[", error.message)
    error.message = re.sub(r"\bprompt\.text\b", "text_input", error.message)


class Renderer:
    """Deltas of one request -> output tensors. Not thread-safe."""

    def __init__(self, form: Form) -> None:
        """Args: ``form``, what is wanted."""
        self._form = form
        self._choices = [_Choice() for _ in range(form.choices)]
        self._prompt_tokens = 0

    def __call__(self, delta: Delta) -> dict[str, Any] | None:
        """The response that a delta gives; None where it gives none, as a heartbeat or half of a whole answer."""
        if delta.usage is not None:
            self._prompt_tokens = delta.usage.prompt_tokens
        if delta.is_heartbeat:
            return None
        self._choices[delta.index].take(delta)
        if not self._form.stream and not all(choice.finish_reason for choice in self._choices):
            return None
        return self._tensors()

    def _tensors(self) -> dict[str, Any]:
        form, choices = self._form, self._choices
        tensors: dict[str, Any] = {"text_output": [form.prompt + choice.text for choice in choices]}
        if form.finish_reason:
            # vLLM's word for none yet
            tensors["finish_reasons"] = [choice.finish_reason or "None" for choice in choices]
        if form.cumulative_logprob:
            tensors["cumulative_logprob"] = np.array([choice.cumulative for choice in choices], np.float32)
        if form.logprobs:
            tensors["logprobs"] = [_logprobs(choice.logprobs) if form.has_logprobs else "null" for choice in choices]
        if form.num_input_tokens:
            tensors["num_input_tokens"] = np.array([self._prompt_tokens], np.uint32)
        if form.num_output_tokens:
            tensors["num_output_tokens"] = np.array([choice.num_tokens for choice in choices], np.uint32)
        for choice in choices:
            choice.told()
        return tensors


@dataclass
class _Choice:
    """One answer: what was not told yet, and its sum of log probabilities and finish reason so far."""

    text: str = ""
    num_tokens: int = 0
    logprobs: list[TokenLogprob] = field(default_factory=list)
    cumulative: float = 0.0
    finish_reason: str = ""

    def take(self, delta: Delta) -> None:
        self.text += delta.text
        self.num_tokens += len(delta.token_ids)
        self.logprobs += delta.logprobs
        self.cumulative += sum(item.logprob for item in delta.logprobs)
        self.finish_reason = delta.finish_reason or self.finish_reason

    def told(self) -> None:
        self.text, self.num_tokens, self.logprobs = "", 0, []


def _logprobs(items: Sequence[TokenLogprob]) -> str:
    """JSON: for each token, {token id: {logprob, rank, decoded_token}} of it and the likeliest instead of it."""
    told = []
    for item in items:
        known = {item.token_id: {"logprob": item.logprob, "rank": item.rank, "decoded_token": item.text}}
        for rank, (token_id, text, logprob, _) in enumerate(item.top, 1):
            known.setdefault(token_id, {"logprob": logprob, "rank": rank, "decoded_token": text})
        told.append(known)
    return json.dumps(told)


def _sampling(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Sampling parameters of the tensor and of the request itself, which must not contradict each other."""
    data: dict[str, Any] = {}
    if (raw := inputs.get("sampling_parameters")) is not None:
        try:
            data = dict(check.mapping(json.loads(raw[0]), "sampling_parameters"))
        except (ValueError, RecursionError) as error:
            raise invalid(f"sampling_parameters is not JSON: {error}", "sampling_parameters") from None
    for name, value in json.loads(inputs.get(PARAMETERS, ("{}",))[0]).items():
        if _NOT_OURS.fullmatch(name):
            continue
        if name not in vllm_sampling.NAMES:
            # Triton's HTTP generate endpoint makes parameters of all names that are no tensor's
            check.known_keys({name: value}, (*_TENSORS, *vllm_sampling.NAMES), "")
        if data.setdefault(name, value) != value:
            where = f"sampling_parameters.{name}"
            raise invalid(f"{where} is {data[name]!r}, but the request's parameter {name} is {value!r}", where)
    return data


_TENSORS = (
    *("text_input", "image", "stream", "sampling_parameters", "exclude_input_in_output"),
    *(f"return_{name}" for name in _EXTRAS),
)


def _flag(inputs: Mapping[str, Any], name: str, default: bool = False) -> bool:
    value = inputs.get(name)
    return default if value is None else bool(value.reshape(-1)[0])


def _picture(item: bytes, where: str) -> bytes:
    """The bytes of a picture that came as they are, or as base64: no file of a picture is made of its letters alone."""
    if item.translate(None, _BASE64):
        return bytes(item)
    try:
        return pybase64.b64decode(item)
    except binascii.Error as error:
        raise invalid(f"{where} is not base64: {error}", where) from None


def _url(item: bytes, where: str) -> str:
    try:
        return item.decode()
    except UnicodeDecodeError as error:
        raise invalid(f"{where} is not a URL: {error}", where) from None
