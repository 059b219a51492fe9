"""Download a model of the Hugging Face hub before the stages, of which each would have to wait for it, are started."""

from __future__ import annotations

import subprocess
import sys
import threading

from .errors import LauncherError

# It belongs to the stages; a process of its own can be ended at any time.
_PROGRAM = "triptych.python_models.families.hub"


class Download:
    """A download, which shows its progress on this process's stderr."""

    def __init__(self, hub_id: str, revision: str, *, code: bool) -> None:
        """Prepare it. Args: organisation/name; branch, tag, commit or ""; whether to take the code it brings along."""
        self._command = [sys.executable, "-m", _PROGRAM, hub_id, *([revision] if revision else [])]
        self._command += ["--trust-remote-code"] if code else []
        self._process: subprocess.Popen[str] | None = None
        self._stopped = False
        self._lock = threading.Lock()

    def run(self) -> None:
        """Return when all of it is in the local cache; at once where it is there already.

        Raises:
            LauncherError: it could not be downloaded, or was stopped.
        """
        with self._lock:
            if self._stopped:
                raise LauncherError("the download was stopped")
            self._process = subprocess.Popen(self._command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
        said, _ = self._process.communicate()
        if self._stopped:
            raise LauncherError("the download was stopped")
        if self._process.returncode != 0:
            lines = said.strip().splitlines()
            raise LauncherError(lines[-1] if lines else f"the download ended with status {self._process.returncode}")

    def stop(self) -> None:
        """End it, from any thread; safe to call twice."""
        with self._lock:
            self._stopped = True
            if self._process is not None and self._process.poll() is None:
                self._process.terminate()
