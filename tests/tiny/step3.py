"""Step3-VL-10B in its published format, beside a forward pass of its own; Step 3.7."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.nn import functional

from .common import Tiny, bpe
from .reference import Reference, Weights, draw, write_checkpoint

_WIDTH, _HEADS, _INNER, _PATCH, _GRID, _TEXT = 32, 2, 48, 4, 12, 64
_SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<im_start>",
    "<im_end>",
    "<im_patch>",
    "<patch_start>",
    "<patch_end>",
    "<patch_newline>",
]
_TEMPLATE = (
    "{%- for m in messages -%}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{%- if m['content'] is string -%}{{ m['content'] }}{%- else -%}{%- for c in m['content'] -%}"
    "{%- if c['type'] == 'image' -%}<im_patch>{%- else -%}{{ c['text'] }}{%- endif -%}{%- endfor -%}{%- endif -%}"
    "{{ '<|im_end|>\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)
_QWEN3 = {
    "model_type": "qwen3",
    "attention_bias": False,
    "head_dim": 16,
    "hidden_act": "silu",
    "hidden_size": _TEXT,
    "intermediate_size": 96,
    "max_position_embeddings": 2048,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000,
    "tie_word_embeddings": False,
    "vocab_size": 512,
}
# squares of 3 x 3 rows, windows of 2 x 2
_PROCESSOR = {
    "size": {"height": _GRID * _PATCH, "width": _GRID * _PATCH},
    "patch_size": 32,
    "vision_patch_size": _PATCH,
    "max_image_size": 160,
}


def _tokenizer() -> Any:
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe(_SPECIAL),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=[s for s in _SPECIAL if s not in ("<|im_end|>", "<|endoftext|>")],
        padding_side="left",
    )


def _processor(tokenizer: Any) -> Any:
    return transformers.Step3p7Processor(
        image_processor=transformers.Step3p7ImageProcessor(**_PROCESSOR), tokenizer=tokenizer, chat_template=_TEMPLATE
    )


def _write(folder: Path) -> None:
    tokenizer = _tokenizer()
    config = {
        "architectures": ["StepVLForConditionalGeneration"],
        "auto_map": {"AutoConfig": "configuration_step_vl.StepRoboticsConfig", "AutoModelForCausalLM": "modeling.M"},
        "model_type": "step_robotics",
        "im_end_token": "<im_end>",
        "im_patch_token": "<im_patch>",
        "im_start_token": "<im_start>",
        "image_token_len": 169,
        "patch_token_len": 81,
        "image_token_id": tokenizer.convert_tokens_to_ids("<im_patch>"),
        "understand_projector_stride": 2,
        "use_im_start_end": "true",
        "vision_select_layer": -1,
        "projector_bias": False,
        "torch_dtype": "bfloat16",
        "text_config": _QWEN3 | {"architectures": ["Qwen3ForCausalLM"], "torch_dtype": "bfloat16"},
        "vision_config": {
            "model_type": "perception_encoder",
            "image_size": _GRID * _PATCH,
            "patch_size": _PATCH,
            "width": _WIDTH,
            "layers": 2,
            "heads": _HEADS,
            "mlp_ratio": _INNER / _WIDTH,
            "pool_type": "none",
            "output_dim": None,
            "use_cls_token": False,
            "ls_init_value": 0.1,
            "use_ln_post": False,
            "hidden_act": "quick_gelu",
        },
    }
    shapes: dict[str, tuple[int, ...]] = {
        "vision_model.conv1.weight": (_WIDTH, 3, _PATCH, _PATCH),
        "vision_model.positional_embedding": (_GRID**2, _WIDTH),
        "vision_model.ln_pre.weight": (_WIDTH,),
        "vision_model.ln_pre.bias": (_WIDTH,),
        "vision_model.vit_downsampler1.weight": (2 * _WIDTH, _WIDTH, 3, 3),
        "vision_model.vit_downsampler1.bias": (2 * _WIDTH,),
        "vision_model.vit_downsampler2.weight": (4 * _WIDTH, 2 * _WIDTH, 3, 3),
        "vision_model.vit_downsampler2.bias": (4 * _WIDTH,),
        "vit_large_projector.weight": (_TEXT, 4 * _WIDTH),
    }
    for k in range(2):
        block = f"vision_model.transformer.resblocks.{k}"
        shapes |= {f"{block}.{norm}.{kind}": (_WIDTH,) for norm in ("ln_1", "ln_2") for kind in ("weight", "bias")}
        shapes |= {
            f"{block}.ls_1.gamma": (_WIDTH,),
            f"{block}.ls_2.gamma": (_WIDTH,),
            f"{block}.attn.in_proj_weight": (3 * _WIDTH, _WIDTH),
            f"{block}.attn.in_proj_bias": (3 * _WIDTH,),
            f"{block}.attn.out_proj.weight": (_WIDTH, _WIDTH),
            f"{block}.attn.out_proj.bias": (_WIDTH,),
            f"{block}.mlp.c_fc.weight": (_INNER, _WIDTH),
            f"{block}.mlp.c_fc.bias": (_INNER,),
            f"{block}.mlp.c_proj.weight": (_WIDTH, _INNER),
            f"{block}.mlp.c_proj.bias": (_WIDTH,),
        }
    weights = draw(shapes)
    for name in weights:
        if name.endswith("gamma"):
            weights[name] = weights[name] + 0.5
    write_checkpoint(
        folder,
        config,
        tokenizer,
        text=transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**_QWEN3)),
        prefix="",
        towers=weights,
        files={"preprocessor_config.json": _PROCESSOR},
    )
    (folder / "chat_template.jinja").write_text(_TEMPLATE)


def _turn(x: torch.Tensor, grid: int) -> torch.Tensor:
    """Rotate pairs (2 i, 2 i + 1) of [grid * grid, heads, D]: the first half by the column, the second by the row."""
    quarter = x.shape[-1] // 4
    speed = 10000.0 ** (-torch.arange(quarter) / quarter)
    row, column = torch.arange(grid * grid) // grid, torch.arange(grid * grid) % grid
    angle = torch.cat([column[:, None] * speed, row[:, None] * speed], dim=1)[:, None]
    even, odd = x[..., ::2], x[..., 1::2]
    return torch.stack([even * angle.cos() - odd * angle.sin(), odd * angle.cos() + even * angle.sin()], -1).flatten(2)


def _see(w: Weights, pixels: torch.Tensor) -> torch.Tensor:
    """One square [3, side, side] -> rows."""
    w = {name.removeprefix("vision_model."): tensor for name, tensor in w.items()}
    x = functional.conv2d(pixels[None], w["conv1.weight"], stride=_PATCH)[0]
    grid = x.shape[1]
    table = w["positional_embedding"].T.view(1, _WIDTH, _GRID, _GRID)
    if grid != _GRID:
        table = functional.interpolate(table, size=(grid, grid), mode="bilinear", align_corners=False)
    x = (x + table[0]).flatten(1).T

    def norm(name: str, x: torch.Tensor) -> torch.Tensor:
        return functional.layer_norm(x, (_WIDTH,), w[f"{name}.weight"], w[f"{name}.bias"], 1e-5)

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    x = norm("ln_pre", x)
    for k in range(2):
        block = f"transformer.resblocks.{k}"
        qkv = functional.linear(
            norm(f"{block}.ln_1", x), w[f"{block}.attn.in_proj_weight"], w[f"{block}.attn.in_proj_bias"]
        )
        q, key, value = qkv.view(len(x), 3, _HEADS, -1).unbind(1)
        scores = torch.einsum("qhd,khd->hqk", _turn(q, grid), _turn(key, grid)) / q.shape[-1] ** 0.5
        mixed = linear(f"{block}.attn.out_proj", torch.einsum("hqk,khd->qhd", scores.softmax(-1), value).flatten(1))
        x = x + w[f"{block}.ls_1.gamma"] * mixed
        y = linear(f"{block}.mlp.c_fc", norm(f"{block}.ln_2", x))
        x = x + w[f"{block}.ls_2.gamma"] * linear(f"{block}.mlp.c_proj", y * torch.sigmoid(1.702 * y))
    x = x.T.view(1, _WIDTH, grid, grid)
    for name in ("vit_downsampler1", "vit_downsampler2"):
        x = functional.conv2d(x, w[f"{name}.weight"], w[f"{name}.bias"], stride=2, padding=1)
    return x[0].flatten(1).T @ w["vit_large_projector.weight"].T


def _reference(folder: Path) -> tuple[Any, Any]:
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)

    def rows(w: Weights, inputs: Mapping[str, Any]) -> dict[int, torch.Tensor]:
        if "pixel_values" not in inputs:
            return {}
        windows = iter(inputs.get("pixel_values_local", ()))
        seen = []
        for square, count in zip(inputs["pixel_values"], inputs["num_local_patches"], strict=True):
            seen += [_see(w, next(windows)) for _ in range(int(count))]
            seen.append(_see(w, square))
        return {tokenizer.convert_tokens_to_ids("<im_patch>"): torch.cat(seen)}

    return Reference(folder, transformers.Qwen3ForCausalLM, rows), _processor(tokenizer)


def _step3p7() -> tuple[Any, Any]:
    tokenizer = _tokenizer()
    text = {key: value for key, value in _QWEN3.items() if key not in ("model_type", "rope_theta")}
    config = transformers.Step3p7Config(
        vision_config={
            "hidden_size": _WIDTH,
            "num_hidden_layers": 2,
            "num_attention_heads": _HEADS,
            "image_size": _GRID * _PATCH,
            "patch_size": _PATCH,
            "mlp_ratio": _INNER / _WIDTH,
            "max_position_embeddings": _GRID**2,
        },
        text_config=text
        | {
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "share_expert_dim": 32,
            "sliding_window": 20,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
            "mlp_layer_types": ["dense", "sparse", "sparse"],
            "num_sliding_attention_heads": 8,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<im_patch>"),
    )
    return transformers.Step3p7ForConditionalGeneration(config), _processor(tokenizer)


FAMILIES = {
    "step3_vl": Tiny(_write, ("image",), reference=_reference),
    "step3p7": Tiny(_step3p7, ("image",)),
}
