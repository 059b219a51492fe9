"""Where a model's files are: ``Settings.model`` -> a folder in Hugging Face layout. Torch-free."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..contract.errors import ErrorKind, TriptychError
from ..contract.settings import Settings
from . import overrides
from .hub import download
from .quantisation import Quantisation

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
DTYPES = ("float32", "bfloat16", "float16")


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
        """Name of the dtype the weights were saved for; "float32" where config.json does not say."""
        parts = ("thinker_config", "text_config", "language_config", "llm_config", "llm_cfg")
        for config in (self.config, *(self.config.get(part) for part in parts)):
            if isinstance(config, dict) and (name := config.get("dtype") or config.get("torch_dtype")) in DTYPES:
                return str(name)
        return "float32"

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
    Quantisation.of(config)
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
