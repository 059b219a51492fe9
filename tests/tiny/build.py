"""Tiny checkpoints with random weights, made offline with the real config, processor and tokenizer classes.

    python tests/tiny/build.py FAMILY FOLDER

Each module beside this one builds some families: its ``FAMILIES`` maps a name to a :class:`common.Tiny`. Weights are
drawn wide enough that logits are far from flat: two different computations would give different tokens.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import inspect
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from triptych.python_models.families import torchvision_fix

torchvision_fix.install()

import transformers  # noqa: E402

HERE = Path(__file__).parent


def modules() -> list[ModuleType]:
    """Of all families; as the package ``tiny``, wherever this script was started from."""
    if "tiny" not in sys.modules:
        place = HERE / "__init__.py"
        spec = importlib.util.spec_from_file_location("tiny", place, submodule_search_locations=[str(HERE)])
        assert spec is not None
        sys.modules["tiny"] = importlib.util.module_from_spec(spec)
    names = sorted(
        path.stem for path in HERE.glob("*.py") if path.stem not in ("__init__", "build", "common", "reference")
    )
    return [importlib.import_module(f"tiny.{name}") for name in names]


FAMILIES: dict[str, Any] = {k: v for module in modules() for k, v in module.FAMILIES.items()}


def build(family: str, folder: Path) -> None:
    """Write the tiny checkpoint of ``family`` (a key of :data:`FAMILIES`) into ``folder``."""
    from tiny.common import draw_weights

    make = FAMILIES[family].make
    if inspect.signature(make).parameters:
        make(folder)
        return
    model, processor = make()
    draw_weights(model)
    tokenizer = getattr(processor, "tokenizer", processor)
    model.generation_config = transformers.GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Write a tiny checkpoint with random weights.")
    parser.add_argument("family", choices=sorted(FAMILIES))
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    build(arguments.family, arguments.folder)


if __name__ == "__main__":
    main()
