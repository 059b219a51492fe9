"""Starts this project's own worker processes, from an ordinary interpreter or from Triton's embedded one."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import sys
from pathlib import Path

from .contract.errors import ErrorKind, TriptychError

_BOOT = """
import importlib, site, sys
module, _, function = sys.argv[1].partition(":")
count = int(sys.argv[2])
arguments, folders = sys.argv[3 : 3 + count], sys.argv[3 + count :]
for folder in folders:
    if folder not in sys.path:
        site.addsitedir(folder)
sys.path[:] = folders + [folder for folder in sys.path if folder not in folders]
getattr(importlib.import_module(module), function)(*arguments)
"""
_PR_SET_PDEATHSIG = 1


def python_command(target: str, *arguments: str) -> list[str]:
    """A command line that calls a function in a fresh interpreter which finds the same packages as this one.

    Args:
        target: "package.module:function".
        arguments: strings that the function is called with.

    Raises:
        TriptychError: STAGE_FAILED where this version of Python is not found.
    """
    folders = [str(Path(p).resolve()) for p in sys.path if p and Path(p).is_dir()]
    return [_interpreter(), "-I", "-c", _BOOT, target, str(len(arguments)), *arguments, *folders]


def end_with_parent(parent: int) -> bool:
    """Have the kernel kill this process when the thread that started it ends; False where that happened already."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    return os.getppid() == parent


def ending(code: int) -> str:
    """How a process ended, in words: ``code`` as subprocess gives it."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"signal {signal.Signals(-code).name}"
    except ValueError:
        return f"signal {-code}"


def _interpreter() -> str:
    """This environment's interpreter; sys.executable is something else where Python is embedded (Triton's stub)."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    here = [Path(sys.executable)] if Path(sys.executable).name.startswith("python") else []
    for prefix in (sys.prefix, sys.base_prefix):
        here += [Path(prefix, "bin", version)]
    for path in here:
        if path.is_file() and os.access(path, os.X_OK):
            return str(path)
    if found := shutil.which(version):
        return found
    raise TriptychError(ErrorKind.STAGE_FAILED, f"no {version} found to run worker processes; put it on PATH")
