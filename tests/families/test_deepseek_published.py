"""DeepSeek's published checkpoints at their full size: names and shapes of weights, without the weights.

Shapes are those of the files beside the published weights; DeepSeek-OCR's sum up to the size that its index gives.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from triptych.python_models.contract.settings import Settings
from triptych.python_models.families.loading import meta_model
from triptych.python_models.families.registry import load_family
from triptych.python_models.families.weights import _entries

Shapes = dict[str, tuple[int, ...]]

_NO_MLA = {
    "kv_lora_rank": None,
    "q_lora_rank": None,
    "qk_nope_head_dim": 0,
    "qk_rope_head_dim": 0,
    "use_mla": False,
    "v_head_dim": 0,
}
_3B = {
    "bos_token_id": 0,
    "eos_token_id": 1,
    "first_k_dense_replace": 1,
    "hidden_size": 1280,
    "intermediate_size": 6848,
    "lm_head": True,
    "max_position_embeddings": 8192,
    "moe_intermediate_size": 896,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_attention_heads": 10,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 12,
    "num_key_value_heads": 10,
    "rm_head": False,
    "topk_group": 1,
    "topk_method": "greedy",
    "torch_dtype": "bfloat16",
    "vocab_size": 129280,
    **_NO_MLA,
}
_16B = _3B | {
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "kv_lora_rank": 512,
    "max_position_embeddings": 4096,
    "moe_intermediate_size": 1408,
    "num_attention_heads": 16,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "use_mla": True,
    "v_head_dim": 128,
    "vocab_size": 102400,
}
_27B = _16B | {
    "hidden_size": 2560,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "n_routed_experts": 72,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_hidden_layers": 30,
    "num_key_value_heads": 32,
    "routed_scaling_factor": 2.0,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "vocab_size": 129280,
}
_SAM = {
    "downsample_channels": [512, 1024],
    "global_attn_indexes": [2, 5, 8, 11],
    "heads": 12,
    "layers": 12,
    "width": 768,
}
_CLIP = {"heads": 16, "image_size": 224, "layers": 24, "patch_size": 14, "width": 1024}
_VL2 = {
    "global_view_pos": "head",
    "model_type": "deepseek_vl_v2",
    "tile_tag": "2D",
    "vision_config": {
        "layers": 27,
        "mlp_ratio": 3.7362,
        "model_name": "siglip_so400m_patch14_384",
        "model_type": "vision",
        "patch_size": 14,
        "width": 1152,
    },
}


def _linear(name: str, outputs: int, inputs: int, *, bias: bool = True) -> Shapes:
    return {f"{name}.weight": (outputs, inputs), **({f"{name}.bias": (outputs,)} if bias else {})}


def _norm(name: str, width: int, *, bias: bool = True) -> Shapes:
    return {f"{name}.{part}": (width,) for part in (("weight", "bias") if bias else ("weight",))}


def _gated(name: str, width: int, inner: int) -> Shapes:
    out = _linear(f"{name}.gate_proj", inner, width, bias=False) | _linear(f"{name}.up_proj", inner, width, bias=False)
    return out | _linear(f"{name}.down_proj", width, inner, bias=False)


def _decoder(text: Mapping[str, Any], prefix: str = "") -> Shapes:
    """DeepSeek-V2 with or without MLA."""
    width, heads, size = text["hidden_size"], text["num_attention_heads"], text["vocab_size"]
    out: Shapes = {f"{prefix}model.embed_tokens.weight": (size, width), f"{prefix}lm_head.weight": (size, width)}
    out |= _norm(f"{prefix}model.norm", width, bias=False)
    for k in range(text["num_hidden_layers"]):
        layer = f"{prefix}model.layers.{k}"
        for name in ("input_layernorm", "post_attention_layernorm"):
            out |= _norm(f"{layer}.{name}", width, bias=False)
        attention = f"{layer}.self_attn"
        if text["use_mla"]:
            rank, rope = text["kv_lora_rank"], text["qk_rope_head_dim"]
            nope, value = text["qk_nope_head_dim"], text["v_head_dim"]
            out |= _linear(f"{attention}.q_proj", heads * (nope + rope), width, bias=False)
            out |= _linear(f"{attention}.kv_a_proj_with_mqa", rank + rope, width, bias=False)
            out |= _norm(f"{attention}.kv_a_layernorm", rank, bias=False)
            out |= _linear(f"{attention}.kv_b_proj", heads * (nope + value), rank, bias=False)
            out |= _linear(f"{attention}.o_proj", width, heads * value, bias=False)
        else:
            for name in "qkvo":
                out |= _linear(f"{attention}.{name}_proj", width, width, bias=False)
        if k == 0:
            out |= _gated(f"{layer}.mlp", width, text["intermediate_size"])
            continue
        inner = text["moe_intermediate_size"]
        out |= _linear(f"{layer}.mlp.gate", text["n_routed_experts"], width, bias=False)
        if text["topk_method"] == "noaux_tc":
            out[f"{layer}.mlp.gate.e_score_correction_bias"] = (text["n_routed_experts"],)
        for expert in range(text["n_routed_experts"]):
            out |= _gated(f"{layer}.mlp.experts.{expert}", width, inner)
        out |= _gated(f"{layer}.mlp.shared_experts", width, inner * text["n_shared_experts"])
    return out


def _sam(last: int) -> Shapes:
    name = "model.sam_model"
    out: Shapes = {f"{name}.patch_embed.proj.weight": (768, 3, 16, 16), f"{name}.patch_embed.proj.bias": (768,)}
    out[f"{name}.pos_embed"] = (1, 64, 64, 768)
    for k in range(12):
        block = f"{name}.blocks.{k}"
        out |= _norm(f"{block}.norm1", 768) | _norm(f"{block}.norm2", 768)
        out |= _linear(f"{block}.attn.qkv", 3 * 768, 768) | _linear(f"{block}.attn.proj", 768, 768)
        for axis in "hw":
            out[f"{block}.attn.rel_pos_{axis}"] = (127 if k in _SAM["global_attn_indexes"] else 27, 64)  # type: ignore[operator]
        out |= _linear(f"{block}.mlp.lin1", 3072, 768) | _linear(f"{block}.mlp.lin2", 768, 3072)
    out |= {f"{name}.neck.0.weight": (256, 768, 1, 1), f"{name}.neck.2.weight": (256, 256, 3, 3)}
    out |= _norm(f"{name}.neck.1", 256) | _norm(f"{name}.neck.3", 256)
    return out | {f"{name}.net_2.weight": (512, 256, 3, 3), f"{name}.net_3.weight": (last, 512, 3, 3)}


def _ocr() -> Shapes:
    name = "model.vision_model"
    out = _sam(1024) | _decoder(_3B) | _norm(f"{name}.pre_layrnorm", 1024)
    out[f"{name}.embeddings.class_embedding"] = (1024,)
    out[f"{name}.embeddings.patch_embedding.weight"] = (1024, 3, 14, 14)
    out[f"{name}.embeddings.position_embedding.weight"] = (257, 1024)
    for k in range(24):
        layer = f"{name}.transformer.layers.{k}"
        out |= _norm(f"{layer}.layer_norm1", 1024) | _norm(f"{layer}.layer_norm2", 1024)
        out |= _linear(f"{layer}.self_attn.qkv_proj", 3072, 1024) | _linear(f"{layer}.self_attn.out_proj", 1024, 1024)
        out |= _linear(f"{layer}.mlp.fc1", 4096, 1024) | _linear(f"{layer}.mlp.fc2", 1024, 4096)
    out |= _linear("model.projector.layers", 1280, 2048)
    return out | {"model.image_newline": (1280,), "model.view_seperator": (1280,)}


def _ocr2() -> Shapes:
    name = "model.qwen2_model.model.model"
    out = _sam(896) | _decoder(_3B) | _norm(f"{name}.norm", 896, bias=False)
    for k in range(24):
        layer = f"{name}.layers.{k}"
        for part in ("input_layernorm", "post_attention_layernorm"):
            out |= _norm(f"{layer}.{part}", 896, bias=False)
        out |= _linear(f"{layer}.self_attn.q_proj", 896, 896) | _linear(f"{layer}.self_attn.k_proj", 128, 896)
        out |= _linear(f"{layer}.self_attn.v_proj", 128, 896)
        out |= _linear(f"{layer}.self_attn.o_proj", 896, 896, bias=False) | _gated(f"{layer}.mlp", 896, 4864)
    out |= {"model.qwen2_model.query_768.weight": (144, 896), "model.qwen2_model.query_1024.weight": (256, 896)}
    return out | _linear("model.projector.layers", 1280, 896) | {"model.view_seperator": (1280,)}


def _timm(name: str, width: int, layers: int, inner: int, patch: int, patches: int) -> Shapes:
    out: Shapes = {
        f"{name}.patch_embed.proj.weight": (width, 3, patch, patch),
        f"{name}.pos_embed": (1, patches, width),
    }
    out |= {f"{name}.patch_embed.proj.bias": (width,), f"{name}.attn_pool.latent": (1, 1, width)}
    for k in range(layers):
        block = f"{name}.blocks.{k}"
        out |= _norm(f"{block}.norm1", width) | _norm(f"{block}.norm2", width)
        out |= _linear(f"{block}.attn.qkv", 3 * width, width) | _linear(f"{block}.attn.proj", width, width)
        out |= _linear(f"{block}.mlp.fc1", inner, width) | _linear(f"{block}.mlp.fc2", width, inner)
    return out | _norm(f"{name}.norm", width) | _linear(f"{name}.attn_pool.proj", width, width)


def _vl2(text: Mapping[str, Any]) -> Shapes:
    width = text["hidden_size"]
    out = _timm("vision", 1152, 27, 4304, 14, 729) | _decoder(text, "language.")
    out |= _linear("projector.layers.0", width, 4 * 1152) | _linear("projector.layers.2", width, width)
    return out | {"image_newline": (width,), "view_seperator": (width,)}


def _janus() -> Shapes:
    out = _timm("vision_model.vision_tower", 1024, 24, 4096, 16, 576)
    out |= _linear("aligner.layers.0", 4096, 1024) | _linear("aligner.layers.2", 4096, 4096)
    name = "language_model"
    out |= {f"{name}.model.embed_tokens.weight": (102400, 4096), f"{name}.lm_head.weight": (102400, 4096)}
    out |= _norm(f"{name}.model.norm", 4096, bias=False) | {"gen_embed.weight": (16384, 8)}
    for k in range(30):
        layer = f"{name}.model.layers.{k}"
        for part in ("input_layernorm", "post_attention_layernorm"):
            out |= _norm(f"{layer}.{part}", 4096, bias=False)
        for part in "qkvo":
            out |= _linear(f"{layer}.self_attn.{part}_proj", 4096, 4096, bias=False)
        out |= _gated(f"{layer}.mlp", 4096, 11008)
    return out


def _ocr_config(model_name: str, towers: Mapping[str, Any], projector: int) -> dict[str, Any]:
    return {
        "language_config": _3B,
        "model_type": "deepseek_vl_v2",
        "projector_config": {"input_dim": projector, "n_embed": 1280, "projector_type": "linear"},
        "vision_config": {"image_size": 1024, "mlp_ratio": 3.7362, "model_name": model_name, "width": towers},
    }


_JANUS = {
    "aligner_config": {"params": {"depth": 2, "input_dim": 1024, "n_embed": 4096, "projector_type": "mlp_gelu"}},
    "gen_vision_config": {"cls": "VQ-16", "params": {"image_token_size": 16384, "n_embed": 8}},
    "language_config": {
        "max_position_embeddings": 16384,
        "model_type": "llama",
        "num_hidden_layers": 30,
        "torch_dtype": "bfloat16",
        "vocab_size": 102400,
    },
    "model_type": "multi_modality",
    "vision_config": {
        "cls": "CLIPVisionTower",
        "params": {"image_size": 384, "model_name": "siglip_large_patch16_384", "select_feature": "same"},
    },
}
# Name -> tiny checkpoint whose tokenizer it takes, config.json, weights, what of them nobody needs, and what of
# transformers' class belongs to no stage.
PUBLISHED: dict[str, tuple[str, dict[str, Any], Callable[[], Shapes], tuple[str, ...], tuple[str, ...]]] = {
    "DeepSeek-OCR": (
        "deepseek_ocr",
        _ocr_config("deeplip_b_l", {"clip-l-14-224": _CLIP, "sam_vit_b": _SAM}, 2048),
        _ocr,
        ("model.vision_model.embeddings.patch_embedding",),
        (),
    ),
    "DeepSeek-OCR-2": (
        "deepseek_ocr",
        _ocr_config("deepencoderv2", {"qwen2-0-5b": {"dim": 896}, "sam_vit_b": _SAM}, 896),
        _ocr2,
        (),
        (),
    ),
    "deepseek-vl2-tiny": (
        "deepseek_vl2_tiny",
        _VL2 | {"language_config": _3B, "projector_config": {"model_type": "mlp_projector", "n_embed": 1280}},
        lambda: _vl2(_3B),
        ("vision.attn_pool.",),
        (),
    ),
    "deepseek-vl2-small": (
        "deepseek_vl2_small",
        _VL2 | {"language_config": _16B, "projector_config": {"model_type": "mlp_projector", "n_embed": 2048}},
        lambda: _vl2(_16B),
        ("vision.attn_pool.",),
        (),
    ),
    "deepseek-vl2": (
        "deepseek_vl2",
        _VL2 | {"language_config": _27B, "projector_config": {"model_type": "mlp_projector", "n_embed": 2560}},
        lambda: _vl2(_27B),
        ("vision.attn_pool.",),
        (),
    ),
    "Janus-Pro-7B": (
        "janus_published",
        _JANUS,
        _janus,
        ("vision_model.vision_tower.attn_pool.", "gen_"),
        ("model.vqmodel.", "model.generation_"),
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_weight_has_its_place(tiny_checkpoint: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    tiny, config, shapes_of, unused, elsewhere = PUBLISHED[name]
    folder = tmp_path / "full"
    shutil.copytree(tiny_checkpoint(tiny), folder, ignore=shutil.ignore_patterns("*.safetensors", "whole", "text"))
    (folder / "config.json").write_text(json.dumps(config))
    family: Any = load_family(Settings(model=str(folder)))
    model = meta_model(family.load_class(), family.load_config())
    state, shapes = model.state_dict(), shapes_of()
    wanted = {key for key in state if not key.startswith(elsewhere)} if elsewhere else set(state)
    used: set[str] = set()
    for target, entry in _entries(model, list(shapes)).items():
        sources = [key for keys in entry.sources.values() for key in keys]
        used.update(sources)
        targets = [target]
        if entry.converter is not None:
            patterns = entry.converter.target_patterns
            targets = [target.replace(patterns[0], pattern) for pattern in patterns]
        else:
            assert tuple(state[target].shape) == shapes[sources[0]], target
        assert sum(state[key].numel() for key in targets) == sum(math.prod(shapes[key]) for key in sources), target
        wanted -= set(targets)
    assert not wanted
    assert {key for key in shapes if key not in used} == {key for key in shapes if unused and key.startswith(unused)}


def test_sizes_are_the_published_ones() -> None:
    """Bytes that the index of DeepSeek-OCR gives, and billions of parameters by name or model card."""
    shapes = _ocr()
    assert len(shapes) == 2710
    assert 2 * sum(map(math.prod, shapes.values())) == 6_672_212_480
    billions = {name: sum(map(math.prod, PUBLISHED[name][2]().values())) / 1e9 for name in PUBLISHED}
    assert 3.3 < billions["deepseek-vl2-tiny"] < 3.5
    assert 16 < billions["deepseek-vl2-small"] < 16.5
    assert 27 < billions["deepseek-vl2"] < 28
