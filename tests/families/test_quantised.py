"""Quantised weights are read as what they stand for, whole and slice by slice."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from triptych.python_models.contract.errors import ErrorKind, TriptychError
from triptych.python_models.contract.settings import Settings
from triptych.python_models.families import quantised
from triptych.python_models.families.checkpoint import find_checkpoint
from triptych.python_models.families.quantisation import Quantisation
from triptych.python_models.families.quantised import open_tensors
from triptych.python_models.families.registry import load_family

FP8 = {"quant_method": "fp8", "weight_block_size": [32, 32]}
COMPRESSED = {"quant_method": "compressed-tensors"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32}

# (function of tiny.quantised, its options, config)
FORMATS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "fp8 blocks": ("fp8_block_wise", {}, FP8),
    "fp8 blocks, smaller ones at the ends": (
        "fp8_block_wise",
        {"rows": 40, "columns": 48},
        FP8 | {"weight_block_size": [40, 48]},
    ),
    "fp8 rows": ("fp8_channel", {}, COMPRESSED | {"format": "float-quantized"}),
    "fp8 tensor": ("fp8_tensor", {}, {"quant_method": "modelopt", "quant_algo": "FP8"}),
    "int8 rows": ("int8_channel", {}, COMPRESSED | {"format": "int-quantized"}),
    "gptq": ("gptq", {}, GPTQ),
    "gptq, any order": ("gptq", {"ordered": True}, GPTQ | {"desc_act": True}),
    "gptq, second layout, one group": (
        "gptq",
        {"size": 64, "second": True},
        GPTQ | {"checkpoint_format": "gptq_v2", "group_size": -1},
    ),
    "gptq, 8 bits": ("gptq", {"bits": 8}, GPTQ | {"bits": 8}),
    "gptq, 2 bits": ("gptq", {"bits": 2}, GPTQ | {"bits": 2}),
    "auto-round": ("gptq", {}, GPTQ | {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq"}),
    "awq": ("awq", {}, {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}),
    "packed": ("packed", {}, COMPRESSED | {"format": "pack-quantized"}),
    "packed, zero points": ("packed", {"zero": True}, COMPRESSED | {"format": "pack-quantized"}),
    "packed, any order": ("packed", {"ordered": True}, COMPRESSED | {"format": "pack-quantized"}),
    "packed, 8 bits": ("packed", {"bits": 8}, COMPRESSED | {"format": "pack-quantized"}),
    "nf4": ("nf4", {"nested": False}, {"quant_method": "bitsandbytes", "load_in_4bit": True}),
    "nf4, nested": ("nf4", {}, {"load_in_4bit": True}),
    "nf4, blocks across rows": ("nf4", {"nested": False, "block": 48}, {"load_in_4bit": True}),
    "int8 of bitsandbytes": ("int8", {}, {"quant_method": "bitsandbytes", "load_in_8bit": True}),
}
# by the stored tensor that holds the numbers: how far from the weights they may be, of the largest weight
ERROR = {"2 bits": 0.4, "fp8": 0.04, "8": 0.01, "nf4": 0.16}


@pytest.fixture(scope="module")
def quantise(pytestconfig: pytest.Config) -> ModuleType:
    pytestconfig.tiny_builder()  # type: ignore[attr-defined]
    return importlib.import_module("tiny.quantised")


def folder_of(path: Path, stored: dict[str, torch.Tensor], config: dict[str, Any] | None) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in stored.items()}, path / "model.safetensors")
    described = {"model_type": "qwen2"} | ({} if config is None else {"quantization_config": config})
    (path / "config.json").write_text(json.dumps(described))
    return path


def check_slices(folder: Path, name: str, expected: torch.Tensor) -> None:
    found = open_tensors(folder, "cpu", torch.float32)
    assert found.keys() == [name]
    assert found.shape(name) == tuple(expected.shape)
    torch.testing.assert_close(found.read(name, ()), expected, rtol=0, atol=0)
    sizes = expected.shape
    for dim, size in enumerate(sizes):
        for start, stop in ((0, size), (size // 2, size), (1, 3), (size // 3, size - 1), (size - 1, size)):
            bounds = tuple((start, stop) if k == dim else (1, sizes[k]) for k in range(len(sizes)))
            want = expected[tuple(slice(*each) for each in bounds)]
            torch.testing.assert_close(found.read(name, bounds), want, rtol=0, atol=0)


@pytest.mark.parametrize("name", FORMATS)
def test_a_matrix(tmp_path: Path, quantise: ModuleType, name: str) -> None:
    method, options, config = FORMATS[name]
    weight = torch.randn(96, 64, generator=torch.Generator().manual_seed(0))
    stored, product = getattr(quantise, method)(weight, **options)
    largest = next((most for kind, most in ERROR.items() if kind in name), 0.12)
    assert 0 < (product - weight).abs().max() < largest * weight.abs().max()
    folder = folder_of(tmp_path, {f"layer{leaf}": tensor for leaf, tensor in stored.items()}, config)
    check_slices(folder, "layer.weight", product)


@pytest.mark.parametrize("name", FORMATS)
def test_some_rows_at_a_time(tmp_path: Path, quantise: ModuleType, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    method, options, config = FORMATS[name]
    stored, product = getattr(quantise, method)(torch.randn(96, 64), **options)
    folder = folder_of(tmp_path, {f"layer{leaf}": tensor for leaf, tensor in stored.items()}, config)
    monkeypatch.setattr(quantised, "_AT_ONCE", 7 * 64)
    found = open_tensors(folder, "cpu", torch.bfloat16).read("layer.weight", ())
    assert torch.equal(found, product.bfloat16())
    found = open_tensors(folder, "cpu", torch.float32).read("layer.weight", ((5, 90), (1, 63)))
    assert torch.equal(found, product[5:90, 1:63])


def test_fused_experts(tmp_path: Path, quantise: ModuleType) -> None:
    weight = torch.randn(4, 64, 48, generator=torch.Generator().manual_seed(0))
    stored, scales, product = quantise.fp8_blocks(weight, 32, 32)
    folder = folder_of(tmp_path, {"experts.up": stored, "experts.up_scale_inv": scales}, FP8)
    check_slices(folder, "experts.up", product)
    # a scale for each of them
    scales = weight.abs().amax((1, 2)) / 448
    stored = (weight / scales[:, None, None]).to(torch.float8_e4m3fn)
    folder_of(tmp_path, {"experts.up": stored, "experts.up_scale_inv": scales}, {"quant_method": "fp8"})
    check_slices(folder, "experts.up", stored.float() * scales[:, None, None])


def test_scales_that_are_exponents(tmp_path: Path) -> None:
    stored = torch.randn(8, 64).to(torch.float8_e4m3fn)
    exponents = torch.randint(120, 130, (8, 2), dtype=torch.uint8)
    folder = folder_of(tmp_path, {"a.weight": stored, "a.weight_scale_inv": exponents}, {"quant_method": "fp8"})
    check_slices(folder, "a.weight", stored.float() * exponents.float().sub(127).exp2().repeat_interleave(32, 1))
    typed = exponents.view(torch.float8_e8m0fnu)
    folder_of(tmp_path, {"a.weight": stored, "a.weight_scale_inv": typed}, {"quant_method": "fp8"})
    check_slices(folder, "a.weight", stored.float() * exponents.float().sub(127).exp2().repeat_interleave(32, 1))


def test_microscaled_experts(tmp_path: Path, quantise: ModuleType) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    weight = torch.randn(3, 96, 10, generator=torch.Generator().manual_seed(0))
    stored, product = quantise.mxfp4(weight)
    assert (product - weight).abs().max() < 0.25 * weight.abs().max()
    folder = folder_of(
        tmp_path, {f"experts.up{leaf}": each for leaf, each in stored.items()}, {"quant_method": "mxfp4"}
    )
    check_slices(folder, "experts.up", product)
    theirs = convert_moe_packed_tensors(stored["_blocks"], stored["_scales"], dtype=torch.float32)
    assert torch.equal(theirs, product)


def test_as_transformers_reads_fp8(quantise: ModuleType) -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    stored, scales, product = quantise.fp8_blocks(torch.randn(96, 64), 48, 32)
    theirs: Any = Fp8Dequantize
    assert torch.equal(theirs(None)._dequantize_one(stored, scales, torch.float32), product)


def test_plain_tensors_stay_and_those_of_activations_go(tmp_path: Path, quantise: ModuleType) -> None:
    stored, _ = quantise.fp8_tensor(torch.randn(8, 8))
    others = {"norm.weight": torch.ones(8), "attn.k_scale": torch.ones(()), "vision.clip.input_min": torch.ones(())}
    folder = folder_of(tmp_path, {f"a{leaf}": each for leaf, each in stored.items()} | others, {"quant_method": "fp8"})
    assert sorted(open_tensors(folder, "cpu", torch.float32).keys()) == [
        "a.weight",
        "norm.weight",
        "vision.clip.input_min",
    ]


@pytest.mark.parametrize(
    ("stored", "config", "what"),
    [
        ({"a.weight": torch.zeros(4, 4).to(torch.float8_e4m3fn)}, None, "lacks a.weight_scale_inv or a.weight_scale"),
        (
            {"a.weight": torch.zeros(4, 4).to(torch.float8_e4m3fn), "a.weight_scale_inv": torch.ones(3, 1)},
            FP8,
            r"has scales a.weight_scale_inv of shape \[3, 1\] that do not fit a.weight of shape \[4, 4\]",
        ),
        ({"a.qweight": torch.zeros(4, 8).int(), "a.scales": torch.ones(1, 8)}, GPTQ, "lacks a.qzeros"),
        ({"a.weight": torch.zeros(4, 4).to(torch.int8), "a.scale": torch.ones(4, 4)}, FP8, "has int8 numbers a.weight"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path: Path, stored: Any, config: Any, what: str) -> None:
    with pytest.raises(TriptychError, match=what) as caught:
        open_tensors(folder_of(tmp_path, stored, config), "cpu", torch.float32)
    assert caught.value.kind is ErrorKind.STAGE_FAILED


@pytest.mark.parametrize(
    ("config", "what"),
    [
        ({"quant_method": "hqq"}, "quant_method 'hqq' is none of fp8, "),
        ({}, "quant_method '' is none of"),
        ({"quant_method": "gptq", "bits": 3}, "gptq's bits must be 2, 4 or 8, not 3"),
        ({"quant_method": "gptq", "checkpoint_format": "marlin"}, "checkpoint_format must be gptq or gptq_v2"),
        ({"quant_method": "awq", "version": "gemv"}, "awq's version must be gemm, not 'gemv'"),
        ({"quant_method": "awq", "bits": 8}, "awq's bits must be 4, not 8"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "modelopt's quant_algo must be FP8, not 'NVFP4'"),
        ({"quant_method": "auto-round", "packing_format": "auto_round:exllamav3"}, "packing_format"),
        (COMPRESSED | {"format": "nvfp4-pack-quantized"}, "'nvfp4-pack-quantized'"),
        (COMPRESSED | {"config_groups": {"a": {"format": "marlin-24"}}}, "'marlin-24'"),
        (COMPRESSED | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "'sparse-24-bitmask'"),
        (COMPRESSED | {"transform_config": {"config_groups": {"R1": {}}}}, "transform_config"),
    ],
)
@pytest.mark.parametrize("part", ["", "text_config"])
def test_what_cannot_be_read_is_refused_at_start(tmp_path: Path, config: Any, what: str, part: str) -> None:
    inner = {"quantization_config": config}
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "qwen2_5_vl", **({part: inner} if part else inner)})
    )
    with pytest.raises(TriptychError, match=what) as caught:
        find_checkpoint(Settings(model=str(tmp_path)))
    assert (caught.value.kind, caught.value.param) == (ErrorKind.UNSUPPORTED, "settings.model")


def test_plain_checkpoints_have_none() -> None:
    assert Quantisation.of({"model_type": "qwen2", "quantization_config": None}) is None


@pytest.mark.parametrize(
    "name",
    ["qwen2_5_vl_awq", "qwen2_5_vl_gptq", "qwen2_vl_nf4", "qwen3_omni_fp8", "qwen3_vl_fp8", "qwen3_vl_moe_fp8"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stages_have_the_plain_weights(tiny_checkpoint: Callable[[str], Path], name: str, dtype: torch.dtype) -> None:
    folder = tiny_checkpoint(name)
    names = {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()}
    assert names & {torch.float8_e4m3fn, torch.int32, torch.uint8}
    family = load_family(Settings(model=str(folder)))
    reference = family.load_class().from_pretrained(folder / "whole", dtype=dtype)  # type: ignore[attr-defined]
    whole = reference.state_dict()
    (text,) = (f"{path}." for path, module in reference.named_modules() if module is reference.get_decoder())
    decoder = family.load_decoder("cpu", dtype)
    _, source = family.open_decoder("cpu", dtype, progress=False)
    for key, tensor in decoder.text_model.state_dict().items():
        assert tensor.dtype == whole[text + key].dtype
        assert torch.equal(tensor, whole[text + key]), key
        assert torch.equal(source.get(key), tensor), key
        if tensor.dim() == 2:
            half = tensor.shape[1] // 2
            assert torch.equal(source.get(key, 1, half, tensor.shape[1]), tensor[:, half:]), key
    for encoder in family.encoders:
        model = family.load_encoder(encoder, "cpu", dtype).model  # type: ignore[attr-defined]
        for key, tensor in model.named_parameters():
            assert torch.equal(tensor, whole[key]), key


def test_as_transformers_loads_fp8(tiny_checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU it turns the weights into plain ones too; the package that it asks for it does not use."""
    from transformers.quantizers import quantizer_finegrained_fp8

    monkeypatch.setattr(quantizer_finegrained_fp8, "is_accelerate_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    folder = tiny_checkpoint("qwen3_vl_fp8")
    family: Any = load_family(Settings(model=str(folder)))
    theirs = family.load_class().from_pretrained(folder, dtype=torch.float32)
    text = theirs.get_decoder().state_dict()
    decoder = family.load_decoder("cpu", torch.float32)
    for key, tensor in decoder.text_model.state_dict().items():
        torch.testing.assert_close(tensor, text[key])
