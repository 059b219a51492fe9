"""Checkpoint folders without weights: real shapes for --load-format dummy, with a small tokenizer.

    python benchmarks/shapes.py qwen2.5-vl-7b FOLDER [--weights]

The shapes are those of the published configurations; processor options too. Only the vocabulary's words are made up.
--weights writes random ones too, as safetensors: to measure loading.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any


def _tiny() -> ModuleType:
    """A builder of the tests' tiny checkpoints: it knows how to make a tokenizer and a processor offline."""
    path = Path(__file__).parent.parent / "tests" / "tiny" / "build.py"
    spec = importlib.util.spec_from_file_location("tiny_build", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return importlib.import_module("tiny.qwen")


def _qwen2_5_vl(text: dict[str, Any], layers: int | None) -> tuple[Any, Any]:
    tiny = _tiny()
    import transformers

    tokenizer = tiny.make_tokenizer()
    shape = {
        **tiny.text_shape(tokenizer),
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
        architectures=["Qwen2_5_VLForConditionalGeneration"],
        **tiny.vision_ids(tokenizer),
    )
    size = {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 16384}
    processor = transformers.Qwen2_5_VLProcessor(
        tokenizer=tokenizer,
        chat_template=tiny.TEMPLATE,
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
    # every token gets a text: answers of random weights would be silent otherwise
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    used = {*vocabulary.values(), *(token["id"] for token in tokenizer["added_tokens"])}
    size = config.get_text_config().vocab_size
    vocabulary.update({f"\u0120w{number}": number for number in range(size) if number not in used})
    path.write_text(json.dumps(tokenizer))


def write_weights(folder: Path, shard_bytes: int = 2 * 2**30) -> None:
    """Random bfloat16 weights for the folder's config.json, in shards with an index."""
    import torch
    import transformers
    from safetensors.torch import save_file

    config = transformers.AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = getattr(transformers, config.architectures[0])(config)
    noise = torch.randn(2**24).mul_(0.02).bfloat16()
    shards: list[dict[str, Any]] = [{}]
    size = 0
    for name, tensor in model.state_dict().items():
        size += 2 * tensor.numel()
        if shards[-1] and size > shard_bytes:
            shards.append({})
            size = 2 * tensor.numel()
        repeats = -(-tensor.numel() // noise.numel())
        shards[-1][name] = noise.repeat(repeats)[: tensor.numel()].view(tensor.shape).clone()
        if tensor.dim() == 1:
            shards[-1][name].fill_(1)
    index = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file(shard, folder / file, {"format": "pt"})
        index.update(dict.fromkeys(shard, file))
        shard.clear()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=sorted(SHAPES))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--weights", action="store_true", help="write random weights too")
    parser.add_argument("--layers", type=int, help="of the decoder, instead of all")
    arguments = parser.parse_args()
    write(arguments.shape, arguments.folder, arguments.layers)
    if arguments.weights:
        write_weights(arguments.folder)


if __name__ == "__main__":
    main()
