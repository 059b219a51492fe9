"""Checkpoints of the Hugging Face hub: downloaded once, then taken from the local cache. Torch-free.

Files that are whole are never downloaded again, wherever a download was cut short; one that was under way begins anew,
but where its connection alone broke, it goes on. Processes that want one file wait for the one that downloads it. As a
program it downloads one model, with progress bars on a terminal:

    python -m triptych.python_models.families.hub ORGANISATION/NAME [REVISION] [--trust-remote-code]
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from ..contract.errors import ErrorKind, TriptychError

# Everything that configuration, processors and tokenizers may be stored in; no images. ERNIE's video processor draws
# with a font.
_DESCRIPTION = ["*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.ttf"]
_CODE = "*.py"
_WEIGHTS, _OLDER = "*.safetensors", "pytorch_model*.bin"
# The weights once more, in formats of their authors.
_TWICE = ["consolidated*", "original/*", "onnx/*", "metal/*"]


def download(hub_id: str, revision: str, *, code: bool = False) -> Path:
    """The folder of a checkpoint: its description and the weights that the stages read, nothing else.

    Args:
        hub_id: organisation/name.
        revision: branch, tag or commit; "": the default branch.
        code: with the code that it brings along, where that is trusted.

    Raises:
        TriptychError: MODEL_NOT_FOUND saying why and what to do.
    """
    import httpx
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    def fetch(allowed: list[str]) -> Path:
        return Path(
            snapshot_download(hub_id, revision=revision or None, allow_patterns=allowed, ignore_patterns=_TWICE)
        )

    try:
        folder = fetch([*_DESCRIPTION, _CODE] if code else _DESCRIPTION)
        fetch(_named_by_index(folder, "model.safetensors.index.json") or [_WEIGHTS])
        if not any(folder.rglob(_WEIGHTS)):
            # Of older checkpoints; nothing but tensors is unpickled from them.
            fetch(_named_by_index(folder, "pytorch_model.bin.index.json") or [_OLDER])
        return folder
    except (HfHubHTTPError, httpx.HTTPError, OSError, ValueError) as error:
        raise _failed(hub_id, revision, error) from None


def _named_by_index(folder: Path, index: str) -> list[str]:
    """The files of weights that an index names, and those in folders, which are of other parts."""
    path = folder / index
    if not path.is_file():
        return []
    names = set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())
    return [*sorted(names), f"*/{_WEIGHTS}"]


def _failed(hub_id: str, revision: str, error: Exception) -> TriptychError:
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError
    from huggingface_hub.errors import RepositoryNotFoundError as NoRepository
    from huggingface_hub.errors import RevisionNotFoundError as NoRevision

    param = "settings.model"
    if isinstance(error, GatedRepoError):
        why = "it is gated: accept its terms on its page, and set HF_TOKEN to a token of that account"
    elif isinstance(error, NoRepository):
        why = "the hub has no such model; check the id, and set HF_TOKEN if the model is private"
    elif isinstance(error, NoRevision):
        why, param = "the model has no such revision", "settings.revision"
    elif isinstance(error, LocalEntryNotFoundError):
        why = (
            "the hub cannot be reached (or HF_HUB_OFFLINE is set) and the local cache does not have all of it; check "
            "the network and, for gated models, HF_TOKEN, or download it elsewhere and give the folder"
        )
    else:
        lines = str(error).strip().splitlines()
        why = (
            f"{type(error).__name__}: {lines[0] if lines else 'no details'}; check the network and, for gated models, "
            "HF_TOKEN, or download it elsewhere and give the folder"
        )
    what = f"{hub_id!r}" + (f" at revision {revision!r}" if revision else "")
    return TriptychError(
        ErrorKind.MODEL_NOT_FOUND,
        f"model {what} is no local folder and could not be downloaded from the Hugging Face hub: {why}",
        param,
    )


def main() -> int:
    """Command line: prints the folder, or what went wrong, with exit status 1; progress goes to stderr."""
    parser = argparse.ArgumentParser(description="Download a model of the Hugging Face hub.")
    parser.add_argument("model", metavar="ORGANISATION/NAME")
    parser.add_argument("revision", nargs="?", default="")
    parser.add_argument("--trust-remote-code", action="store_true", help="with the code that it brings along")
    arguments = parser.parse_args()
    try:
        folder = download(arguments.model, arguments.revision, code=arguments.trust_remote_code)
    except TriptychError as error:
        sys.stdout.write(f"{error.message}\n")
        return 1
    sys.stdout.write(f"{folder}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
