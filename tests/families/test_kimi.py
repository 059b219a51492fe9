"""Kimi-VL's published files: its vocabulary, its pictures, and what is refused."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from triptych.python_models.contract.errors import ErrorKind, TriptychError
from triptych.python_models.families.kimi import MoonPatches
from triptych.python_models.families.tiktoken_file import MOONSHOT_PATTERN, tiktoken_tokenizer

OPTIONS = {
    "patch_size": 4,
    "pad_input": True,
    "in_token_limit": 100,
    "image_mean": [0.5] * 3,
    "image_std": [0.5] * 3,
    "merge_kernel_size": [2, 2],
}


def vocabulary(folder: Path, *joined: str) -> Any:
    """A tokenizer of all bytes and these tokens, with one special token far behind them."""
    tokens = [bytes([k]) for k in range(256)] + [token.encode() for token in joined]
    lines = (f"{base64.b64encode(token).decode()} {rank}" for rank, token in enumerate(tokens))
    (folder / "tiktoken.model").write_text("\n".join(lines) + "\n")
    added = {str(len(tokens) + 3): {"content": "[EOS]", "special": True}}
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added, "eos_token": "[EOS]"}))
    return tiktoken_tokenizer(folder, MOONSHOT_PATTERN)


def test_neighbours_of_the_lowest_rank_are_joined_first(tmp_path: Path) -> None:
    # bc goes before ab
    tokenizer = vocabulary(tmp_path, "bc", "ab", "cd")
    assert tokenizer("abcd")["input_ids"] == [97, 256, 100]
    assert tokenizer("ab")["input_ids"] == [257]
    # xyz cannot be joined of two others, but is one token where it is a whole word
    tokenizer = vocabulary(tmp_path, "bc", "ab", "abc", "xyz")
    assert tokenizer("abcd xyz")["input_ids"] == [258, 100, 32, 120, 121, 122]
    assert tokenizer("xyz")["input_ids"] == [259]


def test_words_are_split_as_published(tmp_path: Path) -> None:
    tokenizer = vocabulary(tmp_path)
    pieces = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("It's你好 12345 HTTPServer's  \n\nx")
    text = "It's你好 12345 HTTPServer's  \n\nx"
    found = [text[start:end] for _, (start, end) in pieces]
    assert found == ["It's", "你好", " ", "123", "45", " HTTPServer's", "  \n\n", "x"]


def test_special_tokens_keep_their_ids(tmp_path: Path) -> None:
    tokenizer = vocabulary(tmp_path, "ab")
    assert tokenizer("a[EOS]é")["input_ids"] == [97, 260, 0xC3, 0xA9]
    assert tokenizer.decode([97, 260, 0xC3, 0xA9]) == "a[EOS]é"
    assert (tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|reserved_token_258|>")) == (260, 258)


@pytest.mark.parametrize("content", ["YQ==", "not base64! 0", ""])
def test_a_broken_vocabulary_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "tiktoken.model").write_text(content)
    with pytest.raises(TriptychError, match=r"the tokenizer of .* cannot be loaded") as caught:
        tiktoken_tokenizer(tmp_path, MOONSHOT_PATTERN)
    assert caught.value.kind is ErrorKind.MODEL_NOT_FOUND


def patches(folder: Path, **options: Any) -> MoonPatches:
    (folder / "preprocessor_config.json").write_text(json.dumps(OPTIONS | options))
    return MoonPatches.read(folder)


def test_pictures_are_made_smaller_and_filled_up(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (21, 13, 3), dtype=np.uint8)
    cut, grid = patches(tmp_path).cut(Image.fromarray(pixels))
    assert grid == [1, 6, 4]
    whole = cut.reshape(6, 4, 3, 4, 4).transpose(0, 3, 1, 4, 2).reshape(24, 16, 3)
    assert np.array_equal(whole[:21, :13], pixels)
    assert not whole[21:].any()
    assert not whole[:, 13:].any()
    # 15 x 30 patches are more than 100: about 7 x 14 remain, in squares of two
    assert patches(tmp_path).cut(Image.new("RGB", (60, 120)))[1] == [1, 14, 8]


def test_pictures_beyond_the_towers_positions(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="512 x 2 patches of 4 pixels; less than 512"):
        patches(tmp_path, in_token_limit=10**6).cut(Image.new("RGB", (2048, 8)))


def test_what_is_not_supported(tmp_path: Path) -> None:
    with pytest.raises(TriptychError, match=r"no preprocessor_config\.json"):
        MoonPatches.read(tmp_path)
    with pytest.raises(TriptychError, match="pad_input on"):
        patches(tmp_path, pad_input=False)
