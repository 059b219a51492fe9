"""The application around the endpoints: bodies, headers, origins, TLS, how it ends, and the Triton server's doors."""

from __future__ import annotations

import json
import signal
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest
import tritonclient.grpc as triton

from triptych.client.cli import access
from triptych.client.cli.main import build
from triptych.client.cli.parser import CommandError

NAME = "tiny-omni"
BODY = {"model": NAME, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 2, "temperature": 0}
LONG = BODY | {"max_tokens": 1500, "ignore_eos": True, "stream": True}


def attached(start: Any, server: Any, *args: str) -> Any:
    """An endpoint of its own over the running server."""
    over = f"--triton-url=127.0.0.1:{server.grpc_port}"
    return start(over, f"--metrics-port={server.metrics_port}", f"--served-model-name={NAME}", "--port=0", *args)


def send(server: Any, data: bytes, finish: bool = False) -> bytes:
    """What comes back for bytes on a connection; ``finish``: nothing more is sent."""
    host, port = server.url.removeprefix("http://").split(":")
    with closing(socket.create_connection((host, int(port)), timeout=60)) as connection:
        connection.sendall(data)
        if finish:
            connection.shutdown(socket.SHUT_WR)
        answer = b""
        while piece := connection.recv(65536):
            answer += piece
    return answer


def raw(body: bytes, *headers: str) -> bytes:
    lines = ["POST /v1/chat/completions HTTP/1.1", "host: x", "connection: close", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def status_of(answer: bytes) -> int:
    return int(answer.split(b" ")[1])


def test_a_chunked_body_is_read_within_the_limit(server: Any) -> None:
    def pieces(count: int) -> Iterator[bytes]:
        yield json.dumps(BODY).encode()
        for _ in range(count):
            yield b" " * 2**18

    url = f"{server.url}/v1/chat/completions"
    assert httpx.post(url, content=pieces(4), trust_env=False, timeout=60).status_code == 200
    refused = httpx.post(url, content=pieces(17), trust_env=False, timeout=60)
    assert refused.status_code == 413
    assert refused.json()["error"]["code"] == "too_large"


def test_a_content_length_that_lies_harms_nobody(server: Any) -> None:
    body = json.dumps(BODY).encode()
    assert status_of(send(server, raw(body, f"content-length: {len(body)}"))) == 200
    # shorter than the body: what is left is no request
    short = send(server, raw(body, f"content-length: {len(body) - 20}"))
    assert status_of(short) == 400
    assert short.count(b"HTTP/1.1") <= 2
    # longer: the rest never comes
    send(server, raw(body, f"content-length: {len(body) + 20}"), finish=True)
    for headers in (["content-length: -1"], ["content-length: 1e3"], ["content-length: 5", "content-length: 6"]):
        assert status_of(send(server, raw(body, *headers))) == 400, headers
    # both: the length must not count (RFC 9112, 6.3)
    chunked = f"{len(body):x}\r\n".encode() + body + b"\r\n0\r\n\r\n"
    both = send(server, raw(chunked, "content-length: 3", "transfer-encoding: chunked"))
    assert status_of(both) in (200, 400)
    assert both.count(b"HTTP/1.1") == 1
    assert server.ask().status_code == 200
    assert server.metric("triptych_http_inflight_bytes") == 0


def test_json_needs_no_content_type_but_must_be_json(server: Any) -> None:
    url = f"{server.url}/v1/chat/completions"
    body = json.dumps(BODY).encode()
    for given in ({}, {"content-type": "application/x-www-form-urlencoded"}, {"content-type": "text/plain"}):
        assert httpx.post(url, content=body, headers=given, trust_env=False, timeout=60).status_code == 200, given
    curl = subprocess.run(["curl", "-s", "--noproxy", "*", url, "-d", body.decode()], capture_output=True, text=True)
    assert json.loads(curl.stdout)["object"] == "chat.completion"
    as_form = httpx.post(url, data=BODY | {"messages": "x"}, files={"f": b"x"}, trust_env=False)
    packed = httpx.post(url, content=body, headers={"content-encoding": "gzip"}, trust_env=False)
    for answer, word in ((as_form, "application/json"), (packed, "gzip")):
        assert answer.status_code == 415
        assert answer.json()["error"]["code"] == "unsupported_media_type"
        assert word in answer.json()["error"]["message"]


def test_what_operators_ask(server: Any) -> None:
    for path in ("/health", "/ready"):
        found = httpx.get(server.url + path, trust_env=False)
        assert found.status_code == 200
        assert found.json()["status"] == "ok"
        assert found.json()["stages"]["language_model"] is True
        assert httpx.head(server.url + path, trust_env=False).status_code == 200
    assert httpx.get(f"{server.url}/live", trust_env=False).json() == {"status": "ok"}
    versions = httpx.get(f"{server.url}/version", trust_env=False).json()
    assert versions["version"]
    assert versions["tritonserver"].startswith("2.")


def test_every_answer_has_its_id(server: Any) -> None:
    for path, status in (("/v1/models", 200), ("/nowhere", 404), ("/health", 200)):
        given = httpx.get(server.url + path, headers={"x-request-id": "mine-1"}, trust_env=False)
        assert (given.status_code, given.headers["x-request-id"]) == (status, "mine-1")
        made = {httpx.get(server.url + path, trust_env=False).headers["x-request-id"] for _ in range(2)}
        assert len(made) == 2
    odd = httpx.get(f"{server.url}/v1/models", headers={"x-request-id": "a b"}, trust_env=False)
    assert odd.headers["x-request-id"].startswith("req_"), "what could break a log line is not taken"


def test_a_connection_serves_several_requests(server: Any) -> None:
    with httpx.Client(trust_env=False, timeout=60) as client:
        answers = [client.get(f"{server.url}/v1/models") for _ in range(3)]
        answers += [client.post(f"{server.url}/v1/chat/completions", content=b"no json") for _ in range(2)]
        ports = {a.extensions["network_stream"].get_extra_info("client_addr") for a in answers}
    assert [answer.status_code for answer in answers] == [200] * 3 + [400] * 2
    assert len(ports) == 1


def test_nobody_else_manages_the_triton_server(server: Any) -> None:
    """Inference is open; what changes the server wants the key that only its launcher knows."""
    with closing(triton.InferenceServerClient(f"127.0.0.1:{server.grpc_port}")) as client:
        assert client.is_model_ready("chat")
        assert client.get_model_config("chat").config.name == "chat"
        assert client.get_inference_statistics("chat")
        tries = [
            lambda: client.unload_model("chat_text"),
            lambda: client.load_model("chat_text"),
            client.get_model_repository_index,
            lambda: client.register_system_shared_memory("a", "/triptych", 16),
            client.get_trace_settings,
            lambda: client.update_log_settings({"log_verbose_level": 1}),
        ]
        for forbidden in tries:
            with pytest.raises(triton.InferenceServerException, match="restricted"):
                forbidden()
    assert server.ask().status_code == 200
    shown = [" ".join(process.cmdline()) for process in server.family()]
    [command] = [line for line in shown if "--model-control-mode" in line]
    assert "triptych-key=*****" in command
    assert command.count("triptych-key=") == command.count("triptych-key=*****") == 2


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(certificate, key) of 127.0.0.1, signed by itself."""
    folder = tmp_path_factory.mktemp("tls")
    files = folder / "cert.pem", folder / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-out", str(files[0]), "-keyout", str(files[1])]
    subprocess.run(command, check=True, capture_output=True)
    return files


def test_https_and_origins_and_a_graceful_end(start: Any, server: Any, certificate: tuple[Path, Path]) -> None:
    """One endpoint for all of it: a stream that runs when SIGTERM comes is finished; what comes after is refused."""
    cert, key = certificate
    page = "https://page.example"
    tls = (f"--ssl-certfile={cert}", f"--ssl-keyfile={key}", f"--allowed-origins={page}", "--drain-timeout-s=300")
    with attached(start, server, *tls) as served:
        url = served.wait_for("ready: ").split()[1]
        assert url.startswith("https://127.0.0.1:")
        context = ssl.create_default_context(cafile=str(cert))
        with httpx.Client(verify=context, trust_env=False, timeout=300, base_url=url) as client:
            with pytest.raises(httpx.TransportError):
                httpx.get(url.replace("https", "http"), trust_env=False)
            # origins
            asked = {"origin": page, "access-control-request-method": "POST"}
            asked["access-control-request-headers"] = "authorization, content-type"
            preflight = client.options("/v1/chat/completions", headers=asked)
            assert preflight.status_code == 200
            assert preflight.headers["access-control-allow-origin"] == page
            assert "authorization" in preflight.headers["access-control-allow-headers"]
            for path in ("/v1/models", "/nowhere"):
                found = client.get(path, headers={"origin": page})
                assert found.headers["access-control-allow-origin"] == page
                assert "x-request-id" in found.headers["access-control-expose-headers"]
            other = client.get("/v1/models", headers={"origin": "https://other.example"})
            assert "access-control-allow-origin" not in other.headers
            assert client.options("/v1/models", headers=asked | {"origin": "https://other.example"}).status_code == 400
            # the end
            began = threading.Event()

            def read() -> list[str]:
                with client.stream("POST", "/v1/chat/completions", json=LONG) as answer:
                    lines = []
                    for line in answer.iter_lines():
                        lines.append(line)
                        began.set()
                    return [line for line in lines if line]

            with ThreadPoolExecutor(1) as pool:
                running = pool.submit(read)
                assert began.wait(120)
                served.process.send_signal(signal.SIGTERM)
                served.wait_for("1 requests run")
                with httpx.Client(verify=context, trust_env=False, timeout=60, base_url=url) as late:
                    refused = late.post("/v1/chat/completions", json=BODY)
                    ready = late.get("/ready")
                    live = late.get("/live")
                assert not running.done(), "the stream must still run for this test to say anything"
                assert refused.status_code == 503
                assert refused.headers["retry-after"]
                assert refused.headers["connection"] == "close"
                assert "shutting down" in refused.json()["error"]["message"]
                assert (ready.status_code, live.status_code) == (503, 200)
                lines = running.result()
            assert lines[-1] == "data: [DONE]"
            assert json.loads(lines[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
        assert served.process.wait(60) == 0
        assert "Traceback" not in served.output()


def test_a_second_signal_ends_at_once(start: Any, server: Any) -> None:
    with attached(start, server, "--drain-timeout-s=3600") as served:
        url = served.wait_for("ready: ").split()[1]
        lines: list[str] = []
        began = threading.Event()

        def read() -> None:
            with httpx.stream("POST", f"{url}/v1/chat/completions", json=LONG, trust_env=False, timeout=300) as answer:
                for line in answer.iter_lines():
                    lines.append(line)
                    began.set()

        reader = threading.Thread(target=read)
        reader.start()
        assert began.wait(120)
        served.process.send_signal(signal.SIGTERM)
        served.wait_for("1 requests run")
        served.process.send_signal(signal.SIGTERM)
        assert served.process.wait(60) == 0
        reader.join(30)
        assert "shutting down" in [line for line in lines if line][-1]
        assert "Traceback" not in served.output()


def test_a_drain_that_takes_too_long_is_cut(start: Any, server: Any) -> None:
    with attached(start, server, "--drain-timeout-s=0") as served:
        url = served.wait_for("ready: ").split()[1]
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=LONG, trust_env=False, timeout=300) as answer:
            lines = answer.iter_lines()
            next(lines)
            served.process.send_signal(signal.SIGTERM)
            assert "shutting down" in [line for line in lines if line][-1]
        assert served.process.wait(60) == 0


@pytest.mark.parametrize(
    ("args", "word"),
    [
        (["--ssl-keyfile", "KEY"], "--ssl-certfile"),
        (["--ssl-certfile", "/nowhere"], "/nowhere"),
        (["--ssl-certfile", "KEY", "--ssl-keyfile", "KEY"], "https"),
        (["--ssl-certfile", "CERT", "--ssl-keyfile", "LOCKED"], "password"),
        (["--drain-timeout-s", "nan"], "--drain-timeout-s"),
        (["--drain-timeout-s", "-1"], "--drain-timeout-s"),
        (["--keep-alive-s", "inf"], "--keep-alive-s"),
        (["--allowed-origins", "example.org"], "--allowed-origins"),
    ],
)
def test_wrong_options_end_the_command_at_once(
    args: list[str], word: str, certificate: tuple[Path, Path], tmp_path: Path
) -> None:
    cert, key = certificate
    locked = tmp_path / "locked.pem"
    command = ["openssl", "rsa", "-aes128", "-passout", "pass:secret", "-in", str(key), "-out", str(locked)]
    subprocess.run(command, check=True, capture_output=True)
    files = {"CERT": str(cert), "KEY": str(key), "LOCKED": str(locked)}
    with pytest.raises(CommandError) as caught:
        access.check(build().parse(["serve", *(files.get(arg, arg) for arg in args)]))
    assert word in str(caught.value)


def test_an_endpoint_alone_stays_small(server: Any) -> None:
    """The process that talks HTTP imports no torch, whatever it was asked before."""
    assert "libtorch" not in Path(f"/proc/{server.process.pid}/maps").read_text()
