"""Starts the workers, reads what they say, and ends the whole group when one of them dies or gets stuck."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from ....contract.errors import ErrorKind, TriptychError
from ....process import ending, python_command
from .board import Board, Progress
from .wire import Kind, Reader

logger = logging.getLogger(__name__)

SILENCE_S = 4.0
"""A worker without a sign of life for so long is stuck: stopped, or its interpreter is."""
CALL_SILENCE_S = 120.0
"""The same while it loads weights, compiles or captures, which may keep the interpreter to themselves."""
STEP_S = 8.0
"""A step that its worker has not finished after so long is stuck."""
_TOKENS_PER_S = 250
"""A longer step may take as long as it would at this rate."""
_EARLY_STEPS, _EARLY_S = 16, 120.0
"""The first steps may compile kernels."""
_TICK_S = 0.25
_PAUSE_S = 1.0
_GRACE_S = 2.0
_SILENT_LINES = ("Extension modules:",)
_TARGET = "triptych.python_models.language_model.runner.parallel.worker:serve"


class Peer:
    """A worker process as rank 0 sees it."""

    def __init__(self, rank: int, about: dict[str, Any], board: Board) -> None:
        self.rank = rank
        self.device = str(about["device"])
        self.socket, theirs = socket.socketpair()
        self.last_line = ""
        self._partial = b""
        with theirs:
            fds = [theirs.fileno(), board.fd]
            command = python_command(_TARGET, json.dumps(about | {"fds": fds, "parent": os.getpid()}))
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=fds,
                cwd="/",
                # a signal from the terminal is for rank 0, which ends its workers itself
                start_new_session=True,
            )
        assert self.process.stdout is not None
        self.output = self.process.stdout
        os.set_blocking(self.output.fileno(), False)
        self._reader = Reader(self.socket, socket.MSG_DONTWAIT)
        self.gone = False

    @property
    def name(self) -> str:
        """For messages."""
        return f"rank {self.rank} ({self.device}, process {self.process.pid})"

    def drain(self) -> bool:
        """Pass on what it has printed, line by line; False where there is nothing more."""
        try:
            data = os.read(self.output.fileno(), 65536)
        except BlockingIOError:
            return False
        *lines, self._partial = (self._partial + data).split(b"\n")
        for line in lines:
            text = line.decode("utf-8", "replace").rstrip()
            sys.stderr.write(f"[rank {self.rank}] {text}\n")
            if text and not text.startswith(_SILENT_LINES):
                self.last_line = text
        return bool(data)

    def read(self) -> Iterator[tuple[Kind, Any]]:
        """What it has said since the last call; `gone` is set at the end of it."""
        while True:
            try:
                kind, body = self._reader.read()
            except BlockingIOError:
                return
            except EOFError:
                self.gone = True
                return
            yield kind, json.loads(bytes(body))

    def kill(self) -> None:
        """End it and whatever it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def last_words(self) -> str:
        """Its last line of output, for messages."""
        while self.drain():
            pass
        return f"; its last line of output: {self.last_line}" if self.last_line else ""


class Watch:
    """The workers of a group, and the thread that owns them.

    The thread starts the processes itself: they die with the thread that started them. What waits or sends raises
    the group's fault as soon as there is one.
    """

    def __init__(self, abouts: Sequence[dict[str, Any]], on_fault: Callable[[TriptychError], None]) -> None:
        """Start the workers.

        Args:
            abouts: what each worker is told at its start, rank 1 first.
            on_fault: called once, from any thread, when the group is lost.
        """
        self.size = len(abouts) + 1
        self.peers: list[Peer] = []
        self.fault: TriptychError | None = None
        self._board = Board(self.size)
        self._on_fault = on_fault
        self._changed = threading.Condition()
        self._results: dict[int, deque[Any]] = {rank: deque() for rank in range(1, self.size)}
        self._failed: dict[int, dict[str, Any]] = {}
        self._failed_at = 0.0
        self._pending: deque[tuple[int, float]] = deque()
        self._calls = 0
        self._closing = False
        self._began = time.monotonic()
        started = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(abouts, started), name="triptych-ranks", daemon=True)
        self._thread.start()
        started.wait()

    @property
    def usable(self) -> bool:
        """Whether there still is a group to talk to."""
        return self.fault is None and not self._closing

    def check(self) -> None:
        """Raise the group's fault if there is one, or that it was closed."""
        if self._closing:
            raise TriptychError(ErrorKind.STAGE_DEAD, "the language model's ranks are closed", None, "language_model")
        if (fault := self.fault) is not None:
            raise TriptychError(fault.kind, fault.message, fault.param, fault.stage)

    def send(self, message: bytes) -> None:
        """Send a message to every worker."""
        for peer in self.peers:
            self.check()
            try:
                peer.socket.sendall(message)
            except OSError:
                # its end will be seen in a moment, with its cause
                self._await_fault()
                self.declare(f"{peer.name} does not listen any more")
        self.check()

    def send_step(self, step: int, message: bytes, num_tokens: int) -> None:
        """As `send`; the step has to be finished in time."""
        limit = max(STEP_S, num_tokens / _TOKENS_PER_S)
        if step <= _EARLY_STEPS:
            limit = max(limit, _EARLY_S)
        self._pending.append((step, time.monotonic() + limit))
        self.send(message)

    def send_call(self, message: bytes) -> None:
        """As `send`; one result of each worker is expected, see `results`."""
        with self._changed:
            self._calls += 1
        self.send(message)

    def results(self, timeout_s: float) -> list[Any]:
        """The results of the oldest call, rank 1 first."""
        with self._changed:
            self._changed.wait_for(lambda: not self.usable or all(self._results.values()), timeout_s)
            late = [peer.name for peer in self.peers if not self._results[peer.rank]]
        if late:
            self.declare(f"{', '.join(late)} gave no answer within {timeout_s:g} s")
        self.check()
        with self._changed:
            self._calls -= 1
            return [self._results[peer.rank].popleft() for peer in self.peers]

    def settle(self, step: int, error: Exception, num_collectives: int) -> None:
        """A step raised on rank 0: return if it did so on every worker at the same place, so that all may go on.

        Raises:
            TriptychError: STAGE_DEAD: the ranks have come apart.
        """
        self._await_fault(lambda: len(self._failed) == len(self.peers))
        with self._changed:
            failed, self._failed = self._failed, {}
            same = [f for f in failed.values() if (f["step"], f["num_collectives"]) == (step, num_collectives)]
            if self.fault is None and len(same) == len(self.peers):
                self._pending = deque(entry for entry in self._pending if entry[0] != step)
                return
        text = f"rank 0 failed in step {step}: {type(error).__name__}: {error}"
        if failed:
            rank, report = min(failed.items(), key=lambda item: int(item[1]["step"]))
            text = f"rank {rank} failed in step {report['step']}: {report['error']}"
        self.declare(text)
        self.check()

    def abandon_call(self, error: Exception) -> None:
        """Rank 0 raised in its own part of a call: leave the group in order where the workers have done theirs.

        Raises:
            TriptychError: what the watch found to be the cause.
        """
        self._await_fault(lambda: all(self._results.values()))
        self.check()
        self.declare(f"rank 0 failed: {type(error).__name__}: {error}")

    def declare(self, text: str, kind: ErrorKind = ErrorKind.STAGE_DEAD, param: str | None = None) -> None:
        """End the group; only the first fault counts."""
        with self._changed:
            if self.fault is not None or self._closing:
                return
            if kind is ErrorKind.STAGE_DEAD:
                text = f"the language model has lost one of its {self.size} processes: {text}"
            self.fault = TriptychError(kind, text, param, "language_model")
            self._changed.notify_all()
        logger.error("%s; ending all %d processes", text, self.size)
        for peer in self.peers:
            peer.kill()
        self._on_fault(self.fault)

    def close(self, grace_s: float) -> None:
        """End all workers; those that do not end by themselves within ``grace_s`` are killed."""
        with self._changed:
            if self._closing:
                return
            self._closing = True
            self._changed.notify_all()
        for peer in self.peers:
            with contextlib.suppress(OSError):
                peer.socket.shutdown(socket.SHUT_WR)
        deadline = time.monotonic() + grace_s
        for peer in self.peers:
            with contextlib.suppress(subprocess.TimeoutExpired):
                peer.process.wait(max(deadline - time.monotonic(), 0))
            # also after its own end: what it started may still be there
            peer.kill()
        if threading.current_thread() is not self._thread:
            self._thread.join()
        for peer in self.peers:
            peer.socket.close()
            peer.output.close()
        self._board.close()

    def _await_fault(self, otherwise: Callable[[], bool] = lambda: False) -> None:
        """Wait a moment for the watch to find out what is wrong, or for something else."""
        with self._changed:
            self._changed.wait_for(lambda: not self.usable or otherwise(), _GRACE_S)

    # what follows runs on the watch's thread

    def _run(self, abouts: Sequence[dict[str, Any]], started: threading.Event) -> None:
        with selectors.DefaultSelector() as selector:
            try:
                for rank, about in enumerate(abouts, 1):
                    self.peers.append(peer := Peer(rank, about, self._board))
                    selector.register(peer.output, selectors.EVENT_READ, peer.drain)
                    selector.register(peer.socket, selectors.EVENT_READ, lambda peer=peer: self._listen(peer))
            except Exception as error:
                logger.exception("a worker cannot be started")
                self.declare(f"rank {len(self.peers) + 1} cannot be started: {error}")
            started.set()
            last = time.monotonic()
            while not self._closing and self.fault is None:
                for key, _ in selector.select(_TICK_S):
                    if not key.data():
                        selector.unregister(key.fileobj)
                now = time.monotonic()
                # after a pause of this process itself, nobody's silence says anything
                if now - last < _PAUSE_S:
                    self._look(now)
                last = now
        for peer in self.peers:
            peer.process.wait()
            peer.last_words()

    def _listen(self, peer: Peer) -> bool:
        """Take in what a worker says; False at the end of it."""
        for kind, value in peer.read():
            with self._changed:
                if kind is Kind.FAILED:
                    self._failed[peer.rank] = value
                    self._failed_at = time.monotonic()
                elif "error" not in value:
                    self._results[peer.rank].append(value["value"])
                self._changed.notify_all()
            if "kind" in value:
                # others may wait in a collective for what this one cannot do
                self.declare(f"{peer.name}: {value['error']}", ErrorKind(value["kind"]), value["param"])
        return not peer.gone

    def _look(self, now: float) -> None:
        """Declare a fault if something is wrong."""
        for peer in self.peers:
            if (code := peer.process.poll()) is not None:
                self.declare(f"{peer.name} ended with {ending(code)}{peer.last_words()}")
                return
        progress = {peer.rank: self._board.read(peer.rank) for peer in self.peers}
        for peer in self.peers:
            silence = now - (progress[peer.rank].pulse or self._began)
            if silence > (CALL_SILENCE_S if self._calls or not progress[peer.rank].pulse else SILENCE_S):
                self.declare(f"{peer.name} is stuck: no sign of life for {silence:.1f} s{peer.last_words()}")
                return
        if self._failed and now - self._failed_at > _GRACE_S:
            rank, report = min(self._failed.items(), key=lambda item: int(item[1]["step"]))
            self.declare(f"rank {rank} failed in step {report['step']}: {report['error']}")
            return
        done = min(p.done for p in progress.values())
        while self._pending and self._pending[0][0] <= done:
            self._pending.popleft()
        if self._pending and now > self._pending[0][1]:
            step = self._pending[0][0]
            self.declare(self._stuck(step, progress))

    def _stuck(self, step: int, progress: Mapping[int, Progress]) -> str:
        """Which ranks hold up a step: those that are behind the others."""
        behind = {rank: (at.received, at.calls, at.queued, at.done) for rank, at in progress.items()}
        least = min(behind.values())
        peers = [peer for peer in self.peers if behind[peer.rank] == least]
        at = progress[peers[0].rank]
        state = "on its device" if at.queued >= step else "being computed" if at.received >= step else "not read"
        names = ", ".join(peer.name for peer in peers)
        return f"{names} stuck: step {step} is {state} after {at.calls} collectives{peers[0].last_words()}"
