"""One package, however it is installed; a client loads nothing that computes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCE = ("triptych", "kernels", "backends", "python_models", "client", "pyproject.toml", "README.md", "LICENSE")
_USE = """
import importlib, sys
from pathlib import Path
ours, theirs = sys.argv[1:]
sys.path[:0] = [ours]
sys.path.append(theirs)
import triptych
for name in ("kernels", "backends.triptych", "python_models.contract", "client.sdk"):
    (path,) = importlib.import_module(f"triptych.{name}").__path__
    assert path.startswith(ours), path
assert triptych.__file__.startswith(ours)
assert triptych.__version__
for name in triptych.__all__:
    getattr(triptych, name)
page = Path(ours, "triptych", "client", "page")
assert (page / "dist" / "index.html").is_file()
assert list(page.glob("dist/assets/*.js"))
# what it is built from stays behind
assert [path.name for path in page.iterdir()] == ["dist"]
"""


def test_a_wheel_has_all_of_it(tmp_path: Path) -> None:
    """Built from the files that git knows, unpacked as pip does, used without the checkout."""
    source, packages = tmp_path / "source", tmp_path / "packages"
    listing = subprocess.run(["git", "ls-files", "-z", *SOURCE], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in listing.stdout.split("\0"):
        # not a deletion that is not committed yet; weights take time to pack and show nothing
        if name and (ROOT / name).is_file() and not name.endswith(".safetensors"):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            os.link(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--quiet"]
    options = ["--disable-pip-version-check", "--no-cache-dir", "--target", str(packages), str(source)]
    subprocess.run(command + options, check=True)
    there = next(path for path in sys.path if path.endswith("site-packages"))
    # -I: neither the working directory nor the installation of this checkout
    subprocess.run([sys.executable, "-I", "-S", "-c", _USE, str(packages), there], check=True, cwd=tmp_path)


def test_a_client_does_not_load_torch() -> None:
    code = (
        "import sys, triptych\n"
        "triptych.Client, triptych.AsyncClient, triptych.TriptychError\n"
        "heavy = {'torch', 'transformers', 'fastapi', 'av'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd="/")
