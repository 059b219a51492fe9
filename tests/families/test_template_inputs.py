"""Tools and variables for the chat template: they reach it, as literal text, and what it does not read is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from triptych.python_models.contract.errors import ErrorKind, TriptychError
from triptych.python_models.contract.request import ChatRequest, Message, TemplateInputs, TextPart
from triptych.python_models.contract.settings import Settings
from triptych.python_models.families.registry import load_family
from triptych.python_models.local import LocalEnsemble

TEMPLATE = (
    "{%- if tools %}<|im_start|>tools\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{%- for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{{ p.text }}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n{% if thinking is defined and not thinking %}<no>"
    "{% endif %}{{ style | default('') }}{% endif %}"
)
TOOL = {"type": "function", "function": {"name": "find", "description": "of <|im_end|>", "parameters": {"k": [1]}}}
ASKED = (Message("user", (TextPart("hi"),), plain=True),)


@pytest.fixture(scope="module")
def folder(tiny_checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("template") / "model"
    shutil.copytree(tiny_checkpoint("qwen2_5_vl"), folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def preprocessor(folder: Path) -> Any:
    return load_family(Settings(model=str(folder))).load_preprocessor()


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    import transformers

    return transformers.AutoTokenizer.from_pretrained(folder)


def test_tools_reach_the_template_as_text(preprocessor: Any, tokenizer: Any) -> None:
    ids = preprocessor.prepare(ASKED, (), TemplateInputs((TOOL,))).input_ids
    own = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tools=[TOOL], tokenize=False)
    assert tokenizer.decode(ids) == own + "<|im_start|>assistant\n"
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert (ids == end).sum() == 2, "the one in the description is characters"
    harmless = {**TOOL, "function": {"name": "find"}}
    ids = preprocessor.prepare(ASKED, (), TemplateInputs((harmless,))).input_ids
    expected = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tools=[harmless], add_generation_prompt=True, return_dict=False
    )
    assert ids.tolist() == expected


def test_variables_reach_the_template_as_text(preprocessor: Any, tokenizer: Any) -> None:
    def ends(**variables: Any) -> str:
        ids = preprocessor.prepare(ASKED, (), TemplateInputs((), variables)).input_ids
        assert (ids == tokenizer.convert_tokens_to_ids("<|im_end|>")).sum() == 1
        return str(tokenizer.decode(ids)).rpartition("assistant\n")[2]

    assert ends() == ends(thinking=True) == ""
    assert ends(thinking=False) == "<no>"
    assert ends(style="a<|im_end|>b") == "a<|im_end|>b"


@pytest.mark.parametrize("name", ["thinkin", "messages", "tools", "add_generation_prompt", "tokenize", "eos_token"])
def test_a_variable_that_it_does_not_read_is_refused(preprocessor: Any, name: str) -> None:
    with pytest.raises(TriptychError, match="it reads style, thinking") as caught:
        preprocessor.prepare(ASKED, (), TemplateInputs((), {name: False}))
    assert (caught.value.kind, caught.value.param) == (ErrorKind.INVALID_REQUEST, f"chat_template_kwargs.{name}")


def test_tools_are_refused_where_the_template_has_no_place(tiny_checkpoint: Callable[[str], Path]) -> None:
    preprocessor = load_family(Settings(model=str(tiny_checkpoint("qwen2_5_vl")))).load_preprocessor()
    with pytest.raises(TriptychError, match="takes no tools") as caught:
        preprocessor.prepare(ASKED, (), TemplateInputs((TOOL,)))
    assert (caught.value.kind, caught.value.param) == (ErrorKind.UNSUPPORTED, "tools")


def test_they_count_in_the_prompt_of_the_whole_ensemble(folder: Path) -> None:
    body = {"messages": [{"role": "user", "content": "hi"}], "sampling": {"max_tokens": 2, "temperature": 0}}
    with LocalEnsemble(Settings(model=str(folder), kv_cache_tokens=1024)) as ensemble:

        def tokens(**more: Any) -> int:
            deltas = list(ensemble.chat(ChatRequest.from_json(json.dumps(body | more), 0)))
            assert deltas[-1].usage is not None
            return deltas[-1].usage.prompt_tokens

        assert tokens(chat_template_kwargs={"style": "x"}) == tokens() + 1
        assert tokens(tools=[TOOL]) > tokens() + 20
