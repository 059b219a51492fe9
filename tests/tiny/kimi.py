"""Kimi K2.5; Kimi-VL in its published format, beside a forward pass of its own."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import MethodType, SimpleNamespace
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import AddedToken, Regex, decoders, pre_tokenizers
from torch.nn import functional

from .common import Tiny, bpe
from .reference import Reference, Weights, draw, write_checkpoint

_WIDTH, _HEADS, _LAYERS, _INNER, _PATCH, _GRID, _TEXT = 32, 2, 2, 48, 8, 6, 64
_LIMIT = 120
_SPECIAL = [
    "[BOS]",
    "[EOS]",
    "<|im_end|>",
    "<|im_user|>",
    "<|im_assistant|>",
    "<|im_system|>",
    "<|im_middle|>",
    "<|media_start|>",
    "<|media_begin|>",
    "<|media_content|>",
    "<|media_end|>",
    "<|media_pad|>",
    "<|kimi_k25_video_placeholder|>",
    "[PAD]",
]
_TEMPLATE = (
    "{%- for m in messages -%}"
    "{%- if loop.first and m['role'] != 'system' -%}"
    "{{ '<|im_system|>system<|im_middle|>You are a helpful assistant<|im_end|>' }}{%- endif -%}"
    "{{ '<|im_' + m['role'] + '|>' + m['role'] + '<|im_middle|>' }}"
    "{%- if m['content'] is string -%}{{ m['content'] + '<|im_end|>' }}{%- else -%}{%- for c in m['content'] -%}"
    "{%- if c['type'] == 'image' -%}{{ '<|media_START|>image<|media_content|><|media_pad|><|media_end|>' }}"
    "{%- elif c['type'] == 'video' -%}{{ '<|kimi_k25_video_placeholder|>' }}"
    "{%- else -%}{{ c['text'] }}{%- endif -%}{%- endfor -%}{{ '<|im_end|>' }}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_assistant|>assistant<|im_middle|>' }}{%- endif -%}"
)
_DEEPSEEK_V3 = {
    "vocab_size": 512,
    "hidden_size": _TEXT,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_shared_experts": 2,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 2.446,
    "norm_topk_prob": True,
    "q_lora_rank": None,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}


def _k25() -> tuple[Any, Any]:
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe(_SPECIAL),
        bos_token="[BOS]",
        eos_token="<|im_end|>",
        pad_token="[PAD]",
        extra_special_tokens=_SPECIAL,
        padding_side="left",
    )
    token = tokenizer.convert_tokens_to_ids
    ids = {"bos_token_id": token("[BOS]"), "eos_token_id": token("<|im_end|>"), "pad_token_id": token("[PAD]")}
    config = transformers.Kimi_K25Config(
        text_config={"model_type": "deepseek_v3", **_DEEPSEEK_V3, "q_lora_rank": 24, **ids},
        vision_config={
            "patch_size": _PATCH,
            "pos_emb_height": _GRID,
            "pos_emb_width": _GRID,
            "num_attention_heads": _HEADS,
            "num_hidden_layers": _LAYERS,
            "hidden_size": _WIDTH,
            "intermediate_size": _INNER,
        },
        projection_hidden_size=_WIDTH,
        image_token_id=token("<|media_pad|>"),
        video_token_id=token("<|kimi_k25_video_placeholder|>"),
        vision_start_token_id=token("<|media_begin|>"),
        vision_end_token_id=token("<|media_end|>"),
        tie_word_embeddings=False,
    )
    processor = transformers.Kimi_K25Processor(
        image_processor=transformers.Kimi_K25ImageProcessor(patch_size=_PATCH, max_patches=_LIMIT),
        video_processor=transformers.Kimi_K25VideoProcessor(patch_size=_PATCH, max_patches=40),
        tokenizer=tokenizer,
        chat_template=_TEMPLATE.replace("START", "begin"),
    )
    return transformers.Kimi_K25ForConditionalGeneration(config), processor


def _k25_reference(folder: Path) -> tuple[Any, Any]:
    model = transformers.Kimi_K25ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()

    def get_video_features(self: Any, pixel_values_videos: Any, video_grid_thw: Any, **_: Any) -> Any:
        # transformers splits the rows by the patches of all frames, though the tower averages over frames, and its
        # tower does not take runs of four frames together with shorter ones
        parts = pixel_values_videos.split(video_grid_thw.prod(-1).tolist())
        seen = [self.vision_tower(part, grid_thw=grid[None]) for part, grid in zip(parts, video_grid_thw, strict=True)]
        rows = torch.cat([one.pooler_output for one in seen])
        return SimpleNamespace(pooler_output=(self.mm_projector(rows).squeeze(1),))

    model.model.get_video_features = MethodType(get_video_features, model.model)
    return model, transformers.AutoProcessor.from_pretrained(folder)


# --- Kimi-VL


def _vocabulary() -> tuple[Any, Any]:
    """A tokenizer with the published rules, its special tokens last; the same as a tiktoken vocabulary."""
    raw = bpe([])
    size = raw.get_vocab_size()
    marks = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
    pattern = (
        r"[\p{Han}]+"
        r"|[^\r\n\p{L}\p{N}]?" + marks[0] + "*" + marks[1] + r"+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r"|[^\r\n\p{L}\p{N}]?" + marks[0] + "+" + marks[1] + r"*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    byte_level = decoders.ByteLevel()
    ordered = sorted(raw.get_vocab().items(), key=lambda item: item[1])
    alphabet = {letter: byte for byte, letter in enumerate(_letters())}
    lines = [base64.b64encode(bytes(alphabet[c] for c in token)).decode() + f" {rank}" for token, rank in ordered]
    assert byte_level.decode([ordered[-1][0]]) == bytes(alphabet[c] for c in ordered[-1][0]).decode()
    raw.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in _special(size)])
    return raw, "\n".join(lines)


def _special(size: int) -> list[str]:
    """With a gap, as there are many in the published one."""
    return [*_SPECIAL[:4], f"<|reserved_token_{size + 4}|>", *_SPECIAL[4:]]


def _letters() -> list[str]:
    # what a byte-level pre-tokenizer makes of each byte, learnt from itself
    letters = {}
    step = pre_tokenizers.ByteLevel(False, use_regex=False)
    for point in [*range(0x80), *range(0x80, 0x800)]:
        for byte, letter in zip(chr(point).encode(), step.pre_tokenize_str(chr(point))[0][0], strict=True):
            letters[byte] = letter
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    # bytes that UTF-8 of such characters never has
    rest = iter(sorted(set(alphabet) - set(letters.values())))
    return [letters[byte] if byte in letters else next(rest) for byte in range(256)]


def _vision_weights() -> Weights:
    shapes: dict[str, tuple[int, ...]] = {
        "vision_tower.patch_embed.proj.weight": (_WIDTH, 3, _PATCH, _PATCH),
        "vision_tower.patch_embed.proj.bias": (_WIDTH,),
        "vision_tower.patch_embed.pos_emb.weight": (_GRID, _GRID, _WIDTH),
        "vision_tower.encoder.final_layernorm.weight": (_WIDTH,),
        "vision_tower.encoder.final_layernorm.bias": (_WIDTH,),
        "multi_modal_projector.pre_norm.weight": (_WIDTH,),
        "multi_modal_projector.pre_norm.bias": (_WIDTH,),
        "multi_modal_projector.linear_1.weight": (4 * _WIDTH, 4 * _WIDTH),
        "multi_modal_projector.linear_1.bias": (4 * _WIDTH,),
        "multi_modal_projector.linear_2.weight": (_TEXT, 4 * _WIDTH),
        "multi_modal_projector.linear_2.bias": (_TEXT,),
    }
    for k in range(_LAYERS):
        block = f"vision_tower.encoder.blocks.{k}"
        for name, out, inner in (
            ("wqkv", 3 * _WIDTH, _WIDTH),
            ("wo", _WIDTH, _WIDTH),
            ("mlp.fc0", _INNER, _WIDTH),
            ("mlp.fc1", _WIDTH, _INNER),
        ):
            shapes |= {f"{block}.{name}.weight": (out, inner), f"{block}.{name}.bias": (out,)}
        for name in ("norm0", "norm1"):
            shapes |= {f"{block}.{name}.weight": (_WIDTH,), f"{block}.{name}.bias": (_WIDTH,)}
    weights = draw(shapes)
    # as large as what it is added to
    weights["vision_tower.patch_embed.pos_emb.weight"] *= math.sqrt(_GRID * _WIDTH)
    return weights


def _write_kimi_vl(folder: Path) -> None:
    raw, vocabulary = _vocabulary()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="[BOS]", eos_token="<|im_end|>", pad_token="[PAD]", chat_template=_TEMPLATE
    )
    tokenizer.chat_template = _TEMPLATE.replace("START", "start")
    token = tokenizer.convert_tokens_to_ids
    text = {
        **_DEEPSEEK_V3,
        "model_type": "kimi_vl_text",
        "rope_theta": 800000.0,
        "rope_scaling": None,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "moe_layer_freq": 1,
        "ep_size": 1,
        "hidden_act": "silu",
        "attention_bias": False,
        "bos_token_id": token("[BOS]"),
        "eos_token_id": token("[EOS]"),
        "pad_token_id": token("[PAD]"),
        "torch_dtype": "bfloat16",
    }
    config = {
        "architectures": ["KimiVLForConditionalGeneration"],
        "auto_map": {"AutoConfig": "configuration_kimi_vl.KimiVLConfig"},
        "model_type": "kimi_vl",
        "ignore_index": -100,
        "media_placeholder_token_id": token("<|media_pad|>"),
        "vocab_size": 512,
        "torch_dtype": "bfloat16",
        "vision_config": {
            "model_type": "moonvit",
            "patch_size": _PATCH,
            "init_pos_emb_height": _GRID,
            "init_pos_emb_width": _GRID,
            "num_attention_heads": _HEADS,
            "num_hidden_layers": _LAYERS,
            "hidden_size": _WIDTH,
            "intermediate_size": _INNER,
            "merge_kernel_size": [2, 2],
            "torch_dtype": "bfloat16",
        },
        "text_config": text,
    }
    preprocessor = {
        "auto_map": {"AutoImageProcessor": "image_processing_kimi_vl.KimiVLImageProcessor"},
        "in_token_limit": _LIMIT,
        "patch_size": _PATCH,
        "pad_input": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "merge_kernel_size": [2, 2],
    }
    plain = {key: value for key, value in text.items() if key not in ("model_type", "rope_scaling")}
    write_checkpoint(
        folder,
        config,
        tokenizer,
        text=transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**plain)),
        prefix="language_model.",
        towers=_vision_weights(),
        files={"preprocessor_config.json": preprocessor},
    )
    # what is published in its place
    (folder / "tokenizer.json").rename(folder / "text" / "tokenizer.json")
    (folder / "tiktoken.model").write_text(vocabulary + "\n")
    added = {token(name): {"content": name, "special": True} for name in _SPECIAL}
    options = {"bos_token": "[BOS]", "eos_token": "<|im_end|>", "pad_token": "[PAD]", "added_tokens_decoder": added}
    options |= {
        "tokenizer_class": "TikTokenTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_moonshot.X", None]},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(options))


def _turn(x: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Rotate [patches, heads, D] in complex pairs: pair 2j by the column, 2j + 1 by the row, at frequency j."""
    rows, columns = torch.arange(height).repeat_interleave(width), torch.arange(width).repeat(height)
    speed = 10000.0 ** (-torch.arange(0, x.shape[-1], 4) / x.shape[-1])
    angle = torch.stack([columns[:, None] * speed, rows[:, None] * speed], dim=-1).flatten(1)
    pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)[:, None]).flatten(-2)


def _see(w: Weights, patches: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """One picture, patches [height * width, 3, side, side] -> rows."""

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return functional.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-5)

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return functional.linear(x, w[f"{name}.weight"].flatten(1), w[f"{name}.bias"])

    x = linear(patches.flatten(1), "vision_tower.patch_embed.proj")
    table = w["vision_tower.patch_embed.pos_emb.weight"]
    if (height, width) != table.shape[:2]:
        grid = functional.interpolate(table.permute(2, 0, 1)[None], size=(height, width), mode="bicubic")
        table = grid[0].permute(1, 2, 0)
    x = x + table.flatten(0, 1)
    for k in range(_LAYERS):
        block = f"vision_tower.encoder.blocks.{k}"
        qkv = linear(norm(x, f"{block}.norm0"), f"{block}.wqkv").view(len(x), 3, _HEADS, -1)
        query, key = (_turn(qkv[:, j], height, width) for j in range(2))
        scores = torch.einsum("qhd,khd->hqk", query, key) * query.shape[-1] ** -0.5
        seen = torch.einsum("hqk,khd->qhd", scores.softmax(-1), qkv[:, 2]).flatten(1)
        x = x + linear(seen, f"{block}.wo")
        inner = functional.gelu(linear(norm(x, f"{block}.norm1"), f"{block}.mlp.fc0"), approximate="tanh")
        x = x + linear(inner, f"{block}.mlp.fc1")
    x = norm(norm(x, "vision_tower.encoder.final_layernorm"), "multi_modal_projector.pre_norm")
    x = x.view(height // 2, 2, width // 2, 2, -1).transpose(1, 2).reshape(-1, 4 * _WIDTH)
    return linear(functional.gelu(linear(x, "multi_modal_projector.linear_1")), "multi_modal_projector.linear_2")


class _Text:
    """The tokenizer, in the place of a processor."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_file=str(folder / "text" / "tokenizer.json"), bos_token="[BOS]", eos_token="<|im_end|>"
        )
        self.image_token_id = self.tokenizer.convert_tokens_to_ids("<|media_pad|>")

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any:
        return self.tokenizer.apply_chat_template(
            conversation, chat_template=_TEMPLATE.replace("START", "start"), **options
        )


def _inputs(processor: Any, text: str, media: Mapping[str, list[Any]]) -> dict[str, Any]:
    """Pictures as the published processor has them."""
    parts, grids = [], []
    for image in media.get("image", []):
        picture = image.pixels
        count = (picture.width // _PATCH) * (picture.height // _PATCH)
        if count > _LIMIT:
            scale = (_LIMIT / count) ** 0.5
            picture = picture.resize((int(picture.width * scale), int(picture.height * scale)), 3)
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 255
        right, below = (-picture.width % (2 * _PATCH), -picture.height % (2 * _PATCH))
        pixels = functional.pad(pixels, (0, right, 0, below)).sub(0.5).div(0.5)
        grids.append((pixels.shape[2] // _PATCH, pixels.shape[3] // _PATCH))
        parts.append(functional.unfold(pixels, _PATCH, stride=_PATCH)[0].T.reshape(-1, 3, _PATCH, _PATCH))
        text = text.replace("<|media_pad|>", "<|a row|>" * (math.prod(grids[-1]) // 4), 1)
    text = text.replace("<|a row|>", "<|media_pad|>")
    inputs: dict[str, Any] = {"input_ids": processor.tokenizer([text], return_tensors="pt")["input_ids"]}
    if parts:
        inputs |= {"pixel_values": torch.cat(parts), "grids": grids}
    return inputs


def _kimi_vl_reference(folder: Path) -> tuple[Any, Any]:
    processor = _Text(folder)

    def rows(w: Weights, inputs: Mapping[str, Any]) -> dict[int, torch.Tensor]:
        if "grids" not in inputs:
            return {}
        parts = inputs["pixel_values"].split([math.prod(grid) for grid in inputs["grids"]])
        seen = [_see(w, part, *grid) for part, grid in zip(parts, inputs["grids"], strict=True)]
        return {processor.image_token_id: torch.cat(seen)}

    return Reference(folder, transformers.DeepseekV3ForCausalLM, rows), processor


FAMILIES = {
    "kimi_k25": Tiny(_k25, ("image", "video"), reference=_k25_reference),
    "kimi_vl": Tiny(_write_kimi_vl, ("image",), reference=_kimi_vl_reference, inputs=_inputs),
}
