"""Finding a server, a libpython and GPUs: on odd machines, with errors that say what to do."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from triptych.client.launcher import LauncherError, TritonServer, checks, find_server, place
from triptych.client.launcher import binary as finding
from triptych.python_models.contract.settings import Settings

VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"


def program(path: Path, text: str = "#!/bin/sh\n") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def installation(home: Path, stub_version: str = VERSION, nested: bool = False) -> Path:
    """A server's folder as in the container (or, ``nested``, as in the wheel)."""
    program(home / "bin" / "tritonserver")
    backend = home / "backends" / "python"
    backend.mkdir(parents=True)
    (backend / "libtriton_python.so").touch()
    (backend / "triton_python_backend_utils.py").touch()
    folder = home / "python_backend_stubs" / stub_version if nested else backend
    program(folder / "triton_python_backend_stub", f"ELF libpython{stub_version}.so.1.0")
    return home


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TRITONSERVER_HOME", "TRITONSERVER_LD"):
        monkeypatch.delenv(name, raising=False)


def test_the_installed_package_is_found() -> None:
    binary = find_server()
    assert binary.knows("--model-repository")
    assert binary.knows("--disable-auto-complete-config")
    assert not binary.knows("--model-repo")
    assert not binary.knows("--no-such-option")
    assert f"libpython{VERSION}" in binary.libpython.name
    assert all(check.ok for check in checks()), checks()


@pytest.mark.parametrize("nested", [False, True])
def test_a_named_folder_or_program_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nested: bool) -> None:
    home = installation(tmp_path / "triton", nested=nested)
    for path in (home, home / "bin" / "tritonserver"):
        found = find_server(str(path))
        assert found.executable == home / "bin" / "tritonserver"
        assert found.stub.is_relative_to(home)
    monkeypatch.setenv("TRITONSERVER_HOME", str(home))
    (tmp_path / "libs").mkdir()
    monkeypatch.setenv("TRITONSERVER_LD", f"{tmp_path}/libs:/usr/lib")
    found = find_server()
    assert found.executable == home / "bin" / "tritonserver"
    assert found.library_dirs[:2] == (tmp_path / "libs", Path("/usr/lib"))


def test_a_folder_without_a_server_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LauncherError, match="holds no bin/tritonserver") as caught:
        find_server(str(tmp_path))
    assert "pip install" in caught.value.remedy
    monkeypatch.setenv("TRITONSERVER_HOME", str(tmp_path))
    with pytest.raises(LauncherError, match="TRITONSERVER_HOME"):
        find_server()
    assert not all(check.ok for check in checks())


def test_a_server_without_python_backend_is_an_error(tmp_path: Path) -> None:
    home = installation(tmp_path / "triton")
    (home / "backends" / "python" / "libtriton_python.so").unlink()
    with pytest.raises(LauncherError, match="has no Python backend"):
        find_server(str(home))


@pytest.mark.parametrize("nested", [False, True])
def test_a_stub_for_another_python_is_an_error(tmp_path: Path, nested: bool) -> None:
    home = installation(tmp_path / "triton", stub_version="3.4", nested=nested)
    with pytest.raises(LauncherError, match=rf"no Python stub for Python {VERSION}; it has one for Python 3\.4"):
        find_server(str(home))


def test_a_missing_libpython_names_the_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(finding, "_libpython_candidates", lambda: iter([tmp_path / "none"]))
    with pytest.raises(LauncherError) as caught:
        find_server()
    assert f"apt-get install libpython{VERSION}" in caught.value.remedy
    failed = [check.name for check in checks() if not check.ok]
    assert "libpython" in failed


def test_a_libpython_of_the_bundle_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    library = tmp_path / f"libpython{VERSION}.so.1.0"
    library.touch()
    monkeypatch.setenv("TRITONSERVER_LD", str(tmp_path))
    monkeypatch.setattr(finding.sysconfig, "get_config_var", lambda name: None)
    assert library in list(finding._libpython_candidates())


def test_a_server_that_does_not_run_says_what_it_said(tmp_path: Path) -> None:
    home = installation(tmp_path / "triton")
    program(home / "bin" / "tritonserver", "#!/bin/sh\necho error while loading libb64.so >&2\nexit 127\n")
    with pytest.raises(LauncherError, match=r"does not run: error while loading libb64\.so") as caught:
        find_server(str(home)).knows("--x")
    assert "TRITONSERVER_LD" in caught.value.remedy
    server = TritonServer(find_server(str(home)), Settings())
    with pytest.raises(LauncherError, match="does not run"):
        server.start()
    server.stop()


def test_a_server_that_ends_at_once_shows_its_last_words(tmp_path: Path) -> None:
    home = installation(tmp_path / "triton")
    helps = '[ "$1" = --help ] && echo "  --model-repository <string>" && exit 0'
    program(home / "bin" / "tritonserver", f'#!/bin/sh\n{helps}\necho "error: no luck" >&2\nexit 3\n')
    with (
        pytest.raises(LauncherError, match="tritonserver ended: error: no luck"),
        TritonServer(find_server(str(home)), Settings()) as server,
    ):
        server.wait_ready(30, lambda _: None)


@pytest.mark.parametrize("enabled", [True, False])
def test_the_server_measures_and_traces_as_it_is_told(enabled: bool, tmp_path: Path) -> None:
    home = installation(tmp_path / "triton")
    helps = '[ "$1" = --help ] && echo "  --model-repository <string>" && exit 0'
    program(home / "bin" / "tritonserver", f'#!/bin/sh\n{helps}\necho "error: $*" >&2\nexit 3\n')
    settings = Settings(enable_metrics=enabled)
    traces = ("mode=opentelemetry", "opentelemetry,url=http://c/v1/traces")
    with (
        pytest.raises(LauncherError) as caught,
        TritonServer(find_server(str(home)), settings, trace_config=traces) as server,
    ):
        server.wait_ready(30, lambda _: None)
    words = caught.value.message.split()
    assert f"--allow-metrics={str(enabled).lower()}" in words
    assert [word for word in words if word.startswith("--trace")] == [f"--trace-config={item}" for item in traces]


def test_a_server_starts_once(tmp_path: Path) -> None:
    server = TritonServer(find_server(), Settings())
    server.stop()
    with pytest.raises(RuntimeError, match="starts once"):
        server.start()
    assert not server.alive()
    assert server.stage_pids() == {}


def test_a_temporary_folder_the_server_cannot_handle_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "my files"))
    server = TritonServer(find_server(), Settings())
    with pytest.raises(LauncherError, match="my files") as caught:
        server.start()
    assert "TMPDIR" in caught.value.remedy


def test_the_environment_is_on_no_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "very-secret-token")
    with TritonServer(find_server(), Settings()) as server:
        assert b"very-secret-token" in Path(f"/proc/{server.pid}/environ").read_bytes()
        guard = Path(f"/proc/{server.pid}/stat").read_text().rpartition(")")[2].split()[1]
        for pid in (server.pid, guard):
            assert b"very-secret-token" not in Path(f"/proc/{pid}/cmdline").read_bytes()


# --- GPUs

SMI = """#!/bin/sh
echo "0, NVIDIA H200, 143771, 580.82"
echo "1, NVIDIA H200, 143771, 580.82"
"""


@pytest.fixture
def two_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(tmp_path / "smi" / "nvidia-smi", SMI)
    monkeypatch.setenv("PATH", f"{tmp_path / 'smi'}:{os.environ['PATH']}")


@pytest.fixture
def no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(tmp_path / "smi" / "nvidia-smi", "#!/bin/sh\necho failed >&2\nexit 9\n")
    monkeypatch.setenv("PATH", f"{tmp_path / 'smi'}:{os.environ['PATH']}")


@pytest.mark.usefixtures("two_gpus")
def test_a_gpu_is_taken_where_there_is_one(tmp_path: Path) -> None:
    assert place(Settings()) == place(Settings(device="cuda:0"))
    assert place(Settings()).gpu_ids == (0,)
    assert place(Settings(device="cuda:1")).gpu_ids == (1,)
    assert place(Settings(tp=2)).gpu_ids == (0, 1)
    assert place(Settings(tp=4, ep=4, device="cpu")).gpu_ids == ()
    with pytest.raises(LauncherError, match=r"--tp 2 from cuda:1 on needs 3 GPUs, but there are 2") as refused:
        place(Settings(tp=2, device="cuda:1"))
    assert refused.value.remedy == "leave --tp out"
    with pytest.raises(LauncherError, match=r"--ep 2 does not fit --tp 4"):
        place(Settings(tp=4, ep=2, device="cpu"))
    assert place(Settings(device="cpu")).gpu_ids == ()
    with pytest.raises(LauncherError, match=r"'cuda:2' does not exist; nvidia-smi lists: cuda:0 NVIDIA H200, cuda:1"):
        place(Settings(device="cuda:2"))
    assert any("NVIDIA H200, 143771 MiB" in check.detail for check in checks())


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize(
    ("dtype", "config", "wire"),
    [
        ("auto", {}, "BF16"),
        ("auto", {"torch_dtype": "float16"}, "FP16"),
        ("auto", {"thinker_config": {"dtype": "float32"}}, "FP32"),
        ("auto", {"dtype": "bfloat16", "text_config": {"dtype": "float32"}}, "BF16"),
        ("float16", {"dtype": "bfloat16"}, "FP16"),
    ],
)
def test_embeddings_travel_in_the_dtype_of_the_checkpoint(
    tmp_path: Path, dtype: str, config: dict[str, object], wire: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert place(Settings(model=str(tmp_path), dtype=dtype)).embedding_dtype == wire


@pytest.mark.usefixtures("no_gpu")
def test_without_a_gpu_the_cpu_is_taken() -> None:
    assert place(Settings()).gpu_ids == ()
    assert place(Settings()).embedding_dtype == "FP32"
    assert place(Settings(dtype="bfloat16")).embedding_dtype == "BF16"
    with pytest.raises(LauncherError, match="'cuda' does not exist; nvidia-smi lists: none"):
        place(Settings(device="cuda"))


@pytest.mark.parametrize(
    "settings", [Settings(device="gpu"), Settings(device="cpu:1"), Settings(device="auto:0"), Settings(dtype="int8")]
)
def test_unknown_devices_and_dtypes_are_refused(settings: Settings) -> None:
    with pytest.raises(LauncherError, match="is not known") as caught:
        place(settings)
    assert "choose" in caught.value.remedy
