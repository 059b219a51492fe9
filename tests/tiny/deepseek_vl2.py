"""DeepSeek-VL2 as it is published, with each of its text models, beside a forward pass of its own."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image as PILImage
from safetensors.torch import load_file, save_file
from torch.nn import functional

from .common import Tiny
from .deepseek import GROUNDING, PAD, language_of, text_of, tokenizer_of
from .reference import Reference, draw, write_checkpoint

_SIDE, _PATCH, _VISION, _INNER = 20, 4, 32, 48
_SIZES = [[20, 20], [20, 40], [40, 20], [20, 60], [60, 20], [40, 40], [20, 80], [80, 20], [60, 40], [40, 60]]
_MLA = {
    "kv_lora_rank": 16,
    "q_lora_rank": None,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "use_mla": True,
    "v_head_dim": 16,
}
_SIGMOID = {
    "n_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.0,
    "scoring_func": "sigmoid",
    "topk_group": 1,
    "topk_method": "noaux_tc",
}
_VL2_TEMPLATE = (
    "{{ bos_token }}{%- for m in messages -%}"
    "{%- set s = namespace(text='') -%}"
    "{%- if m['content'] is string -%}{%- set s.text = m['content'] -%}{%- else -%}{%- for c in m['content'] -%}"
    "{%- set s.text = s.text + ('<image>\n' if c['type'] == 'image' else c['text']) -%}"
    "{%- endfor -%}{%- endif -%}"
    "{%- if m['role'] == 'user' -%}{{ '<|User|>: ' + s.text.strip() + '\n\n<|Assistant|>:' }}"
    "{%- elif m['role'] == 'assistant' -%}{{ s.text.strip() + eos_token }}{%- else -%}{{ s.text.strip() }}{%- endif -%}"
    "{%- endfor -%}"
)


def _vl2_towers() -> dict[str, torch.Tensor]:
    width = text_of(tokenizer_of([]))["hidden_size"]
    shapes: dict[str, tuple[int, ...]] = {
        "vision.patch_embed.proj.weight": (_VISION, 3, _PATCH, _PATCH),
        "vision.patch_embed.proj.bias": (_VISION,),
        "vision.pos_embed": (1, (_SIDE // _PATCH) ** 2, _VISION),
        "vision.norm.weight": (_VISION,),
        "vision.norm.bias": (_VISION,),
        # the pooling of SigLIP, which nothing uses
        "vision.attn_pool.latent": (1, 1, _VISION),
        "projector.layers.0.weight": (width, 4 * _VISION),
        "projector.layers.0.bias": (width,),
        "projector.layers.2.weight": (width, width),
        "projector.layers.2.bias": (width,),
        "image_newline": (width,),
        "view_seperator": (width,),
    }
    for k in range(2):
        shapes |= {
            f"vision.blocks.{k}.norm1.weight": (_VISION,),
            f"vision.blocks.{k}.norm1.bias": (_VISION,),
            f"vision.blocks.{k}.attn.qkv.weight": (3 * _VISION, _VISION),
            f"vision.blocks.{k}.attn.qkv.bias": (3 * _VISION,),
            f"vision.blocks.{k}.attn.proj.weight": (_VISION, _VISION),
            f"vision.blocks.{k}.attn.proj.bias": (_VISION,),
            f"vision.blocks.{k}.norm2.weight": (_VISION,),
            f"vision.blocks.{k}.norm2.bias": (_VISION,),
            f"vision.blocks.{k}.mlp.fc1.weight": (_INNER, _VISION),
            f"vision.blocks.{k}.mlp.fc1.bias": (_INNER,),
            f"vision.blocks.{k}.mlp.fc2.weight": (_VISION, _INNER),
            f"vision.blocks.{k}.mlp.fc2.bias": (_VISION,),
        }
    return draw(shapes)


def _vl2_tower(weights: Mapping[str, torch.Tensor], pixels: torch.Tensor) -> torch.Tensor:
    """[n, 3, side, side] -> [n, 3, 3, hidden size of the text model]; 5 x 5 patches, joined in squares of 2 x 2."""

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return functional.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return functional.layer_norm(x, (_VISION,), weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-6)

    patch = functional.conv2d(
        pixels, weights["vision.patch_embed.proj.weight"], weights["vision.patch_embed.proj.bias"], stride=_PATCH
    )
    x = patch.flatten(2).transpose(1, 2) + weights["vision.pos_embed"]
    for k in range(2):
        name = f"vision.blocks.{k}"
        heads = linear(norm(x, f"{name}.norm1"), f"{name}.attn.qkv").unflatten(-1, (3, 2, _VISION // 2))
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        scores = (query @ key.transpose(-1, -2)) * (_VISION // 2) ** -0.5
        mixed = (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)
        x = x + linear(mixed, f"{name}.attn.proj")
        inner = functional.gelu(linear(norm(x, f"{name}.norm2"), f"{name}.mlp.fc1"), approximate="tanh")
        x = x + linear(inner, f"{name}.mlp.fc2")
    grid = torch.zeros(len(x), 6, 6, _VISION)
    grid[:, :5, :5] = norm(x, "vision.norm").unflatten(1, (5, 5))
    # channel by channel the four patches of a square
    squares = grid.unflatten(2, (3, 2)).unflatten(1, (3, 2)).permute(0, 1, 3, 5, 2, 4).flatten(3)
    return linear(functional.gelu(linear(squares, "projector.layers.0")), "projector.layers.2")


def _vl2_rows(weights: Mapping[str, torch.Tensor], inputs: Mapping[str, Any]) -> dict[int, torch.Tensor]:
    if "pixel_values" not in inputs:
        return {}
    squares = _vl2_tower(weights, inputs["pixel_values"])
    newline, rows, at = weights["image_newline"], [], 0
    for columns, lines in inputs["grids"]:
        for line in squares[at]:
            rows += [*line, newline]
        rows.append(weights["view_seperator"])
        for tile_line in range(lines):
            for line in range(3):
                for column in range(columns):
                    rows += list(squares[at + 1 + tile_line * columns + column][line])
                rows.append(newline)
        at += 1 + columns * lines
    return {inputs["image_token_id"]: torch.stack(rows)}


def _fit(image: Any, width: int, height: int) -> Any:
    """The picture as large as it fits, in the middle of grey."""
    if image.width * height > image.height * width:
        size = width, round(image.height / image.width * width)
    else:
        size = round(image.width / image.height * height), height
    out = PILImage.new("RGB", (width, height), (127, 127, 127))
    out.paste(
        image.resize(size, PILImage.Resampling.BICUBIC), (round((width - size[0]) / 2), round((height - size[1]) / 2))
    )
    return out


def _vl2_inputs(tokenizer: Any, text: str, media: Mapping[str, list[Any]]) -> dict[str, Any]:
    images = [image.pixels for image in media.get("image", ())]
    pieces, grids, squares = text.split("<image>"), [], []
    assert len(pieces) == len(images) + 1
    written = pieces[0]
    for image, piece in zip(images, pieces[1:], strict=True):
        best = (_SIDE, _SIDE)
        if len(images) <= 2:
            most, least = 0, 0
            for width, height in _SIZES:
                scale = min(width / image.width, height / image.height)
                kept = min(int(image.width * scale) * int(image.height * scale), image.width * image.height)
                waste = width * height - kept
                if kept > most or (kept == most and waste < least):
                    most, least, best = kept, waste, (width, height)
        columns, lines = best[0] // _SIDE, best[1] // _SIDE
        grids.append((columns, lines))
        squares.append(_fit(image, _SIDE, _SIDE))
        wide = _fit(image, *best)
        for line in range(lines):
            for column in range(columns):
                left, top = column * _SIDE, line * _SIDE
                squares.append(wide.crop((left, top, left + _SIDE, top + _SIDE)))
        written += "<image>" * (13 + 3 * lines * (3 * columns + 1)) + piece
    ids = tokenizer(written, add_special_tokens=False, return_tensors="pt")["input_ids"]
    out = {"input_ids": ids, "image_token_id": tokenizer.convert_tokens_to_ids("<image>"), "grids": grids}
    if images:
        pixels = np.stack([np.asarray(square) for square in squares]).transpose(0, 3, 1, 2)
        out["pixel_values"] = (torch.from_numpy(pixels.astype(np.float32)) - 127.5) / 127.5
    return out


def _vl2_reference(text_class: str) -> Callable[[Path], tuple[Any, Any]]:
    def load(folder: Path) -> tuple[Any, Any]:
        tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
        tokenizer.chat_template = _VL2_TEMPLATE
        return Reference(folder, getattr(transformers, text_class), _vl2_rows), tokenizer

    return load


def _vl2(folder: Path, language: dict[str, Any], make: Callable[[dict[str, Any]], Any]) -> None:
    tokenizer = tokenizer_of(["<image>", *GROUNDING, "<|User|>", "<|Assistant|>"])
    text = text_of(tokenizer)
    model = make(text)
    config = {
        "candidate_resolutions": _SIZES,
        "global_view_pos": "head",
        "language_config": language_of(text) | language,
        "model_type": "deepseek_vl_v2",
        "projector_config": {"model_type": "mlp_projector", "n_embed": text["hidden_size"], "input_dim": _VISION},
        "tile_tag": "2D",
        "torch_dtype": "bfloat16",
        "vision_config": {
            "image_size": _SIDE,
            "layers": 2,
            "heads": 2,
            "mlp_ratio": _INNER / _VISION,
            "model_name": "siglip_so400m_patch14_384",
            "model_type": "vision",
            "patch_size": _PATCH,
            "width": _VISION,
        },
    }
    options = {
        "candidate_resolutions": _SIZES,
        "downsample_ratio": 2,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "image_token": "<image>",
        "normalize": True,
        "pad_token": PAD,
        "patch_size": _PATCH,
        "processor_class": "DeepseekVLV2Processor",
        "sft_format": "deepseek",
    }
    write_checkpoint(
        folder,
        config,
        tokenizer,
        text=model,
        prefix="language.",
        towers=_vl2_towers(),
        files={"processor_config.json": options},
    )


def _vl2_tiny(folder: Path) -> None:
    """Plain attention."""

    def make(text: dict[str, Any]) -> Any:
        vision = {
            "sam_config": {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "output_channels": 8},
            "encoder_config": {
                "hidden_size": 8,
                "intermediate_size": 8,
                "num_hidden_layers": 1,
                "num_attention_heads": 1,
                "num_key_value_heads": 1,
                "vocab_size": 8,
            },
        }
        layers = ["dense", "sparse", "sparse"]
        return transformers.DeepseekOcr2ForConditionalGeneration(
            transformers.DeepseekOcr2Config(text_config=text | {"mlp_layer_types": layers}, vision_config=vision)
        )

    _vl2(folder, {}, make)
    # what is left of another model's towers
    weights = {
        name: tensor
        for name, tensor in load_file(folder / "model.safetensors").items()
        if not re.match(r"language\.model\.(sam_model|qwen2_model|projector|view)", name)
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _vl2_small(folder: Path) -> None:
    """DeepSeek-V2."""
    _vl2(
        folder,
        _MLA,
        lambda text: transformers.DeepseekV2ForCausalLM(
            transformers.DeepseekV2Config(
                **text, **{k: v for k, v in _MLA.items() if k != "use_mla"}, first_k_dense_replace=1
            )
        ),
    )


def _vl2_large(folder: Path) -> None:
    """DeepSeek-V3's router."""

    def make(text: dict[str, Any]) -> Any:
        routing = {k: v for k, v in _SIGMOID.items() if k not in ("scoring_func", "topk_method")}
        mla = {k: v for k, v in _MLA.items() if k != "use_mla"}
        config = transformers.DeepseekV3Config(**(text | mla | routing), first_k_dense_replace=1, num_mtp_layers=0)
        model = transformers.DeepseekV3ForCausalLM(config)
        generator = torch.Generator().manual_seed(2)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(torch.randn(buffer.shape, generator=generator))
        return model

    _vl2(folder, _MLA | _SIGMOID, make)


FAMILIES = {
    "deepseek_vl2": Tiny(_vl2_large, ("image",), reference=_vl2_reference("DeepseekV3ForCausalLM"), inputs=_vl2_inputs),
    "deepseek_vl2_small": Tiny(
        _vl2_small, ("image",), reference=_vl2_reference("DeepseekV2ForCausalLM"), inputs=_vl2_inputs
    ),
    "deepseek_vl2_tiny": Tiny(
        _vl2_tiny, ("image",), reference=_vl2_reference("DeepseekOcr2ForConditionalGeneration"), inputs=_vl2_inputs
    ),
}
