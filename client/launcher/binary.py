"""Finds a tritonserver, the Python stub for this interpreter and the libpython that the stub needs."""

from __future__ import annotations

import ctypes.util
import functools
import importlib.util
import os
import re
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .errors import LauncherError

VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"
STUB = "triton_python_backend_stub"
_INSTALL = "install one with: pip install 'triptych[server]', or name a folder with TRITONSERVER_HOME"


@dataclass(frozen=True)
class ServerBinary:
    """A tritonserver that can host our stages with the running Python.

    Attributes:
        executable: the tritonserver program.
        python_backend: folder with libtriton_python.so and triton_python_backend_utils.py.
        stub: the program that embeds Python, built for the running Python version.
        libpython: the shared library of the running Python version that ``stub`` loads.
        library_dirs: further folders for the loader.
        source: how it was found, for messages.
    """

    executable: Path
    python_backend: Path
    stub: Path
    libpython: Path
    library_dirs: tuple[Path, ...]
    source: str

    @functools.cached_property
    def help(self) -> str:
        """What ``tritonserver --help`` prints: the options this release knows.

        Raises:
            LauncherError: the program does not run on this machine.
        """
        dirs = [*map(str, self.library_dirs), os.environ.get("LD_LIBRARY_PATH", "")]
        environment = os.environ | {"LD_LIBRARY_PATH": ":".join(d for d in dirs if d)}
        try:
            run = subprocess.run(
                [str(self.executable), "--help"], capture_output=True, text=True, timeout=60, env=environment
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise LauncherError(f"{self.executable} does not run: {error}", "choose another server") from None
        text = run.stdout + run.stderr
        if "--model-repository" not in text:
            lines = text.strip().splitlines()
            said = lines[-1] if lines else f"exit status {run.returncode}"
            raise LauncherError(
                f"{self.executable} does not run: {said}",
                "if a library is missing, add its folder to TRITONSERVER_LD (folders separated by ':')",
            )
        return text

    def knows(self, option: str) -> bool:
        """Whether this release has the command-line option ``option`` (with its dashes)."""
        return re.search(rf"^\s*{re.escape(option)}(?:\s|$)", self.help, re.MULTILINE) is not None


def find_server(path: str | None = None) -> ServerBinary:
    """Find a server: ``path`` (a program or its installation folder), else $TRITONSERVER_HOME, /opt/tritonserver,
    the nvidia-pytriton package.

    Raises:
        LauncherError: there is none, or it has no Python backend for this Python version.
    """
    if path is not None:
        return _at(Path(path), "the path given")
    if home := os.environ.get("TRITONSERVER_HOME"):
        return _at(Path(home), "TRITONSERVER_HOME")
    if Path("/opt/tritonserver/bin/tritonserver").exists():
        return _at(Path("/opt/tritonserver"), "the container")
    # not imported: importing pytriton starts things of its own
    spec = importlib.util.find_spec("pytriton")
    if spec is not None and spec.submodule_search_locations:
        return _at(Path(spec.submodule_search_locations[0]) / "tritonserver", "the nvidia-pytriton package")
    raise LauncherError("no tritonserver found", _INSTALL)


def _at(place: Path, source: str) -> ServerBinary:
    """The server at a program or installation folder."""
    place = place.expanduser().absolute()
    executable = place if place.is_file() else place / "bin" / "tritonserver"
    if not executable.is_file():
        raise LauncherError(f"{source} ({place}) holds no bin/tritonserver", _INSTALL)
    if not os.access(executable, os.X_OK):
        raise LauncherError(f"{executable} may not be executed", f"chmod +x {executable}")
    home = executable.resolve().parent.parent
    backend = home / "backends" / "python"
    for name in ("libtriton_python.so", "triton_python_backend_utils.py"):
        if not (backend / name).is_file():
            raise LauncherError(f"{home} has no Python backend: {backend / name} is missing", _INSTALL)
    extra = [Path(p) for p in os.environ.get("TRITONSERVER_LD", "").split(":") if p]
    beside = [home / "lib", home.parent.parent / "nvidia_pytriton.libs"]
    return ServerBinary(
        executable,
        backend,
        find_stub(home),
        find_libpython(),
        tuple(extra + [p for p in beside if p.is_dir()]),
        source,
    )


def find_stub(home: Path) -> Path:
    """The stub for the running Python version below an installation folder.

    Raises:
        LauncherError: there is none for this version.
    """
    found: list[str] = []
    for stub in (home / "python_backend_stubs" / VERSION / STUB, home / "backends" / "python" / STUB):
        if not stub.is_file():
            continue
        # the name of the libpython it was linked with is the only mark of its version
        match = re.search(rb"libpython(3\.\d+)", stub.read_bytes())
        version = match[1].decode() if match else VERSION
        if version == VERSION:
            return stub
        found.append(version)
    found += [p.parent.name for p in sorted((home / "python_backend_stubs").glob(f"*/{STUB}"))]
    have = f"it has one for Python {', '.join(dict.fromkeys(found))}" if found else "it has none"
    raise LauncherError(
        f"the server in {home} has no Python stub for Python {VERSION}; {have}",
        "make the environment with one of these Python versions",
    )


def find_libpython() -> Path:
    """The shared library of the running Python version.

    Raises:
        LauncherError: this Python was built without it and the system has none either.
    """
    for path in _libpython_candidates():
        if path.is_file():
            return path
    raise LauncherError(
        f"libpython{VERSION}.so.1.0 was not found; the server's Python stub loads it",
        f"Debian or Ubuntu: apt-get install libpython{VERSION}; pyenv: "
        f"PYTHON_CONFIGURE_OPTS=--enable-shared pyenv install --force {sys.version.split()[0]}; "
        "conda and uv Pythons have it",
    )


def _libpython_candidates() -> Iterator[Path]:
    name = f"libpython{VERSION}.so.1.0"
    multiarch = sysconfig.get_config_var("MULTIARCH") or "x86_64-linux-gnu"
    folders = [
        sysconfig.get_config_var("LIBDIR"),
        f"{sys.base_prefix}/lib",
        f"{sys.base_exec_prefix}/lib",
        f"/usr/lib/{multiarch}",
        "/usr/lib64",
        "/usr/lib",
        "/usr/local/lib",
        *os.environ.get("TRITONSERVER_LD", "").split(":"),
        *os.environ.get("LD_LIBRARY_PATH", "").split(":"),
    ]
    yield from (Path(folder) / name for folder in folders if folder)
    # the loader's own cache knows odd places too
    with_cache = ctypes.util.find_library(f"python{VERSION}")
    if with_cache:
        listing = subprocess.run(["ldconfig", "-p"], capture_output=True, text=True, check=False).stdout
        yield from (Path(line.split("=> ")[1]) for line in listing.splitlines() if name in line and "=> " in line)
