"""Sampling parameters under the names of vLLM's ``SamplingParams`` -> :class:`~.sampling.SamplingParams`.

Clients of Triton's vLLM backend send them as a JSON object, in a tensor or as parameters of the request; numbers may
be written as strings there ("max_tokens": "100"). Defaults are vLLM's, so ``max_tokens`` is 16.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from . import _check as check
from .errors import ErrorKind, TriptychError, invalid
from .sampling import SamplingParams

MAX_TOKENS = 16
_INTEGERS = ("n", "top_k", "seed", "max_tokens", "min_tokens")
_NUMBERS = ("presence_penalty", "frequency_penalty", "repetition_penalty", "temperature", "top_p", "min_p")
_BOOLEANS = ("ignore_eos", "skip_special_tokens")
_SAME = (*_INTEGERS, *_NUMBERS, *_BOOLEANS, "stop", "stop_token_ids", "logit_bias")
_GRAMMARS = ("structured_outputs", "guided_decoding")
# what vLLM does without them, which is all that can be asked for here
_FIXED: Mapping[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "use_beam_search": (False,),
    "early_stopping": (False,),
    "length_penalty": (1,),
    "prompt_logprobs": (),
    "detokenize": (True,),
    "spaces_between_special_tokens": (True,),
    "include_stop_str_in_output": (False,),
    "truncate_prompt_tokens": (-1,),
    "bad_words": ([],),
    "allowed_token_ids": (),
    "lora_name": (),
}
NAMES = (*_SAME, "logprobs", *_GRAMMARS, *_FIXED)
_SHAPES = ("json", "regex", "choice", "grammar", "json_object")
_FIXED_SHAPES: Mapping[str, tuple[Any, ...]] = {
    "disable_fallback": (False,),
    "disable_any_whitespace": (False,),
    "disable_additional_properties": (False,),
    "whitespace_pattern": (),
    "structural_tag": (),
    "backend": ("auto", "xgrammar", "xgrammar:no-fallback"),
}


def read(data: Mapping[str, Any], param: str) -> SamplingParams:
    """Check and convert.

    Args:
        data: name -> value; null is as if it were left out.
        param: what errors call the object.

    Raises:
        TriptychError: INVALID_REQUEST or UNSUPPORTED, naming the field as the caller does.
    """
    check.known_keys(data, NAMES, param)
    given: dict[str, Any] = {"max_tokens": MAX_TOKENS}
    for name, value in data.items():
        where = f"{param}.{name}"
        if value is None:
            continue
        if name in _FIXED:
            _fixed(value, _FIXED[name], where)
        elif name in _GRAMMARS:
            if "grammar" in given:
                raise invalid(f"only one of {' and '.join(_GRAMMARS)} is allowed", where)
            if (grammar := _grammar(value, where)) is not None:
                given["grammar"] = grammar
        elif name == "logprobs":
            given |= {"logprobs": True, "top_logprobs": _converted(value, int, where)}
        else:
            given[name] = _converted(value, _kind(name), where)
    try:
        return SamplingParams.from_json(given, param)
    except TriptychError as error:
        # one of our names that vLLM calls otherwise
        error.message = error.message.replace(f"{param}.top_logprobs", f"{param}.logprobs")
        if error.param == f"{param}.top_logprobs":
            error.param = f"{param}.logprobs"
        raise


def _kind(name: str) -> type | None:
    if name in _INTEGERS:
        return int
    if name in _NUMBERS:
        return float
    return bool if name in _BOOLEANS else None


def _converted(value: Any, kind: type | None, where: str) -> Any:
    """A number or boolean that was written as a string; everything else as it is."""
    if kind is None or not isinstance(value, str):
        return value
    if kind is bool:
        if value.lower() not in ("true", "false"):
            raise invalid(f"{where} must be true or false, got {value!r}", where)
        return value.lower() == "true"
    try:
        return kind(value)
    except ValueError:
        wanted = "an integer" if kind is int else "a number"
        raise invalid(f"{where} must be {wanted}, got {value!r}", where) from None


def _fixed(value: Any, allowed: tuple[Any, ...], where: str) -> None:
    if isinstance(value, str) and value.lower() in ("true", "false"):
        value = value.lower() == "true"
    if not any(value == item and isinstance(value, bool) == isinstance(item, bool) for item in allowed):
        may = (
            f"it may be left out or {' or '.join(json.dumps(item) for item in allowed)}" if allowed else "leave it out"
        )
        raise TriptychError(ErrorKind.UNSUPPORTED, f"{where} is not supported here: {may}", where)


def _grammar(value: Any, where: str) -> dict[str, Any] | None:
    """``structured_outputs`` or ``guided_decoding``, an object or its JSON text -> a grammar of the contract."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise invalid(f"{where} is not JSON: {error}", where) from None
    data = check.mapping(value, where)
    check.known_keys(data, (*_SHAPES, *_FIXED_SHAPES), where)
    for name, item in data.items():
        if name in _FIXED_SHAPES and item is not None:
            _fixed(item, _FIXED_SHAPES[name], f"{where}.{name}")
    wanted = [name for name in _SHAPES if data.get(name) is not None and data[name] is not False]
    if len(wanted) > 1:
        raise invalid(f"{where}: only one of {', '.join(_SHAPES)} is allowed, got {', '.join(wanted)}", where)
    if not wanted:
        return None
    name, item = wanted[0], data[wanted[0]]
    if name == "json":
        return {"type": "json_schema", "value": item}
    if name == "json_object":
        check.boolean(item, f"{where}.{name}")
        return {"type": "json_object"}
    if name == "choice":
        if not isinstance(item, list) or not item:
            raise invalid(f"{where}.choice must be a list with at least one string", f"{where}.choice")
        words = [check.string(word, f"{where}.choice[{k}]") for k, word in enumerate(item)]
        # JSON writes strings as the rules do
        return {"type": "ebnf", "value": "root ::= " + " | ".join(json.dumps(w, ensure_ascii=False) for w in words)}
    return {"type": "regex" if name == "regex" else "ebnf", "value": check.string(item, f"{where}.{name}")}
