"""NVILA and NVILA-Lite: in their published format, beside a processor and a forward pass of their own."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional

from .common import Tiny, bpe
from .reference import Reference, Weights, draw, write_checkpoint

_WIDTH, _HEADS, _INNER, _PATCH, _SIDE, _TEXT, _LAYERS = 32, 2, 48, 8, 32, 64, 3
_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<vila/video>", "<vila/sentinel>"]
_PARTS = (
    "{%- for m in messages -%}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{%- if m['content'] is string -%}{{ m['content'] }}{%- else -%}{%- for c in m['content'] -%}"
    "{%- if c['type'] == 'image' -%}<image>{%- elif c['type'] == 'video' -%}<vila/video>"
    "{%- else -%}{{ c['text'] }}{%- endif -%}{%- endfor -%}{%- endif -%}{{ '<|im_end|>\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)
# as Qwen2's: it takes texts
_TEXTS = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_QWEN2 = {
    "model_type": "qwen2",
    "hidden_act": "silu",
    "hidden_size": _TEXT,
    "intermediate_size": 96,
    "max_position_embeddings": 4096,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "vocab_size": 512,
}


def _weights(lite: bool) -> Weights:
    tower = "vision_tower.vision_model"
    shapes: dict[str, tuple[int, ...]] = {
        f"{tower}.embeddings.patch_embedding.weight": (_WIDTH, 3, _PATCH, _PATCH),
        f"{tower}.embeddings.patch_embedding.bias": (_WIDTH,),
        f"{tower}.embeddings.position_embedding.weight": ((_SIDE // _PATCH) ** 2, _WIDTH),
        f"{tower}.post_layernorm.weight": (_WIDTH,),
        f"{tower}.post_layernorm.bias": (_WIDTH,),
        # of SigLIP's own pooling, which is not used
        f"{tower}.head.probe": (1, 1, _WIDTH),
    }
    for k in range(_LAYERS):
        layer = f"{tower}.encoder.layers.{k}"
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= {
                f"{layer}.self_attn.{part}.weight": (_WIDTH, _WIDTH),
                f"{layer}.self_attn.{part}.bias": (_WIDTH,),
            }
        for norm in ("layer_norm1", "layer_norm2"):
            shapes |= {f"{layer}.{norm}.weight": (_WIDTH,), f"{layer}.{norm}.bias": (_WIDTH,)}
        shapes |= {f"{layer}.mlp.fc1.weight": (_INNER, _WIDTH), f"{layer}.mlp.fc1.bias": (_INNER,)}
        shapes |= {f"{layer}.mlp.fc2.weight": (_WIDTH, _INNER), f"{layer}.mlp.fc2.bias": (_WIDTH,)}
    if lite:
        sizes = {
            1: (9 * _WIDTH,),
            2: (3 * _WIDTH, 9 * _WIDTH),
            4: (3 * _WIDTH,),
            5: (_TEXT, 3 * _WIDTH),
            7: (_TEXT,) * 2,
        }
    else:
        sizes = {1: (12 * _WIDTH,), 2: (_TEXT, 12 * _WIDTH), 4: (_TEXT, _TEXT)}
    for k, size in sizes.items():
        shapes |= {f"mm_projector.layers.{k}.weight": size, f"mm_projector.layers.{k}.bias": size[:1]}
    return draw(shapes)


def _write(folder: Path, lite: bool) -> None:
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe(_SPECIAL),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_specific_special_tokens={"image_token": "<image>", "video_token": "<vila/video>"},
        extra_special_tokens=["<|im_start|>", "<image>", "<vila/video>", "<vila/sentinel>"],
        chat_template=_TEXTS if lite else _PARTS,
    )
    name = "NVILALite" if lite else "NVILA"
    config = {
        "architectures": [f"{name}ForConditionalGeneration"],
        "auto_map": {"AutoConfig": f"configuration.{name}Config", "AutoProcessor": f"processing.{name}Processor"},
        "model_type": "nvila_lite" if lite else "nvila",
        "image_token_id": tokenizer.convert_tokens_to_ids("<image>"),
        "video_token_id": tokenizer.convert_tokens_to_ids("<vila/video>"),
        "torch_dtype": "bfloat16",
        "text_config": _QWEN2,
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": _WIDTH,
            "image_size": _SIDE,
            "intermediate_size": _INNER,
            "num_attention_heads": _HEADS,
            "num_hidden_layers": _LAYERS,
            "patch_size": _PATCH,
        },
    }
    processor = {
        "image_processor_type": "SiglipImageProcessor",
        "auto_map": {"AutoProcessor": f"processing.{name}Processor"},
        "processor_class": f"{name}Processor",
        "do_convert_rgb": None,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"height": _SIDE, "width": _SIDE},
    }
    write_checkpoint(
        folder,
        config,
        tokenizer,
        text=transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**_QWEN2)),
        prefix="llm.",
        towers=_weights(lite),
        files={"preprocessor_config.json": processor},
    )


def _write_original(folder: Path, lite: bool) -> None:
    """Three folders; the same in one folder, for the reference, lies in folder/single."""
    single = folder / "single"
    single.mkdir()
    _write(single, lite)
    stored = load_file(single / "model.safetensors")
    for part, prefix in (("llm", "llm."), ("vision_tower", "vision_tower."), ("mm_projector", "mm_projector.")):
        (folder / part).mkdir()
        own = {name.removeprefix(prefix): tensor for name, tensor in stored.items() if name.startswith(prefix)}
        save_file(own, folder / part / "model.safetensors", metadata={"format": "pt"})
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        if (single / name).is_file():
            (single / name).rename(folder / "llm" / name)
    (single / "preprocessor_config.json").rename(folder / "vision_tower" / "preprocessor_config.json")
    given = json.loads((single / "config.json").read_text())
    (folder / "llm" / "config.json").write_text(json.dumps({"architectures": ["Qwen2ForCausalLM"], **_QWEN2}))
    projector = "mlp_downsample_3x3_fix" if lite else "mlp_downsample"
    config = {
        "architectures": ["LlavaLlamaModel"],
        "model_type": "llava_llama",
        "image_aspect_ratio": "dynamic" if lite else "dynamic_s2",
        "dynamic_s2": not lite,
        "s2_scales": f"{_SIDE},{2 * _SIDE},{3 * _SIDE}",
        "num_video_frames": 8,
        "mm_hidden_size": _WIDTH if lite else 3 * _WIDTH,
        "mm_vision_select_layer": -2,
        "model_dtype": "torch.bfloat16",
        # a folder's own config.json is as good
        "llm_cfg": "/somewhere/llm" if lite else given["text_config"],
        "vision_tower_cfg": given["vision_config"],
        "mm_projector_cfg": {"model_type": "v2l_projector", "mm_projector_type": projector},
    }
    (folder / "config.json").write_text(json.dumps(config))


# --- the processor


class Published:
    """What the published processors do, step by step."""

    def __init__(self, tokenizer: Path, image_processor: Path, lite: bool, original: bool) -> None:
        self.lite = lite
        self.original = original
        self.tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(tokenizer)
        self.image_processor = transformers.SiglipImageProcessor.from_pretrained(image_processor)

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any:
        tokens = {"image": "<image>", "video": "<vila/video>"}
        turns = []
        for message in conversation:
            content = message["content"]
            if not isinstance(content, str):
                content = "".join(p["text"] if p["type"] == "text" else tokens[p["type"]] for p in content)
            turns.append({"role": message["role"], "content": content.strip() if self.original else content})
        return self.tokenizer.apply_chat_template(turns, **options)


def _closest(width: int, height: int, fewest: int) -> tuple[int, int]:
    candidates = {
        (i, j)
        for n in range(fewest, 13)
        for i in range(1, n + 1)
        for j in range(1, n + 1)
        if i * j <= 12 and i * j >= fewest
    }
    best, best_difference = (1, 1), float("inf")
    for ratio in sorted(candidates, key=lambda x: x[0] * x[1]):
        difference = abs(width / height - ratio[0] / ratio[1])
        if difference < best_difference:
            best, best_difference = ratio, difference
        elif difference == best_difference and width * height > 0.5 * _SIDE * _SIDE * ratio[0] * ratio[1]:
            best = ratio
    return best


def _tiles(image: Any, columns: int, rows: int) -> list[Any]:
    resized = image.resize((columns * _SIDE, rows * _SIDE))
    out = []
    for k in range(columns * rows):
        left, top = (k % columns) * _SIDE, (k // columns) * _SIDE
        out.append(resized.crop((left, top, left + _SIDE, top + _SIDE)))
    return out


def _inputs(processor: Any, text: str, media: Mapping[str, list[Any]]) -> dict[str, Any]:
    """``seen`` holds for each row of a token what it is of: (token, pixels, blocks)."""
    images = [data.pixels.convert("RGB") for data in media.get("image", ())]
    seen: dict[str, list[tuple[Any, Any]]] = {"<image>": [], "<vila/video>": []}
    counts: dict[str, list[int]] = {"<image>": [], "<vila/video>": []}
    pixels = []

    def look(pictures: list[Any]) -> Any:
        found = processor.image_processor(pictures, return_tensors="pt")["pixel_values"]
        pixels.append(found)
        return found

    if len(images) == 1 and processor.lite:
        columns, rows = _closest(*images[0].size, 1)
        tiles = _tiles(images[0], columns, rows)
        if len(tiles) != 1:
            tiles.append(images[0].resize((_SIDE, _SIDE)))
        text = text.replace("<image>", "<image>\n" * len(tiles))
        seen["<image>"] = [(tile[None], None) for tile in look(tiles)]
        counts["<image>"] = [4] * len(tiles)
    elif len(images) == 1:
        columns, rows = _closest(*images[0].size, 9)
        tiles = [*_tiles(images[0], 1, 1), *_tiles(images[0], 2, 2), *_tiles(images[0], columns, rows)]
        seen["<image>"] = [(look(tiles), (rows, columns))]
        counts["<image>"] = [4 * rows * columns]
    elif images:
        seen["<image>"] = [(look([image]), None) for image in images]
        counts["<image>"] = [4] * len(images)
    for video in media.get("video", ()):
        frames = [Image.fromarray(frame) for frame in video.frames]
        text = text.replace("<vila/video>", "<stand-in>" * len(frames), 1)
        seen["<vila/video>"] += [(frame[None], None) for frame in look(frames)]
        counts["<vila/video>"] += [4] * len(frames)
    text = text.replace("<stand-in>", "<vila/video>")
    for token, own in counts.items():
        pieces = text.split(token)
        assert len(pieces) == len(own) + 1
        # room for the line feed, which takes the place of the last one
        text = pieces[0] + "".join(token * (n + 1) + piece for n, piece in zip(own, pieces[1:], strict=True))
    ids = processor.tokenizer(text)["input_ids"]
    for token, own in counts.items():
        media_id, place = processor.tokenizer.convert_tokens_to_ids(token), 0
        for n in own:
            place = ids.index(media_id, place) + n
            ids[place] = processor.tokenizer.encode("\n")[0]
    inputs: dict[str, Any] = {"input_ids": torch.tensor([ids]), "seen": seen}
    if pixels:
        inputs["pixel_values"] = torch.cat(pixels)
    return inputs


# --- the forward pass


def _states(w: Weights, pixels: torch.Tensor) -> torch.Tensor:
    """One tile [3, side, side] -> states before the last layer [patches, width]."""
    w = {name.removeprefix("vision_tower.vision_model."): tensor for name, tensor in w.items()}

    def norm(name: str, x: torch.Tensor) -> torch.Tensor:
        return functional.layer_norm(x, (_WIDTH,), w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    weight, bias = w["embeddings.patch_embedding.weight"], w["embeddings.patch_embedding.bias"]
    x = functional.conv2d(pixels[None], weight, bias, stride=_PATCH)[0].flatten(1).T
    x = x + w["embeddings.position_embedding.weight"]
    for k in range(_LAYERS - 1):
        layer = f"encoder.layers.{k}"
        y = norm(f"{layer}.layer_norm1", x)
        q, key, value = (linear(f"{layer}.self_attn.{p}_proj", y).view(len(y), _HEADS, -1) for p in "qkv")
        scores = torch.einsum("qhd,khd->hqk", q, key) / q.shape[-1] ** 0.5
        mixed = torch.einsum("hqk,khd->qhd", scores.softmax(-1), value).flatten(1)
        x = x + linear(f"{layer}.self_attn.out_proj", mixed)
        y = linear(f"{layer}.mlp.fc1", norm(f"{layer}.layer_norm2", x))
        x = x + linear(f"{layer}.mlp.fc2", functional.gelu(y, approximate="tanh"))
    return x


def _whole(states: list[torch.Tensor], columns: int) -> torch.Tensor:
    """States of the tiles of a grid -> [height, width, channels]."""
    side = math.isqrt(len(states[0]))
    maps = [state.view(side, side, -1) for state in states]
    rows = [torch.cat(maps[k : k + columns], dim=1) for k in range(0, len(maps), columns)]
    return torch.cat(rows, dim=0)


def _shrunk(whole: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Each place the mean of what lies under it."""
    rows, columns = whole.shape[:2]
    out = torch.empty(height, width, whole.shape[2])
    for i in range(height):
        for j in range(width):
            top, bottom = i * rows // height, -(-(i + 1) * rows // height)
            left, right = j * columns // width, -(-(j + 1) * columns // width)
            out[i, j] = whole[top:bottom, left:right].mean(dim=(0, 1))
    return out


def _project(w: Weights, tile: torch.Tensor, lite: bool) -> torch.Tensor:
    """[side, side, channels] -> rows [squares, width]."""
    merge = 3 if lite else 2
    missing = -len(tile) % merge
    tile = functional.pad(tile, (0, 0, 0, missing, 0, missing))
    squares = [
        tile[i : i + merge, j : j + merge].flatten()
        for i in range(0, len(tile), merge)
        for j in range(0, len(tile), merge)
    ]
    x = torch.stack(squares)
    layers = {1: "norm", 2: "linear", 3: "gelu", 4: "norm", 5: "linear", 6: "gelu", 7: "linear"}
    for k, kind in (layers if lite else {1: "norm", 2: "linear", 3: "gelu", 4: "linear"}).items():
        if kind == "gelu":
            x = functional.gelu(x)
            continue
        weight, bias = w[f"mm_projector.layers.{k}.weight"], w[f"mm_projector.layers.{k}.bias"]
        x = (
            functional.linear(x, weight, bias)
            if kind == "linear"
            else functional.layer_norm(x, bias.shape, weight, bias)
        )
    return x


def _see(w: Weights, pixels: torch.Tensor, blocks: tuple[int, int] | None, lite: bool) -> torch.Tensor:
    states = [_states(w, tile) for tile in pixels]
    if blocks is None:
        whole = _whole(states, 1)
        return _project(w, whole if lite else whole.repeat(1, 1, 3), lite)
    rows, columns = blocks
    largest = _whole(states[5:], columns)
    height, width = largest.shape[:2]
    smaller = [_shrunk(_whole(states[:1], 1), height, width), _shrunk(_whole(states[1:5], 2), height, width)]
    joined = torch.cat([*smaller, largest], dim=2)
    side = height // rows
    lines = []
    for i in range(rows):
        tiles = [joined[i * side : (i + 1) * side, j * side : (j + 1) * side] for j in range(columns)]
        lines.append(torch.cat([_project(w, tile, lite).view(side // 2, side // 2, -1) for tile in tiles], dim=1))
    return torch.cat(lines, dim=0).flatten(0, 1)


def _reference(folder: Path, lite: bool, original: bool) -> tuple[Any, Any]:
    places = (folder / "llm", folder / "vision_tower") if original else (folder, folder)
    processor = Published(*places, lite, original)

    def rows(w: Weights, inputs: Mapping[str, Any]) -> dict[int, torch.Tensor]:
        return {
            processor.tokenizer.convert_tokens_to_ids(token): torch.cat([_see(w, *part, lite) for part in own])
            for token, own in inputs.get("seen", {}).items()
            if own
        }

    return Reference(folder / "single" if original else folder, transformers.Qwen2ForCausalLM, rows), processor


def _family(lite: bool, original: bool) -> Tiny:
    write = _write_original if original else _write
    return Tiny(
        lambda folder: write(folder, lite),
        ("image", "video"),
        reference=lambda folder: _reference(folder, lite, original),
        inputs=_inputs,
    )


FAMILIES = {
    "nvila": _family(False, False),
    "nvila_lite": _family(True, False),
    "nvila_original": _family(False, True),
    "nvila_lite_original": _family(True, True),
}
