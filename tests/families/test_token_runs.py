"""Prompts with long runs of placeholder tokens, tokenised as transformers does it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers

from triptych.python_models.contract.settings import Settings
from triptych.python_models.families.registry import load_family

NAMES = ["qwen2_5_vl", "internvl", "gemma3", "llava"]


@pytest.fixture(scope="module", params=NAMES)
def pair(request: pytest.FixtureRequest, tiny_checkpoint: Callable[[str], Path]) -> tuple[Any, Any, str]:
    """(the preprocessor's tokenizer, transformers' own, the token that comes in runs)."""
    folder = tiny_checkpoint(request.param)
    preprocessor = load_family(Settings(model=str(folder))).load_preprocessor()
    own = preprocessor.processor.tokenizer
    token = own.convert_ids_to_tokens(preprocessor.token_id("image"))
    return own, transformers.AutoTokenizer.from_pretrained(folder), token


@pytest.mark.parametrize(
    "text", ["{0}", "{0}{0}", "a{0}b", " {0} \n{0}\t", "{1}{0}{1}x{1}", "x {0}  two {1}{1} three {0}", "no run at all"]
)
@pytest.mark.parametrize("options", [{}, {"return_tensors": "pt"}, {"add_special_tokens": False}])
def test_same_ids(pair: tuple[Any, Any, str], text: str, options: dict[str, Any]) -> None:
    own, plain, token = pair
    text = text.format(token * 500, token)
    found, expected = own([text], **options), plain([text], **options)
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert type(found[name]) is type(value)
        if options.get("return_tensors"):
            assert found[name].dtype == value.dtype
            assert found[name].shape == value.shape
        assert list(map(list, found[name])) == list(map(list, value))


def test_the_run_is_not_tokenised(pair: tuple[Any, Any, str], monkeypatch: pytest.MonkeyPatch) -> None:
    own, _, token = pair
    seen: list[str] = []
    base = type(own).__mro__[1]
    usual = base.__call__

    def call(self: Any, text: Any, **options: Any) -> Any:
        seen.extend(text)
        return usual(self, text, **options)

    monkeypatch.setattr(base, "__call__", call)
    assert len(own([f"a{token * 5000}b"])["input_ids"][0]) >= 5000
    assert seen == [f"a{token}b"]


def test_several_texts_and_truncation_go_the_usual_way(pair: tuple[Any, Any, str]) -> None:
    own, plain, token = pair
    texts = [token * 100, f"a{token * 70}"]
    assert own(texts)["input_ids"] == plain(texts)["input_ids"]
    cut: dict[str, Any] = {"truncation": True, "max_length": 20}
    assert own([texts[1]], **cut)["input_ids"] == plain([texts[1]], **cut)["input_ids"]
