"""Checkpoints of 2023 and 2024 whose tokenizer is a ``tokenizer.model`` of sentencepiece alone."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from triptych.python_models.contract.settings import Settings
from triptych.python_models.families.registry import load_family

# A text that begins with a space is one that transformers' own tokenizer reads otherwise.
TEXTS = [
    "USER: what is shown here? ASSISTANT:",
    "two  spaces, a\nnew line, ünïcödé, 漢字 and 😀",
]


@pytest.fixture(scope="module")
def model() -> bytes:
    """Made as Llama's: byte pairs, bytes where there is no piece, digits one by one."""
    out = io.BytesIO()
    lines = ["the quick brown fox jumps over the lazy dog", "USER: what is shown here? ASSISTANT: a picture", *TEXTS]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines * 20),
        model_writer=out,
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        split_digits=True,
        add_dummy_prefix=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return out.getvalue()


def test_llava_reads_it(model: bytes, tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(tiny_checkpoint("llava_v1_5"), folder)
    for path in (*folder.glob("tokenizer*"), *folder.glob("special_tokens*"), *folder.glob("*.jinja")):
        path.unlink()
    (folder / "tokenizer.model").write_bytes(model)
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"add_bos_token": True, "legacy": True}))
    family: Any = load_family(Settings(model=str(folder)))
    tokenizer = family.load_tokenizer()
    original = sentencepiece.SentencePieceProcessor(model_proto=model)
    for text in TEXTS:
        assert tokenizer(text)["input_ids"] == [original.bos_id(), *original.encode(text)]
        assert tokenizer.decode(original.encode(text), skip_special_tokens=True) == text
