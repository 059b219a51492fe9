"""``triptych serve`` as a process: its life from a taken port to a clean end."""

from __future__ import annotations

import signal
import socket
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil

NAME = "tiny-omni"


def run(command: list[str], *args: str, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*command, *args], capture_output=True, text=True, timeout=timeout_s)


def gone(processes: list[psutil.Process], timeout_s: float = 15.0) -> list[psutil.Process]:
    """Those that still live."""
    _, alive = psutil.wait_procs(processes, timeout=timeout_s)
    return [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


def test_sigterm_while_loading_leaves_nothing(start: Any, checkpoint: Path) -> None:
    with start(str(checkpoint), "--port=0") as served:
        served.wait_for("loading the models")
        processes = served.family()
        assert len(processes) > 2
        served.process.send_signal(signal.SIGTERM)
        assert served.process.wait(40) == 0
        assert gone(processes) == []
        served.wait_for("stopped", 5)
        assert "Traceback" not in served.output()


def test_a_life(start: Any, checkpoint: Path, tmp_path: Path) -> None:
    """Health while loading, an answer, then Ctrl-C in the middle of a stream."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with start(str(checkpoint), f"--port={port}", f"--server-log={tmp_path / 'log'}") as served:
        served.wait_for("loading the models")
        loading = httpx.get(f"{url}/health", trust_env=False, timeout=30)
        assert loading.status_code == 503
        assert "loading" in loading.json()["error"]["message"]
        body = {"model": str(checkpoint), "messages": [{"role": "user", "content": "a"}], "max_tokens": 2}
        early = httpx.post(f"{url}/v1/chat/completions", json=body, trust_env=False, timeout=30)
        assert early.status_code == 503
        assert early.headers["retry-after"]
        assert served.wait_for("ready: ").split()[1] == url
        assert "curl " in served.wait_for("curl")
        assert httpx.post(f"{url}/v1/chat/completions", json=body, trust_env=False, timeout=60).status_code == 200
        processes = served.family()
        events: list[str] = []
        began = threading.Event()

        def read() -> None:
            asked = body | {"max_tokens": 1900, "ignore_eos": True, "stream": True}
            with httpx.stream("POST", f"{url}/v1/chat/completions", json=asked, trust_env=False, timeout=60) as answer:
                for line in answer.iter_lines():
                    events.append(line)
                    began.set()

        reader = threading.Thread(target=read)
        reader.start()
        assert began.wait(30)
        served.process.send_signal(signal.SIGINT)
        assert served.process.wait(40) == 0
        reader.join(10)
        assert "shutting down" in [line for line in events if line][-1]
        assert gone(processes) == []
        assert "Traceback" not in served.output()


def test_a_tritonserver_that_dies_is_started_again_but_not_for_ever(start: Any, checkpoint: Path) -> None:
    def triton() -> psutil.Process:
        [found] = [p for p in served.family() if "/bin/tritonserver" in (p.cmdline() or [""])[0]]
        return found

    with start(str(checkpoint), "--port=0", "--max-server-restarts=1", "--served-model-name=m") as served:
        served.url = served.wait_for("ready: ").split()[1]
        body = {"model": "m", "messages": [{"role": "user", "content": "a"}], "max_tokens": 1900, "ignore_eos": True}
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(
                httpx.post, f"{served.url}/v1/chat/completions", json=body, trust_env=False, timeout=60
            )
            wait_for(lambda: served.metric("triptych_requests_running", stage="language_model") == 1)
            triton().kill()
            began = time.monotonic()
            failed = running.result()
            assert time.monotonic() - began < 10
        assert failed.status_code == 503, failed.text
        served.wait_for("ready again")
        answer = httpx.post(
            f"{served.url}/v1/chat/completions", json=body | {"max_tokens": 2}, trust_env=False, timeout=60
        )
        assert answer.status_code == 200, answer.text
        assert httpx.get(f"{served.url}/health", trust_env=False).status_code == 200
        assert served.metric("triptych_server_restarts_total") == 1
        processes = served.family()
        triton().kill()
        assert served.process.wait(40) == 1
        assert gone(processes) == []
        assert "Traceback" not in served.output()


def test_a_taken_port_is_one_clear_error(server: Any, command: list[str], checkpoint: Path) -> None:
    port = server.url.rpartition(":")[2]
    began = time.monotonic()
    done = run(command, "serve", str(checkpoint), "--port", port)
    assert done.returncode == 1
    assert f"port {port}" in done.stderr
    assert "--port" in done.stderr
    assert "Traceback" not in done.stderr
    assert time.monotonic() - began < 60
    taken = run(command, "serve", str(checkpoint), "--port", "0", "--grpc-port", str(server.grpc_port))
    assert taken.returncode == 1
    assert "--grpc-port" in taken.stderr
    assert server.ask().status_code == 200


def test_an_endpoint_over_a_running_server(start: Any, server: Any, checkpoint: Path) -> None:
    """--triton-url: no launch; and when this endpoint is killed, leases end what it left behind."""
    with start(
        "--triton-url",
        f"127.0.0.1:{server.grpc_port}",
        f"--metrics-port={server.metrics_port}",
        "--port=0",
        "--lease-s=2",
    ) as served:
        url = served.wait_for("ready: ").split()[1]
        [name] = [card["id"] for card in httpx.get(f"{url}/v1/models", trust_env=False).json()["data"]]
        assert name == str(checkpoint), "the name is that of the model which the server has"
        assert len(served.family()) == 1
        body = {"model": name, "messages": [{"role": "user", "content": "hello"}], "temperature": 0}
        answer = httpx.post(f"{url}/v1/chat/completions", json=body | {"max_tokens": 2}, trust_env=False, timeout=60)
        assert answer.json()["choices"][0]["message"] == server.ask().json()["choices"][0]["message"]
        served.url = url
        assert served.metric("nv_inference_count", model="preprocess") > 0
        asked = body | {"max_tokens": 1900, "ignore_eos": True, "stream": True}
        streams = [
            threading.Thread(target=drain, args=(f"{url}/v1/chat/completions", asked), daemon=True) for _ in range(6)
        ]
        for stream in streams:
            stream.start()
        wait_for(lambda: server.metric("triptych_requests_running", stage="language_model") >= 1)
        served.process.kill()
        served.process.wait()
    wait_for(lambda: server.metric("triptych_requests_running", stage="language_model") == 0)
    assert server.ask().status_code == 200


def drain(url: str, body: dict[str, Any]) -> None:
    try:
        httpx.post(url, json=body, trust_env=False, timeout=60)
    except httpx.TransportError:
        return


def wait_for(condition: Any, timeout_s: float = 20.0) -> None:
    until = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < until, "it did not happen in time"
        time.sleep(0.02)


def test_a_triton_url_without_a_server(command: list[str]) -> None:
    done = run(command, "serve", "--triton-url", "127.0.0.1:1", "--port", "0")
    assert done.returncode == 1
    assert "cannot be reached" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_stage_that_cannot_load_is_one_clear_error(command: list[str], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "abacus"}')
    done = run(command, "serve", str(tmp_path), "--port", "0")
    assert done.returncode == 1
    assert "abacus" in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) <= 3


def test_chat_command(server: Any, command: list[str], parts: Any, tmp_path: Path) -> None:
    files = {"a.png": parts.picture(1), "b.mp4": parts.film(2), "c.wav": parts.sound(3), "d.unknown": parts.sound(3)}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    paths = [str(tmp_path / name) for name in files]
    done = run(
        command, "chat", "--url", server.url, "--max-tokens", "5", "--image", paths[0], "--video", paths[1],
        "--audio", paths[2], "--audio", paths[3], "what is this?",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    content = [parts.image(1), parts.video(2), parts.input_audio(3), parts.audio(3), parts.text("what is this?")]
    expected = server.ask(messages=[{"role": "user", "content": content}], max_tokens=5).json()
    assert done.stdout == expected["choices"][0]["message"]["content"] + "\n"
    wrong = run(command, "chat", "--url", server.url, "--image", paths[2], "what?")
    assert wrong.returncode == 1
    assert "not a picture" in wrong.stderr
    assert "Traceback" not in wrong.stderr
