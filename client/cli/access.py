"""Who may ask and how: options of ``triptych serve`` for keys, TLS, origins and the way it ends."""

from __future__ import annotations

import argparse
import math
import os
import re
import ssl
import sys
from collections.abc import Iterable, MutableMapping
from pathlib import Path
from typing import TYPE_CHECKING

from .parser import CommandError

if TYPE_CHECKING:
    from triptych.client.openai_api.keys import ApiKeys

ENVIRONMENT = "TRIPTYCH_API_KEY"
TRITON_KEY = "TRIPTYCH_TRITON_KEY"

# What fits into a header without quoting.
_KEY = re.compile(r"[!-+\--~]+")
# ... and into an option of tritonserver
_TRITON_KEY = re.compile(r"[A-Za-z0-9_-]{16,}")
_ORIGIN = re.compile(r"\*|[a-z][a-z0-9+.-]*://[^/\s]+")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    group = parser.add_argument_group("access")
    group.add_argument(
        "--api-key",
        action="append",
        default=[],
        metavar="KEY",
        help="requests must carry this key, or another one given (may be repeated; others on this machine may see it "
        f"before it is hidden: rather use --api-key-file, or {ENVIRONMENT} with one key or several, with commas)",
    )
    group.add_argument(
        "--api-key-file", action="append", default=[], metavar="FILE", help="a key in each line (may be repeated)"
    )
    group.add_argument(
        "--allowed-origins",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="scripts of this web page, such as https://example.org, may ask; *: of any (may be repeated)",
    )
    group.add_argument("--ssl-certfile", metavar="FILE", help="serve https with this certificate chain (PEM)")
    group.add_argument("--ssl-keyfile", metavar="FILE", help="its private key, where it is not in the same file")
    group.add_argument(
        "--open-triton-management",
        action="store_true",
        help="leave loading and unloading models, shared memory, trace and log settings of the Triton server to every "
        f"user of this machine (default: they want a key, a random one or that of {TRITON_KEY})",
    )
    group.add_argument(
        "--drain-timeout-s",
        type=float,
        default=30,
        metavar="X",
        help="after SIGTERM, requests that run may go on for so long (default %(default)s)",
    )
    group.add_argument(
        "--keep-alive-s",
        type=float,
        default=75,
        metavar="X",
        help="keep an idle connection for so long; longer than what is in front of it does (default %(default)s)",
    )


def check(args: argparse.Namespace) -> None:
    """Find what is wrong with them before a model is loaded for minutes.

    Raises:
        CommandError: naming the option.
    """
    for option in ("drain_timeout_s", "keep_alive_s"):
        if not 0 <= getattr(args, option) < math.inf:
            raise CommandError(f"--{option.replace('_', '-')} must be a number, at least 0")
    for origin in args.allowed_origins:
        if not _ORIGIN.fullmatch(origin):
            raise CommandError(
                f"--allowed-origins {origin!r} is no origin", "write scheme and host, such as https://example.org, or *"
            )
    if args.ssl_keyfile and not args.ssl_certfile:
        raise CommandError("--ssl-keyfile needs --ssl-certfile", "name the certificate too")
    if args.ssl_certfile:
        try:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            # without a password for it, an encrypted key would be asked for on the terminal
            context.load_cert_chain(args.ssl_certfile, args.ssl_keyfile, password=lambda: "")
        except OSError as error:
            files = " and ".join(filter(None, (args.ssl_certfile, args.ssl_keyfile)))
            raise CommandError(
                f"{files} cannot be used for https: {error.strerror or error}",
                "--ssl-certfile wants a certificate in PEM, --ssl-keyfile its private key without a password",
            ) from None


def take_keys(args: argparse.Namespace, environment: MutableMapping[str, str] = os.environ) -> ApiKeys:
    """The API keys; afterwards neither the arguments, nor the environment of other processes, nor the title has them.

    Raises:
        CommandError: a key that no header can carry, or a file without any.
    """
    # not for the sake of --help
    from triptych.client.launcher.hide import hide
    from triptych.client.openai_api.keys import ApiKeys

    keys = list(args.api_key)
    for key in keys:
        _check_key(key, "a key given by --api-key")
        if not hide(key):
            print(
                f"triptych serve: --api-key stays visible in the list of processes; use {ENVIRONMENT}", file=sys.stderr
            )
    args.api_key = []
    if (given := environment.pop(ENVIRONMENT, None)) is not None:
        keys += _several(given.split(","), ENVIRONMENT)
    for name in args.api_key_file:
        try:
            lines = Path(name).read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            said = error.strerror if isinstance(error, OSError) else "it is no text"
            raise CommandError(f"--api-key-file {name}: {said}") from None
        keys += _several((line for line in lines if not line.startswith("#")), f"--api-key-file {name}")
    return ApiKeys(keys)


def take_triton_key(args: argparse.Namespace, environment: MutableMapping[str, str] = os.environ) -> str | None:
    """The key for the Triton server's management: "" for none, None where one is to be made.

    Raises:
        CommandError: a key that is not allowed, or a contradiction.
    """
    given = environment.pop(TRITON_KEY, None)
    if args.open_triton_management:
        if given:
            raise CommandError(f"--open-triton-management and {TRITON_KEY} contradict each other", "use one")
        return ""
    if given is not None and not _TRITON_KEY.fullmatch(given):
        raise CommandError(f"{TRITON_KEY} must be at least 16 letters, digits, - and _")
    return given


def _several(lines: Iterable[str], where: str) -> list[str]:
    keys = [line.strip() for line in lines if line.strip()]
    for key in keys:
        _check_key(key, f"a key of {where}")
    if not keys:
        # a deployment that asked for keys must not be open
        raise CommandError(f"{where} has no key", "write one, or leave it out to let everybody ask")
    return keys


def _check_key(key: str, what: str) -> None:
    # the key itself must not be in a message
    if not _KEY.fullmatch(key):
        raise CommandError(
            f"{what} is empty or has a character that is not allowed", "use ASCII without spaces or commas"
        )
