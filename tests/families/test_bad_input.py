"""What no family can serve is refused by name: folders that lack files, media that a family does not take."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image as PILImage

from triptych.python_models.contract.errors import ErrorKind, TriptychError
from triptych.python_models.contract.request import MediaPart, Message, TextPart
from triptych.python_models.contract.settings import Settings
from triptych.python_models.families.registry import load_family
from triptych.python_models.media.types import Audio, Image, Medium

TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
PROCESSOR = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")


@pytest.fixture
def bare(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> Callable[..., Path]:
    """(family, names of files) -> its folder without them."""

    def make(family: str, *gone: str, into: str = "bare") -> Path:
        folder = tmp_path / into
        shutil.copytree(tiny_checkpoint(family), folder)
        for name in gone:
            (folder / name).unlink(missing_ok=True)
        return folder

    return make


def refused(folder: Path) -> TriptychError:
    with pytest.raises(TriptychError) as caught:
        load_family(Settings(model=str(folder))).load_preprocessor()
    assert caught.value.param == "settings.model"
    assert str(folder) in caught.value.message
    return caught.value


@pytest.mark.parametrize("family", ["gemma3", "qwen2_5_omni", "llama"])
def test_a_folder_without_a_tokenizer(bare: Callable[..., Path], family: str) -> None:
    """transformers itself would make an empty one of some families' kind, and go on."""
    error = refused(bare(family, *TOKENIZER))
    assert error.kind is ErrorKind.MODEL_NOT_FOUND
    assert "there is none of tokenizer.json" in error.message


@pytest.mark.parametrize("family", ["gemma3", "qwen2_5_omni"])
def test_a_folder_without_a_processor(bare: Callable[..., Path], family: str) -> None:
    error = refused(bare(family, *PROCESSOR))
    assert error.kind is ErrorKind.MODEL_NOT_FOUND
    assert f"there is none of {', '.join(PROCESSOR)}" in error.message


CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class MineConfig(LlamaConfig):
    model_type = "mine"

class MineForCausalLM(LlamaForCausalLM):
    config_class = MineConfig
"""


def test_code_that_a_checkpoint_brings_along_runs_only_where_it_is_trusted(bare: Callable[..., Path]) -> None:
    folder = bare("llama")
    config = json.loads((folder / "config.json").read_text())
    names = {"AutoConfig": "modeling_mine.MineConfig", "AutoModelForCausalLM": "modeling_mine.MineForCausalLM"}
    config |= {"model_type": "mine", "architectures": ["MineForCausalLM"], "auto_map": names}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling_mine.py").write_text(CODE)
    error = refused(folder)
    assert error.kind is ErrorKind.UNSUPPORTED
    assert "knows no model_type 'mine'" in error.message
    assert "--trust-remote-code" in error.message
    family: Any = load_family(Settings(model=str(folder), trust_remote_code=True))
    prompt = family.load_preprocessor().prepare([Message("user", (TextPart("hello"),), plain=True)], [])
    decoder = family.load_decoder("cpu", torch.float32)
    ids = torch.from_numpy(prompt.input_ids.astype(np.int64))
    hidden = decoder.text_model(inputs_embeds=decoder.embed(ids, ids < 0)[None]).last_hidden_state
    whole = transformers.LlamaForCausalLM.from_pretrained(bare("llama", into="plain"), dtype=torch.float32)
    torch.testing.assert_close(decoder.lm_head(hidden), whole(ids[None]).logits)


def image() -> Medium:
    return Medium("image", Image(PILImage.new("RGB", (8, 8))), "i", "messages[0].content[0]")


def audio() -> Medium:
    return Medium("audio", Audio(np.zeros(8000, np.float32), 16000), "a", "messages[0].content[0]")


@pytest.mark.parametrize(
    ("family", "medium", "what"),
    [
        ("qwen2_audio", image(), "qwen2_audio takes audio, not images"),
        ("gemma3", audio(), "gemma3 takes images, not audio"),
        ("qwen2_vl", audio(), "qwen2_vl takes images and videos, not audio"),
        ("llama", image(), "llama takes text, not images"),
    ],
)
def test_a_medium_that_the_family_cannot_take(
    tiny_checkpoint: Callable[[str], Path], family: str, medium: Medium, what: str
) -> None:
    preprocessor: Any = load_family(Settings(model=str(tiny_checkpoint(family)))).load_preprocessor()
    message = Message("user", (MediaPart(medium.modality, blob=0), TextPart("what is this?")))
    with pytest.raises(TriptychError) as caught:
        preprocessor.prepare([message], [medium])
    assert caught.value.kind is ErrorKind.UNSUPPORTED
    assert caught.value.kind.status == 400
    assert caught.value.message == f"messages[0].content[0]: {what}"
