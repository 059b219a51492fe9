"""MiMo-VL, in the layout in which checkpoints of Qwen2.5-VL are published: everything of the text in one flat
config.json, sizes of pictures in pixels, the template beside the processor."""

from __future__ import annotations

import json
from pathlib import Path

import transformers

from .common import Tiny, bpe, draw_weights
from .qwen import NAMED, TEMPLATE, VISION

_MARKS = {name: token for name, token in NAMED.items() if "audio" not in name}


def _mimo_vl(folder: Path) -> None:
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *_MARKS.values()]
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe(special),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=special[1:2] + special[3:],
    )
    ids = dict(zip(special, tokenizer.convert_tokens_to_ids(special), strict=True))
    text = {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        # more keys and values to a query than Qwen2.5-VL has
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 2048,
        "max_window_layers": 3,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "use_sliding_window": False,
        "sliding_window": 2048,
        "tie_word_embeddings": False,
        "rope_theta": 640000,
        "rope_scaling": {"type": "default", "rope_type": "default", "mrope_section": [2, 3, 3]},
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
    }
    config = {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "torch_dtype": "bfloat16",
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "vision_config": VISION | {"model_type": "qwen2_5_vl", "in_chans": 3, "spatial_patch_size": 8},
        **text,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    model = transformers.Qwen2_5_VLForConditionalGeneration(
        transformers.Qwen2_5_VLConfig.from_pretrained(folder, dtype="float32")
    )
    assert model.config.text_config.rope_parameters["rope_theta"] == 640000
    draw_weights(model)
    model.generation_config = transformers.GenerationConfig(
        eos_token_id=[ids["<|im_end|>"], ids["<|endoftext|>"]], pad_token_id=ids["<|endoftext|>"]
    )
    model.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer.save_pretrained(folder)
    preprocessor = {
        "min_pixels": 32 * 32,
        "max_pixels": 112 * 112,
        "patch_size": 8,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor",
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATE}))


FAMILIES = {"mimo_vl": Tiny(_mimo_vl, ("image", "video"))}
