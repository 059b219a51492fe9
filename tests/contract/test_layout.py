"""The promises of the tree: one package, imports that only go down, third parties behind their fences."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
TOP = ("kernels", "python_models", "backends", "client")
# the package itself: what users import from it, above all others
API = "triptych"

# Which packages a module may import from; the longest matching prefix decides.
ALLOWED = {
    "kernels": ("kernels",),
    "python_models": ("python_models", "kernels"),
    "python_models/contract": ("python_models/contract",),
    "python_models/repository": ("python_models/contract", "python_models/repository"),
    "python_models/media": (
        "python_models/media",
        "python_models/contract",
        "python_models/families/base",
        "python_models/process",
    ),
    "python_models/language_model/engine": (
        "python_models/language_model/engine",
        "python_models/language_model/runner",
        "python_models/contract",
        "python_models/families/base",
        "python_models/stage",
        "kernels",
    ),
    "python_models/language_model/runner": (
        "python_models/language_model/runner",
        "python_models/contract",
        "python_models/families",
        "python_models/process",
        "kernels",
    ),
    "backends": ("backends", "python_models"),
    API: (API, *TOP),
    "client": ("client", "python_models/contract", "python_models/repository", "python_models/builtin"),
}
# third-party package -> folders that may import it (None: torch is banned where listed in BANNED instead)
FENCES = {
    "triton_python_backend_utils": ("backends/triptych",),
    "fastapi": ("client/openai_api",),
    "uvicorn": ("client/cli", "client/openai_api"),
    "tritonclient": ("client", "backends/triptych/remote"),
    "decord": ("python_models/media", "python_models/builtin/training"),
    "librosa": ("python_models/media", "python_models/builtin/training"),
    "transformers": ("python_models/families", "python_models/language_model", "python_models/builtin/training"),
}
TORCH_FREE = (
    "client",
    "python_models/contract",
    "python_models/repository",
    "python_models/media",
    "python_models/preprocess",
)


def modules() -> Iterator[Path]:
    for top in (*TOP, API):
        yield from (p for p in sorted((ROOT / top).rglob("*.py")) if "__pycache__" not in p.parts)


def place(path: Path) -> str:
    return path.relative_to(ROOT).with_suffix("").as_posix()


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """(what is imported, runtime): ours as a folder path, others as the top package name."""
    tree = ast.parse(path.read_text())
    typing_only = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and getattr(block.test, "id", "") == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(tree):
        runtime = id(node) not in typing_only
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            stem = "/".join((*base, *(node.module.split(".") if node.module else ())))
            for alias in node.names:
                full = f"{stem}/{alias.name}"
                yield full if (ROOT / f"{full}.py").exists() or (ROOT / full).is_dir() else stem, runtime
            continue
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
            if names[0].startswith("triptych"):
                names = [f"{names[0]}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name.startswith("triptych."):
                full = "/".join(name.split(".")[1:])
                yield full, runtime
            else:
                yield name.split(".")[0], runtime


def test_the_four_top_folders_are_namespace_portions() -> None:
    for top in TOP:
        assert not (ROOT / top / "__init__.py").exists(), f"{top}/__init__.py would shadow other packages"
        assert (ROOT / top / "py.typed").exists()


def test_packages_in_pyproject_match_the_tree() -> None:
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    found = {API} | {f"triptych.{top}" for top in TOP}
    found |= {
        "triptych." + ".".join(p.parent.relative_to(ROOT).parts)
        for p in modules()
        if p.name == "__init__.py" and p.parent != ROOT / API
    }
    assert listed == found


def test_every_folder_with_modules_is_a_package() -> None:
    for path in modules():
        if path.parent.parent != ROOT and path.parent != ROOT:
            assert (path.parent / "__init__.py").exists() or path.parent.name in TOP, path


def test_imports_only_go_down() -> None:
    wrong = []
    for path in modules():
        here = place(path)
        rule = max((r for r in ALLOWED if here == r or here.startswith(f"{r}/")), key=len)
        for target, _ in imports(path):
            if target.split("/")[0] in (*TOP, API) and not any(
                target == a or target.startswith(f"{a}/") for a in ALLOWED[rule]
            ):
                wrong.append(f"{here} imports {target}; allowed: {ALLOWED[rule]}")
    assert not wrong, "\n".join(wrong)


def test_third_parties_stay_behind_their_fences() -> None:
    wrong = []
    for path in modules():
        here = place(path)
        for target, runtime in imports(path):
            if target in FENCES and not any(here == f or here.startswith(f"{f}/") for f in FENCES[target]):
                wrong.append(f"{here} imports {target}")
            if target == "torch" and runtime and any(here.startswith(f"{f}/") for f in TORCH_FREE):
                wrong.append(f"{here} imports torch")
    assert not wrong, "\n".join(wrong)


def test_our_folders_are_not_importable_by_bare_name() -> None:
    """transformers imports a package named ``kernels`` where it finds one; ours must never be it."""
    code = (
        "import triptych.python_models.contract.settings, sys\n"
        "import importlib.util as u\n"
        "for name in ('kernels', 'client', 'backends', 'python_models'):\n"
        "    spec = u.find_spec(name)\n"
        "    assert spec is None or spec.origin is None or not spec.origin.startswith(sys.argv[1]), spec\n"
    )
    subprocess.run([sys.executable, "-c", code, str(ROOT)], check=True, cwd="/")


def test_model_repository_holds_no_logic() -> None:
    files = [p for p in (ROOT / "model_repository").rglob("*") if p.is_file()]
    assert files
    assert {p.name for p in files} <= {"config.pbtxt", ".gitkeep", "README.md"}
