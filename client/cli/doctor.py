"""``triptych doctor``: whether this machine can serve, and what to do where it cannot."""

from __future__ import annotations

import argparse
import socket

from triptych.client.launcher import Check, checks

SUMMARY = "check whether this machine can serve"
DESCRIPTION = "Look at Python, libpython, the server binary, GPU, shared memory and the port, and say what to mend."
EXAMPLES = "Exit status 1 where something essential is missing."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("--tritonserver", metavar="PATH", help="program or installation folder (default: found)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default %(default)s)")
    parser.add_argument("--port", type=int, default=30000, metavar="N", help="its port (default %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Print one line for each check; 1 where an essential one failed."""
    found = checks(args.tritonserver)
    _show(found, "FAIL")
    # Another port is one option away, so a taken one is no reason to fail.
    _show([_port(args.host, args.port)], "warn")
    failed = [check.name for check in found if not check.ok]
    print(f"\nnot ready: {', '.join(failed)}" if failed else "\nready to serve: triptych serve")
    return 1 if failed else 0


def _show(found: list[Check], bad: str) -> None:
    for check in found:
        print(f"{'ok' if check.ok else bad:<5} {check.name:<14} {check.detail}")
        if not check.ok and check.remedy:
            print(f"{'':<20} -> {check.remedy}")


def _port(host: str, port: int) -> Check:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, OverflowError) as error:
            return Check("port", False, f"{host}:{port}: {error}", "stop what listens there, or serve with --port N")
    return Check("port", True, f"{host}:{port} is free")
