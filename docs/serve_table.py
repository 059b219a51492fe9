"""Writes docs/serve.md: every option of ``triptych serve``, from the parser that takes them.

python docs/serve_table.py            write docs/serve.md
python docs/serve_table.py --check    fail where it is not current
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from pathlib import Path

from triptych.client.cli.main import build

PAGE = Path(__file__).parent / "serve.md"
_HEAD = """# Every option of `triptych serve`

As `triptych serve --help` says them; an unknown option is an error that names the nearest one. What those for prompts
and media do exactly is in [options.md](options.md), of checkpoints in [loading.md](loading.md), of access in
[security.md](security.md); what to turn first in [tuning.md](tuning.md). Options of *model and engine* are also the
fields of `settings` in each `config.pbtxt`, with underscores. Written by `make options`.
"""


def write() -> str:
    """The page."""
    serve = build()._subparser("serve")
    lines = [_HEAD]
    for group in serve._action_groups:
        rows = list(_rows(group))
        if rows:
            title = (group.title or "").capitalize()
            lines += [f"## {title}\n", "| option | what |", "|---|---|", *rows, ""]
    return "\n".join(lines).rstrip() + "\n"


def _rows(group: argparse._ArgumentGroup) -> Iterator[str]:
    for action in group._group_actions:
        if isinstance(action, argparse._HelpAction):
            continue
        text = (action.help or "") % {"default": action.default, "prog": "triptych serve"}
        names = ", ".join(f"`{name}`" for name in action.option_strings) or f"`{action.metavar}`"
        if action.option_strings and action.nargs != 0:
            value = action.metavar or "|".join(map(str, action.choices or ())) or action.dest.upper()
            names = re.sub(r"`$", f" {value}`", names) if isinstance(value, str) else names
        yield f"| {_cell(names)} | {_cell(text)} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def main() -> None:
    """Write the page, or compare it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    text = write()
    if not parser.parse_args().check:
        PAGE.write_text(text)
    elif not PAGE.is_file() or PAGE.read_text() != text:
        raise SystemExit(f"{PAGE} is not current: make options")


if __name__ == "__main__":
    main()
