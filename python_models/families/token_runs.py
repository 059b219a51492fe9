"""Runs of a placeholder token, thousands of it for one picture, are tokenised as one.

A tokenizer splits text at special tokens before it does anything else. So a run of one of them becomes its id as often
as it is written there, whatever stands around it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

_FEWEST = 64
"""Characters of runs for which it is worth while."""
_PLAIN_OPTIONS = {"add_special_tokens", "padding_side", "return_tensors", "return_attention_mask"}
_ROWS = {"input_ids", "attention_mask", "token_type_ids"}


def shorten_runs(tokenizer: Any, ids: Sequence[int]) -> None:
    """Have a tokenizer of transformers tokenise runs as one. Args: it; the tokens that come in runs.

    Its results stay the same. Tokens that are searched for in normalised text are left alone: what stands around them
    decides whether they are found.
    """
    added = tokenizer.added_tokens_decoder
    known = {added[i].content: i for i in ids if i in added and not (added[i].normalized or added[i].single_word)}
    if not known:
        return
    runs = re.compile(f"({'|'.join(re.escape(text) for text in sorted(known, key=len, reverse=True))})\\1*")
    own = type(tokenizer)

    def call(self: Any, text: Any = None, *arguments: Any, **options: Any) -> Any:
        chosen = {name for name, value in options.items() if value is not None and value is not False}
        one = text[0] if isinstance(text, list) and len(text) == 1 else None
        usual = bool(arguments) or bool(chosen - _PLAIN_OPTIONS) or options.get("return_tensors") not in (None, "pt")
        if isinstance(one, str) and not usual:
            found = [match.span() for match in runs.finditer(one)]
            if sum(end - start for start, end in found) >= _FEWEST:
                short = runs.sub(r"\1", one)
                encoded = own.__call__(self, [short], **{**options, "return_tensors": None})
                lengths = _lengths(one, found, encoded, known)
                if lengths is not None:
                    return _lengthened(encoded, lengths, options.get("return_tensors"))
        return own.__call__(self, text, *arguments, **options)

    tokenizer.__class__ = type(own.__name__, (own,), {"__call__": call, "__module__": own.__module__})


def _lengths(text: str, found: Sequence[tuple[int, int]], encoded: Any, known: dict[str, int]) -> Any:
    """How often each token of the shortened text stands in ``text``, int64 [tokens]; None where it does not fit."""
    (row,) = encoded["input_ids"]
    ids = np.asarray(row, dtype=np.int64)
    places = np.flatnonzero(np.isin(ids, list(known.values())))
    names = {number: name for name, number in known.items()}
    if set(encoded) - _ROWS or len(places) != len(found):
        return None
    lengths = np.ones(len(ids), dtype=np.int64)
    for place, (start, end) in zip(places, found, strict=True):
        name = names[int(ids[place])]
        if not text.startswith(name, start):
            return None
        lengths[place] = (end - start) // len(name)
    return lengths


def _lengthened(encoded: Any, lengths: Any, tensors: str | None) -> Any:
    for name, (row,) in list(encoded.items()):
        values = np.repeat(np.asarray(row, dtype=np.int64), lengths)
        encoded[name] = torch.from_numpy(values)[None] if tensors == "pt" else [values.tolist()]
    return encoded
