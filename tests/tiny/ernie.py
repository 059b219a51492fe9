"""ERNIE 4.5 VL, in transformers' format and as it is published."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import transformers
from PIL import ImageFont

from .common import Tiny, bpe, draw_weights
from .qwen import IMAGE_SIZE, text_shape

_NAMED = {
    "image_token": "<|IMAGE_PLACEHOLDER|>",
    "image_start_token": "<|IMAGE_START|>",
    "image_end_token": "<|IMAGE_END|>",
    "video_token": "<|VIDEO_PLACEHOLDER|>",
    "video_start_token": "<|VIDEO_START|>",
    "video_end_token": "<|VIDEO_END|>",
}
_TEMPLATE = (
    "{{ '<|begin_of_sentence|>' }}{% set count = namespace(image=0, video=0) %}"
    "{%- for m in messages -%}"
    "{{ {'user': 'User: ', 'assistant': 'Assistant: ', 'system': ''}[m['role']] }}"
    "{%- if m['content'] is string -%}{{ m['content'] }}{%- else -%}{%- for c in m['content'] -%}"
    "{%- if c['type'] == 'image' -%}{%- set count.image = count.image + 1 -%}"
    "{{ 'Picture ' + count.image|string + ':<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>' }}"
    "{%- elif c['type'] == 'video' -%}{%- set count.video = count.video + 1 -%}"
    "{{ 'Video ' + count.video|string + ':<|VIDEO_START|><|VIDEO_PLACEHOLDER|><|VIDEO_END|>' }}"
    "{%- else -%}{{ c['text'] }}{%- endif -%}{%- endfor -%}{%- endif -%}"
    "{{ '</s>' if m['role'] == 'assistant' else '\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}Assistant: {%- endif -%}"
)
_FOLDER = tempfile.TemporaryDirectory()


def _tokenizer() -> Any:
    special = ["<pad>", "<|begin_of_sentence|>", "</s>", *_NAMED.values()]
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe(special),
        bos_token="<|begin_of_sentence|>",
        eos_token="</s>",
        pad_token="<pad>",
        model_specific_special_tokens=_NAMED,
        extra_special_tokens=list(_NAMED.values()),
        padding_side="left",
    )


def _font() -> str:
    """The one that pillow brings along, as a file; it draws times on frames."""
    path = Path(_FOLDER.name) / "Tiny-Regular.ttf"
    path.write_bytes(ImageFont.load_default(10).font_bytes)
    return str(path)


def _ernie4_5_vl_moe() -> tuple[Any, Any]:
    tokenizer = _tokenizer()
    text = text_shape(tokenizer) | {
        "bos_token_id": tokenizer.bos_token_id,
        "moe_k": 2,
        "moe_num_experts": 4,
        "moe_num_shared_experts": 1,
        "moe_intermediate_size": [32, 16],
        # height and width, then time
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 4]},
    }
    config = transformers.Ernie4_5_VLMoeConfig(
        text_config=text,
        vision_config={"depth": 2, "hidden_size": 32, "num_heads": 2, "patch_size": 8, "intermediate_size": 128},
        tie_word_embeddings=False,
        **{f"{name}_id": getattr(tokenizer, f"{name}_id") for name in _NAMED},
    )
    processor = transformers.Ernie4_5_VLMoeProcessor(
        image_processor=transformers.Ernie4_5_VLMoeImageProcessor(patch_size=8, size=IMAGE_SIZE),
        video_processor=transformers.Ernie4_5_VLMoeVideoProcessor(
            patch_size=8, size={"shortest_edge": 32 * 32, "longest_edge": 64 * 64}, font=_font()
        ),
        tokenizer=tokenizer,
        chat_template=_TEMPLATE,
    )
    return transformers.Ernie4_5_VLMoeForConditionalGeneration(config), processor


def _published(folder: Path) -> None:
    model, processor = _ernie4_5_vl_moe()
    draw_weights(model)
    tokenizer = processor.tokenizer
    model.generation_config = transformers.GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(folder / "whole")
    processor.save_pretrained(folder / "whole")
    # transformers writes the published names of weights
    for name in ("model.safetensors", "generation_config.json"):
        shutil.copy(folder / "whole" / name, folder / name)
    text, vision = model.config.text_config, model.config.vision_config
    config = {
        "architectures": ["Ernie4_5_VLMoeForConditionalGeneration"],
        "model_type": "ernie4_5_moe_vl",
        "torch_dtype": "bfloat16",
        "hidden_size": text.hidden_size,
        "intermediate_size": text.intermediate_size,
        "num_hidden_layers": text.num_hidden_layers,
        "num_attention_heads": text.num_attention_heads,
        "num_key_value_heads": text.num_key_value_heads,
        "vocab_size": text.vocab_size,
        "max_position_embeddings": text.max_position_embeddings,
        "rms_norm_eps": text.rms_norm_eps,
        "rope_theta": 10000.0,
        "rope_3d": True,
        "freq_allocation": 4,
        "use_bias": False,
        "use_cache": False,
        "tie_word_embeddings": False,
        "moe_num_experts": [4, 4],
        "moe_intermediate_size": [32, 16],
        "moe_k": 2,
        "moe_num_shared_experts": 1,
        "moe_layer_start_index": [1, 1],
        "moe_layer_end_index": [3, 2],
        "moe_layer_interval": 1,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "im_patch_id": tokenizer.image_token_id,
        "spatial_conv_size": 2,
        "temporal_conv_size": 2,
        "vision_config": {
            "model_type": "DFNRope_vision_transformer",
            "depth": vision.depth,
            "embed_dim": 32,
            "hidden_size": 32,
            "hidden_act": "quick_gelu",
            "in_channels": 3,
            "mlp_ratio": 4,
            "num_heads": 2,
            "patch_size": 8,
            "spatial_merge_size": 2,
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
    plain = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe(["<pad>", "<|begin_of_sentence|>", "</s>", *_NAMED.values()]),
        bos_token="<|begin_of_sentence|>",
        eos_token="</s>",
        pad_token="<pad>",
    )
    template = _TEMPLATE
    for name in ("image", "video"):
        template = template.replace(_NAMED[f"{name}_token"], f"<|{name}@placeholder|>")
    plain.chat_template = template
    plain.save_pretrained(folder)
    preprocessor = {
        "image_processor_type": "Ernie_45T_VLImageProcessor",
        "min_pixels": IMAGE_SIZE["shortest_edge"],
        "max_pixels": IMAGE_SIZE["longest_edge"],
        "video_min_pixels": 32 * 32,
        "video_max_pixels": 64 * 64,
        "patch_size": 8,
        "merge_size": 2,
        "temporal_conv_size": 2,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    shutil.copy(_font(), folder / "Roboto-Regular.ttf")


FAMILIES = {
    "ernie4_5_vl_moe": Tiny(_ernie4_5_vl_moe, ("image", "video")),
    "ernie4_5_vl_published": Tiny(_published, ("image", "video")),
}
