"""Runs a server and outlives its starter just long enough to clean up after it.

Run as a program of its own (``python -I -S guard.py``): a process with one thread that ends the server, its model
processes and their shared memory also when the launcher is killed. It reads one line of JSON from its standard input
(not from the command line, which everybody may see, for it holds the environment); the end of the input is the order
to stop. It prints the server's pid, and later the server's exit status.
"""

from __future__ import annotations

import contextlib
import ctypes
import glob
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from typing import Any

PR_SET_PDEATHSIG = 1
TICK_S = 0.1


def main(job: dict[str, Any]) -> None:
    """Run ``job["command"]`` until it ends or the starter wants it to."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    starter = os.getppid()
    with open(job["log"], "ab", buffering=0) as log:
        server = subprocess.Popen(
            job["command"],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=job["cwd"],
            env=job["env"],
            start_new_session=True,
            preexec_fn=_prepare_server,
        )
    try:
        _say(f"pid {server.pid}")
        while server.poll() is None and os.getppid() == starter:
            if _input_ended():
                break
        _end(server, float(job["grace_s"]))
    finally:
        _kill_group(server.pid)
        remove_shared_memory(job["shm_prefix"])
        _say(f"exit {server.returncode}")
        # until then the starter may want to read the log in it
        while os.getppid() == starter and not _input_ended():
            pass
        shutil.rmtree(job["folder"], ignore_errors=True)


def remove_shared_memory(shm_prefix: str) -> None:
    """Remove the shared memory of a server that has ended."""
    for region in glob.glob(f"/dev/shm/{glob.escape(shm_prefix)}*"):
        os.unlink(region)


def _input_ended() -> bool:
    """Wait for a moment; whether the starter has closed the input."""
    readable, _, _ = select.select([0], [], [], TICK_S)
    return bool(readable) and not os.read(0, 4096)


def _kill_group(group: int) -> None:
    """Kill the model processes that are left of the server's process group, and wait until they are gone."""
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            os.killpg(group, signal.SIGKILL)
        except OSError:
            break
        time.sleep(0.01)


def _prepare_server() -> None:
    """In the new process: die with the guard, and take the signals the guard ignores."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def _end(server: subprocess.Popen[bytes], grace_s: float) -> None:
    if server.poll() is None:
        server.terminate()
        try:
            server.wait(grace_s)
        except subprocess.TimeoutExpired:
            server.kill()
    server.wait()


def _say(text: str) -> None:
    # where nobody listens any more, the work goes on
    with contextlib.suppress(BrokenPipeError):
        os.write(1, f"{text}\n".encode())


if __name__ == "__main__":
    main(json.loads(sys.stdin.buffer.readline()))
