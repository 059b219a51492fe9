"""Quantised checkpoints, each beside the weights that its numbers stand for; and how weights are quantised."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from . import qwen, qwen3
from .common import Tiny

Made = tuple[dict[str, torch.Tensor], torch.Tensor]
"""Stored tensors by what follows the module's name (a dot and more), and the matrix they stand for, float32."""

_E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
# the quantiles of a normal distribution that bitsandbytes calls nf4
_NF4 = torch.tensor(
    [
        -1.0,
        -0.6961928,
        -0.5250731,
        -0.3949175,
        -0.2844414,
        -0.1847734,
        -0.0910500,
        0.0,
        0.0795803,
        0.1609302,
        0.2461123,
        0.3379152,
        0.4407098,
        0.5626170,
        0.7229568,
        1.0,
    ]
)


def pack(numbers: torch.Tensor, bits: int, dim: int) -> torch.Tensor:
    """Words of 32 bits, the first number lowest; the last one is filled with zeros."""
    each, moved = 32 // bits, numbers.movedim(dim, -1).long()
    moved = torch.nn.functional.pad(moved, (0, -moved.shape[-1] % each)).unflatten(-1, (-1, each))
    words = sum(moved[..., k] << bits * k for k in range(each))
    assert isinstance(words, torch.Tensor)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32).movedim(-1, dim).contiguous()


def fp8_blocks(weight: torch.Tensor, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """float8 numbers, scales of blocks (of the last two dimensions; those at the end may be smaller), their product."""
    counts = -(-weight.shape[-2] // rows), -(-weight.shape[-1] // columns)
    scales = torch.empty(*weight.shape[:-2], *counts)
    stored, product = torch.empty_like(weight, dtype=torch.float8_e4m3fn), torch.empty_like(weight)
    for i in range(counts[0]):
        for k in range(counts[1]):
            place = (..., slice(i * rows, (i + 1) * rows), slice(k * columns, (k + 1) * columns))
            scale = weight[place].abs().amax((-2, -1), keepdim=True) / 448
            scales[..., i, k] = scale[..., 0, 0]
            stored[place] = (weight[place] / scale).to(torch.float8_e4m3fn)
            product[place] = stored[place].float() * scale
    return stored, scales, product


def fp8_block_wise(weight: torch.Tensor, rows: int = 32, columns: int = 32) -> Made:
    """As Qwen3-VL-FP8 is published, with blocks of another size."""
    stored, scales, product = fp8_blocks(weight, rows, columns)
    return {".weight": stored, ".weight_scale_inv": scales}, product


def fp8_channel(weight: torch.Tensor) -> Made:
    """float-quantized of compressed-tensors, a scale for each row."""
    stored, scales, _ = fp8_blocks(weight, 1, weight.shape[1])
    return {".weight": stored, ".weight_scale": scales.bfloat16()}, stored.float() * scales.bfloat16().float()


def fp8_tensor(weight: torch.Tensor) -> Made:
    """One scale for all, and one for activations, which nothing here needs."""
    stored, scales, product = fp8_blocks(weight, *weight.shape)
    return {".weight": stored, ".weight_scale": scales.flatten(), ".input_scale": torch.ones(())}, product


def int8(weight: torch.Tensor) -> Made:
    """LLM.int8() of bitsandbytes."""
    largest = weight.abs().amax(1)
    stored = (weight / largest[:, None] * 127).round().to(torch.int8)
    kept = {".weight": stored, ".SCB": largest, ".weight_format": torch.zeros((), dtype=torch.uint8)}
    return kept, stored.float() * largest[:, None] / 127


def int8_channel(weight: torch.Tensor) -> Made:
    """int-quantized of compressed-tensors, with zero points."""
    low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    scale = (high - low) / 255
    zero = (-128 - low / scale).round().clamp(-128, 127)
    stored = (weight / scale + zero).round().clamp(-128, 127)
    kept = {".weight": stored.to(torch.int8), ".weight_scale": scale, ".weight_zero_point": zero.to(torch.int8)}
    return kept, (stored - zero) * scale


def grouped(
    weight: torch.Tensor, group: torch.Tensor, bits: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Positive numbers [out, in], zero points and scales [out, groups] (float16's), and what they stand for."""
    most = 2**bits - 1
    columns = [weight[:, group == k] for k in range(int(group.max()) + 1)]
    low = torch.stack([each.amin(1).clamp(max=0) for each in columns], 1)
    high = torch.stack([each.amax(1).clamp(min=0) for each in columns], 1)
    scales = ((high - low) / most).half().float()
    # one at least: GPTQ's first layout stores them less one
    zeros = (-low / scales).round().clamp(1, most)
    numbers = (weight / scales[:, group] + zeros[:, group]).round().clamp(0, most)
    return numbers, zeros, scales, (numbers - zeros[:, group]) * scales[:, group]


def gptq(weight: torch.Tensor, size: int = 32, bits: int = 4, *, ordered: bool = False, second: bool = False) -> Made:
    """With inputs in groups of any order (desc_act), in the second layout, in words of so many bits."""
    group = torch.arange(weight.shape[1]) // size
    if ordered:
        group = group[torch.randperm(len(group), generator=torch.Generator().manual_seed(0))]
    numbers, zeros, scales, product = grouped(weight, group, bits)
    stored = {
        ".qweight": pack(numbers.T, bits, 0),
        ".qzeros": pack(zeros.T - (0 if second else 1), bits, 1),
        ".scales": scales.T.half().contiguous(),
    }
    return stored | ({".g_idx": group.int()} if ordered or not second else {}), product


def awq(weight: torch.Tensor, size: int = 32) -> Made:
    """Of AutoAWQ's gemm version."""
    numbers, zeros, scales, product = grouped(weight, torch.arange(weight.shape[1]) // size, 4)
    order = [0, 2, 4, 6, 1, 3, 5, 7]

    def packed(matrix: torch.Tensor) -> torch.Tensor:
        return pack(matrix.unflatten(1, (-1, 8))[:, :, order].flatten(1), 4, 1)

    return {".qweight": packed(numbers.T), ".qzeros": packed(zeros.T), ".scales": scales.T.half().contiguous()}, product


def packed(weight: torch.Tensor, size: int = 32, bits: int = 4, *, zero: bool = False, ordered: bool = False) -> Made:
    """pack-quantized of compressed-tensors."""
    group = torch.arange(weight.shape[1]) // size
    if ordered:
        group = group[torch.randperm(len(group), generator=torch.Generator().manual_seed(0))]
    stored: dict[str, torch.Tensor] = {".weight_shape": torch.tensor(weight.shape)}
    if zero:
        numbers, zeros, scales, product = grouped(weight, group, bits)
        stored[".weight_zero_point"] = pack(zeros, bits, 0)
    else:
        half = 2 ** (bits - 1)
        columns = [weight[:, group == k] for k in range(int(group.max()) + 1)]
        scales = torch.stack([each.abs().amax(1) for each in columns], 1) / (half - 1)
        numbers = (weight / scales[:, group]).round() + half
        product = (numbers - half) * scales[:, group]
    stored |= {".weight_packed": pack(numbers, bits, 1), ".weight_scale": scales}
    return stored | ({".weight_g_idx": group.int()} if ordered else {}), product


def nf4(weight: torch.Tensor, *, nested: bool = True, block: int = 64) -> Made:
    """Of bitsandbytes; nested: with factors of blocks that are quantised themselves."""
    blocks = weight.flatten().unflatten(0, (-1, block))
    factors = blocks.abs().amax(1)
    state: dict[str, Any] = {"quant_type": "nf4", "blocksize": block, "dtype": "float32", "shape": list(weight.shape)}
    stored = {".weight.quant_map": _NF4.clone()}
    if nested:
        offset, table = float(factors.mean()), torch.linspace(-1, 1, 256)
        coarse = (factors - offset).unflatten(0, (-1, 4)).abs().amax(1)
        spread = coarse.repeat_interleave(4)
        small = ((factors - offset) / spread).unsqueeze(1).sub(table).abs().argmin(1)
        factors = table[small] * spread + offset
        stored |= {".weight.absmax": small.to(torch.uint8), ".weight.nested_absmax": coarse}
        stored |= {".weight.nested_quant_map": table}
        state |= {"nested_blocksize": 4, "nested_dtype": "float32", "nested_offset": offset}
    else:
        stored[".weight.absmax"] = factors
    codes = (blocks / factors[:, None]).unsqueeze(-1).sub(_NF4).abs().argmin(-1)
    pairs = codes.flatten().unflatten(0, (-1, 2))
    stored[".weight"] = (pairs[:, :1] * 16 + pairs[:, 1:]).to(torch.uint8)
    described = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    stored[".weight.quant_state.bitsandbytes__nf4"] = described
    return stored, (_NF4[codes] * factors[:, None]).reshape(weight.shape)


def mxfp4(weight: torch.Tensor) -> Made:
    """Of fused experts: [experts, inputs, outputs], stored with outputs first."""
    blocks = weight.transpose(1, 2).unflatten(-1, (-1, 32))
    exponents = (blocks.abs().amax(-1) / 6).log2().ceil()
    scaled = blocks / exponents.exp2().unsqueeze(-1)
    codes = scaled.abs().unsqueeze(-1).sub(_E2M1).abs().argmin(-1)
    values = _E2M1[codes] * scaled.sign()
    codes = codes + 8 * (scaled < 0)
    pairs = codes.unflatten(-1, (-1, 2))
    stored = {"_blocks": (pairs[..., 0] + 16 * pairs[..., 1]).to(torch.uint8)}
    stored["_scales"] = (exponents + 127).to(torch.uint8)
    return stored, (values * exponents.exp2().unsqueeze(-1)).flatten(-2).transpose(1, 2).contiguous()


def _write(
    folder: Path,
    made: tuple[Any, Any],
    config: dict[str, Any],
    how: Callable[[str], Callable[[torch.Tensor], Made] | None],
    *,
    turned_experts: bool = False,
) -> None:
    """A checkpoint whose linear layers are quantised, and in folder/whole one of what they stand for.

    Args:
        config: its quantization_config.
        how: name of a weight -> how it is quantised.
        turned_experts: experts are published in one tensor, the other way round than transformers has them.
    """
    qwen3.save(*made, folder)
    plain = load_file(folder / "whole" / "model.safetensors")
    stored: dict[str, torch.Tensor] = {}
    for name, weight in plain.items():
        fused = turned_experts and ".experts." in name
        published = weight.transpose(1, 2).contiguous() if fused else weight
        method = how(name) if weight.dim() == 2 or fused else None
        if fused:
            numbers, scales, product = fp8_blocks(published, 32, 32)
            stored |= {name: numbers, f"{name}_scale_inv": scales}
            plain[name] = product.transpose(1, 2).contiguous()
        elif method is None:
            stored[name] = published
        else:
            parts, plain[name] = method(published)
            stored |= {name.removesuffix(".weight") + leaf: tensor for leaf, tensor in parts.items()}
    save_file(plain, folder / "whole" / "model.safetensors", {"format": "pt"})
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    described = json.loads((folder / "whole" / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(described | {"quantization_config": config}))


def _linear(name: str) -> bool:
    return name.endswith(("_proj.weight", ".qkv.weight", ".proj.weight", ".linear_fc1.weight", ".linear_fc2.weight"))


def _of_text(method: Callable[[torch.Tensor], Made]) -> Callable[[str], Callable[[torch.Tensor], Made] | None]:
    return lambda name: method if _linear(name) and "visual" not in name else None


def _qwen3_vl_fp8(folder: Path) -> None:
    config = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [32, 32]}
    _write(folder, qwen3.qwen3_vl(), config, _of_text(fp8_block_wise))


def _qwen3_vl_moe_fp8(folder: Path) -> None:
    config = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [32, 32]}
    _write(folder, qwen3.qwen3_vl_moe(), config, _of_text(fp8_block_wise), turned_experts=True)


def _qwen3_omni_fp8(folder: Path) -> None:
    """Experts one by one with a scale for each row; in the towers, one for each matrix."""
    config = {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float"}}},
    }

    def how(name: str) -> Callable[[torch.Tensor], Made] | None:
        tower = "visual" in name or "audio_tower" in name
        return (fp8_tensor if tower else fp8_channel) if _linear(name) else None

    _write(folder, qwen3.qwen3_omni_thinker(), config, how)


def _qwen2_5_vl_awq(folder: Path) -> None:
    config = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}
    _write(folder, qwen.qwen2_5_vl(), config, _of_text(awq))


def _qwen2_5_vl_gptq(folder: Path) -> None:
    config = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True, "sym": False}
    _write(folder, qwen.qwen2_5_vl(), config, _of_text(lambda weight: gptq(weight, ordered=True)))


def _qwen2_vl_nf4(folder: Path) -> None:
    config = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    _write(folder, qwen.qwen2_vl(), config, lambda name: nf4 if _linear(name) else None)


FAMILIES = {
    "qwen2_5_vl_awq": Tiny(_qwen2_5_vl_awq, ("image", "video")),
    "qwen2_5_vl_gptq": Tiny(_qwen2_5_vl_gptq, ("image", "video")),
    "qwen2_vl_nf4": Tiny(_qwen2_vl_nf4, ("image", "video")),
    "qwen3_omni_fp8": Tiny(_qwen3_omni_fp8, ("image", "video", "audio")),
    "qwen3_vl_fp8": Tiny(_qwen3_vl_fp8, ("image", "video"), quick=True),
    "qwen3_vl_moe_fp8": Tiny(_qwen3_vl_moe_fp8, ("image", "video")),
}
