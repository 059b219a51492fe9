"""The folder a server runs in: backends, model repository and log, apart from the source tree."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from ...python_models.contract.settings import Settings
from ...python_models.repository import write
from .binary import STUB, ServerBinary
from .errors import LauncherError


class RuntimeFolder:
    """A temporary folder with everything a server is started on.

    ::

        backends/python/            the server's Python backend, with the stub for this Python
        backends/triptych/model.py  our backend: a copy of the thin file; the rest is imported from the package
        models/<model>/config.pbtxt
        checkpoint                  a link to the checkpoint, where its own path is not ASCII
        lib/                        libpython alone, so that nothing else of its folder gets in the loader's way
        work/                       the server's working directory: model processes import from it, so it is empty
        server.log

    Attributes:
        path: the folder.
        models: names of the models in the repository, stages before ensembles.
    """

    def __init__(
        self,
        binary: ServerBinary,
        settings: Settings,
        *,
        embedding_dtype: str,
        gpu_ids: Sequence[int],
        stage_classes: Mapping[str, str],
    ) -> None:
        """Make it. See :func:`triptych.python_models.repository.write` for the arguments."""
        self.path = Path(tempfile.mkdtemp(prefix="triptych-", dir=_temporary_folder()))
        try:
            self._link_backends(binary)
            (self.path / "lib").mkdir()
            (self.path / "lib" / binary.libpython.name).symlink_to(binary.libpython.resolve())
            (self.path / "work").mkdir()
            self.models = write(
                self.path / "models",
                self._with_plain_path(settings),
                embedding_dtype=embedding_dtype,
                gpu_ids=gpu_ids,
                stage_classes=stage_classes,
            )
        except BaseException:
            self.remove()
            raise

    def _link_backends(self, binary: ServerBinary) -> None:
        python = self.path / "backends" / "python"
        python.mkdir(parents=True)
        # copies: the server refuses a library whose real path lies outside its backend directory
        for name in ("libtriton_python.so", "triton_python_backend_utils.py"):
            shutil.copy(binary.python_backend / name, python / name)
        shutil.copy(binary.stub, python / STUB)
        ours = self.path / "backends" / "triptych"
        ours.mkdir()
        shutil.copyfile(backend_source(), ours / "model.py")

    def _with_plain_path(self, settings: Settings) -> Settings:
        """A checkpoint by a path in ASCII: the stub's interpreter cannot open others, whatever the locale."""
        if settings.model.isascii() or not (checkpoint := Path(settings.model).absolute()).exists():
            return settings
        link = self.path / "checkpoint"
        link.symlink_to(checkpoint)
        return replace(settings, model=str(link))

    def environment(self, binary: ServerBinary, python: Path) -> dict[str, str]:
        """The server's environment; the stub takes the first ``python3`` on PATH for its own interpreter."""
        environment = dict(os.environ)
        # both would send the embedded interpreter to another installation
        environment.pop("PYTHONHOME", None)
        environment.pop("__PYVENV_LAUNCHER__", None)
        # Several stages share the cores: an OpenMP thread that spins while it waits takes them from the others.
        environment.setdefault("GOMP_SPINCOUNT", "0")
        environment["PATH"] = f"{python.parent}:{environment.get('PATH', '/usr/bin:/bin')}"
        dirs = [str(self.path / "lib"), *map(str, binary.library_dirs), environment.get("LD_LIBRARY_PATH", "")]
        environment["LD_LIBRARY_PATH"] = ":".join(d for d in dirs if d)
        return environment

    def remove(self) -> None:
        """Delete it with all its content."""
        shutil.rmtree(self.path, ignore_errors=True)


def _temporary_folder() -> str:
    """Where the runtime folder goes.

    Raises:
        LauncherError: its path has characters that the server's way to start a stub does not survive.
    """
    folder = tempfile.gettempdir()
    if not re.fullmatch(r"[A-Za-z0-9_./+-]+", folder):
        raise LauncherError(
            f"the folder for temporary files, {folder!r}, has characters that tritonserver cannot handle",
            "set TMPDIR to a folder whose path has letters, digits and ._+- only",
        )
    return folder


def backend_source() -> Path:
    """The installed ``backends/triptych/model.py``, found without importing it (it only runs inside a stub).

    Raises:
        LauncherError: the installation lacks it.
    """
    spec = find_spec("triptych.backends.triptych")
    if spec is None or spec.origin is None or not (path := Path(spec.origin).with_name("model.py")).is_file():
        raise LauncherError("the package triptych.backends is not installed", "install triptych anew")
    return path
