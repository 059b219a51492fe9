"""The committed model repository is what the generator writes, and what the server's own schema accepts."""

from __future__ import annotations

import filecmp
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import text_format

from triptych.python_models.contract.errors import TriptychError
from triptych.python_models.contract.settings import Settings
from triptych.python_models.contract.tensors import EMBEDDING, ENSEMBLES, STAGES
from triptych.python_models.repository import write

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from tritonclient.grpc import model_config_pb2

COMMITTED = Path(__file__).parents[2] / "model_repository"
MODELS = (*STAGES, *ENSEMBLES)


def parse(folder: Path, model: str) -> Any:
    """The config as the server's protobuf schema reads it; unknown fields are errors."""
    return text_format.Parse((folder / model / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())


def files(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def test_committed_repository_is_up_to_date(tmp_path: Path) -> None:
    write(tmp_path, Settings())
    names = files(tmp_path)
    assert files(COMMITTED) - {"README.md"} == names, "run `make repository`"
    _, differ, missing = filecmp.cmpfiles(tmp_path, COMMITTED, names, shallow=False)
    assert not differ, "run `make repository`"
    assert not missing, "run `make repository`"


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("dtype", "gpus"), [("FP32", ()), ("BF16", (0,)), ("FP16", (1, 3))])
def test_configs_say_what_the_contract_says(tmp_path: Path, model: str, dtype: str, gpus: tuple[int, ...]) -> None:
    write(tmp_path, Settings(), embedding_dtype=dtype, gpu_ids=gpus)
    config = parse(tmp_path, model)
    spec = STAGES[model] if model in STAGES else ENSEMBLES[model]
    assert config.name == model
    assert config.max_batch_size == 0
    for ours, theirs in ((spec.inputs, config.input), (spec.outputs, config.output)):
        assert [t.name for t in ours] == [t.name for t in theirs]
        for tensor, written in zip(ours, theirs, strict=True):
            wanted = f"TYPE_{dtype}" if tensor.dtype == EMBEDDING else tensor.dtype
            assert model_config_pb2.DataType.Name(written.data_type) == wanted
            assert tuple(written.dims) == tensor.dims
    assert [t.name for t in config.input if t.optional] == [t.name for t in spec.inputs if t.optional]
    assert (tmp_path / model / "1").is_dir()


@pytest.mark.parametrize("model", STAGES)
def test_stages_run_where_they_should(tmp_path: Path, model: str) -> None:
    spec = STAGES[model]
    write(tmp_path / "cpu", Settings(preprocess_instances=3))
    write(tmp_path / "gpu", Settings(preprocess_instances=3), embedding_dtype="BF16", gpu_ids=(2,))
    cpu, gpu = parse(tmp_path / "cpu", model), parse(tmp_path / "gpu", model)
    count = 3 if model == "preprocess" else 1
    for config in (cpu, gpu):
        assert config.backend == "triptych"
        assert config.model_transaction_policy.decoupled == spec.decoupled
        assert [group.count for group in config.instance_group] == [count]
        assert config.parameters["stage"].string_value == model
    assert [model_config_pb2.ModelInstanceGroup.Kind.Name(g.kind) for g in cpu.instance_group] == ["KIND_CPU"]
    kind, gpus = ("KIND_GPU", [2]) if spec.uses_gpu else ("KIND_CPU", [])
    assert [model_config_pb2.ModelInstanceGroup.Kind.Name(g.kind) for g in gpu.instance_group] == [kind]
    assert list(gpu.instance_group[0].gpus) == gpus
    # embeddings reach the language model on the GPU only where Triton is told not to copy them to the host
    assert "FORCE_CPU_ONLY_INPUT_TENSORS" not in cpu.parameters
    takes_gpu = any(tensor.device_ok for tensor in spec.inputs)
    assert ("FORCE_CPU_ONLY_INPUT_TENSORS" in gpu.parameters) == takes_gpu
    write(tmp_path / "host", Settings(mm_feature_transport="cpu"), embedding_dtype="BF16", gpu_ids=(2,))
    assert "FORCE_CPU_ONLY_INPUT_TENSORS" not in parse(tmp_path / "host", model).parameters


def test_encoders_run_on_every_gpu_and_the_language_model_once(tmp_path: Path) -> None:
    write(tmp_path, Settings(tp=2), embedding_dtype="BF16", gpu_ids=(1, 2))
    for model, gpus in (("vision_encoder", [1, 2]), ("audio_encoder", [1, 2]), ("language_model", [1])):
        (group,) = parse(tmp_path, model).instance_group
        assert (list(group.gpus), group.count) == (gpus, 1)


@pytest.mark.parametrize("model", ENSEMBLES)
def test_ensembles_join_the_steps_of_the_contract(model: str) -> None:
    config = parse(COMMITTED, model)
    assert config.platform == "ensemble"
    steps = [(s.model_name, dict(s.input_map), dict(s.output_map)) for s in config.ensemble_scheduling.step]
    assert steps == [(s.stage, s.inputs, s.outputs) for s in ENSEMBLES[model].steps]


def test_settings_travel_whole_with_any_text_in_them(tmp_path: Path) -> None:
    settings = Settings(model='/tmp/a "b" \\ ü 漢 😀\n', mem_fraction_static=0.5, allowed_media_hosts=("a:1", "b"))
    write(tmp_path, settings)
    # known only here: whether there are GPUs
    expected = replace(settings, gpu_preprocessing="off")
    for model in STAGES:
        assert Settings.from_json(parse(tmp_path, model).parameters["settings"].string_value) == expected


def test_a_class_of_the_user_is_named_in_its_stage_alone(tmp_path: Path) -> None:
    write(tmp_path, Settings(), stage_classes={"preprocess": "/x/own.py:Own"})
    assert parse(tmp_path, "preprocess").parameters["stage"].string_value == "/x/own.py:Own"
    assert parse(tmp_path, "language_model").parameters["stage"].string_value == "language_model"
    with pytest.raises(TriptychError, match="unknown stage 'prepocess'"):
        write(tmp_path, Settings(), stage_classes={"prepocess": "/x/own.py:Own"})


def test_writing_twice_gives_the_same_and_leaves_strangers_alone(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "config.pbtxt").write_text('name: "theirs"')
    write(tmp_path, Settings(model="a"))
    write(tmp_path, Settings())
    assert (tmp_path / "theirs" / "config.pbtxt").read_text() == 'name: "theirs"'
    write(tmp_path / "again", Settings())
    for model in MODELS:
        assert (tmp_path / model / "config.pbtxt").read_bytes() == (
            tmp_path / "again" / model / "config.pbtxt"
        ).read_bytes()


def test_command_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "triptych.python_models.repository", "--output", str(tmp_path)]
    good = subprocess.run(
        [*command, "--settings", '{"block_size": 32}', "--embedding-dtype", "FP16", "--gpu", "0"], check=True, cwd="/"
    )
    assert good.returncode == 0
    settings = Settings.from_json(parse(tmp_path, "preprocess").parameters["settings"].string_value)
    assert settings == Settings(block_size=32, gpu_preprocessing="on")
    bad = subprocess.run([*command, "--settings", '{"blok_size": 32}'], cwd="/", capture_output=True, text=True)
    assert bad.returncode == 2
    assert "did you mean 'block_size'" in bad.stderr


def test_unknown_dtype_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TriptychError, match="FP32, BF16, FP16"):
        write(tmp_path, Settings(), embedding_dtype="FP8")
