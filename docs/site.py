"""What mkdocs needs beside its configuration.

Links that leave docs/ work in the repository, not on the site, where their files are named instead. And the package's
folders, which only its installation puts together, are put together for the reader of docstrings.
"""

from __future__ import annotations

import posixpath
import re
import shutil
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
_LINK = re.compile(r"\[([^\]]+)\]\(((?:\.\./)+[^)#\s]+)(?:#[^)]*)?\)")
_PACKAGE = ROOT / "build/docstrings/triptych"


def on_startup(**_: Any) -> None:
    """Called by mkdocs first of all."""
    shutil.rmtree(_PACKAGE, ignore_errors=True)
    _PACKAGE.mkdir(parents=True)
    for file in (ROOT / "triptych").glob("*.py"):
        (_PACKAGE / file.name).symlink_to(file)
    for folder in ("python_models", "client", "backends", "kernels"):
        (_PACKAGE / folder).mkdir()
        (_PACKAGE / folder / "__init__.py").touch()
        for path in (ROOT / folder).iterdir():
            (_PACKAGE / folder / path.name).symlink_to(path)


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Called by mkdocs with each page's text."""
    folder = posixpath.dirname(page.file.src_uri)

    def named(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join("docs", folder, match[2]))
        return match[0] if target.startswith("docs/") else f"{match[1]} (`{target}`)"

    return _LINK.sub(named, markdown)
