"""PaddleOCR-VL, in the layout in which it is published: the text in one flat config.json, names of code beside."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import transformers

from .common import Tiny, draw_weights
from .qwen import IMAGE_SIZE, TEMPLATE, make_tokenizer, text_shape, vision_ids


def _paddleocr_vl(folder: Path) -> None:
    tokenizer = make_tokenizer()
    text = text_shape(tokenizer) | {"head_dim": 16}
    rope = text.pop("rope_parameters")
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 64,
        "patch_size": 8,
        "spatial_merge_size": 2,
    }
    model = transformers.PaddleOCRVLForConditionalGeneration(
        transformers.PaddleOCRVLConfig(
            text_config=text | {"rope_parameters": rope},
            vision_config=vision,
            tie_word_embeddings=False,
            **vision_ids(tokenizer),
        )
    )
    draw_weights(model)
    model.generation_config = transformers.GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    # transformers writes the published names of weights
    model.save_pretrained(folder)
    code: dict[str, Any] = {"AutoConfig": "configuration_paddleocr_vl.PaddleOCRVLConfig"}
    config = {
        "architectures": ["PaddleOCRVLForConditionalGeneration"],
        "model_type": "paddleocr_vl",
        "auto_map": code,
        # both are said of a tower whose patches are of one frame
        "vision_config": vision | {"model_type": "paddleocr_vl", "temporal_patch_size": 2, "tokens_per_second": 2},
        "rope_scaling": {"mrope_section": rope["mrope_section"], "rope_type": "default", "type": "default"},
        "rope_theta": rope["rope_theta"],
        **text,
        **vision_ids(tokenizer),
    }
    (folder / "config.json").write_text(json.dumps(config))
    processor = transformers.PaddleOCRVLProcessor(
        image_processor=transformers.PaddleOCRVLImageProcessor(patch_size=8, size=IMAGE_SIZE),
        tokenizer=tokenizer,
        chat_template=TEMPLATE,
    )
    processor.save_pretrained(folder)


FAMILIES = {"paddleocr_vl": Tiny(_paddleocr_vl, ("image",))}
