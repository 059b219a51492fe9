"""What ``triptych doctor`` looks at before it says a machine can serve."""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from .binary import find_libpython, find_server
from .errors import LauncherError
from .gpu import gpus

_SHM_MIB = 256


@dataclass(frozen=True)
class Check:
    """One thing looked at: ``ok`` or not, what was found, and what to do where it is not."""

    name: str
    ok: bool
    detail: str
    remedy: str = ""


def checks(server: str | None = None) -> list[Check]:
    """Look at everything; ``server`` as in :func:`find_server`."""
    return [_python(), _numpy(), _libpython(), *_server(server), _gpu(), _shm()]


def _python() -> Check:
    found = sys.version.split()[0]
    return Check("python", sys.version_info >= (3, 10), found, "use Python 3.10 or newer")


def _numpy() -> Check:
    try:
        found = version("numpy")
    except PackageNotFoundError:
        return Check("numpy", False, "not installed", "pip install 'numpy<2'")
    ok = int(found.split(".")[0]) < 2
    return Check("numpy", ok, found, "pip install 'numpy<2': the server's Python backend corrupts strings with 2")


def _libpython() -> Check:
    try:
        return Check("libpython", True, str(find_libpython()))
    except LauncherError as error:
        return Check("libpython", False, error.message, error.remedy)


def _server(path: str | None) -> list[Check]:
    try:
        binary = find_server(path)
    except LauncherError as error:
        return [Check("tritonserver", False, error.message, error.remedy)]
    found = Check("tritonserver", True, f"{binary.executable} (from {binary.source})")
    stub = Check("python stub", True, str(binary.stub))
    try:
        binary.help  # noqa: B018 - it runs the program
    except LauncherError as error:
        found = Check("tritonserver", False, error.message, error.remedy)
    return [found, stub]


def _gpu() -> Check:
    found = gpus()
    if not found:
        return Check("gpu", True, "none: everything runs on the CPU")
    detail = "; ".join(f"{g.index}: {g.name}, {g.memory_mib} MiB, driver {g.driver}" for g in found)
    if len(found) > 1:
        detail += f"; --tp up to {len(found)}"
    return Check("gpu", True, detail)


def _shm() -> Check:
    try:
        free = shutil.disk_usage("/dev/shm").free // 2**20
    except OSError as error:
        return Check("shared memory", False, f"/dev/shm: {error.strerror}", "mount a tmpfs at /dev/shm")
    return Check(
        "shared memory",
        free >= _SHM_MIB,
        f"/dev/shm has {free} MiB free",
        "" if free >= _SHM_MIB else f"give it at least {_SHM_MIB} MiB (docker run --shm-size=1g)",
    )
