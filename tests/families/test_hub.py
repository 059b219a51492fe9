"""Downloads from a hub on this machine: which files, once, offline, and what is said where it fails."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from triptych.client.launcher import Download, LauncherError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
INDEX = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
FILES = {
    "config.json": b'{"model_type": "qwen2_vl"}',
    "tokenizer.json": b"{}",
    "chat_template.jinja": b"{{ 1 }}",
    "model.safetensors.index.json": json.dumps(INDEX).encode(),
    "model-00001-of-00002.safetensors": b"1" * 70_000,
    "model-00002-of-00002.safetensors": b"2" * 70_000,
    "adapter/adapter_model.safetensors": b"3",
    "consolidated.safetensors": b"4",
    "original/consolidated.00.safetensors": b"5",
    "pytorch_model.bin": b"6",
    "picture.png": b"7",
    "modeling.py": b"8",
}
WANTED = {*FILES} - {"consolidated.safetensors", "original/consolidated.00.safetensors", "pytorch_model.bin"}
WANTED -= {"picture.png", "modeling.py"}


class Hub(http.server.ThreadingHTTPServer):
    """What huggingface_hub asks of huggingface.co, for one repository."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = dict(FILES)
        self.status = 200
        self.error = ""
        self.cut = 0
        self.asked = threading.Event()
        self.held: threading.Event | None = None
        self.sent: list[str] = []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), "X-Repo-Commit": COMMIT, **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self) -> None:
        hub = self.server
        hub.asked.set()
        if hub.held is not None:
            hub.held.wait(60)
        if hub.status != 200:
            return self.answer(hub.status, b"{}", **({"X_Error_Code": hub.error} if hub.error else {}))
        if found := re.match(r"/api/models/org/name/revision/([^/?]+)", self.path):
            if found[1] not in ("main", COMMIT):
                return self.answer(404, b"{}", X_Error_Code="RevisionNotFound")
            siblings = [{"rfilename": name} for name in hub.files]
            return self.answer(200, json.dumps({"id": "org/name", "sha": COMMIT, "siblings": siblings}).encode())
        if self.path.startswith("/api/models/org/name/tree/"):
            rows = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in hub.files.items()
            ]
            return self.answer(200, json.dumps(rows).encode())
        found = re.match(r"/org/name/resolve/[^/]+/([^?]+)", self.path)
        if found is None or found[1] not in hub.files:
            return self.answer(404, b"{}", X_Error_Code="EntryNotFound")
        data = hub.files[found[1]]
        etag = f'"{hashlib.sha1(data).hexdigest()}"'
        start = 0
        if given := re.match(r"bytes=(\d+)-", self.headers.get("Range") or ""):
            start = int(given[1])
        if self.command == "GET":
            hub.sent.append(f"{found[1]}@{start}" if start else found[1])
        if self.command == "GET" and hub.cut and len(data) > hub.cut and not start:
            # the connection breaks
            self.send_response(200)
            for name, value in (("Content-Length", str(len(data))), ("ETag", etag), ("X-Repo-Commit", COMMIT)):
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data[: hub.cut])
            self.close_connection = True
            return None
        ranged = {"Content_Range": f"bytes {start}-{len(data) - 1}/{len(data)}"} if start else {}
        return self.answer(206 if start else 200, data[start:], ETag=etag, **ranged)

    def do_HEAD(self) -> None:
        self.do_GET()


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as hub:
        yield hub
        hub.shutdown()


def start(hub: Hub, home: Path, *arguments: str, **extra: str) -> subprocess.Popen[str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    env |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "*", **extra}
    command = [sys.executable, "-m", "triptych.python_models.families.hub", *(arguments or ("org/name",))]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def download(hub: Hub, home: Path, *arguments: str, **extra: str) -> Path:
    process = start(hub, home, *arguments, **extra)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, out + err
    return Path(out.strip())


def refused(hub: Hub, home: Path, *arguments: str, **extra: str) -> str:
    process = start(hub, home, *arguments, **extra)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 1, out + err
    assert "Traceback" not in err
    (message,) = out.splitlines()
    return message


def launched(hub: Hub, home: Path, monkeypatch: pytest.MonkeyPatch) -> Download:
    for name, value in (("HF_ENDPOINT", hub.url), ("HF_HOME", str(home)), ("HF_HUB_DISABLE_XET", "1")):
        monkeypatch.setenv(name, value)
    return Download("org/name", "main", code=False)


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_what_stages_need_and_nothing_else(hub: Hub, tmp_path: Path) -> None:
    process = start(hub, tmp_path)
    out, err = process.communicate(timeout=120)
    folder = Path(out.strip())
    # the bar
    assert "100%" in err
    assert names(folder) == WANTED
    assert all((folder / name).read_bytes() == FILES[name] for name in WANTED)
    assert sorted(hub.sent) == sorted(WANTED)
    # what is there is not downloaded again, and found without a network
    assert download(hub, tmp_path) == folder
    assert len(hub.sent) == len(WANTED)
    hub.status = 503
    assert download(hub, tmp_path, HF_HUB_OFFLINE="1") == folder


def test_older_weights_where_there_are_no_others(hub: Hub, tmp_path: Path) -> None:
    hub.files = {name: data for name, data in FILES.items() if "safetensors" not in name}
    assert names(download(hub, tmp_path)) == {
        "config.json",
        "tokenizer.json",
        "chat_template.jinja",
        "pytorch_model.bin",
    }


def test_a_download_that_breaks_goes_on(hub: Hub, tmp_path: Path) -> None:
    # huggingface_hub writes ten megabytes at a time
    name, piece = "model-00001-of-00002.safetensors", 10 * 2**20
    hub.files[name] = b"1" * (piece + 2**20)
    hub.cut = piece + 2**19
    folder = download(hub, tmp_path)
    assert (folder / name).read_bytes() == hub.files[name]
    assert [sent for sent in hub.sent if name in sent] == [name, f"{name}@{piece}"]


def test_code_where_it_is_trusted(hub: Hub, tmp_path: Path) -> None:
    assert names(download(hub, tmp_path, "org/name", "--trust-remote-code")) == WANTED | {"modeling.py"}


def test_several_processes_download_once(hub: Hub, tmp_path: Path) -> None:
    processes = [start(hub, tmp_path) for _ in range(3)]
    folders = {process.communicate(timeout=120)[0] for process in processes}
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert len(folders) == 1
    assert sorted(hub.sent) == sorted(WANTED)


def test_a_revision(hub: Hub, tmp_path: Path) -> None:
    assert names(download(hub, tmp_path, "org/name", COMMIT)) == WANTED
    message = refused(hub, tmp_path, "org/name", "v9")
    assert "'org/name' at revision 'v9'" in message
    assert "no such revision" in message


@pytest.mark.parametrize(
    ("status", "error", "what"),
    [
        (404, "RepoNotFound", "no such model; check the id, and set HF_TOKEN"),
        (403, "GatedRepo", "gated: accept its terms on its page, and set HF_TOKEN"),
    ],
)
def test_what_is_wrong_is_said(hub: Hub, tmp_path: Path, status: int, error: str, what: str) -> None:
    hub.status, hub.error = status, error
    message = refused(hub, tmp_path)
    assert "'org/name'" in message
    assert what in message


def test_offline_without_a_cache(hub: Hub, tmp_path: Path) -> None:
    message = refused(hub, tmp_path, HF_HUB_OFFLINE="1")
    assert "cannot be reached (or HF_HUB_OFFLINE is set) and the local cache does not have all of it" in message
    assert not hub.sent


def test_the_launcher_downloads_before_the_stages(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("HF_HUB_DISABLE_PROGRESS_BARS", raising=False)
    launched(hub, tmp_path, monkeypatch).run()
    assert sorted(hub.sent) == sorted(WANTED)
    assert "100%" in capfd.readouterr().err
    hub.status, hub.error = 404, "RepoNotFound"
    with pytest.raises(LauncherError, match="the hub has no such model"):
        launched(hub, tmp_path / "other", monkeypatch).run()


def test_the_launcher_stops_a_download(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.held = threading.Event()
    one = launched(hub, tmp_path, monkeypatch)

    def stop() -> None:
        hub.asked.wait(60)
        one.stop()

    stopping = threading.Thread(target=stop)
    stopping.start()
    with pytest.raises(LauncherError, match="stopped"):
        one.run()
    stopping.join()
    hub.held.set()
    with pytest.raises(LauncherError, match="stopped"):
        one.run()
