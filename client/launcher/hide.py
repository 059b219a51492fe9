"""Takes a secret out of a command line, which every user of the machine may read."""

from __future__ import annotations

from pathlib import Path

# of /proc/PID/stat, counted from the process's state on
_ARG_START, _ARG_END = 45, 46


def hide(secret: str, pid: int | None = None) -> bool:
    """Overwrite a secret in the command line of a process, as a program does that changes its title.

    The process must have read its arguments. Whoever looked before has seen it.

    Args:
        secret: what to overwrite, everywhere it stands.
        pid: this process or one that it started; None: this one.

    Returns:
        Whether it stands there no more; the system may forbid one process to write another's memory.
    """
    process = Path("/proc") / ("self" if pid is None else str(pid))
    found = secret.encode()
    try:
        stat = (process / "stat").read_text().rpartition(")")[2].split()
        start, end = int(stat[_ARG_START]), int(stat[_ARG_END])
        with (process / "mem").open("r+b", buffering=0) as memory:
            memory.seek(start)
            arguments = memory.read(end - start)
            memory.seek(start)
            memory.write(arguments.replace(found, b"*" * len(found)))
        return found not in (process / "cmdline").read_bytes()
    except (OSError, ValueError, IndexError):
        return False
