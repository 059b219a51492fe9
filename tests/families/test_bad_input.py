"""What no family can serve is refused by name: folders that lack files, media that a family does not take."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
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

    def make(family: str, *gone: str) -> Path:
        folder = tmp_path / family
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
