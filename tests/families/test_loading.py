"""A stage loads its own weights and reads no others."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from triptych.python_models.contract.errors import ErrorKind, TriptychError
from triptych.python_models.contract.settings import Settings
from triptych.python_models.families.files import Files
from triptych.python_models.families.loading import Absent, load_part, model_class, stage_dtype
from triptych.python_models.families.registry import load_family


def family_of(folder: Path) -> Any:
    return load_family(Settings(model=str(folder)))


def parameters(model: Any) -> set[str]:
    return {name for name, _ in model.named_parameters()}


class ReadLog:
    """Names of the tensors whose data was read from a checkpoint's files."""

    def __init__(self) -> None:
        self.names: set[str] = set()


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> ReadLog:
    log = ReadLog()
    original = Files.read

    def read(self: Files, key: str, bounds: Any) -> torch.Tensor:
        log.names.add(key)
        return original(self, key, bounds)

    monkeypatch.setattr(Files, "read", read)
    return log


def on_disk(folder: Path) -> set[str]:
    return set(load_file(folder / "model.safetensors"))


def test_vision_encoder_reads_the_tower_alone(tiny_checkpoint: Callable[[str], Path], reads: ReadLog) -> None:
    folder = tiny_checkpoint("qwen2_5_omni")
    encoder = family_of(folder).load_encoder("vision", "cpu", torch.float32)
    assert parameters(encoder.model)
    assert all(".visual." in f".{name}" for name in parameters(encoder.model))
    assert reads.names == {name for name in on_disk(folder) if ".visual." in f".{name}"}
    assert isinstance(encoder.base.audio_tower, Absent)


def test_audio_encoder_reads_the_tower_alone(tiny_checkpoint: Callable[[str], Path], reads: ReadLog) -> None:
    folder = tiny_checkpoint("qwen2_5_omni")
    encoder = family_of(folder).load_encoder("audio", "cpu", torch.float32)
    assert all(".audio_tower." in f".{name}" for name in parameters(encoder.model))
    assert reads.names == {name for name in on_disk(folder) if ".audio_tower." in f".{name}"}
    assert isinstance(encoder.base.visual, Absent)
    with pytest.raises(RuntimeError, match="visual is not part of this stage"):
        encoder.base.visual(None)


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen2_5_omni", "gemma3"])
def test_decoder_reads_the_language_model_alone(
    name: str, tiny_checkpoint: Callable[[str], Path], reads: ReadLog
) -> None:
    folder = tiny_checkpoint(name)
    decoder = family_of(folder).load_decoder("cpu", torch.float32)
    names = ("visual.", "audio_tower.", "vision_tower.", "multi_modal_projector.")
    towers = {n for n in on_disk(folder) if any(name in n for name in names)}
    assert towers
    assert reads.names == on_disk(folder) - towers
    assert not any(p.is_meta for p in decoder.text_model.parameters())


def test_preprocessor_reads_no_weights(tiny_checkpoint: Callable[[str], Path], reads: ReadLog) -> None:
    preprocessor = family_of(tiny_checkpoint("qwen2_5_vl")).load_preprocessor()
    assert all(p.is_meta for p in preprocessor.model.parameters())
    assert not reads.names


def test_weights_equal_those_of_the_whole_model(tiny_checkpoint: Callable[[str], Path]) -> None:
    folder = tiny_checkpoint("qwen2_5_omni")
    family = family_of(folder)
    reference = model_class(family.model_class).from_pretrained(folder, dtype=torch.float32)
    whole = dict(reference.named_parameters())
    (text,) = (f"{path}." for path, module in reference.named_modules() if module is reference.get_decoder())
    seen: set[str] = set()
    for model in (
        family.load_encoder("vision", "cpu", torch.float32).model,
        family.load_encoder("audio", "cpu", torch.float32).model,
    ):
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, whole[name]), name
            assert not parameter.requires_grad
            seen.add(name)
    decoder = family.load_decoder("cpu", torch.float32)
    for name, parameter in decoder.text_model.named_parameters():
        assert torch.equal(parameter, whole[text + name]), name
        seen.add(text + name)
    assert seen | {"lm_head.weight"} == set(whole)


def test_tied_head(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """A checkpoint whose head is its embedding table, and which stores it once."""
    folder = tmp_path / "tied"
    shutil.copytree(tiny_checkpoint("qwen2_5_vl"), folder)
    config = json.loads((folder / "config.json").read_text())
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = True
    (folder / "config.json").write_text(json.dumps(config))
    weights = load_file(folder / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    decoder = family_of(folder).load_decoder("cpu", torch.float32)
    assert decoder.lm_head.weight.data_ptr() == decoder.text_model.embed_tokens.weight.data_ptr()
    family_of(folder).load_encoder("vision", "cpu", torch.float32)


def test_thinker_inside_a_whole_omni_checkpoint(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """As published: the thinker's configuration and weights are one part among several."""
    tiny, folder = tiny_checkpoint("qwen2_5_omni"), tmp_path / "whole"
    shutil.copytree(tiny, folder)
    thinker = json.loads((tiny / "config.json").read_text())
    whole = {"model_type": "qwen2_5_omni", "architectures": ["Qwen2_5OmniModel"], "thinker_config": thinker}
    (folder / "config.json").write_text(json.dumps(whole))
    weights = {f"thinker.{name}": tensor for name, tensor in load_file(tiny / "model.safetensors").items()}
    weights["talker.codec_head.weight"] = torch.zeros(2, 2)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    alone, inside = family_of(tiny), family_of(folder)
    for encoder in ("vision", "audio"):
        a, b = (dict(f.load_encoder(encoder, "cpu", torch.float32).model.named_parameters()) for f in (alone, inside))
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)
    c, d = alone.load_decoder("cpu", torch.float32), inside.load_decoder("cpu", torch.float32)
    assert torch.equal(c.lm_head.weight, d.lm_head.weight)
    assert c.eos_token_ids == d.eos_token_ids
    assert c.context_length == d.context_length == inside.load_preprocessor().context_length


def test_missing_weights_are_named(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(tiny_checkpoint("qwen2_5_vl"), folder)
    weights = load_file(folder / "model.safetensors")
    gone = next(name for name in sorted(weights) if name.endswith("blocks.1.attn.proj.weight"))
    del weights[gone]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(TriptychError, match=r"lacks weights of the vision encoder: .*blocks\.1\.attn\.proj\.weight"):
        family_of(folder).load_encoder("vision", "cpu", torch.float32)
    # The other half does not care.
    family_of(folder).load_decoder("cpu", torch.float32)


def test_no_weight_files(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tmp_path / "empty"
    shutil.copytree(tiny_checkpoint("qwen2_5_vl"), folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(TriptychError, match="cannot be loaded") as caught:
        family_of(folder).load_decoder("cpu", torch.float32)
    assert caught.value.kind is ErrorKind.MODEL_NOT_FOUND


def test_truncated_weight_file(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tmp_path / "short"
    shutil.copytree(tiny_checkpoint("qwen2_5_vl"), folder)
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(TriptychError, match="cannot be loaded"):
        family_of(folder).load_decoder("cpu", torch.float32)


def test_dtype(tiny_checkpoint: Callable[[str], Path]) -> None:
    folder = tiny_checkpoint("qwen2_5_vl")
    family = family_of(folder)
    encoder = family.load_encoder("vision", "cpu", torch.bfloat16)
    assert {p.dtype for p in encoder.model.parameters()} == {torch.bfloat16}
    checkpoint = family.checkpoint
    assert stage_dtype(checkpoint, Settings(), "cpu") is torch.float32
    assert stage_dtype(checkpoint, Settings(dtype="float16"), "cpu") is torch.float16
    half = type(checkpoint)(folder, {**checkpoint.config, "dtype": "bfloat16"})
    assert stage_dtype(half, Settings(), "cuda:0") is torch.bfloat16
    assert stage_dtype(half, Settings(), "cpu") is torch.float32
    with pytest.raises(TriptychError, match="dtype must be auto, float32, bfloat16 or float16, got 'int8'"):
        stage_dtype(checkpoint, Settings(dtype="int8"), "cpu")


def test_an_encoder_the_family_has_not(tiny_checkpoint: Callable[[str], Path]) -> None:
    with pytest.raises(TriptychError, match="qwen2_5_vl has no audio encoder"):
        family_of(tiny_checkpoint("qwen2_5_vl")).load_encoder("audio", "cpu", torch.float32)


def test_load_part_reports_what_dies_inside(tiny_checkpoint: Callable[[str], Path]) -> None:
    def keep(model: Any) -> list[str]:
        return ["model.no_such_module"]

    cls, folder = model_class("Qwen2_5_VLForConditionalGeneration"), tiny_checkpoint("qwen2_5_vl")
    config = cls.config_class.from_pretrained(folder)
    with pytest.raises(TriptychError, match=r"the toy part of .* cannot be loaded: AttributeError"):
        load_part(cls, config, folder, keep, part="toy part", device="cpu", dtype=torch.float32)


def test_code_of_a_checkpoint_runs_only_where_it_is_trusted(
    tiny_checkpoint: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(tiny_checkpoint("qwen2_5_vl"), folder)
    (folder / "own_code.py").write_text(
        "from transformers import Qwen2_5_VLProcessor\n\n\nclass OwnProcessor(Qwen2_5_VLProcessor):\n    pass\n"
    )
    config = json.loads((folder / "processor_config.json").read_text())
    config |= {"processor_class": "OwnProcessor", "auto_map": {"AutoProcessor": "own_code.OwnProcessor"}}
    (folder / "processor_config.json").write_text(json.dumps(config))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    with pytest.raises(TriptychError, match="trust_remote_code"):
        load_family(Settings(model=str(folder))).load_preprocessor()
    trusted: Any = load_family(Settings(model=str(folder), trust_remote_code=True)).load_preprocessor()
    assert type(trusted.processor).__name__ == "OwnProcessor"


def damaged(folder: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Any:
    """The family of a copy of a checkpoint with other weights."""
    shutil.copytree(folder, target)
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, target / "model.safetensors", {"format": "pt"})
    return family_of(target)


def test_weights_of_another_shape_are_named(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    def change(weights: dict[str, torch.Tensor]) -> None:
        weights["visual.blocks.1.attn.proj.weight"] = torch.zeros(32, 31)
        weights["model.layers.0.mlp.up_proj.weight"] = torch.zeros(7, 64)

    family = damaged(tiny_checkpoint("qwen2_5_vl"), tmp_path / "wrong", change)
    wrong = r"of another shape than the vision encoder's: \S*visual\.blocks\.1\.attn\.proj\.weight is "
    with pytest.raises(TriptychError, match=wrong + r"\[32, 31\], not \[32, 32\]$") as caught:
        family.load_encoder("vision", "cpu", torch.float32)
    assert caught.value.kind is ErrorKind.STAGE_FAILED
    wrong = (
        r"of another shape than the language model's: \S*layers\.0\.mlp\.up_proj\.weight is \[7, 64\], not \[96, 64\]$"
    )
    with pytest.raises(TriptychError, match=wrong):
        family.load_decoder("cpu", torch.float32)
    with pytest.raises(TriptychError, match=wrong):
        family.open_decoder("cpu", torch.float32, progress=False)


def test_weights_that_do_not_go_together_are_named(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    key = "model.layers.0.mlp.experts.1.gate_proj.weight"

    def change(weights: dict[str, torch.Tensor]) -> None:
        weights[key] = torch.zeros(3, 64)

    family = damaged(tiny_checkpoint("qwen3_omni_moe_thinker"), tmp_path / "wrong", change)
    with pytest.raises(TriptychError, match=r"cannot be put together: \S*layers\.0\.mlp\.experts\.gate_up_proj \("):
        family.load_decoder("cpu", torch.float32)
    with pytest.raises(TriptychError, match=rf"experts.0.gate_proj.weight and {key} become one, but are .* \[3, 64\]$"):
        family.open_decoder("cpu", torch.float32, progress=False)


def test_weights_that_no_stage_reads_are_named(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def change(weights: dict[str, torch.Tensor]) -> None:
        for k in range(3):
            weights[f"model.layers.{k}.self_attn.extra.weight"] = torch.zeros(2)
        weights["visual.surplus"] = torch.zeros(2)
        weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(2)

    family = damaged(tiny_checkpoint("qwen2_5_vl"), tmp_path / "more", change)
    caplog.set_level("WARNING", "triptych")
    family.load_encoder("vision", "cpu", torch.float32)
    assert not caplog.messages
    family.load_decoder("cpu", torch.float32)
    (message,) = caplog.messages
    names = "model.layers.*.self_attn.extra.weight, visual.surplus"
    assert message == f"the checkpoint {tmp_path / 'more'} has 4 weights that no stage reads: {names}"
    caplog.clear()
    family.open_decoder("cpu", torch.float32, progress=False)
    assert not caplog.messages
    family.open_decoder("cpu", torch.float32, progress=True)
    assert caplog.messages == [message]


@pytest.mark.parametrize("name", ["qwen2_5_vl", "gemma3", "qwen3_vl_moe_fp8", "deepseek_ocr2_published"])
def test_whole_checkpoints_have_no_such_weights(
    name: str, tiny_checkpoint: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("WARNING", "triptych")
    family_of(tiny_checkpoint(name)).load_decoder("cpu", torch.float32)
    assert not [message for message in caplog.messages if "no stage" in message]


def resident() -> int:
    """Bytes of memory that this process has, of its own and of mapped files."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS")))


def test_memory_is_that_of_the_weights(tmp_path: Path) -> None:
    """Of a checkpoint of 100 MB in shards of 20 MB, nothing but the weights is held at any time."""
    cls = model_class("Qwen2ForCausalLM")
    config = cls.config_class(
        vocab_size=64,
        hidden_size=512,
        intermediate_size=4096,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=8,
    )
    cls(config).save_pretrained(tmp_path, max_shard_size="20MB")
    size = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    assert size > 100e6
    assert len(list(tmp_path.glob("*.safetensors"))) > 4

    def load() -> Any:
        return load_part(
            cls, config, tmp_path, lambda _: ["lm_head", "model"], part="all", device="cpu", dtype=torch.float32
        )

    # what is imported and allocated once
    load()
    ended = threading.Event()
    seen = [before := resident()]

    def watch() -> None:
        while not ended.wait(0.002):
            seen.append(resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    model = load()
    ended.set()
    watcher.join()
    assert model.lm_head.weight.shape == (64, 512)
    assert max(seen) - before < size + 40e6


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl_moe_fp8", "qwen2_vl_nf4"])
def test_on_a_gpu(tiny_checkpoint: Callable[[str], Path], name: str) -> None:
    family = family_of(tiny_checkpoint(name))
    here, there = (family.load_decoder(device, torch.bfloat16).text_model for device in ("cpu", "cuda:0"))
    weights = there.state_dict()
    for key, tensor in here.state_dict().items():
        assert weights[key].device == torch.device("cuda:0")
        torch.testing.assert_close(weights[key].cpu(), tensor, rtol=0, atol=0)
    assert all(buffer.is_cuda for buffer in there.buffers())
