"""Llama Nemotron Super, in its published format, beside a forward pass of its own."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.nn import functional

from .common import Tiny, bpe
from .reference import Weights, draw

_WIDTH, _HEADS, _HEAD, _VOCABULARY = 64, 4, 16, 512
_ROPE = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_type": "llama3",
}
_SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
_TEMPLATE = (
    "{{ bos_token }}{%- for m in messages -%}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' }}"
    "{%- if m['content'] is string -%}{{ m['content'] }}{%- else -%}"
    "{%- for c in m['content'] -%}{{ c['text'] }}{%- endfor -%}{%- endif -%}{{ '<|eot_id|>' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif -%}"
)


def _attention(group: int | None = None, *, linear: bool = False) -> dict[str, Any]:
    return {
        "n_heads_in_group": group,
        "no_op": group is None and not linear,
        "num_sink_tokens": None,
        "replace_with_linear": linear,
        "sparsify": None,
        "unshifted_sink": False,
        "use_prefill_window_in_sink_attention": False,
        "window_length": None,
    }


def _ffn(mult: float | None = None, *, linear: bool = False) -> dict[str, Any]:
    return {"ffn_mult": mult, "no_op": mult is None and not linear, "replace_with_linear": linear, "sparsify": None}


_BLOCKS = [
    {"attention": _attention(2), "ffn": _ffn(2.625)},
    {"attention": _attention(), "ffn": _ffn(5.25)},
    {"attention": _attention(linear=True), "ffn": _ffn(linear=True)},
    {"attention": _attention(4), "ffn": _ffn()},
    {"attention": _attention(1), "ffn": _ffn(6.5)},
]


def _width(mult: float) -> int:
    return math.ceil(int(2 * mult * _WIDTH / 3) / 256) * 256


def _weights() -> Weights:
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (_VOCABULARY, _WIDTH),
        "model.norm.weight": (_WIDTH,),
        "lm_head.weight": (_VOCABULARY, _WIDTH),
    }
    for k, block in enumerate(_BLOCKS):
        layer, attention, ffn = f"model.layers.{k}", block["attention"], block["ffn"]
        if not attention["no_op"]:
            shapes[f"{layer}.input_layernorm.weight"] = (_WIDTH,)
        if attention["replace_with_linear"]:
            shapes[f"{layer}.self_attn.linear_attn.weight"] = (_WIDTH, _WIDTH)
        elif not attention["no_op"]:
            keys = _HEADS // attention["n_heads_in_group"] * _HEAD
            for name, out in (("q", _HEADS * _HEAD), ("k", keys), ("v", keys)):
                shapes[f"{layer}.self_attn.{name}_proj.weight"] = (out, _WIDTH)
            shapes[f"{layer}.self_attn.o_proj.weight"] = (_WIDTH, _HEADS * _HEAD)
        if not ffn["no_op"]:
            shapes[f"{layer}.post_attention_layernorm.weight"] = (_WIDTH,)
        if ffn["replace_with_linear"]:
            shapes[f"{layer}.mlp.linear_mlp.weight"] = (_WIDTH, _WIDTH)
        elif not ffn["no_op"]:
            inner = _width(ffn["ffn_mult"])
            for name in ("gate", "up"):
                shapes[f"{layer}.mlp.{name}_proj.weight"] = (inner, _WIDTH)
            shapes[f"{layer}.mlp.down_proj.weight"] = (_WIDTH, inner)
    weights = draw(shapes)
    weights["model.embed_tokens.weight"] *= _WIDTH**0.5
    return weights


def _write(folder: Path) -> None:
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe(_SPECIAL),
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        pad_token="<|end_of_text|>",
        extra_special_tokens=_SPECIAL[2:4],
        chat_template=_TEMPLATE,
    )
    config = {
        "architectures": ["DeciLMForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_decilm.DeciLMConfig",
            "AutoModelForCausalLM": "modeling_decilm.DeciLMForCausalLM",
        },
        "model_type": "nemotron-nas",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "block_configs": _BLOCKS,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": [tokenizer.eos_token_id, tokenizer.pad_token_id],
        "hidden_act": "silu",
        "hidden_size": _WIDTH,
        "initializer_range": 0.02,
        "intermediate_size": None,
        "max_position_embeddings": 2048,
        "mlp_bias": False,
        "num_attention_heads": _HEADS,
        "num_hidden_layers": len(_BLOCKS),
        "num_key_value_heads": None,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": _ROPE,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.48.3",
        "use_cache": True,
        "vocab_size": _VOCABULARY,
    }
    tokenizer.save_pretrained(folder)
    save_file(_weights(), folder / "model.safetensors", metadata={"format": "pt"})
    ends = {"eos_token_id": config["eos_token_id"]}
    for name, content in {"config.json": config, "generation_config.json": ends}.items():
        (folder / name).write_text(json.dumps(content))


def _frequencies() -> torch.Tensor:
    """Llama 3.1's: slow ones are divided, those in between in part."""
    speed = 500000.0 ** (-torch.arange(0, _HEAD, 2) / _HEAD)
    turns = 64 * speed / (2 * math.pi)
    share = ((turns - 1.0) / (4.0 - 1.0)).clamp(0, 1)
    return share * speed + (1 - share) * speed / 8


class _Reference:
    """Called like a model of transformers; every token is computed from all before it."""

    def __init__(self, folder: Path) -> None:
        self.weights = load_file(folder / "model.safetensors")
        self.blocks = json.loads((folder / "config.json").read_text())["block_configs"]
        self.ends = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
        self.base_model = SimpleNamespace()

    def _linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ self.weights[f"{name}.weight"].T

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * self.weights[f"{name}.weight"]

    def _attend(self, x: torch.Tensor, name: str, group: int) -> torch.Tensor:
        count = len(x)
        query, key, value = (self._linear(x, f"{name}.{p}_proj").view(count, -1, _HEAD) for p in "qkv")
        angle = torch.arange(count)[:, None, None] * _frequencies()

        def turn(y: torch.Tensor) -> torch.Tensor:
            first, second = y.chunk(2, dim=-1)
            return torch.cat(
                [first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], dim=-1
            )

        query, key, value = turn(query), turn(key).repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        scores = torch.einsum("qhd,khd->hqk", query, key) * _HEAD**-0.5
        scores = scores + torch.full((count, count), -torch.inf).triu(1)
        return self._linear(torch.einsum("hqk,khd->qhd", scores.softmax(-1), value).flatten(1), f"{name}.o_proj")

    def __call__(self, input_ids: torch.Tensor, **_: Any) -> Any:
        """Logits [1, L, V]."""
        x = self.weights["model.embed_tokens.weight"][input_ids[0]]
        for k, block in enumerate(self.blocks):
            layer, attention, ffn = f"model.layers.{k}", block["attention"], block["ffn"]
            if not attention["no_op"]:
                y = self._norm(x, f"{layer}.input_layernorm")
                if attention["replace_with_linear"]:
                    x = x + self._linear(y, f"{layer}.self_attn.linear_attn")
                else:
                    x = x + self._attend(y, f"{layer}.self_attn", attention["n_heads_in_group"])
            if not ffn["no_op"]:
                y = self._norm(x, f"{layer}.post_attention_layernorm")
                if ffn["replace_with_linear"]:
                    x = x + self._linear(y, f"{layer}.mlp.linear_mlp")
                else:
                    gated = functional.silu(self._linear(y, f"{layer}.mlp.gate_proj"))
                    x = x + self._linear(gated * self._linear(y, f"{layer}.mlp.up_proj"), f"{layer}.mlp.down_proj")
        return SimpleNamespace(logits=self._linear(self._norm(x, "model.norm"), "lm_head")[None])

    def generate(self, input_ids: torch.Tensor, max_new_tokens: int, **options: Any) -> Any:
        """Token ids of prompt and answer, with the logits where they are asked for."""
        logits: list[torch.Tensor] = []
        while len(logits) < max_new_tokens:
            logits.append(self(input_ids).logits[:, -1])
            newest = logits[-1].argmax(-1, keepdim=True)
            input_ids = torch.cat([input_ids, newest], dim=1)
            if int(newest) in self.ends:
                break
        if options.get("return_dict_in_generate"):
            return SimpleNamespace(sequences=input_ids, logits=tuple(logits))
        return input_ids


def _reference(folder: Path) -> tuple[Any, Any]:
    return _Reference(folder), transformers.PreTrainedTokenizerFast.from_pretrained(folder)


def _inputs(tokenizer: Any, text: str, media: Mapping[str, list[Any]]) -> dict[str, Any]:
    return {"input_ids": tokenizer([text], return_tensors="pt", add_special_tokens=False)["input_ids"]}


FAMILIES = {"nemotron_nas": Tiny(_write, reference=_reference, inputs=_inputs)}
