"""Where a model's files are: ``Settings.model`` -> a folder in Hugging Face layout. Torch-free."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from ..contract.errors import ErrorKind, TriptychError
from ..contract.settings import Settings
from . import overrides
from .hub import download
from .quantisation import Quantisation

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
DTYPES = ("float32", "bfloat16", "float16")
_STORED = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
# Where the part that describes the language model may be.
_PARTS = ("thinker_config", "text_config", "language_config", "llm_config", "llm_cfg")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk.

    Attributes:
        folder: where its files are.
        config: its parsed ``config.json``, with what the operator overrides.
        overrides: that alone.
        original: ``config.json`` without it.
    """

    folder: Path
    config: dict[str, Any]
    overrides: dict[str, Any] = field(default_factory=dict)
    original: dict[str, Any] = field(default_factory=dict)

    @property
    def model_type(self) -> str:
        """The ``model_type`` of config.json ("" where it names none)."""
        return str(self.config.get("model_type", ""))

    @property
    def dtype(self) -> str:
        """Name of the dtype the weights were saved for: what config.json says of the whole, else of a part.

        Where it says nothing, that of most of the stored numbers; "float32" where they are of no such dtype.
        """
        return _declared_dtype(self.config) or _stored_dtype(self.folder) or "float32"

    def dtype_for(self, settings: Settings, *, gpu: bool) -> str:
        """Name of the dtype a stage computes in: the one asked for, else the checkpoint's on GPU, float32 on CPU.

        Raises:
            TriptychError: INVALID_REQUEST where ``settings.dtype`` is none of those allowed.
        """
        if settings.dtype == "auto":
            return self.dtype if gpu else "float32"
        if settings.dtype not in DTYPES:
            raise TriptychError(
                ErrorKind.INVALID_REQUEST,
                f"dtype must be auto, {', '.join(DTYPES[:-1])} or {DTYPES[-1]}, got {settings.dtype!r}",
                "settings.dtype",
            )
        return settings.dtype


def _declared_dtype(config: dict[str, Any]) -> str:
    for key in ("dtype", "torch_dtype"):
        if (name := str(config.get(key)).removeprefix("torch.")) in DTYPES:
            return name
    parts = (config.get(part) for part in _PARTS)
    return next((found for part in parts if isinstance(part, dict) and (found := _declared_dtype(part))), "")


def _stored_dtype(folder: Path) -> str:
    """From the header of the first file of safetensors: its length in 8 bytes, then JSON."""
    path = min(folder.glob("*.safetensors"), default=None)
    if path is None:
        return ""
    try:
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        counts: Counter[str] = Counter()
        for entry in header.values():
            if (name := _STORED.get(entry.get("dtype", ""))) is not None:
                counts[name] += prod(entry["shape"])
    except (OSError, ValueError, MemoryError, OverflowError, AttributeError, KeyError):
        # whoever loads the weights says what is wrong with the file
        return ""
    return max(counts, key=lambda name: counts[name], default="")


def find_checkpoint(settings: Settings) -> Checkpoint:
    """The checkpoint that ``settings.model`` names: "builtin", a folder, or a hub id (downloaded on first use).

    Raises:
        TriptychError: MODEL_NOT_FOUND saying what was tried and what to do; INVALID_REQUEST for overrides that are no
            JSON object; UNSUPPORTED for a quantisation that cannot be read.
    """
    folder = _folder(settings)
    path = folder / "config.json"
    if not path.is_file():
        raise _not_found(
            f"{folder} has no config.json: it must be a folder in Hugging Face layout "
            "(config.json, *.safetensors, tokenizer and processor files)"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _not_found(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(config, dict):
        raise _not_found(f"{path} must hold a JSON object")
    found = Quantisation.of(config)
    if (wanted := settings.quantization) and (found is None or wanted not in (found.method, found.declared)):
        has = "is not quantised" if found is None else f"has {found.declared}"
        message = f"quantization is {wanted!r}, but the checkpoint {has}; loading does not quantise weights"
        raise TriptychError(ErrorKind.UNSUPPORTED, message, "settings.quantization")
    changes = overrides.parse(settings.json_model_override_args)
    return Checkpoint(folder, overrides.merged(config, changes), changes, config)


def _folder(settings: Settings) -> Path:
    model = settings.model
    if model == "builtin":
        from ..builtin import checkpoint

        return Path(checkpoint())
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise _not_found(f"model {model!r} is a file; give the folder that holds config.json")
    if not _HUB_ID.fullmatch(model) or model.startswith("."):
        raise _not_found(
            f"there is no folder {model!r}, and it is not a hub id; give 'builtin', a folder with config.json, "
            "or a Hugging Face id such as 'Qwen/Qwen2.5-VL-3B-Instruct'"
        )
    return download(model, settings.revision, code=settings.trust_remote_code)


def _not_found(message: str) -> TriptychError:
    return TriptychError(ErrorKind.MODEL_NOT_FOUND, message, "settings.model")
