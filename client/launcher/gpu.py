"""Which GPUs there are and what runs on them, decided without torch."""

from __future__ import annotations

import json
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...python_models.contract.settings import Settings
from .errors import LauncherError

_WIRE_DTYPES = {"float32": "FP32", "bfloat16": "BF16", "float16": "FP16"}


@dataclass(frozen=True)
class Gpu:
    """A GPU that nvidia-smi lists: its number, name, memory in MiB and driver version."""

    index: int
    name: str
    memory_mib: int
    driver: str


@dataclass(frozen=True)
class Placement:
    """Where the stages run: ``gpu_ids`` (none: CPU; several: tensor parallel, the first is the language model's rank
    0) and what dtype embeddings have on their way.
    """

    gpu_ids: tuple[int, ...]
    embedding_dtype: str


def gpus() -> list[Gpu]:
    """The GPUs of this machine; none where nvidia-smi is missing or fails."""
    query = ["nvidia-smi", "--query-gpu=index,name,memory.total,driver_version", "--format=csv,noheader,nounits"]
    try:
        run = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [[cell.strip() for cell in line.split(",")] for line in run.stdout.splitlines()]
    return [
        Gpu(int(row[0]), row[1], int(row[2]), row[3])
        for row in rows
        if len(row) == 4 and row[0].isdigit() and row[2].isdigit()
    ]


def place(settings: Settings) -> Placement:
    """Resolve ``settings.device``, ``settings.dtype``, ``settings.tp`` and ``settings.ep``.

    Raises:
        LauncherError: a device that does not exist, fewer GPUs than ``tp``, or a value that is none.
    """
    if settings.ep not in (1, settings.tp):
        raise LauncherError(
            f"--ep {settings.ep} does not fit --tp {settings.tp}",
            "choose --ep 1 (every GPU has a part of each expert) or the number of --tp (each has whole experts)",
        )
    if settings.dtype not in ("auto", *_WIRE_DTYPES):
        raise LauncherError(f"dtype {settings.dtype!r} is not known", f"choose auto, {', '.join(_WIRE_DTYPES)}")
    device = settings.device
    match = re.fullmatch(r"(auto|cpu|cuda)(?::(\d+))?", device)
    if match is None or (match[2] and match[1] != "cuda"):
        raise LauncherError(f"device {device!r} is not known", "choose auto, cpu, cuda or cuda:N")
    found = [] if match[1] == "cpu" else gpus()
    if match[1] == "cpu" or (match[1] == "auto" and not found):
        return Placement((), _WIRE_DTYPES.get(settings.dtype, "FP32"))
    index = int(match[2] or 0)
    if index >= len(found):
        have = ", ".join(f"cuda:{gpu.index} {gpu.name}" for gpu in found) or "none"
        raise LauncherError(f"device {device!r} does not exist; nvidia-smi lists: {have}", "choose cpu or one of these")
    if index + settings.tp > len(found):
        raise LauncherError(
            f"--tp {settings.tp} from cuda:{index} on needs {index + settings.tp} GPUs, but there "
            f"{'is' if len(found) == 1 else 'are'} {len(found)}",
            f"choose --tp {len(found) - index} or less" if len(found) - index > 1 else "leave --tp out",
        )
    return Placement(tuple(range(index, index + settings.tp)), _WIRE_DTYPES[_dtype_on_gpu(settings)])


def _dtype_on_gpu(settings: Settings) -> str:
    """ "auto" is the checkpoint's dtype; where its config is not at hand, bfloat16, as almost all are."""
    if settings.dtype != "auto":
        return settings.dtype
    config = Path(settings.model) / "config.json"
    if not config.is_file():
        return "bfloat16"
    found = _find_dtype(json.loads(config.read_text()))
    return found if found in _WIRE_DTYPES else "bfloat16"


def _find_dtype(config: Any) -> str:
    """The first ``dtype`` or ``torch_dtype`` of a config.json, outermost first."""
    if not isinstance(config, dict):
        return ""
    for key in ("dtype", "torch_dtype"):
        if isinstance(config.get(key), str):
            return str(config[key])
    return next((name for value in config.values() if (name := _find_dtype(value))), "")
