"""How the next token is chosen: the sampling fields of a request and their limits."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from . import _check as check
from .errors import ErrorKind, TriptychError, invalid

MAX_STOP_STRINGS = 16
MAX_TOP_LOGPROBS = 20
MAX_CHOICES = 128
MAX_SPECULATIVE_TOKENS = 16
MAX_NGRAM_SIZE = 1024
MAX_GRAMMAR_BYTES = 128 * 1024
# compiling takes time that grows with the square of it, at least
MAX_SCHEMA_DEPTH = 128
GRAMMAR_TYPES = ("json_object", "json_schema", "regex", "ebnf", "structural_tag")


@dataclass(frozen=True)
class Grammar:
    """What the text of an answer must look like.

    Attributes:
        type: "json_object" (any JSON object), "json_schema", "regex" (the whole text matches), "ebnf" (GBNF, the
            start rule is ``root``) or "structural_tag" (xgrammar's formats of texts with calls and schemas in them).
        value: the JSON text of the schema or the format, the expression or the rules; "" for json_object.
    """

    type: str
    value: str = ""

    @classmethod
    def from_json(cls, value: Any, param: str) -> Grammar:
        """Check shape and size; whether it can be compiled is found out by the language model.

        A schema may be given as a JSON value or as its text.

        Raises:
            TriptychError: INVALID_REQUEST or TOO_LARGE, naming the field.
        """
        data = check.mapping(value, param)
        check.known_keys(data, ("type", "value"), param)
        kind, text = data.get("type"), data.get("value", "")
        if kind not in GRAMMAR_TYPES:
            raise invalid(f"{param}.type must be one of {', '.join(GRAMMAR_TYPES)}, got {kind!r}", f"{param}.type")
        where = f"{param}.value"
        if kind == "json_object":
            if text:
                raise invalid(f"{where} must be left out for json_object", where)
            return cls(kind)
        if kind in ("json_schema", "structural_tag"):
            text = _schema(text, where)
        if not check.string(text, where):
            raise invalid(f"{where} must not be empty", where)
        size = len(text.encode("utf-8", "replace"))
        if size > MAX_GRAMMAR_BYTES:
            message = f"{where} has {size} bytes; at most {MAX_GRAMMAR_BYTES} are allowed"
            raise TriptychError(ErrorKind.TOO_LARGE, message, where)
        return cls(kind, text)


@dataclass(frozen=True)
class SamplingParams:
    """Sampling of one request. ``temperature`` 0 is greedy (argmax).

    Attributes:
        max_tokens: tokens to generate at most; None means up to the context length.
        min_tokens: end-of-sequence and stop strings are suppressed before this many tokens.
        temperature: logits are divided by it; 0 to 2.
        top_p: nucleus sampling (Holtzman et al. 2020), (0, 1].
        top_k: keep the k most likely tokens; 0 or -1 keeps all.
        min_p: keep tokens with probability >= min_p * max probability (Nguyen et al. 2024), [0, 1].
        repetition_penalty: > 1 discourages tokens of prompt and output (Keskar et al. 2019), (0, 10].
        no_repeat_ngram_size: no run of that many tokens of prompt and output may stand twice; 0 allows all. Not with
            a grammar.
        no_repeat_ngram_window_size: only runs within that many last tokens count; 0 for all. At least the size.
        no_repeat_ngram_allowed_ids: token ids that may complete a run all the same.
        presence_penalty, frequency_penalty: OpenAI's, over generated tokens, [-2, 2].
        seed: makes sampling reproducible whatever else is in the batch; None draws one.
        stop: strings that end generation; they are not part of the answer.
        stop_token_ids: token ids that end generation, beside the checkpoint's own.
        ignore_eos: go on past the end-of-sequence token.
        logprobs: report the log probability of every chosen token.
        top_logprobs: and of that many most likely tokens, 0 to 20.
        logit_bias: token id -> value added to its logit, [-100, 100].
        skip_special_tokens: leave special tokens out of the text.
        n: answers to the same prompt, each a choice of its own, 1 to 128. Choice 0 is the answer that n = 1 gives.
        speculative_tokens: tokens guessed per step by prompt lookup (Saxena 2023), 0 (off) to 16; None takes the
            server's. Greedy answers stay the same.
        grammar: what the text must look like; None for anything.
    """

    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    no_repeat_ngram_window_size: int = 0
    no_repeat_ngram_allowed_ids: tuple[int, ...] = ()
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: bool = False
    top_logprobs: int = 0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    skip_special_tokens: bool = True
    n: int = 1
    speculative_tokens: int | None = None
    grammar: Grammar | None = None

    @classmethod
    def from_json(cls, value: Any, param: str = "sampling") -> SamplingParams:
        """Validate a JSON object.

        Raises:
            TriptychError: INVALID_REQUEST that names the field and its range.
        """
        data = dict(check.mapping(value, param))
        check.known_keys(data, (f.name for f in fields(cls)), param)
        given: dict[str, Any] = {}
        for name, item in data.items():
            where = f"{param}.{name}" if param else name
            if item is None and name in ("max_tokens", "seed", "speculative_tokens", "grammar"):
                continue
            given[name] = _FIELDS[name](item, where)
        params = cls(**given)
        _check_repeats(params, f"{param}." if param else "")
        return params

    def to_json(self) -> dict[str, Any]:
        """The fields that differ from their defaults, as JSON values."""
        default = type(self)()
        out = {k: v for k, v in asdict(self).items() if v != getattr(default, k)}
        if "logit_bias" in out:
            out["logit_bias"] = {str(k): v for k, v in self.logit_bias.items()}
        return out


def _schema(value: Any, param: str) -> str:
    """The text of a JSON schema given as such or as a JSON value."""
    schema = value
    if isinstance(value, str):
        try:
            schema = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise invalid(f"{param} is not JSON: {error}", param) from None
    if not isinstance(schema, (Mapping, bool)):
        raise invalid(f"{param} must be an object or a boolean, not {check.json_type(schema)}", param)
    depth, level = 0, [schema]
    while level := [v for item in level if isinstance(item, (Mapping, list)) for v in _inside(item)]:
        depth += 1
        if depth > MAX_SCHEMA_DEPTH:
            raise invalid(f"{param} is nested more than {MAX_SCHEMA_DEPTH} levels deep", param)
    return json.dumps(schema, ensure_ascii=False, separators=(",", ":"))


def _inside(value: Mapping[str, Any] | list[Any]) -> Iterable[Any]:
    return value.values() if isinstance(value, Mapping) else value


def _stop(value: Any, param: str) -> tuple[str, ...]:
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, (list, tuple)) or len(items) > MAX_STOP_STRINGS:
        raise invalid(f"{param} must be a string or a list of at most {MAX_STOP_STRINGS} strings", param)
    for item in items:
        if not check.string(item, param):
            raise invalid(f"{param} must not hold an empty string", param)
    return tuple(items)


def _ids(value: Any, param: str) -> tuple[int, ...]:
    if not isinstance(value, (list, tuple)):
        raise invalid(f"{param} must be a list of token ids, not {check.json_type(value)}", param)
    return tuple(check.integer(item, param, 0, 2**31 - 1) for item in value)


def _bias(value: Any, param: str) -> dict[int, float]:
    out: dict[int, float] = {}
    for key, item in check.mapping(value, param).items():
        if not str(key).isdigit():
            raise invalid(f"{param} keys must be token ids, got {key!r}", param)
        out[int(key)] = check.number(item, f"{param}.{key}", -100, 100)
    return out


def _top_p(value: Any, param: str) -> float:
    if (result := check.number(value, param, 0, 1)) == 0:
        raise invalid(f"{param} must be greater than 0 and at most 1, got 0", param)
    return result


def _repetition(value: Any, param: str) -> float:
    if (result := check.number(value, param, 0, 10)) == 0:
        raise invalid(f"{param} must be greater than 0 and at most 10, got 0", param)
    return result


def _check_repeats(params: SamplingParams, prefix: str) -> None:
    size, window = params.no_repeat_ngram_size, params.no_repeat_ngram_window_size
    if window and not size <= window:
        where = f"{prefix}no_repeat_ngram_window_size"
        raise invalid(f"{where} must be 0 or at least no_repeat_ngram_size ({size}), got {window}", where)
    if size and params.grammar is not None:
        where = f"{prefix}no_repeat_ngram_size"
        raise invalid(f"{where} is not allowed beside a grammar, which may leave no other way on", where)


_FIELDS: dict[str, Any] = {
    "max_tokens": lambda v, p: check.integer(v, p, 1, 2**31 - 1),
    "min_tokens": lambda v, p: check.integer(v, p, 0, 2**31 - 1),
    "temperature": lambda v, p: check.number(v, p, 0, 2),
    "top_p": _top_p,
    "top_k": lambda v, p: check.integer(v, p, -1, 2**31 - 1),
    "min_p": lambda v, p: check.number(v, p, 0, 1),
    "repetition_penalty": _repetition,
    "no_repeat_ngram_size": lambda v, p: check.integer(v, p, 0, MAX_NGRAM_SIZE),
    "no_repeat_ngram_window_size": lambda v, p: check.integer(v, p, 0, 2**31 - 1),
    "no_repeat_ngram_allowed_ids": _ids,
    "presence_penalty": lambda v, p: check.number(v, p, -2, 2),
    "frequency_penalty": lambda v, p: check.number(v, p, -2, 2),
    "seed": lambda v, p: check.integer(v, p, -(2**63), 2**63 - 1),
    "stop": _stop,
    "stop_token_ids": _ids,
    "ignore_eos": check.boolean,
    "logprobs": check.boolean,
    "top_logprobs": lambda v, p: check.integer(v, p, 0, MAX_TOP_LOGPROBS),
    "logit_bias": _bias,
    "skip_special_tokens": check.boolean,
    "n": lambda v, p: check.integer(v, p, 1, MAX_CHOICES),
    "speculative_tokens": lambda v, p: check.integer(v, p, 0, MAX_SPECULATIVE_TOKENS),
    "grammar": Grammar.from_json,
}
