"""A pool of decode workers (worker.py) for one asyncio loop: killable, replaced on death, gone with their owner."""

from __future__ import annotations

import asyncio
import fcntl
import json
import mmap
import os
import signal
import socket
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..contract.errors import ErrorKind, TriptychError
from ..process import ending, python_command
from .limits import unreadable
from .worker import MAX_MESSAGE

START_TIMEOUT_S = 60.0
_ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "TMPDIR")
_PIECE = 4 * 2**20
_CRASHES = (signal.SIGSEGV, signal.SIGABRT, signal.SIGFPE, signal.SIGBUS, signal.SIGILL)


class DecoderCrashedError(Exception):
    """A decoder crashed on a file."""


class DecoderHungError(Exception):
    """A decoder did not come to an end with a file."""


@dataclass(frozen=True)
class Decoded:
    """What a worker gave back.

    Attributes:
        about: its description of the content, see worker.py.
        data: flat bytes, in memory of their own (freed with the last array that views them).
        shape: of the array in ``data``.
    """

    about: dict[str, Any]
    data: mmap.mmap | bytes
    shape: tuple[int, ...]

    def array(self, dtype: Any) -> NDArray[Any]:
        """The decoded array, without a copy."""
        return np.frombuffer(self.data, dtype=dtype).reshape(self.shape)


class DecodePool:
    """At most ``size`` workers; a job waits for a free one. Use from one running loop only, whose thread must live
    as long as the workers: they die with the thread that started them.
    """

    def __init__(self, size: int) -> None:
        self._free = asyncio.Semaphore(size)
        self._idle: list[_Worker] = []
        self._all: set[_Worker] = set()
        self._closed = False

    @property
    def pids(self) -> list[int]:
        """Process ids of the living workers."""
        return [worker.process.pid for worker in self._all]

    async def start(self) -> None:
        """Start one worker now, so that a broken environment shows at once.

        Raises:
            TriptychError: STAGE_FAILED where it does not come up.
        """
        async with self._free:
            self._idle.append(await self._spawn())

    async def run(self, job: Mapping[str, Any], data: bytes, patience_s: float | None = None) -> Decoded:
        """Decode a file. Cancelling the call kills the worker.

        Args:
            job: see worker.py.
            data: the file.
            patience_s: a worker that takes longer is killed; waiting for a free one does not count.

        Raises:
            DecoderCrashedError: the worker died of a native crash.
            DecoderHungError: it took longer.
            TriptychError: what the worker says, or STAGE_FAILED where it was killed.
        """
        async with self._free:
            worker = await self._take()
            try:
                answer, fd = await asyncio.wait_for(worker.call(job, data), patience_s)
            except asyncio.TimeoutError:
                await asyncio.shield(self._discard(worker))
                raise DecoderHungError from None
            except (EOFError, OSError):
                code = await self._discard(worker, grace_s=1.0)
                if -code in _CRASHES:
                    raise DecoderCrashedError from None
                raise TriptychError(
                    ErrorKind.STAGE_FAILED, f"a decode worker ended unexpectedly ({ending(code)}); try again"
                ) from None
            except BaseException:
                await asyncio.shield(self._discard(worker))
                raise
            self._idle.append(worker)
        if "error" in answer:
            raise TriptychError(ErrorKind(answer["error"]), answer["message"])
        return Decoded(answer["about"], _map(fd), tuple(answer["shape"]))

    async def close(self) -> None:
        """Kill all workers."""
        self._closed = True
        await asyncio.gather(*(self._discard(worker) for worker in list(self._all)))

    async def _take(self) -> _Worker:
        while self._idle:
            worker = self._idle.pop()
            if worker.process.poll() is None:
                return worker
            await self._discard(worker)
        return await self._spawn()

    async def _spawn(self) -> _Worker:
        if self._closed:
            raise TriptychError(ErrorKind.STAGE_FAILED, "the decode workers are shutting down")
        worker = _Worker()
        self._all.add(worker)
        try:
            await asyncio.wait_for(worker.receive(), START_TIMEOUT_S)
        except (EOFError, OSError, asyncio.TimeoutError):
            code = await self._discard(worker, grace_s=1.0)
            raise TriptychError(
                ErrorKind.STAGE_FAILED,
                f"the decode worker did not start ({ending(code)}); check that {worker.python} can import "
                "triptych.python_models.media.worker (numpy, av and soundfile must be installed for it)",
            ) from None
        except BaseException:
            await asyncio.shield(self._discard(worker))
            raise
        return worker

    async def _discard(self, worker: _Worker, grace_s: float = 0.0) -> int:
        """End a worker and reap it; gives its exit code.

        ``grace_s``: a worker whose socket has closed is dying of something: leave it time to show its exit code.
        """
        self._all.discard(worker)
        if worker in self._idle:
            self._idle.remove(worker)
        worker.socket.close()
        if grace_s:
            try:
                return await asyncio.to_thread(worker.process.wait, grace_s)
            except subprocess.TimeoutExpired:
                pass
        worker.process.kill()
        return await asyncio.to_thread(worker.process.wait)


class _Worker:
    """One process and this end of its socket."""

    def __init__(self) -> None:
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = python_command("triptych.python_models.media.worker:serve", str(theirs.fileno()), str(os.getpid()))
        self.python = command[0]
        with theirs:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                # decord's native log would write pieces of the caller's file to it
                stderr=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                cwd="/",
                env={k: os.environ[k] for k in _ENVIRONMENT if k in os.environ} | {"OMP_NUM_THREADS": "1"},
            )
        self.socket.setblocking(False)

    async def call(self, job: Mapping[str, Any], data: bytes) -> tuple[dict[str, Any], int | None]:
        fd = os.memfd_create("triptych", os.MFD_CLOEXEC)
        try:
            await _write(fd, data)
            socket.send_fds(self.socket, [json.dumps(dict(job)).encode()], [fd])
        finally:
            os.close(fd)
        return await self.receive()

    async def receive(self) -> tuple[dict[str, Any], int | None]:
        """The next message and its file descriptor; EOFError when the worker has gone."""
        await _readable(self.socket)
        message, fds, _, _ = socket.recv_fds(self.socket, MAX_MESSAGE, 1)
        if not message:
            raise EOFError
        return json.loads(message), (fds[0] if fds else None)


def video_job(sampling: Mapping[str, Any], max_pixels: int, max_frames: int) -> dict[str, Any]:
    """A job that decodes a video; ``sampling`` holds the fields of a FrameSampling."""
    return {
        "kind": "video",
        "sampling": dict(sampling),
        "max_pixels": max_pixels,
        "max_frames": max_frames,
        "decoders": ["decord", "av"],
    }


def audio_job(max_s: float) -> dict[str, Any]:
    """A job that decodes the sound track of a file that libsndfile does not read."""
    return {"kind": "audio", "max_s": max_s, "decoders": ["av"]}


async def decode(pool: DecodePool, job: Mapping[str, Any], data: bytes, patience_s: float | None = None) -> Decoded:
    """Run a job; a video on which decord crashes or hangs is tried again with PyAV alone.

    Args:
        pool: where.
        job: see worker.py.
        data: the file.
        patience_s: that decord has; the last decoder has what the caller has.

    Raises:
        TriptychError: INVALID_MEDIA also for a file that crashes the last decoder.
    """
    try:
        return await pool.run(job, data, patience_s if "decord" in job["decoders"] else None)
    except (DecoderCrashedError, DecoderHungError):
        if "decord" not in job["decoders"]:
            raise unreadable(f"the {job['kind']} is damaged: it crashed the decoder") from None
    return await decode(pool, {**job, "decoders": ["av"]}, data)


async def _readable(sock: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()
    fd = sock.fileno()

    def wake() -> None:
        if not ready.done():
            ready.set_result(None)

    loop.add_reader(fd, wake)
    try:
        await ready
    finally:
        loop.remove_reader(fd)


async def _write(fd: int, data: bytes) -> None:
    """Copy to a memory file, in pieces so that a large one does not hold up the loop."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view[:_PIECE]) :]
        await asyncio.sleep(0)
    os.lseek(fd, 0, os.SEEK_SET)


def _map(fd: int | None) -> mmap.mmap | bytes:
    """The sealed memory file as private memory; closes ``fd``."""
    if fd is None:
        raise TriptychError(ErrorKind.STAGE_FAILED, "a decode worker's answer has no data")
    try:
        if not fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
            raise TriptychError(ErrorKind.STAGE_FAILED, "a decode worker's answer is not sealed")
        size = os.fstat(fd).st_size
        # private and writable: torch warns of arrays it may not write to
        return mmap.mmap(fd, size, access=mmap.ACCESS_COPY) if size else b""
    finally:
        os.close(fd)
