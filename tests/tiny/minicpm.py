"""MiniCPM-V 2.6, MiniCPM-o 2.6: in their published format, beside a processor and a forward pass of their own."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from torch.nn import functional

from .common import Tiny, bpe
from .reference import Reference, Weights, draw, write_checkpoint

_WIDTH, _TEXT, _QUERIES, _PATCH, _SIDE, _SQUARE = 32, 128, 4, 8, 8, 32
_SOUND, _SOUND_INNER, _BINS = 32, 128, 16
_NAMED = ["<image>", "</image>", "<slice>", "</slice>", "<image_id>", "</image_id>", "<unk>"]
_AUDIO = ["<|audio_start|>", "<|audio|>", "<|audio_end|>"]
# as Qwen2's: it takes texts
_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_QWEN2 = {
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "hidden_size": _TEXT,
    "intermediate_size": 96,
    "max_position_embeddings": 2048,
    "max_window_layers": 3,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 2048,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 512,
}
_PREPROCESSOR = {
    "image_processor_type": "MiniCPMVImageProcessor",
    "auto_map": {"AutoProcessor": "processing.Processor", "AutoImageProcessor": "image_processing.ImageProcessor"},
    "processor_class": "MiniCPMVProcessor",
    "max_slice_nums": 9,
    "scale_resolution": _SQUARE,
    "patch_size": _PATCH,
    "use_image_id": True,
    "image_feature_size": _QUERIES,
    "im_start": "<image>",
    "im_end": "</image>",
    "slice_start": "<slice>",
    "slice_end": "</slice>",
    "unk": "<unk>",
    "im_id_start": "<image_id>",
    "im_id_end": "</image_id>",
    "slice_mode": True,
    "norm_mean": [0.5, 0.5, 0.5],
    "norm_std": [0.5, 0.5, 0.5],
    "version": 2.6,
}


def _layer(name: str, width: int, inner: int, norms: tuple[str, str], mlp: str, *, key_bias: bool) -> dict[str, Any]:
    shapes: dict[str, tuple[int, ...]] = {}
    for norm in norms:
        shapes |= {f"{name}.{norm}.weight": (width,), f"{name}.{norm}.bias": (width,)}
    for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
        shapes[f"{name}.self_attn.{part}.weight"] = (width, width)
        if key_bias or part != "k_proj":
            shapes[f"{name}.self_attn.{part}.bias"] = (width,)
    shapes |= {f"{name}.{mlp}fc1.weight": (inner, width), f"{name}.{mlp}fc1.bias": (inner,)}
    return shapes | {f"{name}.{mlp}fc2.weight": (width, inner), f"{name}.{mlp}fc2.bias": (width,)}


def _weights(audio: bool) -> Weights:
    shapes: dict[str, tuple[int, ...]] = {
        "vpm.embeddings.patch_embedding.weight": (_WIDTH, 3, _PATCH, _PATCH),
        "vpm.embeddings.patch_embedding.bias": (_WIDTH,),
        "vpm.embeddings.position_embedding.weight": (_SIDE**2, _WIDTH),
        "vpm.post_layernorm.weight": (_WIDTH,),
        "vpm.post_layernorm.bias": (_WIDTH,),
        "resampler.query": (_QUERIES, _TEXT),
        "resampler.proj": (_TEXT, _TEXT),
        "resampler.kv_proj.weight": (_TEXT, _WIDTH),
        "resampler.attn.in_proj_weight": (3 * _TEXT, _TEXT),
        "resampler.attn.in_proj_bias": (3 * _TEXT,),
        "resampler.attn.out_proj.weight": (_TEXT, _TEXT),
        "resampler.attn.out_proj.bias": (_TEXT,),
    }
    for norm in ("ln_q", "ln_kv", "ln_post"):
        shapes |= {f"resampler.{norm}.weight": (_TEXT,), f"resampler.{norm}.bias": (_TEXT,)}
    for k in range(2):
        shapes |= _layer(f"vpm.encoder.layers.{k}", _WIDTH, 48, ("layer_norm1", "layer_norm2"), "mlp.", key_bias=True)
    if audio:
        shapes |= {
            "apm.conv1.weight": (_SOUND, _BINS, 3),
            "apm.conv1.bias": (_SOUND,),
            "apm.conv2.weight": (_SOUND, _SOUND, 3),
            "apm.conv2.bias": (_SOUND,),
            "apm.embed_positions.weight": (100, _SOUND),
            "apm.layer_norm.weight": (_SOUND,),
            "apm.layer_norm.bias": (_SOUND,),
            "audio_projection_layer.linear1.weight": (_TEXT, _SOUND),
            "audio_projection_layer.linear1.bias": (_TEXT,),
            "audio_projection_layer.linear2.weight": (_TEXT, _TEXT),
            "audio_projection_layer.linear2.bias": (_TEXT,),
            # of the voice, which is not loaded
            "tts.emb_text.weight": (8, 8),
        }
        norms = ("self_attn_layer_norm", "final_layer_norm")
        for k in range(2):
            shapes |= _layer(f"apm.layers.{k}", _SOUND, _SOUND_INNER, norms, "", key_bias=False)
    return draw(shapes)


def _write(folder: Path, audio: bool) -> None:
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *_NAMED, *(_AUDIO if audio else [])]
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe(special),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<unk>",
        extra_special_tokens=[s for s in special if s not in ("<|im_end|>", "<|endoftext|>", "<unk>")],
        chat_template=_TEMPLATE,
    )
    vision = {
        "hidden_size": _WIDTH,
        "image_size": _SIDE * _PATCH,
        "intermediate_size": 48,
        "model_type": "siglip_vision_model" if audio else "siglip",
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "patch_size": _PATCH,
    }
    config: dict[str, Any] = _QWEN2 | {
        "architectures": ["MiniCPMO" if audio else "MiniCPMV"],
        "auto_map": {"AutoConfig": "configuration_minicpm.Config", "AutoModelForCausalLM": "modeling.Model"},
        "model_type": "minicpmo" if audio else "minicpmv",
        "version": "2.6" if audio else 2.6,
        "batch_vision_input": True,
        "drop_vision_last_layer": False,
        "image_size": 448,
        "patch_size": _PATCH,
        "query_num": _QUERIES,
        "slice_config": {"max_slice_nums": 9, "patch_size": _PATCH, "model_type": "minicpmv"},
        "slice_mode": True,
        "torch_dtype": "bfloat16",
        "vision_config": vision,
    }
    preprocessor: dict[str, Any] = dict(_PREPROCESSOR)
    if audio:
        whisper = transformers.WhisperConfig(
            d_model=_SOUND,
            encoder_attention_heads=2,
            encoder_ffn_dim=_SOUND_INNER,
            encoder_layers=2,
            num_mel_bins=_BINS,
            max_source_positions=100,
        )
        config |= {
            "audio_config": {**whisper.to_dict(), "architectures": ["WhisperForConditionalGeneration"]},
            "audio_chunk_length": 1.0,
            "audio_pool_step": 2,
            "chunk_input": True,
            "init_vision": True,
            "init_audio": True,
            "init_tts": True,
            "tts_config": {"model_type": "conditional_chattts", "llm_dim": _TEXT},
        }
        extractor = transformers.WhisperFeatureExtractor(feature_size=_BINS, chunk_length=2)
        preprocessor = extractor.to_dict() | preprocessor | {"processor_class": "MiniCPMOProcessor"}
    text = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**_QWEN2))
    write_checkpoint(
        folder,
        config,
        tokenizer,
        text=text,
        prefix="llm.",
        towers=_weights(audio),
        files={"preprocessor_config.json": preprocessor},
    )
    # the class is the checkpoint's own code
    path = folder / "tokenizer_config.json"
    tokenizer_config = json.loads(path.read_text()) | {
        "tokenizer_class": "MiniCPMVTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization.Slow", "tokenization.Fast"]},
    }
    path.write_text(json.dumps(tokenizer_config))


# --- the processor


class Published:
    """What the published processor does, step by step."""

    def __init__(self, folder: Path, audio: bool) -> None:
        self.tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
        self.extractor = transformers.WhisperFeatureExtractor.from_pretrained(folder) if audio else None

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any:
        turns = []
        for message in conversation:
            content = message["content"]
            if not isinstance(content, str):
                lines = [p["text"] if p["type"] == "text" else f"(<{p['type']}>./</{p['type']}>)" for p in content]
                content = "\n".join(lines)
            turns.append({"role": message["role"], "content": content})
        return self.tokenizer.apply_chat_template(turns, **options)


def _divided(length: float, by: int) -> int:
    return max(round(length / by) * by, by)


def _best(width: float, height: float, upscale: bool) -> tuple[int, int]:
    if width * height > _SQUARE * _SQUARE or upscale:
        r = width / height
        height = int(_SQUARE / math.sqrt(r))
        width = int(height * r)
    return _divided(width, _PATCH), _divided(height, _PATCH)


def _grid(width: int, height: int, most: int) -> list[int] | None:
    multiple = min(math.ceil(width * height / (_SQUARE * _SQUARE)), most)
    if multiple <= 1:
        return None
    candidates = []
    for n in [multiple - 1, multiple, multiple + 1]:
        if n == 1 or n > most:
            continue
        m = 1
        while m <= n:
            if n % m == 0:
                candidates.append([m, n // m])
            m += 1
    best, error = [1, 1], float("inf")
    for candidate in candidates:
        distance = abs(math.log(width / height) - math.log(candidate[0] / candidate[1]))
        if distance < error:
            best, error = candidate, distance
    return best


def _slices(image: Any, most: int) -> list[Any]:
    width, height = image.size
    grid = _grid(width, height, most)
    if grid is None:
        return [image.resize(_best(width, height, True), Image.Resampling.BICUBIC)]
    out = [image.resize(_best(width, height, False), Image.Resampling.BICUBIC)]
    cell = _best(_divided(width, grid[0]) / grid[0], _divided(height, grid[1]) / grid[1], True)
    refined = image.resize((cell[0] * grid[0], cell[1] * grid[1]), Image.Resampling.BICUBIC)
    for top in range(0, refined.height, cell[1]):
        for left in range(0, refined.width, cell[0]):
            out.append(refined.crop((left, top, left + cell[0], top + cell[1])))
    return out


def _image_text(image: Any, most: int, number: int | None) -> str:
    unk = "<unk>" * _QUERIES
    text = f"<image>{unk}</image>"
    if number is not None:
        text = f"<image_id>{number}</image_id>" + text
    if grid := _grid(*image.size, most):
        text += "\n".join("".join(f"<slice>{unk}</slice>" for _ in range(grid[0])) for _ in range(grid[1]))
    return text


def _sound_text(samples: Any) -> str:
    frames = (math.ceil(len(samples) / 160) - 1) // 2 + 1
    rows = (frames - 2) // 2 + 1
    text, done = "", 0
    for _ in range((rows + 25 - 1) // 25):
        text += "<|audio_start|>" + "<unk>" * min(25, rows - done) + "<|audio_end|>"
        done += min(25, rows - done)
    return text


def _inputs(processor: Any, text: str, media: Mapping[str, list[Any]]) -> dict[str, Any]:
    """``order`` says what the rows of ``<unk>`` are of: slices and pieces of sound as they come."""
    queues = {kind: list(own) for kind, own in media.items()}
    number, order = 0, []
    while True:
        found = [(text.find(f"(<{kind}>./</{kind}>)"), kind) for kind in ("image", "video", "audio")]
        place, kind = min([f for f in found if f[0] >= 0], default=(-1, ""))
        if place < 0:
            break
        data = queues[kind].pop(0)
        if kind == "image":
            picture = data.pixels.convert("RGB")
            own = _image_text(picture, 9, number)
            number += 1
            order += [("image", s) for s in _slices(picture, 9)]
        elif kind == "video":
            frames = [Image.fromarray(frame) for frame in data.frames]
            own = "\n".join(_image_text(frame, 2, None) for frame in frames)
            order += [("image", s) for frame in frames for s in _slices(frame, 2)]
        else:
            own = _sound_text(data.samples)
            for start in range(0, len(data.samples), 32000):
                piece = data.samples[start : start + 32000]
                mel = processor.extractor(piece, sampling_rate=16000, padding="max_length", return_tensors="pt")
                order.append(("audio", mel["input_features"][0][:, : math.ceil(len(piece) / 160)]))
        tag = f"(<{kind}>./</{kind}>)"
        text = text[:place] + own + text[place + len(tag) :]
    assert not any(queues.values())
    inputs: dict[str, Any] = {"input_ids": processor.tokenizer(text, return_tensors="pt")["input_ids"], "order": []}
    patches = []
    for kind, piece in order:
        if kind == "image":
            array = (np.asarray(piece).astype(np.float32) / 255 - np.float32(0.5)) / np.float32(0.5)
            square = torch.from_numpy(array.transpose(2, 0, 1).copy())
            cut = functional.unfold(square, _PATCH, stride=_PATCH).T.reshape(-1, 3, _PATCH, _PATCH)
            patches.append(cut)
            inputs["order"].append((kind, cut, piece.height // _PATCH, piece.width // _PATCH))
        else:
            inputs["order"].append((kind, piece, 0, 0))
    if patches:
        inputs["pixel_values"] = torch.cat(patches)
    return inputs


# --- the forward pass


def _norm(w: Weights, name: str, x: torch.Tensor, eps: float) -> torch.Tensor:
    return functional.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps)


def _linear(w: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
    return functional.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, seen: torch.Tensor | None = None
) -> torch.Tensor:
    """[n, width], [m, width] -> [n, width]."""
    q, k, v = (x.view(len(x), heads, -1) for x in (q, k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
    if seen is not None:
        scores = scores.masked_fill(~seen, float("-inf"))
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1)


def _self_attention(w: Weights, name: str, x: torch.Tensor, seen: torch.Tensor | None = None) -> torch.Tensor:
    q, k, v = (_linear(w, f"{name}.{part}_proj", x) for part in "qkv")
    return _linear(w, f"{name}.out_proj", _attend(q, k, v, 2, seen))


def _see(w: Weights, patches: torch.Tensor, height: int, width: int) -> torch.Tensor:
    x = _linear({"x.weight": w["vpm.embeddings.patch_embedding.weight"].flatten(1)}, "x", patches.flatten(1))
    x = x + w["vpm.embeddings.patch_embedding.bias"]
    # the table's place below each patch's corner
    for place in range(height * width):
        row, column = (place // width * _SIDE) // height, (place % width * _SIDE) // width
        x[place] = x[place] + w["vpm.embeddings.position_embedding.weight"][row * _SIDE + column]
    for k in range(2):
        name = f"vpm.encoder.layers.{k}"
        x = x + _self_attention(w, f"{name}.self_attn", _norm(w, f"{name}.layer_norm1", x, 1e-6))
        y = _linear(w, f"{name}.mlp.fc1", _norm(w, f"{name}.layer_norm2", x, 1e-6))
        x = x + _linear(w, f"{name}.mlp.fc2", functional.gelu(y, approximate="tanh"))
    x = _norm(w, "vpm.post_layernorm", x, 1e-6)
    values = _norm(w, "resampler.ln_kv", _linear(w, "resampler.kv_proj", x), 1e-6)
    omega = 1.0 / 10000 ** (np.arange(_TEXT // 4, dtype=np.float32) / (_TEXT / 4.0))
    across, down = np.meshgrid(np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32))
    parts = [f(place.reshape(-1)[:, None] * omega) for place in (across, down) for f in (np.sin, np.cos)]
    keys = values + torch.from_numpy(np.concatenate(parts, axis=1).astype(np.float32))
    wq, wk, wv = w["resampler.attn.in_proj_weight"].chunk(3)
    bq, bk, bv = w["resampler.attn.in_proj_bias"].chunk(3)
    queries = _norm(w, "resampler.ln_q", w["resampler.query"], 1e-6) @ wq.T + bq
    mixed = _attend(queries, keys @ wk.T + bk, values @ wv.T + bv, _TEXT // 128)
    mixed = _linear(w, "resampler.attn.out_proj", mixed)
    return _norm(w, "resampler.ln_post", mixed, 1e-6) @ w["resampler.proj"]


def _hear(w: Weights, mel: torch.Tensor) -> torch.Tensor:
    x = functional.gelu(functional.conv1d(mel[None], w["apm.conv1.weight"], w["apm.conv1.bias"], padding=1))
    x = functional.gelu(functional.conv1d(x, w["apm.conv2.weight"], w["apm.conv2.bias"], stride=2, padding=1))[0].T
    x = x + w["apm.embed_positions.weight"][: len(x)]
    seen = torch.tensor([[k // 50 <= q // 50 for k in range(len(x))] for q in range(len(x))])
    for k in range(2):
        name = f"apm.layers.{k}"
        x = x + _self_attention(w, f"{name}.self_attn", _norm(w, f"{name}.self_attn_layer_norm", x, 1e-5), seen)
        y = functional.gelu(_linear(w, f"{name}.fc1", _norm(w, f"{name}.final_layer_norm", x, 1e-5)))
        x = x + _linear(w, f"{name}.fc2", y)
    x = functional.relu(_linear(w, "audio_projection_layer.linear1", _norm(w, "apm.layer_norm", x, 1e-5)))
    x = _linear(w, "audio_projection_layer.linear2", x)
    return (x[0 : len(x) // 2 * 2 : 2] + x[1::2]) / 2


def _reference(folder: Path, audio: bool) -> tuple[Any, Any]:
    processor = Published(folder, audio)

    def rows(w: Weights, inputs: Mapping[str, Any]) -> dict[int, torch.Tensor]:
        found = [
            _see(w, piece, height, width) if kind == "image" else _hear(w, piece)
            for kind, piece, height, width in inputs.get("order", ())
        ]
        return {processor.tokenizer.convert_tokens_to_ids("<unk>"): torch.cat(found)} if found else {}

    return Reference(folder, transformers.Qwen2ForCausalLM, rows), processor


FAMILIES = {
    "minicpmv": Tiny(
        lambda folder: _write(folder, False),
        ("image", "video"),
        reference=lambda folder: _reference(folder, False),
        inputs=_inputs,
    ),
    "minicpmo": Tiny(
        lambda folder: _write(folder, True),
        ("image", "video", "audio"),
        reference=lambda folder: _reference(folder, True),
        inputs=_inputs,
    ),
}
