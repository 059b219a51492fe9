"""argparse with two habits more: an unknown option names the nearest known one, failures have one type."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Sequence
from typing import Any, NoReturn


class CommandError(Exception):
    """A failure of a command, with what to do about it.

    Attributes:
        message: what went wrong.
        remedy: what to do; "" where the message says it.
    """

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message}\n  {self.remedy}" if self.remedy else self.message


class Parser(argparse.ArgumentParser):
    """An ArgumentParser without abbreviations."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False} | kwargs)

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parse; wrong arguments end the process with status 2 and a message.

        Raises:
            SystemExit: status 2, or 0 after ``--help``.
        """
        args, unknown = self.parse_known_args(argv)
        for item in unknown:
            if item.startswith("-") and item != "-":
                self.refuse_option(item.split("=")[0], args.command)
        if unknown:
            self.error(f"unexpected argument {unknown[0]!r} (put text with spaces in quotes)")
        return args

    def refuse_option(self, option: str, command: str) -> NoReturn:
        """End with a message that names the nearest option of a subcommand."""
        known = self._subparser(command)._option_string_actions
        near = difflib.get_close_matches(option, known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"triptych {command} --help lists what there is"
        self.error(f"unknown option {option}; {hint}")

    def error(self, message: str) -> NoReturn:
        """End the process with status 2."""
        print(f"{self.prog}: {message}", file=sys.stderr)
        sys.exit(2)

    def _subparser(self, command: str) -> argparse.ArgumentParser:
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                found: argparse.ArgumentParser = action.choices[command]
                return found
        return self
