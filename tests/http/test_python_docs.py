"""docs/python.md and the examples beside it, run as written but for the address."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
ADDRESS = "127.0.0.1:8001"


def test_every_block_of_the_page(server: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    text = (ROOT / "docs" / "python.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S)
    assert len(blocks) >= 9
    monkeypatch.chdir(ROOT)
    names: dict[str, Any] = {"__name__": "docs"}
    said = []
    for block in blocks:
        exec(compile(block.replace(ADDRESS, f"127.0.0.1:{server.grpc_port}"), "docs/python.md", "exec"), names)
        said.append(capsys.readouterr().out)
    assert all(said)
    # what the built-in model sees, in whatever form it is given
    assert said[1].split() == ["3"] * 4
    assert said[2].strip() == "True"
    assert said[3].split("\n")[0] in ("red", "green", "blue")
    assert "item 1: messages[0].role" in said[4]
    assert said[4].rstrip().endswith("[1] [True, False, True]")


def test_the_examples(server: Any) -> None:
    run = {"capture_output": True, "text": True, "timeout": 300, "cwd": "/"}
    done: Any = subprocess.run([sys.executable, str(ROOT / "examples" / "offline.py")], **run)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("What is in the picture? ")
    assert "circle" in lines[0]
    assert lines[1].startswith("How many shapes are there? 3 (")
    assert lines[4].startswith("What is this? failed: messages[0].content[0]: not a picture")
    assert len(lines) == 6
    assert "5/5" in done.stderr
    address = ["--url", f"127.0.0.1:{server.grpc_port}"]
    done = subprocess.run([sys.executable, str(ROOT / "examples" / "grpc_client.py"), *address], **run)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert re.search(r" \(\d+ tokens\)$", done.stdout, re.M)
    assert sum(line.startswith(("What ", "How ")) for line in lines) >= 3
