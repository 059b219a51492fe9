"""What the images run, outside of them; and what they are made from, linted."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
BIN = Path(sys.executable).parent
START_S = 180.0


def dependencies() -> list[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return [str(item) for item in project["dependencies"]]


def not_in_its_image() -> list[str]:
    """Top-level modules that are installed here and would not be in the endpoint's image."""
    wanted = [line for line in (DOCKER / "endpoint.txt").read_text().splitlines() if not line.startswith("#")]
    there: set[str] = {"triptych", "pip", "setuptools"}
    while wanted:
        requirement = Requirement(wanted.pop())
        if (name := canonicalize_name(requirement.name)) in there:
            continue
        there.add(name)
        for item in metadata.requires(name) or ():
            needs = Requirement(item)
            if needs.marker is None or any(needs.marker.evaluate({"extra": e}) for e in ("", *requirement.extras)):
                wanted.append(item.partition(";")[0])
    modules = metadata.packages_distributions()
    return [module for module, owners in modules.items() if not there & {canonicalize_name(o) for o in owners}]


@contextmanager
def running(script: str, *arguments: str, **environment: str) -> Iterator[list[str]]:
    """An image's entry point with the installed command; its lines of output, as they come."""
    lines: list[str] = []
    path = f"{BIN}:{os.environ['PATH']}"
    process = subprocess.Popen(
        [DOCKER / script, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"PATH": path} | environment,
        start_new_session=True,
    )
    assert process.stdout is not None
    reader = threading.Thread(target=lambda: lines.extend(process.stdout or ()), daemon=True)
    reader.start()
    try:
        yield lines
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        reader.join(5)
        process.stdout.close()


def ready(lines: list[str]) -> str:
    """The address that a ready server names."""
    until = time.monotonic() + START_S
    while time.monotonic() < until:
        for line in list(lines):
            if line.startswith("ready: "):
                return re.sub("//[^:]+:", "//127.0.0.1:", line.split()[1])
        time.sleep(0.05)
    raise AssertionError("".join(lines))


def test_server_and_endpoint(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path, unused_ports: Callable[[int], list[int]]
) -> None:
    """The server's entry point, and over it the endpoint's, with nothing that its image has not."""
    http, grpc, metrics = unused_ports(3)
    ports = [f"--http-port={http}", f"--grpc-port={grpc}", f"--metrics-port={metrics}", "--port=0"]
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({not_in_its_image()!r}))\n")
    with running("server.sh", str(tiny_checkpoint("qwen2_vl")), "--device=cpu", *ports) as server:
        ready(server)
        with running(
            "endpoint.sh",
            "--port=0",
            f"--metrics-port={metrics}",
            "--served-model-name=small",
            TRITON_URL=f"127.0.0.1:{grpc}",
            PYTHONPATH=str(site),
        ) as endpoint:
            url = ready(endpoint)
            ask = {"model": "small", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}
            answer = httpx.post(f"{url}/v1/chat/completions", json=ask, timeout=60, trust_env=False)
            assert answer.status_code == 200, answer.text
            assert answer.json()["usage"]["completion_tokens"] == 2
            page = httpx.get(f"{url}/metrics", trust_env=False).text
            assert 'triptych_generation_tokens_total{stage="language_model"' in page


def test_endpoint_wants_an_address() -> None:
    run = subprocess.run([DOCKER / "endpoint.sh"], capture_output=True, text=True, env={"PATH": os.environ["PATH"]})
    assert run.returncode != 0
    assert "set TRITON_URL to host:port" in run.stderr


def test_packages_of_the_endpoint_are_those_of_the_project() -> None:
    lines = (DOCKER / "endpoint.txt").read_text().splitlines()
    own = [line for line in lines if line and not line.startswith("#")]
    project = {re.sub(r"[\[>=<;!].*", "", item) for item in dependencies()}
    assert {re.sub(r"[\[>=<;!].*", "", item) for item in own} <= project
    for line in own:
        name = re.sub(r"[\[>=<;!].*", "", line)
        (declared,) = (item for item in dependencies() if re.sub(r"[\[>=<;!].*", "", item) == name)
        assert line.partition(">=")[2] == declared.partition(">=")[2].partition(";")[0].strip(), name


@pytest.mark.parametrize("file", sorted(DOCKER.glob("*.Dockerfile")), ids=lambda file: file.name)
def test_dockerfiles_are_clean(file: Path) -> None:
    run = subprocess.run([BIN / "hadolint", file], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    # every folder of the package is copied; whatever is copied is there, and reaches the build
    folders = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"].values()
    assert all(f"COPY {folder} {folder}\n" in file.read_text() for folder in folders)
    ignored = (ROOT / ".dockerignore").read_text()
    for line in re.findall(r"^COPY (.+)$", file.read_text(), re.MULTILINE):
        for source in line.split()[:-1]:
            assert (ROOT / source).exists(), source
            first = source if not source.startswith("docker/") else None
            assert first is None or f"!{first}\n" in ignored


def test_yaml_is_clean() -> None:
    files = [
        *DOCKER.glob("*.yaml"),
        *(DOCKER / "helm").glob("*.yaml"),
        *(DOCKER / "helm/triptych").glob("*.yaml"),
        *(DOCKER / "prometheus").rglob("*.y*ml"),
        *(DOCKER / "grafana").rglob("*.y*ml"),
    ]
    rules = "{extends: default, rules: {line-length: {max: 140}, document-start: disable, braces: disable}}"
    run = subprocess.run([BIN / "yamllint", "-s", "-d", rules, *files], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout


def test_compose_names_what_there_is() -> None:
    text = (DOCKER / "compose.yaml").read_text()
    versions = dict(
        line.split("=")
        for line in (DOCKER / "versions.env").read_text().splitlines()
        if line and not line.startswith("#")
    )
    assert set(re.findall(r"\$\{(\w+):\?", text)) == set(versions)
    assert "latest" not in versions.values()
    services: dict[str, Any] = yaml.safe_load(text)["services"]
    assert set(services) == {"server", "endpoint", "prometheus", "grafana"}
    for service in services.values():
        if "build" in service:
            assert (DOCKER / service["build"]["context"] / service["build"]["dockerfile"]).is_file()
        for volume in service.get("volumes", ()):
            if volume.startswith("./"):
                assert (DOCKER / volume.split(":")[0]).is_dir(), volume


def test_one_version() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    chart = yaml.safe_load((DOCKER / "helm/triptych/Chart.yaml").read_text())
    assert chart["version"] == chart["appVersion"] == version
    values = yaml.safe_load((DOCKER / "helm/triptych/values.yaml").read_text())
    assert values["image"]["server"].endswith(f":{version}")
