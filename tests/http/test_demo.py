"""The demo, as `make demo` runs it: the built-in model answers about real files through the whole path."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_demo_answers_about_a_picture_a_video_and_a_sound(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "demo.py")],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=tmp_path,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    answers = [part.partition("\n")[2].strip() for part in run.stdout.split("$ triptych chat")[1:]]
    picture, video, sound = (answer.splitlines()[0] for answer in answers)
    assert picture == "a red circle at the top left, a blue star at the top right and a yellow triangle at the bottom"
    assert video == "moving right"
    assert sound == "4719"
