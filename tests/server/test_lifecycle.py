"""Starting, failing, dying and stopping: whatever happens, the cause is named and nothing is left behind."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from triptych.client.launcher import LauncherError, TritonServer, find_server
from triptych.python_models.contract.errors import ErrorKind, TriptychError
from triptych.python_models.contract.settings import Settings
from triptych.python_models.contract.tensors import ENSEMBLES, STAGES

NewServer = Callable[..., TritonServer]


def script(**steps: Any) -> dict[str, Any]:
    return {"request": [json.dumps(steps)]}


def wait(condition: Callable[[], bool], what: str, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not come true within {seconds} s"
        time.sleep(0.02)


def processes(text: str) -> list[int]:
    """The processes whose command line holds a text; zombies have none."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                if text.encode() in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


class Traces:
    """What a running server has put into the world."""

    def __init__(self, server: TritonServer) -> None:
        arguments = Path(f"/proc/{server.pid}/cmdline").read_bytes().decode().split("\0")
        options = dict(a.split("=", 1) for a in arguments if "=" in a and a.startswith("--"))
        self.folder = Path(options["--model-repository"]).parent
        self.prefix = options["--backend-config"].partition("=")[2]

    def left(self) -> dict[str, Any]:
        found = {
            "processes": processes(str(self.folder)),
            "shared memory": [p.name for p in Path("/dev/shm").glob(f"{self.prefix}*")],
            "folder": [self.folder] if self.folder.exists() else [],
        }
        return {name: items for name, items in found.items() if items}


def test_start_errors_stop(new_server: NewServer, start: Any) -> None:
    """Progress names every model; after all sorts of failed requests the server ends without one it still waits for."""
    server = new_server(Settings(preprocess_instances=2))
    said: list[str] = []
    client = start(server, said)
    for model in (*STAGES, *ENSEMBLES):
        assert any(re.match(rf"{model} is ready after [\d.]+ s", line) for line in said), said
    assert sorted(server.stage_pids()) == sorted(STAGES)
    traces = Traces(server)
    assert set(traces.left()) == {"processes", "shared memory", "folder"}

    # gauges of several processes of one stage must not overwrite each other
    for instance in ("preprocess_0_0", "preprocess_0_1"):
        labels = {"stage": "preprocess", "instance": instance}
        client.wait_metric(lambda v: v > 0, "triptych_heartbeat_timestamp_seconds", **labels)

    raising = {"rows": 1, "width": 1, "raise": True}
    failing = [
        {"preprocess": {"fail": True}},
        {"language_model": {"count": 9, "fail_at": 3}},
        {"vision": raising},
        # two steps of one request that fail side by side
        {"vision": raising, "audio": raising},
        {"vision": {"sleep": 0.1, "rows": 1, "width": 1}, "audio": raising},
    ]
    for steps in failing:
        streams = [client.stream("chat", script(**steps)) for _ in range(8)]
        for stream in streams:
            with pytest.raises(TriptychError):
                stream.all()
    assert server.alive()
    log = server.log
    server.stop()
    assert not server.alive()
    assert traces.left() == {}
    waited = re.findall(r"Found (\d+) model versions that have in-flight inferences", log.read_text())
    assert waited == ["0"]
    server.stop()


def test_a_killed_stage_is_loaded_again(new_server: NewServer, start: Any) -> None:
    server = new_server()
    client = start(server)
    client.stream("chat_text", script(language_model={"threads": 2})).all()
    count = client.wait_metric(lambda v: v >= 2000, "triptych_generation_tokens_total", stage="language_model")
    before = server.stage_pids()
    # its victim waits silently: a stage that dies while it holds a lock shared with the server takes that along
    client.stream("chat_text", script(language_model={"interval": 300}))
    client.wait_metric(lambda v: v == 1, "triptych_requests_running", stage="language_model")
    os.kill(before["language_model"], signal.SIGKILL)
    wait(lambda: "language_model" not in server.stage_pids(), "the death of the stage")
    assert server.alive()
    with pytest.raises(TriptychError) as caught:
        client.stream("chat_text", script()).all()
    assert caught.value.kind is ErrorKind.STAGE_DEAD

    server.reload("language_model")
    after = server.stage_pids()
    assert after["language_model"] != before["language_model"]
    assert after["preprocess"] == before["preprocess"]
    assert len(client.stream("chat_text", script(language_model={"count": 5})).all()) == 5
    assert len(client.stream("chat", script(vision={"rows": 2, "width": 2})).all()) == 1
    # counters go on where they were
    client.stream("chat_text", script(language_model={"threads": 1})).all()
    client.wait_metric(lambda v: v == count + 1000, "triptych_generation_tokens_total", stage="language_model")
    # a living stage can be replaced too, and keeps its metrics
    server.reload("language_model")
    assert server.stage_pids()["language_model"] != after["language_model"]
    client.stream("chat_text", script(language_model={"threads": 1})).all()
    client.wait_metric(lambda v: v == count + 2000, "triptych_generation_tokens_total", stage="language_model")
    # the stream of the killed stage hangs in this server for ever; the shim's idle timeout is what ends it
    traces = Traces(server)
    server.stop()
    assert traces.left() == {}


LAUNCHER = """
import sys, time
from pathlib import Path
from triptych.client.launcher import TritonServer, find_server
from triptych.python_models.contract.settings import Settings
server = TritonServer(find_server(), Settings())
server.start()
print(server.pid, flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("victim", ["launcher", "guard"])
def test_a_killed_launcher_or_guard_takes_the_server_along(victim: str) -> None:
    launcher = subprocess.Popen([sys.executable, "-c", LAUNCHER], stdout=subprocess.PIPE, cwd="/", text=True)
    try:
        assert launcher.stdout is not None
        pid = int(launcher.stdout.readline())
        guard = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        folder = Path(f"/proc/{pid}/cwd").readlink().parent
        os.kill(launcher.pid if victim == "launcher" else guard, signal.SIGKILL)
        wait(lambda: not Path(f"/proc/{pid}/cwd").exists(), "the end of the server")
        if victim == "launcher":
            wait(lambda: not folder.exists() and not processes(str(folder)), "the end of its traces")
    finally:
        launcher.kill()
        launcher.wait()
        if launcher.stdout is not None:
            launcher.stdout.close()
    if victim == "guard" and folder.exists():
        # a guard killed with -9 cleans nothing up; the launcher was not asked to stop here
        subprocess.run(["rm", "-rf", str(folder)], check=True)


def test_stages_that_do_not_load_say_why_and_a_killed_server_leaves_nothing(
    new_server: NewServer, start: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SCRIPTED_REFUSES", "AudioEncoder")
    monkeypatch.setenv("SCRIPTED_BREAKS", "Preprocess")
    server = new_server()
    server.start()
    traces = Traces(server)
    refusal = "audio_encoder: this stage was told not to load; tell it otherwise"
    with pytest.raises(LauncherError, match=f"{refusal}|preprocess: ZeroDivisionError"):
        server.wait_ready(60, lambda _: None)

    with pytest.raises(LauncherError) as caught:
        server.reload("audio_encoder")
    assert caught.value.message == refusal
    # an accident: the cause in one line, the rest in the log
    with pytest.raises(LauncherError, match=r"preprocess: ZeroDivisionError: broken as told; .*server's log") as caught:
        server.reload("preprocess")
    assert "At:" not in str(caught.value)
    assert "Traceback" in server.log.read_text()
    # a repository that somebody has edited
    config = traces.folder / "models" / "preprocess" / "config.pbtxt"
    config.write_text(config.read_text().replace("max_media_items", "max_media_itens"))
    with pytest.raises(LauncherError, match="did you mean 'max_media_items'"):
        server.reload("preprocess")

    server.reload("vision_encoder")
    os.kill(server.pid, signal.SIGKILL)
    # the log is still there to be read
    wait(lambda: set(traces.left()) == {"folder"}, "the end of everything but the folder")
    assert not server.alive()
    with pytest.raises(LauncherError, match="tritonserver ended"):
        server.reload("preprocess")
    server.stop()
    assert traces.left() == {}

    # another one takes its place, where clients expect it
    monkeypatch.delenv("SCRIPTED_REFUSES")
    monkeypatch.delenv("SCRIPTED_BREAKS")
    successor = server.another()
    assert (successor.grpc_url, successor.metrics_url) == (server.grpc_url, server.metrics_url)
    try:
        client = start(successor)
        assert len(client.stream("chat_text", script(language_model={"count": 3})).all()) == 3
    finally:
        successor.stop()


@pytest.mark.parametrize("name", ["grpc", "http", "metrics"])
def test_a_taken_port_is_named(name: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(LauncherError, match=f"port {port} of 127.0.0.1") as caught:
            TritonServer(find_server(), Settings(), **{f"{name}_port": port})
    assert f"--{name}-port" in caught.value.remedy
