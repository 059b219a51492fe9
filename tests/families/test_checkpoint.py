"""``Settings.model`` -> checkpoint -> family."""

from __future__ import annotations

import json
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from triptych.python_models.builtin import checkpoint as builtin_checkpoint
from triptych.python_models.contract.errors import ErrorKind, TriptychError
from triptych.python_models.contract.settings import Settings
from triptych.python_models.families.checkpoint import find_checkpoint
from triptych.python_models.families.registry import load_family, supported_model_types


def refused(model: str) -> TriptychError:
    with pytest.raises(TriptychError) as caught:
        load_family(Settings(model=model))
    return caught.value


def write_config(folder: Path, config: Any) -> Path:
    (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return folder


def test_folder(tmp_path: Path) -> None:
    found = find_checkpoint(Settings(model=str(write_config(tmp_path, {"model_type": "qwen2_5_vl"}))))
    assert found.folder == tmp_path
    assert found.model_type == "qwen2_5_vl"


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"dtype": "bfloat16"}, "bfloat16"),
        ({"torch_dtype": "float16"}, "float16"),
        ({"text_config": {"dtype": "bfloat16"}}, "bfloat16"),
        ({"thinker_config": {"torch_dtype": "bfloat16"}}, "bfloat16"),
        ({"thinker_config": {"text_config": {"dtype": "float16"}}}, "float16"),
        ({"dtype": "auto", "llm_config": {"torch_dtype": "torch.bfloat16"}}, "bfloat16"),
        ({"dtype": None, "vision_config": {"dtype": "float16"}}, "float32"),
        ({}, "float32"),
    ],
)
def test_dtype_of_a_checkpoint(config: dict[str, Any], name: str, tmp_path: Path) -> None:
    assert find_checkpoint(Settings(model=str(write_config(tmp_path, config)))).dtype == name


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_dtype_of_the_stored_weights_where_nothing_else_says(name: str, tmp_path: Path) -> None:
    weights = {"a": torch.zeros(9, 9, dtype=getattr(torch, name)), "b": torch.zeros(9), "c": torch.zeros(99).int()}
    save_file(weights, write_config(tmp_path, {}) / "model.safetensors", {"format": "pt"})
    assert find_checkpoint(Settings(model=str(tmp_path))).dtype == name


@pytest.mark.parametrize("data", [b"", b"\xff" * 20, (2).to_bytes(8, "little") + b"[]"])
def test_dtype_of_broken_files(data: bytes, tmp_path: Path) -> None:
    (write_config(tmp_path, {}) / "model.safetensors").write_bytes(data)
    assert find_checkpoint(Settings(model=str(tmp_path))).dtype == "float32"


def test_no_such_folder(tmp_path: Path) -> None:
    error = refused(str(tmp_path / "nothing"))
    assert error.kind is ErrorKind.MODEL_NOT_FOUND
    assert "there is no folder" in error.message
    assert "builtin" in error.message


def test_file_instead_of_folder(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"")
    assert "is a file" in refused(str(path)).message


def test_folder_without_config(tmp_path: Path) -> None:
    error = refused(str(tmp_path))
    assert error.kind is ErrorKind.MODEL_NOT_FOUND
    assert "has no config.json" in error.message


@pytest.mark.parametrize("text", ["{", "[]"])
def test_broken_config(text: str, tmp_path: Path) -> None:
    error = refused(str(write_config(tmp_path, text)))
    assert error.kind is ErrorKind.MODEL_NOT_FOUND
    assert "config.json" in error.message


def test_hub_id_without_network(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    asked: list[Any] = []

    def offline(*args: Any, **kwargs: Any) -> str:
        asked.append((args, kwargs["revision"]))
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(TriptychError) as caught:
        load_family(Settings(model="Some/Model", revision="v2"))
    assert asked == [(("Some/Model",), "v2")]
    assert caught.value.kind is ErrorKind.MODEL_NOT_FOUND
    assert "'Some/Model' at revision 'v2'" in caught.value.message
    assert "HF_TOKEN" in caught.value.message


@pytest.mark.parametrize("trust", [False, True])
def test_hub_id_downloads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, trust: bool) -> None:
    """Code too only where it is trusted."""
    import huggingface_hub

    write_config(tmp_path, {"model_type": "qwen2_vl"})
    asked: list[list[str]] = []

    def download(*args: Any, allow_patterns: list[str], **kwargs: Any) -> str:
        asked.append(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert find_checkpoint(Settings(model="Some/Model", trust_remote_code=trust)).folder == tmp_path
    assert ("*.py" in asked[0]) is trust


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model-00001-of-00002.bin"])
def test_older_weights_are_downloaded_where_there_are_no_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    import huggingface_hub

    write_config(tmp_path, {"model_type": "qwen2_vl"})

    def download(*args: object, allow_patterns: list[str], **kwargs: object) -> str:
        if any(fnmatch(name, pattern) for pattern in allow_patterns):
            (tmp_path / name).touch()
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert find_checkpoint(Settings(model="Some/Model")).folder == tmp_path
    assert (tmp_path / name).exists()


def test_builtin_is_the_package_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import triptych.python_models.builtin as builtin

    write_config(tmp_path, {"model_type": "qwen2_vl"})
    assert builtin_checkpoint().name == "checkpoint"
    monkeypatch.setattr(builtin, "checkpoint", lambda: tmp_path)
    assert find_checkpoint(Settings(model="builtin")).folder == tmp_path


def test_unknown_model_type_names_the_supported(tmp_path: Path) -> None:
    error = refused(str(write_config(tmp_path, {"model_type": "qwen2_5_vlm"})))
    assert error.kind is ErrorKind.UNSUPPORTED
    assert "is not supported because" in error.message
    assert "'qwen2_5_vlm'" in error.message
    assert "the nearest name that is known is 'qwen2_5_vl'" in error.message
    for name in supported_model_types():
        assert name in error.message


@pytest.mark.parametrize(
    ("model_type", "why"),
    [
        ("bart", "its language model takes no position_ids"),
        ("deepseek_v32", "its attention chooses tokens by an index of its own"),
        ("florence2", "it has an encoder for its text"),
        ("llama4", "it has no linear head lm_head"),
        ("paligemma", "it gives its language model attention_mask of its own"),
        ("pix2struct", "it has no linear head lm_head"),
    ],
)
def test_what_the_generic_adapter_cannot_split_says_why(tmp_path: Path, model_type: str, why: str) -> None:
    error = refused(str(write_config(tmp_path, {"model_type": model_type})))
    assert error.kind is ErrorKind.UNSUPPORTED
    assert f"is not supported because {why}" in error.message
    assert f"model_type {model_type}" in error.message


def test_quantization_is_what_the_checkpoint_says(tmp_path: Path) -> None:
    plain = str(write_config(tmp_path, {"model_type": "qwen2_5_vl"}))
    with pytest.raises(TriptychError, match="'fp8', but the checkpoint is not quantised") as caught:
        find_checkpoint(Settings(model=plain, quantization="fp8"))
    assert (caught.value.kind, caught.value.param) == (ErrorKind.UNSUPPORTED, "settings.quantization")
    write_config(tmp_path, {"model_type": "qwen2_5_vl", "quantization_config": {"quant_method": "fp8"}})
    assert find_checkpoint(Settings(model=plain, quantization="fp8")).folder == tmp_path
    with pytest.raises(TriptychError, match="'awq', but the checkpoint has fp8"):
        find_checkpoint(Settings(model=plain, quantization="awq"))
