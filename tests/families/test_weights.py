"""Slices of a checkpoint's weights are those of the modules that transformers loads from it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from triptych.python_models.contract.errors import ErrorKind, TriptychError
from triptych.python_models.contract.settings import Settings
from triptych.python_models.families.files import Files
from triptych.python_models.families.loading import model_class, outline
from triptych.python_models.families.registry import load_family
from triptych.python_models.families.weights import RandomSource, SafetensorsSource

_TEXT: dict[str, Any] = {
    "vocab_size": 30,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
_MOE = _TEXT | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "decoder_sparse_step": 1}
_VISION = {"depth": 1, "hidden_size": 8, "out_hidden_size": 16, "num_heads": 2, "intermediate_size": 8}
_VISION |= {"deepstack_visual_indexes": [0], "num_position_embeddings": 4}
_SECTIONS = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 0]}}

# class -> config; what is special about its files
KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "plain": ("Qwen2ForCausalLM", "Qwen2Config", {**_TEXT, "tie_word_embeddings": False}),
    "tied head": ("Qwen2ForCausalLM", "Qwen2Config", {**_TEXT, "tie_word_embeddings": True}),
    "experts one by one": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", _MOE),
    "shared expert": ("Qwen2MoeForCausalLM", "Qwen2MoeConfig", _MOE | {"shared_expert_intermediate_size": 8}),
    "float32 correction": (
        "Glm4MoeForCausalLM",
        "Glm4MoeConfig",
        _MOE | {"n_routed_experts": 4, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
    ),
    "renamed experts": ("MixtralForCausalLM", "MixtralConfig", _TEXT | {"num_local_experts": 4}),
    "experts turned, prefixes": (
        "Qwen3VLMoeForConditionalGeneration",
        "Qwen3VLMoeConfig",
        {"text_config": _MOE | _SECTIONS, "vision_config": _VISION},
    ),
    "conversions of whole tensors": (
        "Ernie4_5_VLMoeForConditionalGeneration",
        "Ernie4_5_VLMoeConfig",
        {
            "text_config": _TEXT
            | {"moe_num_experts": 4, "moe_intermediate_size": [8, 8], "moe_k": 2, "moe_layer_start_index": 0}
            | {
                "head_dim": 8,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
            },
            "vision_config": {"depth": 1, "hidden_size": 8, "num_heads": 2, "intermediate_size": 8},
        },
    ),
}


def keep(model: Any) -> list[str]:
    text = model.get_decoder()
    return ["lm_head", *(path for path, module in model.named_modules() if module is text)]


def opened(folder: Path, cls: Any, dtype: torch.dtype = torch.float32) -> SafetensorsSource:
    model = outline(cls, cls.config_class.from_pretrained(folder), keep, dtype)
    return SafetensorsSource(model, folder, keep(model)[1], "cpu", dtype)


def saved(kind: str, folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """Write a checkpoint in several files; its model class."""
    cls, config = model_class(KINDS[kind][0]), model_class(KINDS[kind][1])
    torch.manual_seed(0)
    model = cls(config(**KINDS[kind][2]))
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.normal_()
    model.to(dtype).save_pretrained(folder, max_shard_size="6KB")
    return cls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_slices_are_those_of_transformers(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    cls = saved(kind, tmp_path, dtype)
    whole = cls.from_pretrained(tmp_path, dtype=dtype)
    source = opened(tmp_path, cls, dtype)
    text = keep(whole)[1]
    names = [n for n in whole.state_dict() if n.startswith((f"{text}.", "lm_head."))]
    assert len(names) > 20
    for full in names:
        expected = whole.state_dict()[full]
        name = full.removeprefix(f"{text}.")
        mine = source.get(name)
        assert mine.dtype == expected.dtype, name
        assert torch.equal(mine, expected), name
        for dim, size in enumerate(expected.shape):
            for start, stop in {(0, size), (size // 2, size), (0, size // 2 or 1), (size // 3, 2 * size // 3 or 1)}:
                part = source.get(name, dim, start, stop)
                assert torch.equal(part, expected.narrow(dim, start, stop - start)), (name, dim, start, stop)
    with pytest.raises(KeyError):
        source.get("layers.0.no_such.weight")
    source.close()


def test_only_what_is_asked_for_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cls = saved("experts one by one", tmp_path)
    reads: list[tuple[str, Any]] = []
    original = Files.read

    def read(self: Files, key: str, bounds: Any) -> torch.Tensor:
        reads.append((key, bounds))
        return original(self, key, bounds)

    monkeypatch.setattr(Files, "read", read)
    source = opened(tmp_path, cls)
    assert reads == []
    source.get("layers.1.mlp.experts.gate_up_proj", 0, 2, 3)
    assert {key for key, _ in reads} == {f"model.layers.1.mlp.experts.2.{name}_proj.weight" for name in ("gate", "up")}
    reads.clear()
    source.get("layers.1.mlp.experts.gate_up_proj", 1, 10, 13)
    assert {bounds for _, bounds in reads} == {((2, 5), (0, 16))}
    assert len(reads) == 4


@pytest.mark.parametrize(
    "name",
    [
        "qwen2_5_vl",
        "gemma3",
        "gemma3_text",
        "janus_published",
        "deepseek_ocr",
        "deepseek_ocr2_published",
        "deepseek_vl2",
        "deepseek_vl2_small",
        "deepseek_vl2_tiny",
    ],
)
def test_one_file_and_a_family(tiny_checkpoint: Callable[[str], Path], name: str) -> None:
    folder = tiny_checkpoint(name)
    family = load_family(Settings(model=str(folder)))
    decoder, source = family.open_decoder("cpu", torch.float32, progress=False)
    loaded = family.load_decoder("cpu", torch.float32)
    assert {p.device.type for p in decoder.text_model.parameters()} == {"meta"}
    frequencies = dict(loaded.text_model.rotary_emb.named_buffers())  # type: ignore[union-attr, operator]
    assert frequencies
    for key, buffer in frequencies.items():
        assert torch.equal(decoder.text_model.rotary_emb.get_buffer(key), buffer), key  # type: ignore[union-attr, operator]
    for key, tensor in loaded.text_model.state_dict().items():
        assert torch.equal(source.get(key), tensor), key
    assert torch.equal(source.get("lm_head.weight"), loaded.lm_head.weight)  # type: ignore[arg-type]
    assert (decoder.num_axes, decoder.context_length) == (loaded.num_axes, loaded.context_length)
    assert decoder.bidirectional == loaded.bidirectional


@pytest.mark.parametrize("load_format", ["auto", "dummy"])
def test_another_dtype_than_the_checkpoints(tiny_checkpoint: Callable[[str], Path], load_format: str) -> None:
    settings = Settings(model=str(tiny_checkpoint("mimo_vl")), load_format=load_format)
    family = load_family(settings)
    assert family.load_config().dtype is torch.bfloat16
    decoder, source = family.open_decoder("cpu", torch.float32, progress=False)
    modules = torch.nn.ModuleList([decoder.text_model, decoder.lm_head])
    assert {parameter.dtype for parameter in modules.parameters()} == {torch.float32}
    names = ("lm_head.weight", "embed_tokens.weight", "norm.weight", "layers.0.self_attn.q_proj.weight")
    assert {source.get(name).dtype for name in names} == {torch.float32}
    encoder = family.load_encoder("vision", "cpu", torch.float32)
    assert {parameter.dtype for parameter in encoder.model.parameters()} == {torch.float32}


def test_missing_weights_are_named(tmp_path: Path) -> None:
    cls = saved("plain", tmp_path)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    key = "model.layers.1.mlp.up_proj.weight"
    path = tmp_path / index["weight_map"].pop(key)
    tensors = load_file(path)
    save_file({name: tensor for name, tensor in tensors.items() if name != key}, path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(TriptychError, match=rf"lacks weights of the language model: {key}$") as caught:
        opened(tmp_path, cls)
    assert caught.value.kind is ErrorKind.STAGE_FAILED


@pytest.mark.parametrize("damage", ["none", "short", "index"])
def test_files_that_cannot_be_read(tmp_path: Path, damage: str) -> None:
    cls = saved("plain", tmp_path)
    files = sorted(tmp_path.glob("*.safetensors"))
    if damage == "none":
        (tmp_path / "model.safetensors.index.json").unlink()
        for path in files:
            path.unlink()
    elif damage == "short":
        files[0].write_bytes(files[0].read_bytes()[:100])
    else:
        files[0].unlink()
    with pytest.raises(TriptychError, match="cannot be loaded") as caught:
        opened(tmp_path, cls)
    assert caught.value.kind is ErrorKind.MODEL_NOT_FOUND


def test_weights_of_another_shape_are_named(tmp_path: Path) -> None:
    cls = saved("plain", tmp_path)
    key = "model.layers.1.mlp.up_proj.weight"
    path = tmp_path / json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"][key]
    save_file(load_file(path) | {key: torch.zeros(24, 17)}, path)
    with pytest.raises(TriptychError, match=rf"of another shape .*: {key} is \[24, 17\], not \[24, 16\]$") as caught:
        opened(tmp_path, cls)
    assert caught.value.kind is ErrorKind.STAGE_FAILED


def test_random_weights_are_the_same_on_all_ranks_where_they_must_be(tmp_path: Path) -> None:
    cls = saved("experts one by one", tmp_path)
    model = outline(cls, cls.config_class.from_pretrained(tmp_path), keep, torch.bfloat16)
    ranks = [RandomSource(model, "model", "cpu", torch.bfloat16) for _ in range(2)]
    for name in ("embed_tokens.weight", "layers.0.mlp.gate.weight", "norm.weight"):
        one, two = (source.get(name) for source in ranks)
        assert torch.equal(one, two)
        assert one.dtype is torch.bfloat16
    assert ranks[0].get("layers.0.mlp.experts.down_proj", 0, 1, 3).shape == (2, 16, 8)
    assert not torch.equal(
        ranks[0].get("layers.0.self_attn.q_proj.weight", 0, 0, 8),
        ranks[1].get("layers.0.self_attn.q_proj.weight", 0, 8, 16),
    )
