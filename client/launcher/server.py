"""Starts a tritonserver, loads the models one by one with progress, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import queue
import re
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from ...python_models.contract.errors import TriptychError
from ...python_models.contract.settings import Settings
from ...python_models.contract.tensors import ENSEMBLES, STAGES
from . import guard
from .binary import STUB, ServerBinary
from .errors import LauncherError
from .runtime import RuntimeFolder

HOST = "127.0.0.1"
GRACE_S = 8.0
EXIT_TIMEOUT_S = 3
CUDA_POOL_BYTES = 512 * 2**20
_POLL_S = 0.05


class TritonServer:
    """A running tritonserver with one deployment's models; a context manager that stops it.

    The server runs under a guard process (see guard.py), so it also ends when this process is killed.

    Attributes:
        grpc_url: "host:port" of the gRPC endpoint, without a scheme.
        http_url: base URL of the HTTP endpoint.
        metrics_url: URL of the Prometheus page.
        pid: process id of tritonserver, 0 before :meth:`start`.
        log: file with what the server and the stages print.
    """

    def __init__(
        self,
        binary: ServerBinary,
        settings: Settings,
        *,
        grpc_port: int = 0,
        http_port: int = 0,
        metrics_port: int = 0,
        embedding_dtype: str = "FP32",
        gpu_ids: Sequence[int] = (),
        log: Path | None = None,
        stage_classes: Mapping[str, str] | None = None,
    ) -> None:
        """Prepare a server; nothing runs yet.

        Args:
            binary: from :func:`find_server`.
            settings: options of the deployment.
            grpc_port, http_port, metrics_port: 0 takes a free one.
            embedding_dtype: "FP32", "BF16" or "FP16"; what encoders hand to the language model.
            gpu_ids: GPUs of the stages that use one; none: everything on the CPU.
            log: where to keep the server's log; None: in the runtime folder, gone after :meth:`stop`.
            stage_classes: {stage: "module:Class"} that replaces the built-in class of a stage.

        Raises:
            LauncherError: a given port is taken.
        """
        self.binary = binary
        self.settings = settings
        ports = _ports({"gRPC": grpc_port, "HTTP": http_port, "metrics": metrics_port})
        self._ports = ports
        self.grpc_url = f"{HOST}:{ports['gRPC']}"
        self.http_url = f"http://{HOST}:{ports['HTTP']}"
        self.metrics_url = f"http://{HOST}:{ports['metrics']}/metrics"
        self.pid = 0
        self._embedding_dtype = embedding_dtype
        self._gpu_ids = tuple(gpu_ids)
        self._stage_classes = dict(stage_classes or {})
        self._wanted_log = log
        self._folder: RuntimeFolder | None = None
        self._guard: subprocess.Popen[bytes] | None = None
        self._shm_prefix = f"triptych-{os.getpid()}-{secrets.token_hex(4)}-"
        self.log = log or Path(os.devnull)

    def start(self) -> None:
        """Start the server without any model; returns at once.

        Raises:
            LauncherError: the runtime folder cannot be made or the program does not start.
        """
        self._folder = RuntimeFolder(
            self.binary,
            self.settings,
            embedding_dtype=self._embedding_dtype,
            gpu_ids=self._gpu_ids,
            stage_classes=self._stage_classes,
        )
        self.log = self._wanted_log or self._folder.path / "server.log"
        job = {
            "command": self._command(self._folder.path),
            "cwd": str(self._folder.path / "work"),
            "env": self._folder.environment(self.binary, Path(sys.executable)),
            "log": str(self.log),
            "grace_s": GRACE_S,
            "shm_prefix": self._shm_prefix,
            "folder": str(self._folder.path),
        }
        self._guard = subprocess.Popen(
            [sys.executable, "-I", "-S", guard.__file__, json.dumps(job)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        assert self._guard.stdout is not None
        first = self._guard.stdout.readline().split()
        if len(first) != 2 or first[0] != b"pid":
            self.stop()
            raise LauncherError(f"{self.binary.executable} could not be started", "see what it printed above")
        self.pid = int(first[1])
