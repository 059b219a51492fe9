"""Nemotron Omni; Nemotron Nano 2 VL in its published format."""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image as PILImage
from safetensors.torch import load_file, save_file

from triptych.python_models.families.qwen_vision import video_metadata

from .common import Tiny, bpe, draw_weights

NAMED = {
    "image_token": "<image>",
    "video_token": "<video>",
    "audio_token": "<so_embedding>",
    "image_start_token": "<img>",
    "image_end_token": "</img>",
}
TEMPLATE = (
    "{%- for m in messages -%}"
    "{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{%- if m['content'] is string -%}{{ m['content'] }}{%- else -%}{%- for c in m['content'] -%}"
    "{%- if c['type'] == 'image' -%}<image>\n"
    "{%- elif c['type'] == 'video' -%}<video>\n"
    "{%- elif c['type'] == 'audio' -%}<so_embedding>\n"
    "{%- else -%}{{ c['text'] }}{%- endif -%}{%- endfor -%}{%- endif -%}"
    "{{ '<|im_end|>\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)


def tokenizer(named: Mapping[str, str] = NAMED, more: tuple[str, ...] = ("<so_start>", "<so_end>")) -> Any:
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *named.values(), *more]
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe(special),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_specific_special_tokens=dict(named),
        extra_special_tokens=[s for s in special if s not in ("<|im_end|>", "<|endoftext|>")],
        padding_side="left",
    )


def text(own: Any) -> dict[str, Any]:
    """Mamba-2, attention, a plain and a gated expert network, each a layer of its own."""
    return {
        "model_type": "nemotron_h",
        "vocab_size": 512,
        "hidden_size": 64,
        "layers_block_type": ["linear_attention", "mlp", "full_attention", "moe", "linear_attention"],
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size": 96,
        "ssm_state_size": 8,
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "n_groups": 2,
        "conv_kernel": 4,
        "chunk_size": 8,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "moe_intermediate_size": 32,
        "moe_shared_expert_intermediate_size": 32,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 2048,
        "bos_token_id": own.convert_tokens_to_ids("<|endoftext|>"),
        "eos_token_id": own.eos_token_id,
        "pad_token_id": own.pad_token_id,
    }


def _omni() -> tuple[Any, Any]:
    own = tokenizer()
    vision = {
        "model_type": "radio",
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "mlp_ratio": 2.0,
        "patch_size": 16,
        "image_size": 64,
        "max_img_size": 256,
        "num_cls_tokens": 1,
        "num_registers": 1,
        "video_temporal_patch_size": 2,
        "summary_idxs": [0],
    }
    audio = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "num_mel_bins": 16,
        "subsampling_conv_channels": 8,
        "conv_kernel_size": 5,
        "projection_hidden_size": 48,
        "projection_bias": False,
    }
    config = transformers.NemotronH_Omni_Reasoning_V3_Config(
        vision_config=vision,
        text_config=text(own),
        audio_config=audio,
        force_image_size=64,
        projector_hidden_size=48,
        vision_hidden_size=32,
        image_token_id=own.image_token_id,
        video_token_id=own.video_token_id,
        audio_token_id=own.audio_token_id,
    )
    processor = transformers.NemotronH_Omni_Reasoning_V3Processor(
        image_processor=transformers.NemotronH_Omni_Reasoning_V3ImageProcessor(
            patch_size=16, min_num_patches=16, max_num_patches=64
        ),
        video_processor=transformers.NemotronH_Omni_Reasoning_V3VideoProcessor(
            patch_size=16, video_target_num_patches=16, norm_mean=[0.5] * 3, norm_std=[0.5] * 3
        ),
        tokenizer=own,
        feature_extractor=transformers.ParakeetFeatureExtractor(feature_size=16),
        chat_template=TEMPLATE,
    )
    return transformers.NemotronH_Omni_Reasoning_V3(config), processor


def whole(folder: Path) -> tuple[Any, Any]:
    """transformers' model, which concatenates what its ``get_video_features`` gives as if it were a list."""
    model = transformers.NemotronH_Omni_Reasoning_V3.from_pretrained(folder, dtype=torch.float32).eval()
    run = model.get_video_features

    # generate looks at its arguments
    @functools.wraps(run)
    def get_video_features(*args: Any, **options: Any) -> Any:
        out = run(*args, **options)
        out.pooler_output = [out.pooler_output]
        return out

    model.get_video_features = get_video_features
    return model, transformers.AutoProcessor.from_pretrained(folder)


def inputs(processor: Any, text: str, media: Mapping[str, list[Any]]) -> Any:
    """transformers' processor takes one video, and its metadata not in a list."""
    arguments: dict[str, Any] = {}
    if "image" in media:
        arguments["images"] = [image.pixels for image in media["image"]]
    if "video" in media:
        (video,) = media["video"]
        arguments["videos"] = [video.frames]
        arguments["videos_kwargs"] = {"do_sample_frames": False, "video_metadata": video_metadata(video)}
    if "audio" in media:
        arguments["audio"] = [sound.samples for sound in media["audio"]]
    return processor(text=[text], return_tensors="pt", **arguments)


_SIDE, _PATCH = 64, 16
_MEAN, _STD = [0.48, 0.46, 0.41], [0.27, 0.26, 0.28]


def _nano(folder: Path) -> None:
    """Nemotron Nano 2 VL: the published format, and beside it the same model in that of transformers."""
    own = tokenizer(more=())
    teachers = [{"name": "clip"}, {"name": "siglip"}, {"name": "sam", "use_summary": False}]
    vision = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_ratio": 2.0}
    shape = text(own)
    shape["layers_block_type"] = ["linear_attention", "mlp", "full_attention", "mlp", "linear_attention"]
    config = transformers.NemotronH_Omni_Reasoning_V3_Config(
        vision_config=vision
        | {
            "model_type": "radio",
            "patch_size": _PATCH,
            "max_img_size": 128,
            "num_cls_tokens": 3,
            "num_registers": 1,
            "video_temporal_patch_size": 2,
            "summary_idxs": [0, 1],
        },
        text_config=shape,
        audio_config=None,
        force_image_size=_SIDE,
        projector_hidden_size=48,
        vision_hidden_size=32,
        image_token_id=own.image_token_id,
        video_token_id=own.video_token_id,
    )
    model = transformers.NemotronH_Omni_Reasoning_V3(config)
    draw_weights(model)
    model.generation_config = transformers.GenerationConfig(eos_token_id=own.eos_token_id)
    model.save_pretrained(folder / "whole")
    own.chat_template = TEMPLATE
    own.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    # transformers writes the published names
    weights = load_file(folder / "whole" / "model.safetensors")
    left_out = ("video_embedder", "lambda1")
    published = {name: value for name, value in weights.items() if not any(part in name for part in left_out)}
    assert len(published) < len(weights)
    published["vision_model.radio_model.input_conditioner.norm_mean"] = torch.zeros(3, 1, 1)
    save_file(published, folder / "model.safetensors")
    llm = {key: value for key, value in shape.items() if key != "layers_block_type"}
    raw = {
        "architectures": ["NemotronH_Nano_VL_V2"],
        "auto_map": {"AutoConfig": "configuration.NemotronH_Nano_VL_V2_Config"},
        "model_type": "NemotronH_Nano_VL_V2",
        "downsample_ratio": 0.5,
        "force_image_size": _SIDE,
        "img_context_token": "<image>",
        "img_context_token_id": own.image_token_id,
        "img_start_token": "<img>",
        "img_end_token": "</img>",
        "video_context_token": "<video>",
        "video_context_token_id": own.video_token_id,
        "llm_config": llm | {"architectures": ["NemotronHForCausalLM"], "hybrid_override_pattern": "M-*-M"},
        "norm_mean": _MEAN,
        "norm_std": _STD,
        "patch_size": _PATCH,
        "projector_hidden_size": 48,
        "ps_version": "v2",
        "use_thumbnail": True,
        "video_pruning_rate": 0.0,
        "vision_config": vision
        | {
            "args": {
                "model": "vit_tiny",
                "teachers": teachers,
                "cls_token_per_teacher": True,
                "register_multiple": 4,
                "cpe_max_size": 128,
            },
            "patch_size": _PATCH,
            "max_resolution": 128,
        },
        "vit_hidden_size": 32,
    }
    (folder / "config.json").write_text(json.dumps(raw))


def _nano_whole(folder: Path) -> tuple[Any, Any]:
    model = transformers.NemotronH_Omni_Reasoning_V3.from_pretrained(folder / "whole", dtype=torch.float32).eval()
    return model, transformers.AutoTokenizer.from_pretrained(folder)


def _nano_inputs(own: Any, prompt: str, media: Mapping[str, list[Any]]) -> dict[str, Any]:
    """The published processor, written down once more; each tile is a picture to transformers' model."""
    tiles: list[np.ndarray] = []
    each = (_SIDE // _PATCH // 2) ** 2
    images, videos = iter(media.get("image", ())), iter(media.get("video", ()))

    def picture(found: re.Match[str]) -> str:
        if found[0] == "<video>":
            video, texts = next(videos), []
            for k, (frame, index) in enumerate(zip(video.frames, video.indices, strict=True)):
                tiles.append(np.asarray(PILImage.fromarray(frame).resize((_SIDE, _SIDE), PILImage.BICUBIC)))
                seconds = index * int(1000.0 / video.source_fps) / 1000.0
                texts.append(f"Frame {k + 1} sampled at {seconds:.2f} seconds: <img>{'<image>' * each}</img>")
            return "".join(texts)
        image = next(images).pixels
        ratios = sorted({(i, j) for n in range(1, 13) for i in range(1, n + 1) for j in range(1, n + 1) if i * j <= 12})
        ratios.sort(key=lambda pair: pair[0] * pair[1])
        chosen, best = (1, 1), math.inf
        for i, j in ratios:
            gap = abs(image.width / image.height - i / j)
            if gap < best or (gap == best and image.width * image.height > 0.5 * _SIDE**2 * i * j):
                chosen, best = (i, j), gap
        wide = np.asarray(image.resize((chosen[0] * _SIDE, chosen[1] * _SIDE), PILImage.BICUBIC))
        cut = [part for row in np.split(wide, chosen[1]) for part in np.split(row, chosen[0], axis=1)]
        if len(cut) > 1:
            cut.append(np.asarray(image.resize((_SIDE, _SIDE), PILImage.BICUBIC)))
        tiles.extend(cut)
        return f"<img>{'<image>' * each * len(cut)}</img>"

    prompt = re.sub("<image>|<video>", picture, prompt)
    out = dict(own([prompt], return_tensors="pt"))
    if tiles:
        pixels = torch.from_numpy(np.stack(tiles)).permute(0, 3, 1, 2).float() / 255
        pixels = (pixels - torch.tensor(_MEAN).view(3, 1, 1)) / torch.tensor(_STD).view(3, 1, 1)
        grid = _SIDE // _PATCH
        patches = pixels.unfold(2, _PATCH, _PATCH).unfold(3, _PATCH, _PATCH).permute(0, 2, 3, 1, 4, 5)
        out["pixel_values"] = patches.reshape(-1, 3 * _PATCH**2)
        out["image_grid_hw"] = torch.tensor([[grid, grid]] * len(tiles))
    return out


_WITHOUT = dict.fromkeys(
    ("image_and_video", "mixed"), "transformers' forward takes rows of pictures or of a video, not both"
) | {"two_videos": "transformers' processor takes one video a prompt"}
FAMILIES = {
    "nemotron_h_omni": Tiny(_omni, ("image", "video", "audio"), without=_WITHOUT, reference=whole, inputs=inputs),
    "nemotron_nano_vl": Tiny(_nano, ("image", "video"), reference=_nano_whole, inputs=_nano_inputs),
}
