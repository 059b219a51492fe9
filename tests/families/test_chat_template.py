"""--chat-template: a template by name or file in place of the checkpoint's own, with the family's tokens for media."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as PILImage

from triptych.python_models.contract.errors import ErrorKind, TriptychError
from triptych.python_models.contract.plan import Plan
from triptych.python_models.contract.request import ChatRequest, MediaPart, Message, TextPart
from triptych.python_models.contract.settings import Settings
from triptych.python_models.families import templates
from triptych.python_models.families.base import Prepared
from triptych.python_models.families.registry import load_family
from triptych.python_models.local import LocalEnsemble
from triptych.python_models.media.types import Audio, Image, Medium

Tiny = Callable[[str], Path]
TEXT_ALONE = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] + '' }}\n{% endfor %}>"


def settings_for(folder: Path, template: str = "") -> Settings:
    return Settings(model=str(folder), chat_template=template, kv_cache_tokens=1024)


def prepare(folder: Path, template: str, *texts: str) -> tuple[Any, Prepared]:
    """A picture between each two texts."""
    preprocessor: Any = load_family(settings_for(folder, template)).load_preprocessor()
    media, parts = [], [TextPart(texts[0])]
    for k, text in enumerate(texts[1:]):
        pixels = np.random.default_rng(k).integers(0, 256, (56, 84, 3), dtype=np.uint8)
        media.append(Medium("image", Image(PILImage.fromarray(pixels)), f"{k}", "messages[0]"))
        parts += [MediaPart("image", blob=k), TextPart(text)]
    return preprocessor.processor.tokenizer, preprocessor.prepare([Message("user", tuple(parts))], media)


def text_of(tokenizer: Any, prepared: Prepared) -> str:
    """The prompt with one placeholder for each run of them."""
    ids: list[int] = []
    inside = {i for item in prepared.items for span in item.spans for i in range(*span)}
    for i, token in enumerate(prepared.input_ids.tolist()):
        if i not in inside or i - 1 not in inside:
            ids.append(token)
    return str(tokenizer.decode(ids))


def test_a_template_by_name(tiny_checkpoint: Tiny) -> None:
    tokenizer, prepared = prepare(tiny_checkpoint("llava"), "vicuna_v1.1", "one ", "two")
    found = text_of(tokenizer, prepared)
    assert found.endswith("to the user's questions. USER: one <image>\ntwo ASSISTANT:")
    own = text_of(*prepare(tiny_checkpoint("llava"), "", "one ", "two"))
    assert own != found


@pytest.mark.parametrize("name", ["chatml-llava", "vicuna_v1.1", "llama_3_vision"])
def test_media_are_written_as_the_family_does(tiny_checkpoint: Tiny, name: str) -> None:
    folder = tiny_checkpoint("qwen2_5_vl")
    tokenizer, prepared = prepare(folder, name, "one ", "two ", "three")
    picture = "<|vision_start|><|image_pad|><|vision_end|>"
    assert f"one {picture}two {picture}three" in text_of(tokenizer, prepared)
    _, own = prepare(folder, "", "one ", "two ", "three")
    assert [item.num_rows for item in prepared.items] == [item.num_rows for item in own.items]
    assert [item.digest for item in prepared.items] == [item.digest for item in own.items]


def test_sounds_of_a_family_with_a_processor_of_its_own(tiny_checkpoint: Tiny) -> None:
    def prepared(template: str) -> Any:
        preprocessor: Any = load_family(settings_for(tiny_checkpoint("voxtral"), template)).load_preprocessor()
        sound = Medium("audio", Audio(np.full(8000, 0.1, np.float32), 16000), "x", "messages[0]")
        return preprocessor.prepare([Message("user", (MediaPart("audio", blob=0), TextPart("a")))], [sound])

    assert prepared("vicuna_v1.1").items[0].num_rows == prepared("").items[0].num_rows > 0


def test_the_familys_template_by_name_is_left_alone(tiny_checkpoint: Tiny) -> None:
    tokenizer, prepared = prepare(tiny_checkpoint("qwen2_5_vl"), "qwen2-vl", "a", "b")
    assert text_of(tokenizer, prepared) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        "a<|vision_start|><|image_pad|><|vision_end|>b<|im_end|>\n<|im_start|>assistant\n"
    )


def test_glm_4v_is_the_checkpoints_own(tiny_checkpoint: Tiny) -> None:
    folder = tiny_checkpoint("qwen2_5_vl")
    assert np.array_equal(prepare(folder, "glm-4v", "a", "b")[1].input_ids, prepare(folder, "", "a", "b")[1].input_ids)


def test_a_file(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    path = tmp_path / "mine.jinja"
    path.write_text("{% for m in messages %}{% for p in m.content %}<{{ p.type }}>{{ p.text }}{% endfor %}{% endfor %}")
    with pytest.raises(TriptychError, match=r"writes no '<\|image_pad\|>' for a part of type image"):
        prepare(tiny_checkpoint("qwen2_5_vl"), str(path), "a", "b")
    path.write_text(
        path.read_text().replace(
            "<{{ p.type }}>",
            "{{ '<|image_pad|>' if p.type == 'image' else '<|video_pad|>' if p.type == 'video' else '!' }}",
        )
    )
    assert text_of(*prepare(tiny_checkpoint("qwen2_5_vl"), str(path), "a", "b")) == "!a<|image_pad|>!b"


def test_a_file_that_takes_texts(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    path = tmp_path / "texts.jinja"
    path.write_text(TEXT_ALONE)
    found = text_of(*prepare(tiny_checkpoint("qwen2_5_vl"), str(path), "a ", " b"))
    assert found == "[user] a <|image_pad|> b\n>"


def test_a_checkpoint_without_a_template(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    folder = tmp_path / "bare"
    folder.mkdir()
    for file in tiny_checkpoint("qwen2_5_vl").iterdir():
        if file.is_file() and file.name != "chat_template.jinja":
            (folder / file.name).symlink_to(file)
    with pytest.raises(TriptychError, match="--chat-template"):
        prepare(folder, "", "a", "b")
    assert "USER: a<|image_pad|>b ASSISTANT:" in text_of(*prepare(folder, "vicuna_v1.1", "a", "b"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("qwen2vl", None, "no chat template 'qwen2vl'; did you mean 'qwen2-vl'.*chatml-llava.*glm-4v.*vicuna_v1.1"),
        ("nowhere.jinja", None, "nowhere.jinja cannot be read"),
        ("bad.jinja", "{% for m in messages %}", "bad.jinja is not valid: .*line 1"),
        ("still.jinja", "hello", "does not read messages"),
    ],
)
def test_refused(tiny_checkpoint: Tiny, tmp_path: Path, name: str, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    given = str(tmp_path / name) if name.endswith(".jinja") else name
    with pytest.raises(TriptychError, match=f"(?s){message}") as caught:
        prepare(tiny_checkpoint("qwen2_5_vl"), given, "a")
    assert (caught.value.kind, caught.value.param) == (ErrorKind.INVALID_REQUEST, "settings.chat_template")


def test_its_ends_end_answers(tiny_checkpoint: Tiny) -> None:
    """A token that the tokenizer has by its id, others by their characters."""
    folder = tiny_checkpoint("qwen2_5_vl")
    decoder = load_family(settings_for(folder, "points-v15-chat")).load_decoder("cpu", torch.float32)
    token = decoder.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert token in decoder.eos_token_ids
    tokenizer, prepared = prepare(folder, "vicuna_v1.1", "a")
    assert "</s>" not in tokenizer.get_vocab()
    assert prepared.stop == ("</s>",)
    assert prepare(folder, "", "a")[1].stop == ()
    assert Plan.from_json(Plan(stop=prepared.stop).to_json()).stop == prepared.stop


def test_a_stop_string_of_the_template_stops(tiny_checkpoint: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_checkpoint("qwen2_5_vl")
    request = {"messages": [{"role": "user", "content": "hi"}], "sampling": {"max_tokens": 24, "temperature": 0}}

    def answer() -> str:
        with LocalEnsemble(settings_for(folder, "chatml")) as ensemble:
            deltas = list(ensemble.chat(ChatRequest.from_json(json.dumps(request), 0)))
        return "".join(delta.text for delta in deltas)

    free = answer()
    cut = free[4:7]
    changed = templates.ChatTemplate(templates.TEMPLATES["chatml"].text, (cut,))
    monkeypatch.setitem(templates.TEMPLATES, "chatml", changed)
    assert answer() == free[: free.index(cut)]


def test_the_documentation_lists_every_name() -> None:
    text = (Path(__file__).parents[2] / "docs" / "options.md").read_text()
    listed = re.findall(r"`([^`]+)`", text.partition("Names:")[2].partition("Any other")[0])
    assert sorted(listed, key=str.lower) == sorted(templates.TEMPLATES, key=str.lower)
