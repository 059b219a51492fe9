"""Mistral's own tokenizer files (``tekken.json``), where a checkpoint has no other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

FILE = "tekken.json"


def tekken_tokenizer(folder: Path) -> Any:
    """transformers' fast tokenizer of a folder's ``tekken.json``.

    transformers reads that file through the mistral-common package where that is installed, whose tokenizers take no
    template; its own conversion needs no package.
    """
    from transformers import PreTrainedTokenizerFast
    from transformers.integrations.mistral.tokenizer import MistralConverter

    tokenizer_class: Any = PreTrainedTokenizerFast
    converted = MistralConverter(str(folder / FILE)).converted()
    return tokenizer_class(
        tokenizer_object=converted, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    )
