"""The command line: picks the subcommand and turns its failures into one clear message."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import version

from . import chat, doctor, serve
from .parser import CommandError, Parser

_COMMANDS = {"serve": serve, "chat": chat, "doctor": doctor}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: its arguments; None takes the process's own.

    Returns:
        The exit status: 0 where all went well, 1 for a failure, 2 for wrong arguments, 130 after Ctrl-C.
    """
    args = build().parse(sys.argv[1:] if argv is None else argv)
    try:
        status: int = _COMMANDS[args.command].run(args)
    except CommandError as error:
        print(f"triptych {args.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return status


def build() -> Parser:
    """The parser with all subcommands."""
    parser = Parser(
        prog="triptych",
        description="Serve a multimodal model on Triton Inference Server behind an OpenAI-compatible endpoint.",
        epilog="triptych COMMAND --help lists the options of a command.",
    )
    parser.add_argument("--version", action="version", version=f"triptych {version('triptych')}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, module in _COMMANDS.items():
        sub = commands.add_parser(
            name,
            help=module.SUMMARY,
            description=module.DESCRIPTION,
            epilog=module.EXAMPLES,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(sub)
    return parser
