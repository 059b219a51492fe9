"""Tokenizers that are published as a tiktoken vocabulary (``tiktoken.model``), as Moonshot's are.

Such a file has a token's bytes in base64 and its rank in every line; two neighbours are joined first whose joint has
the lowest rank. What the file does not say is how text is split before, and which special tokens follow: the former is
given, the latter are in tokenizer_config.json. Compared with ``tokenization_moonshot.py`` of moonshotai's repositories.
"""

from __future__ import annotations

import base64
import binascii
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

from ..contract.errors import ErrorKind, TriptychError

FILE = "tiktoken.model"

_ENDINGS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
MOONSHOT_PATTERN = "|".join(
    (
        r"[\p{Han}]+",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_ENDINGS}",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_ENDINGS}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
"""Chinese apart from other writing, words with their endings, up to three digits, marks, white space."""


def tiktoken_tokenizer(folder: Path, pattern: str) -> Any:
    """transformers' fast tokenizer of a folder's ``tiktoken.model``.

    Raises:
        TriptychError: MODEL_NOT_FOUND where a file is missing or cannot be read.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    try:
        ranks = _ranks((folder / FILE).read_bytes())
        options = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        special = {int(number): str(token["content"]) for number, token in options["added_tokens_decoder"].items()}
    except (OSError, ValueError, KeyError, TypeError, binascii.Error) as error:
        raise TriptychError(
            ErrorKind.MODEL_NOT_FOUND,
            f"the tokenizer of {folder} cannot be loaded: {type(error).__name__}: {error}",
            "settings.model",
        ) from None
    names = _byte_names()
    written = {token: "".join(names[byte] for byte in token) for token in ranks}
    merges = [
        (written[left], written[right])
        for token in sorted(ranks, key=ranks.__getitem__)
        for left, right in _halves(token, ranks)
    ]
    raw = Tokenizer(models.BPE({written[token]: rank for token, rank in ranks.items()}, merges, ignore_merges=True))
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    raw.decoder = decoders.ByteLevel()
    # ids are given in turn, so those between them need a name
    last = max(special, default=len(ranks) - 1)
    raw.add_special_tokens(
        [
            AddedToken(special.get(number, f"<|reserved_token_{number}|>"), normalized=False, special=True)
            for number in range(len(ranks), last + 1)
        ]
    )
    tokens = {key: options[key] for key in ("bos_token", "eos_token", "pad_token", "unk_token") if options.get(key)}
    tokenizer_class: Any = PreTrainedTokenizerFast
    return tokenizer_class(tokenizer_object=raw, chat_template=options.get("chat_template"), **tokens)


def _ranks(content: bytes) -> dict[bytes, int]:
    """Bytes of each token -> its rank."""
    pairs = (line.split() for line in content.splitlines() if line.strip())
    return {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}


def _halves(token: bytes, ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The two parts that a token is joined of: what joining with lower ranks alone leaves of it."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        joints = [ranks.get(left + right, ranks[token]) for left, right in pairwise(parts)]
        lowest = min(joints)
        if lowest >= ranks[token]:
            return []
        at = joints.index(lowest)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return [(parts[0], parts[1])] if len(parts) == 2 else []


def _byte_names() -> list[str]:
    """The character that stands for each byte in a byte-level vocabulary: its own where it can be printed."""
    printed = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printed else chr(next(others)) for byte in range(256)]
