"""docs/models.md: current, and no model of the goals is missing."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from triptych.python_models.families.registry import family_files

ROOT = Path(__file__).parents[2]
# what the goals name, each a piece of a row's ids
GOALS = """
Llama-3.2-11B-Vision Qwen2-VL-7B Qwen2.5-VL-3B Qwen3-VL-8B Qwen3-VL-30B-A3B -235B-A22B-Instruct FP8 deepseek-vl2
DeepSeek-OCR DeepSeek-OCR-2 Janus-Pro-7B llava-v1.5-13b llava-v1.6 llava-next-72b llama3-llava-next-8b
llava-onevision-qwen2-7b-ov LLaVA-NeXT-Video-7B gemma-3-4b-it gemma-3n Kimi-VL-A3B Mistral-Small-3.1-24B
Phi-4-multimodal MiMo-VL-7B MiniCPM-V-2_6 MiniCPM-o-2_6 GLM-4.1V GLM-4.5V GLM-OCR dots.vlm1 dots.ocr NVILA-8B
ERNIE-4.5-VL-28B Step3-VL-10B InternVL2-8B InternVL3-8B Qwen3-Omni-30B-A3B Qwen2-Audio-7B Nemotron-Nano-12B-v2-VL
LightOnOCR PaddleOCR-VL Nemotron-Super JetVLM
"""


@pytest.fixture(scope="module")
def table() -> ModuleType:
    spec = importlib.util.spec_from_file_location("models_table", ROOT / "docs" / "models_table.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # dataclasses look their module up
    sys.modules["models_table"] = module
    spec.loader.exec_module(module)
    return module


def test_it_is_current(table: ModuleType) -> None:
    report = json.loads(table.REPORT.read_text())
    assert table.TABLE.read_text() == table.write(report, family_files()), "run make models"


def test_every_goal_has_a_row(table: ModuleType) -> None:
    ids = " ".join(row.ids for row in table.ROWS)
    assert [goal for goal in GOALS.split() if goal not in ids] == []


def test_rows_name_what_is_there(table: ModuleType, pytestconfig: pytest.Config) -> None:
    tiny = pytestconfig.tiny_builder().FAMILIES  # type: ignore[attr-defined]
    files = ROOT / "python_models" / "families"
    for row in table.ROWS:
        for name in row.family.split(", ") if row.family else ():
            assert (files / f"{name}.py").is_file(), row.ids
        assert set(row.tiny) <= set(tiny), row.ids
        assert bool(row.tiny) is bool(row.family), row.ids
        assert row.family or row.missing, row.ids


def test_failures_show(table: ModuleType) -> None:
    report = [
        ["mllama", "test_served.test_each_modality", "image", "failed"],
        ["mllama", "test_served.test_each_modality", "text", "passed"],
        ["mllama", "test_split.test_tokens_equal_generate", "image", "passed"],
        ["gpt2", "test_generic.test_same_tokens_or_refused", "", "failed"],
    ]
    text = table.write(report, {"mllama": "mllama"})
    assert "`mllama`: in process 1/1, served 1/2" in text
    assert "- failing (1): `gpt2`" in text
