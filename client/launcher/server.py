"""Starts a tritonserver, loads the models one by one with progress, and leaves nothing behind."""

from __future__ import annotations

import contextlib
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

from ...python_models.contract.errors import TriptychError
from ...python_models.contract.settings import Settings
from ...python_models.contract.tensors import ENSEMBLES, STAGES
from . import guard
from .binary import STUB, ServerBinary
from .errors import LauncherError
from .hide import hide
from .runtime import RuntimeFolder

HOST = "127.0.0.1"
GRACE_S = 10.0
LOAD_ATTEMPTS = 3
EXIT_TIMEOUT_S = 5
CUDA_POOL_BYTES = 512 * 2**20
# What changes the server, or lets it read memory of others; an inference and what describes a model stay open.
MANAGEMENT = "model-repository,shared-memory,trace,logging"
KEY_HEADER = "triptych-key"
_POLL_S = 0.05
# a proxy of the environment would be in the way of a local connection
_LOCAL = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class TritonServer:
    """A running tritonserver with one deployment's models; a context manager that stops it.

    The server runs under a guard process (see guard.py), so it also ends when this process is killed.

    Attributes:
        grpc_url: "host:port" of the gRPC endpoint, without a scheme.
        http_url: base URL of the HTTP endpoint.
        metrics_url: URL of the Prometheus page.
        pid: process id of tritonserver, 0 before :meth:`start`.
        log: file with what the server and the stages print.
        management_key: what a request to load or unload a model must carry, "" where it needs nothing.
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
        management_key: str | None = None,
        host: str = HOST,
        stages: Sequence[str] = tuple(STAGES),
        trace_config: Sequence[str] = (),
    ) -> None:
        """Prepare a server; nothing runs yet.

        Args:
            binary: from :func:`find_server`.
            settings: options of the deployment.
            grpc_port, http_port, metrics_port: 0 takes a free one.
            embedding_dtype: "FP32", "BF16" or "FP16"; what encoders hand to the language model.
            gpu_ids: GPUs of the stages that use one; none: everything on the CPU.
            log: where to keep the server's log; None: in the runtime folder, gone after :meth:`stop`.
            stage_classes: {stage: "/path/file.py:Class"} that replaces the built-in class of a stage.
            management_key: for the endpoints of :data:`MANAGEMENT`; None makes a random one, "" leaves them open to
                every user of this machine.
            host: address that the server's ports listen on.
            stages: those that are loaded, with the ensembles that need no others.
            trace_config: settings of the server's own traces, ``key=value``, as its option of that name takes them.

        Raises:
            LauncherError: a given port is taken.
        """
        self.binary = binary
        self.settings = settings
        self._host, self._stages = host, tuple(stages)
        self._trace_config = tuple(trace_config)
        ports = _ports({"gRPC": grpc_port, "HTTP": http_port, "metrics": metrics_port})
        self._ports = ports
        reached = HOST if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
        self.grpc_url = f"{reached}:{ports['gRPC']}"
        self.http_url = f"http://{reached}:{ports['HTTP']}"
        self.metrics_url = f"http://{reached}:{ports['metrics']}/metrics"
        self.pid = 0
        self._embedding_dtype = embedding_dtype
        self._gpu_ids = tuple(gpu_ids)
        self._stage_classes = dict(stage_classes or {})
        self.management_key = secrets.token_urlsafe(24) if management_key is None else management_key
        self._wanted_log = log
        self._folder: RuntimeFolder | None = None
        self._guard: subprocess.Popen[bytes] | None = None
        self._used = False
        self._lock = threading.Lock()
        self._shm_prefix = f"triptych-{os.getpid()}-{secrets.token_hex(4)}-"
        self.log = log or Path(os.devnull)

    def start(self) -> None:
        """Start the server without any model; returns at once.

        Raises:
            LauncherError: the runtime folder cannot be made or the program does not start.
            RuntimeError: it has been started or stopped before.
        """
        with self._lock:
            if self._used:
                raise RuntimeError("a TritonServer starts once; make another")
            self._used = True
            self._folder = RuntimeFolder(
                self.binary,
                self.settings,
                embedding_dtype=self._embedding_dtype,
                gpu_ids=self._gpu_ids,
                stage_classes=self._stage_classes,
            )
            self.log = self._wanted_log or self._folder.path / "server.log"
            self._guard = self._start_guard(self._folder)

    def _start_guard(self, folder: RuntimeFolder) -> subprocess.Popen[bytes]:
        """Start the guard, which starts the server; sets ``pid``."""
        job = {
            "command": self._command(folder.path),
            "cwd": str(folder.path / "work"),
            "env": folder.environment(self.binary, Path(sys.executable)),
            "log": str(self.log),
            "grace_s": GRACE_S,
            "shm_prefix": self._shm_prefix,
            "folder": str(folder.path),
        }
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", guard.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdin.write(json.dumps(job).encode() + b"\n")
        process.stdin.flush()
        first = process.stdout.readline().split()
        if len(first) == 2 and first[0] == b"pid":
            self.pid = int(first[1])
            return process
        lines = process.stderr.read().decode(errors="replace").strip().splitlines()
        process.communicate()
        folder.remove()
        raise LauncherError(f"{self.binary.executable} could not be started: {(lines or ['it said nothing'])[-1]}")

    def wait_ready(self, timeout_s: float, progress: Callable[[str], None]) -> None:
        """Load every model, stages side by side, and return when all answer.

        Args:
            timeout_s: seconds for all of it.
            progress: called with a line of text whenever something has happened.

        Raises:
            LauncherError: a stage could not load (with the stage's own message), the server ended, or time ran out.
        """
        deadline = time.monotonic() + timeout_s
        self._wait_live(deadline)
        if self.management_key and not hide(self.management_key, self.pid):
            progress("the management key cannot be hidden: whoever lists this machine's processes can read it")
        progress(f"tritonserver is up (pid {self.pid}); loading the models")
        ensembles = [name for name, spec in ENSEMBLES.items() if all(step.stage in self._stages for step in spec.steps)]
        done, total = 0, len(self._stages) + len(ensembles)
        for group in (self._stages, ensembles):
            for model, seconds in self._load_all(group, deadline, progress):
                done += 1
                progress(f"{model} is ready after {seconds:.1f} s ({done} of {total})")

    def reload(self, model: str) -> None:
        """Load a model anew: a stage whose process has died gets a new one, a living one is replaced.

        Raises:
            LauncherError: it could not load (with the stage's own message).
        """
        for attempt in range(LOAD_ATTEMPTS):
            # the server loads a model that it has already only if a file of it is newer, and keeps the old processes
            # if that file is config.pbtxt
            if (folder := self._folder) is not None:
                with contextlib.suppress(FileNotFoundError):
                    (folder.path / "models" / model / "1" / "loaded").touch()
            try:
                self._post(f"/v2/repository/models/{model}/load", timeout_s=None)
                return
            except LauncherError as error:
                # the server gives a process up that shows no sign of life for a second, as on a busy machine it may
                if attempt + 1 == LOAD_ATTEMPTS or "is not healthy" not in error.message:
                    raise

    def another(self) -> TritonServer:
        """A server like this one, on the same ports, to be started where this one has ended and was stopped.

        It is needed: a stage that dies while it holds one of the locks that it shares with the server (it does for a
        moment with every response and metric) takes the whole server along; release 24.10 then aborts with
        ``boost::interprocess::lock_exception``.

        Raises:
            LauncherError: somebody else has taken one of the ports.
        """
        return TritonServer(
            self.binary,
            self.settings,
            grpc_port=self._ports["gRPC"],
            http_port=self._ports["HTTP"],
            metrics_port=self._ports["metrics"],
            embedding_dtype=self._embedding_dtype,
            gpu_ids=self._gpu_ids,
            log=self._wanted_log,
            stage_classes=self._stage_classes,
            management_key=self.management_key,
            host=self._host,
            stages=self._stages,
            trace_config=self._trace_config,
        )

    def alive(self) -> bool:
        """Whether the server process runs (its stages may be dead; see :meth:`stage_pids`)."""
        process = self._guard
        return process is not None and process.poll() is None and _running(self.pid)

    def stage_pids(self) -> dict[str, int]:
        """The living process of each stage; of a stage with several, the one started last."""
        found: dict[str, tuple[int, int]] = {}
        for pid, arguments in _children(self.pid):
            if not arguments or Path(arguments[0]).name != STUB:
                continue
            # the stub's arguments hold its instance, "preprocess_0_1" being number 1 of group 0
            for argument in arguments[1:]:
                match = re.fullmatch(r"(\w+?)_\d+_\d+", argument)
                if match and match[1] in STAGES:
                    found[match[1]] = max((_started(pid), pid), found.get(match[1], (0, 0)))
        return {stage: pid for stage, (_, pid) in found.items()}

    def stop(self) -> None:
        """Stop the server, its stages and the guard; safe to call twice, and from another thread."""
        with self._lock:
            self._used = True
            if self._guard is not None:
                try:
                    # the end of its input is the guard's order to stop
                    self._guard.communicate(timeout=GRACE_S + 10)
                except subprocess.TimeoutExpired:
                    self._guard.kill()
                    self._guard.communicate()
                if self._guard.returncode != 0 and self._folder is not None:
                    # it was killed before it could do its work
                    _kill_users(self._folder.path)
                    guard.remove_shared_memory(self._shm_prefix)
                self._guard = None
            if self._folder is not None:
                self._folder.remove()
                self._folder = None

    def __enter__(self) -> TritonServer:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _command(self, folder: Path) -> list[str]:
        """The command line; options that not every release knows are asked for first."""
        ports = self._ports
        options = [
            f"--model-repository={folder / 'models'}",
            f"--backend-directory={folder / 'backends'}",
            "--model-control-mode=explicit",
            f"--exit-timeout-secs={EXIT_TIMEOUT_S}",
            f"--http-address={self._host}",
            f"--http-port={ports['HTTP']}",
            f"--grpc-address={self._host}",
            f"--grpc-port={ports['gRPC']}",
            f"--metrics-address={self._host}",
            f"--metrics-port={ports['metrics']}",
            "--allow-metrics=" + ("true" if self.settings.enable_metrics else "false"),
            "--allow-gpu-metrics=" + ("true" if self._gpu_ids and self.settings.enable_metrics else "false"),
            *(f"--trace-config={item}" for item in self._trace_config),
            # the configs are complete; completing them would start every stage's process twice
            "--disable-auto-complete-config",
            f"--backend-config=python,shm-region-prefix-name={self._shm_prefix}",
        ]
        for gpu in self._gpu_ids:
            # embeddings stay on the GPU between stages only while this pool has room
            options.append(f"--cuda-memory-pool-byte-size={gpu}:{CUDA_POOL_BYTES}")
        if self.management_key:
            options += [
                f"--{option}={MANAGEMENT}:{KEY_HEADER}={self.management_key}"
                for option in ("http-restricted-api", "grpc-restricted-protocol")
            ]
        if self.binary.knows("--http-max-input-size"):
            options.append(f"--http-max-input-size={2**31 - 1}")
        return [str(self.binary.executable), *options]

    def _wait_live(self, deadline: float) -> None:
        while True:
            try:
                with _LOCAL.open(f"{self.http_url}/v2/health/live", timeout=2):
                    return
            except (urllib.error.URLError, OSError):
                self._check_running()
            if time.monotonic() > deadline:
                raise LauncherError("tritonserver did not answer in time", f"its log is {self.log}")
            time.sleep(_POLL_S)

    def _check_running(self) -> None:
        if not self.alive():
            raise LauncherError(f"tritonserver ended: {self._last_error()}", "the line above is from its log")

    def _last_error(self) -> str:
        """The most telling line of the log: the first error, else the last line."""
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        lines = [line for line in text.splitlines() if line.strip()]
        errors = [line for line in lines if re.match(r"(error:|E\d{4} |failed|Failed)", line)]
        return (errors or lines[-1:] or ["it printed nothing"])[0].strip()

    def _load_all(
        self, models: Iterable[str], deadline: float, progress: Callable[[str], None]
    ) -> Iterable[tuple[str, float]]:
        """Load models side by side; yields (model, seconds) as each is ready."""
        results: queue.SimpleQueue[tuple[str, float, LauncherError | None]] = queue.SimpleQueue()

        def load(model: str) -> None:
            started = time.monotonic()
            error = None
            try:
                self.reload(model)
            except LauncherError as caught:
                error = caught
            results.put((model, time.monotonic() - started, error))

        waiting = set(models)
        for model in sorted(waiting):
            threading.Thread(target=load, args=(model,), daemon=True).start()
        told = time.monotonic()
        while waiting:
            try:
                model, seconds, error = results.get(timeout=0.5)
            except queue.Empty:
                self._check_running()
                if time.monotonic() > deadline:
                    raise LauncherError(
                        f"not ready in time: {', '.join(sorted(waiting))}", f"the server's log is {self.log}"
                    ) from None
                if time.monotonic() - told > 5:
                    told = time.monotonic()
                    progress(f"still loading: {', '.join(sorted(waiting))}")
                continue
            if error is not None:
                raise error
            waiting.discard(model)
            yield model, seconds

    def _post(self, path: str, timeout_s: float | None) -> None:
        request = urllib.request.Request(f"{self.http_url}{path}", data=b"{}", method="POST")
        if self.management_key:
            request.add_header(KEY_HEADER, self.management_key)
        try:
            with _LOCAL.open(request, timeout=timeout_s) as answer:
                answer.read()
        except urllib.error.HTTPError as error:
            raise _load_error(error.read().decode(errors="replace")) from None
        except OSError as error:
            self._check_running()
            raise LauncherError(f"tritonserver does not answer: {error}", f"its log is {self.log}") from None


def _load_error(body: str) -> LauncherError:
    """What the server says of a failed load, reduced to what the stage said."""
    try:
        text = str(json.loads(body)["error"])
    except (ValueError, LookupError, TypeError):
        text = body
    # Triton wraps: load failed for model 'm': version 1 is at UNAVAILABLE state: Internal: <ours>\n\nAt:\n  file(line)
    text = text.split("\n\nAt:")[0]
    text = re.sub(r"^load failed for model '([^']*)': version \d+ is at \w+ state: (?:Internal: )?", r"\1: ", text)
    text = re.sub(r"\b(?:\w*Exception|TriptychError|Error): ", "", text, count=1)
    error = TriptychError.from_wire(text.strip().rstrip(";"))
    return LauncherError(error.message)


def _ports(wanted: Mapping[str, int]) -> dict[str, int]:
    """A port for each name: the given one if it is free, else any."""
    probes: list[socket.socket] = []
    ports: dict[str, int] = {}
    try:
        for name, port in wanted.items():
            probe = socket.socket()
            probes.append(probe)
            # servers do the same, so a port in TIME_WAIT counts as free
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, port))
            except OSError as error:
                raise LauncherError(
                    f"the {name} port {port} of {HOST} cannot be taken: {error.strerror}",
                    f"stop what listens there, or choose another with --{name.lower()}-port (0: any free one)",
                ) from None
            ports[name] = int(probe.getsockname()[1])
    finally:
        for probe in probes:
            probe.close()
    return ports


def _running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return False
    return state not in "ZX"


def _kill_users(folder: Path) -> None:
    """Kill the model processes of a runtime folder; only they have its path on their command line."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                if f"{folder}/".encode() in (entry / "cmdline").read_bytes():
                    os.kill(int(entry.name), signal.SIGKILL)


def _started(pid: int) -> int:
    """When a process was started, in clock ticks since boot; 0 if it is gone."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, IndexError):
        return 0


def _children(pid: int) -> Iterable[tuple[int, list[str]]]:
    """(pid, arguments) of the living processes of the server's process group, itself left out."""
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == pid:
            continue
        try:
            if os.getpgid(int(entry.name)) == pid and _running(int(entry.name)):
                yield int(entry.name), (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
        except (OSError, ProcessLookupError):
            continue
