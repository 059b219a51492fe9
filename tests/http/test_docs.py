"""What the documentation says is so: every code block runs as written, every link leads somewhere, the site builds.

A block that cannot run here stands after ``<!-- not run: reason -->``. The server on port 30000 is one on the built-in
model.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "docker/README.md",
    *sorted(p for p in (ROOT / "docs").rglob("*.md") if "site" not in p.parts),
]
SHELL = ("bash", "sh")
SHOWN = ("text", "json", "yaml", "toml", "ebnf", "jsonc", "promql", "jinja")
_FENCE = re.compile(
    r"(?P<before>[^\n]*)\n(?P<indent> *)```(?P<language>[^\n`]*)\n(?P<body>.*?)\n(?P=indent)```", re.DOTALL
)
_NOT_RUN = re.compile(r"\s*<!-- not run: .{3,} -->")
_LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)|!\[[^\]]*\]\(([^)\s]+)\)")
_SERVER = re.compile(r"(?:localhost|127\.0\.0\.1):(30000|800[012])\b")
# pages that have tests of their own, which look at more than that they run
ELSEWHERE = {"docs/python.md": "test_python_docs.py", "docs/tools.md": "test_tools.py"}
LIMIT_S = 120


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: Path
    line: int
    language: str
    body: str
    runs: bool

    def __str__(self) -> str:
        return f"{name(self.page)}:{self.line}"


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path) -> Iterator[Block]:
    text = "\n" + page.read_text()
    for match in _FENCE.finditer(text):
        body = re.sub(rf"(?m)^{match['indent']}", "", match["body"])
        line = text.count("\n", 0, match.start("language"))
        yield Block(page, line, match["language"].strip(), body, not _NOT_RUN.fullmatch(match["before"]))


BLOCKS = [block for page in PAGES for block in blocks(page)]


def run(command: list[str], text: str, ports: Mapping[str, int]) -> str:
    """Run a block against the server; its output."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PATH": path, "TRIPTYCH_URL": f"http://127.0.0.1:{ports['30000']}"},
        start_new_session=True,
    ) as process:
        try:
            text = _SERVER.sub(lambda match: f"127.0.0.1:{ports[match[1]]}", text)
            out, errors = process.communicate(text, timeout=LIMIT_S)
        finally:
            # whatever a block has started and left
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, f"{out[-2000:]}\n{errors[-4000:]}"
    return out


def test_blocks_name_their_language() -> None:
    wrong = [f"{block}: {block.language!r}" for block in BLOCKS if block.language not in (*SHELL, *SHOWN, "python")]
    assert not wrong, "\n".join(wrong)
    for block in BLOCKS:
        if block.language == "json":
            json.loads(block.body)
        elif block.language == "yaml":
            list(yaml.safe_load_all(block.body))


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language in SHELL and b.runs], ids=str)
def test_commands(block: Block, documented: Any) -> None:
    output = run(["bash", "-euo", "pipefail", "-s"], block.body, documented)
    # curl ends well even where the answer is an error
    assert '{"error":' not in output, output


@pytest.mark.parametrize("page", [p for p in PAGES if any(b.language == "python" for b in blocks(p))], ids=name)
def test_python(page: Path, documented: Any) -> None:
    """The Python of a page in one piece: later blocks may use what earlier ones made."""
    if (own := ELSEWHERE.get(name(page))) is not None:
        assert page.name in Path(__file__).with_name(own).read_text()
        return
    code = "\n\n".join(block.body for block in blocks(page) if block.language == "python" and block.runs)
    if code:
        run([sys.executable, "-"], code, documented)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    wrong = []
    for match in _LINK.finditer(text):
        target = match[1] or match[2]
        if "://" in target or target.startswith("mailto:"):
            continue
        place, _, anchor = target.partition("#")
        file = (page.parent / place).resolve() if place else page
        if not file.exists() or (anchor and file.suffix == ".md" and anchor not in anchors(file)):
            wrong.append(target)
    assert not wrong, wrong


def anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def test_the_page_of_options_is_current() -> None:
    subprocess.run([sys.executable, ROOT / "docs/serve_table.py", "--check"], check=True)


def test_the_site_builds(tmp_path: Path) -> None:
    site = tmp_path / "site"
    done = subprocess.run(
        [Path(sys.executable).with_name("mkdocs"), "build", "--strict", "--quiet", "--site-dir", site],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=LIMIT_S,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (site / "index.html").is_file()
    # every page is reached, and readers fetch nothing from elsewhere
    for page in (ROOT / "docs").rglob("*.md"):
        place = page.relative_to(ROOT / "docs").with_suffix("")
        where = site / place / "index.html" if place.name != "index" else site / place.with_suffix(".html")
        assert where.is_file(), place
        outside = re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="(https?://[^"]+)"', where.read_text())
        assert not outside, (place, outside)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="session")
def documented(start: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mapping[str, int]]:
    """A server on the built-in model: the port of the documentation -> its own."""
    log = tmp_path_factory.mktemp("documented") / "server.log"
    ports = {"8000": free_port(), "8001": free_port(), "8002": free_port()}
    with start(
        "--port=0",
        f"--http-port={ports['8000']}",
        f"--grpc-port={ports['8001']}",
        f"--metrics-port={ports['8002']}",
        "--open-triton-management",
        f"--server-log={log}",
    ) as served:
        url = served.wait_for("ready: ").split()[1]
        yield ports | {"30000": int(url.rpartition(":")[2])}
