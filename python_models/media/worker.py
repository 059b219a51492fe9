"""The decode worker: a process that decodes one file at a time and may die without harm to anything else.

It talks over one SOCK_SEQPACKET socket: a job is a JSON message with the file's bytes in an anonymous memory file, an
answer is a JSON message with the decoded array in another. It imports numpy, PyAV and decord, never torch.
"""

from __future__ import annotations

import fcntl
import json
import mmap
import os
import resource
import signal
import socket
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..contract.errors import ErrorKind, TriptychError
from ..families.base import FrameSampling
from ..process import end_with_parent
from .audio import read_with_av
from .video import decode_video

MAX_MESSAGE = 65536
MAX_MEMORY = 8 * 2**30
"""Address space of a worker: a file that makes a decoder ask for more fails alone."""


def serve(fd: str, parent: str) -> None:
    """Answer jobs until the other end closes.

    Args:
        fd: number of the worker's end of the socket.
        parent: process id of the owner; the worker ends with it, whatever it is doing.
    """
    if not end_with_parent(int(parent)):
        return
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    connection = socket.socket(fileno=int(fd))
    connection.sendall(b'{"ready": true}')
    while True:
        message, fds, _, _ = socket.recv_fds(connection, MAX_MESSAGE, 1)
        if not message:
            return
        answer, result = _answer(json.loads(message), fds[0])
        try:
            socket.send_fds(connection, [json.dumps(answer).encode()], [] if result is None else [result])
        finally:
            if result is not None:
                os.close(result)


def _answer(job: dict[str, Any], source: int) -> tuple[dict[str, Any], int | None]:
    """(answer, file descriptor of its array or None); closes ``source``."""
    memory = _Memory()
    try:
        path = f"/proc/self/fd/{source}"
        if job["kind"] == "video":
            info = decode_video(
                path,
                FrameSampling(**job["sampling"]),
                job["max_pixels"],
                job["max_frames"],
                lambda shape: memory.array(shape, np.uint8),
                job["decoders"],
            )
            about = asdict(info)
        else:
            samples, rate = read_with_av(path, job["max_s"])
            memory.array(samples.shape, np.float32)[:] = samples
            about = {"rate": rate}
        return {"about": about, "shape": memory.shape}, memory.seal()
    except TriptychError as error:
        memory.close()
        return {"error": error.kind.value, "message": error.message}, None
    except MemoryError:
        memory.close()
        message = f"decoding the {job['kind']} needs more memory than a decoder may use"
        return {"error": ErrorKind.TOO_LARGE.value, "message": message}, None
    except ImportError as error:
        memory.close()
        message = f"this server lacks what it needs to decode the {job['kind']}: {error}"
        return {"error": ErrorKind.STAGE_FAILED.value, "message": message}, None
    except Exception as error:  # noqa: BLE001 - hostile files raise anything; the worker must live on
        memory.close()
        message = f"the {job['kind']} is damaged ({type(error).__name__} while decoding)"
        return {"error": ErrorKind.INVALID_MEDIA.value, "message": message}, None
    finally:
        os.close(source)


class _Memory:
    """An array in an anonymous memory file, which the other process maps without a copy."""

    def __init__(self) -> None:
        self.shape: tuple[int, ...] = ()
        self._fd: int | None = None

    def array(self, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
        """Make the file and map it."""
        self.shape = shape
        size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        self._fd = os.memfd_create("triptych", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        if not size:
            return np.zeros(shape, dtype)
        os.ftruncate(self._fd, size)
        return np.frombuffer(mmap.mmap(self._fd, size), dtype).reshape(shape)

    def seal(self) -> int:
        """The file, never to shrink again: a reader's mapping stays valid whatever happens here."""
        assert self._fd is not None
        fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
        return self._fd

    def close(self) -> None:
        """Give the memory back."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None
