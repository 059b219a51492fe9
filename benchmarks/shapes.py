"""Checkpoint folders without weights: real shapes for --load-format dummy, with a small tokenizer.

    python benchmarks/shapes.py qwen2.5-vl-7b FOLDER [--weights]
    python benchmarks/shapes.py qwen2.5-vl-7b FOLDER --check

The shapes are those of the published configurations (published.py); processor options too. Only the vocabulary's words
are made up. --weights writes random ones too, as safetensors: to measure loading. --check compares with the published
size of the model and of what it makes of a medium.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import inspect
import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from published import SHAPES

_PARTS = ("text_config", "language_config", "llm_config")


def _tiny(module: str, family: str) -> Any:
    """How the tests make a tiny checkpoint: they know tokenizers, templates and processors that need no network."""
    from triptych.python_models.families import torchvision_fix

    torchvision_fix.install()
    if "tiny" not in sys.modules:
        place = Path(__file__).parent.parent / "tests" / "tiny"
        spec = importlib.util.spec_from_file_location(
            "tiny", place / "__init__.py", submodule_search_locations=[str(place)]
        )
        assert spec is not None
        sys.modules["tiny"] = importlib.util.module_from_spec(spec)
    return importlib.import_module(f"tiny.{module}").FAMILIES[family].make


def write(shape: str, folder: Path, layers: int | None = None) -> None:
    """Write config.json, tokenizer and processor of ``shape``; ``layers`` shortens the decoder, to try a script."""
    published = SHAPES[shape]
    make = _tiny(*published.tiny)
    if inspect.signature(make).parameters:
        make(folder)
        # in its place are published ones that cannot be added to
        if (folder / "text" / "tokenizer.json").is_file():
            shutil.move(folder / "text" / "tokenizer.json", folder / "tokenizer.json")
        for name in ("whole", "text"):
            shutil.rmtree(folder / name, ignore_errors=True)
        for path in folder.glob("*.safetensors"):
            path.unlink()
    else:
        model, processor = make()
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(folder)
        processor.save_pretrained(folder)
    config = _merged(_read(folder / "config.json"), published.config)
    _set_dtype(config)
    if layers:
        # each of the first layers takes rows of a layer of the tower
        deep = len(config.get("vision_config", {}).get("deepstack_visual_indexes", ()))
        _shorten(_text_of(config), max(layers, deep))
    _write(folder / "config.json", config)
    for name in ("processor_config.json", "preprocessor_config.json"):
        if (folder / name).is_file():
            _write(folder / name, _merged(_read(folder / name), published.processor))
    _fill(folder / "tokenizer.json", _text_of(config)["vocab_size"])


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def _write(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content))


def _merged(old: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """``old`` with ``changes``, dictionary by dictionary; None removes a key."""
    out = dict(old)
    for key, value in changes.items():
        if value is None:
            out.pop(key, None)
        else:
            out[key] = _merged(out.get(key, {}), value) if isinstance(value, Mapping) else value
    return out


def _text_of(config: dict[str, Any]) -> dict[str, Any]:
    """The part that describes the decoder."""
    found: dict[str, Any] = next(config[name] for name in _PARTS if name in config)
    return found


def _set_dtype(config: dict[str, Any]) -> None:
    for part in (config, *(part for part in config.values() if isinstance(part, dict))):
        part.pop("torch_dtype", None)
        part.pop("dtype", None)
    config["dtype"] = "bfloat16"


def _shorten(text: dict[str, Any], layers: int) -> None:
    """Keep these layers of the decoder, at least one of each kind that it has."""
    if pattern := text.get("hybrid_override_pattern"):
        text["hybrid_override_pattern"] = "M*-" + pattern[: max(layers - 3, 0)]
        return
    text["num_hidden_layers"] = layers
    if text.get("first_k_dense_replace"):
        text["num_hidden_layers"] = max(layers, text["first_k_dense_replace"] + 1)
    if "cross_attention_layers" in text:
        text["num_hidden_layers"] = max(layers, 2)
        text["cross_attention_layers"] = [1]


def _fill(path: Path, size: int) -> None:
    """Give every token a text: answers of random weights would be silent otherwise."""
    tokenizer = _read(path)
    vocabulary = tokenizer["model"]["vocab"]
    # those that are no part of it would get other ids when it grows
    vocabulary.update({token["content"]: token["id"] for token in tokenizer["added_tokens"]})
    used = set(vocabulary.values())
    vocabulary.update({f"\u0120w{number}": number for number in range(size) if number not in used})
    _write(path, tokenizer)


def check(shape: str, folder: Path) -> dict[str, float]:
    """Parameters in billions, rows and tokens for a medium; SystemExit where they are not the published ones."""
    import numpy as np
    import torch
    from PIL import Image as PILImage

    from triptych.python_models.contract.request import MediaPart, Message, TextPart
    from triptych.python_models.contract.settings import Settings
    from triptych.python_models.families.registry import load_family
    from triptych.python_models.media.types import Audio, Image, Medium

    published = SHAPES[shape]
    family: Any = load_family(Settings(model=str(folder), load_format="dummy"))
    with torch.device("meta"):
        model = family.load_class()(family.config())
        model.tie_weights()
    parameters = sum(parameter.numel() for parameter in model.parameters()) / 1e9
    if published.modality == "image":
        data: Any = Image(PILImage.fromarray(np.zeros((1024, 1024, 3), dtype=np.uint8)))
    else:
        data = Audio(np.zeros(160000, dtype=np.float32), 16000)
    message = Message("user", (MediaPart(published.modality, blob=0), TextPart("describe")))
    prepared = family.load_preprocessor().prepare([message], [Medium(published.modality, data, "x", "messages[0]")])
    rows = sum(item.num_rows for items in prepared.features.values() for item in items)
    found = {"parameters": round(parameters, 3), "rows": rows, "prompt tokens": len(prepared.input_ids)}
    if rows != published.rows or abs(parameters / published.parameters - 1) > 0.02:
        raise SystemExit(
            f"{shape} has {found}, not {published.parameters} billion parameters and {published.rows} rows"
        )
    return found


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
    _write(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": index})


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=sorted(SHAPES))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--weights", action="store_true", help="write random weights too")
    parser.add_argument("--layers", type=int, help="of the decoder, instead of all")
    parser.add_argument("--check", action="store_true", help="compare with what is published")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    write(arguments.shape, arguments.folder, arguments.layers)
    if arguments.check:
        print(json.dumps({"shape": arguments.shape, **check(arguments.shape, arguments.folder)}))
    if arguments.weights:
        write_weights(arguments.folder)


if __name__ == "__main__":
    main()
