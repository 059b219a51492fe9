"""Finds, starts and supervises a tritonserver with a model repository."""

from .binary import ServerBinary, find_server
from .checks import Check, checks
from .download import Download
from .errors import LauncherError
from .gpu import Placement, place
from .server import TritonServer

__all__ = [
    "Check",
    "Download",
    "LauncherError",
    "Placement",
    "ServerBinary",
    "TritonServer",
    "checks",
    "find_server",
    "place",
]
