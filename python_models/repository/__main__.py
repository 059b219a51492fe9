"""``python -m triptych.python_models.repository --output DIR``: write a model repository."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..contract.errors import TriptychError
from ..contract.settings import Settings
from . import EMBEDDING_DTYPES, write


def main() -> int:
    """Parse the command line and write; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m triptych.python_models.repository", description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder to write to")
    parser.add_argument("--settings", default="{}", help="options of the deployment as a JSON object")
    parser.add_argument("--embedding-dtype", choices=EMBEDDING_DTYPES, default="FP32")
    parser.add_argument("--gpu", type=int, action="append", default=[], help="a GPU of the stages that use one")
    options = parser.parse_args()
    try:
        settings = Settings.from_json(options.settings)
        models = write(options.output, settings, embedding_dtype=options.embedding_dtype, gpu_ids=options.gpu)
    except TriptychError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    sys.stdout.write(f"{options.output}: {', '.join(models)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
