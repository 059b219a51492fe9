"""Checkpoint folders without weights: real shapes for --load-format dummy, with a small tokenizer.

    python benchmarks/shapes.py qwen2.5-vl-7b FOLDER

The shapes are those of the published configurations; processor options too. Only the vocabulary's words are made up,
so token ids beyond them have no text.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any


def _tiny() -> ModuleType:
    """The builder of the tests' tiny checkpoints: it knows how to make a tokenizer and a processor offline."""
    path = Path(__file__).parent.parent / "tests" / "tiny" / "build.py"
    spec = importlib.util.spec_from_file_location("tiny_build", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _qwen2_5_vl(text: dict[str, Any], layers: int | None) -> tuple[Any, Any]:
    tiny = _tiny()
    import transformers

    tokenizer = tiny._tokenizer()
    shape = {
        **tiny._text(tokenizer),
        "vocab_size": 152064,
        "max_position_embeddings": 32768,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        **text,
    }
    if layers:
        shape["num_hidden_layers"] = layers
    config = transformers.Qwen2_5_VLConfig(
        text_config=shape,
        vision_config={
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "patch_size": 14,
            "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31],
            "out_hidden_size": shape["hidden_size"],
        },
        dtype="bfloat16",
        **tiny._vision_ids(tokenizer),
    )
    size = {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 16384}
    processor = transformers.Qwen2_5_VLProcessor(
        tokenizer=tokenizer,
        chat_template=tiny._TEMPLATE,
        image_processor=transformers.Qwen2VLImageProcessor(patch_size=14, size=size),
        video_processor=transformers.Qwen2VLVideoProcessor(patch_size=14),
    )
    return config, processor


def _qwen2_5_vl_7b(layers: int | None) -> tuple[Any, Any]:
    text = {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
    }
    return _qwen2_5_vl(text, layers)


SHAPES: dict[str, Callable[[int | None], tuple[Any, Any]]] = {"qwen2.5-vl-7b": _qwen2_5_vl_7b}


def write(shape: str, folder: Path, layers: int | None = None) -> None:
    """Write config.json, tokenizer and processor of ``shape``; ``layers`` shortens the decoder, to try a script."""
    config, processor = SHAPES[shape](layers)
    config.save_pretrained(folder)
    processor.save_pretrained(folder)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=sorted(SHAPES))
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    write(arguments.shape, arguments.folder)


if __name__ == "__main__":
    main()
