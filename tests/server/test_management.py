"""Who may change what the server has loaded: the launcher, and whoever has its key."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from triptych.client.launcher.server import KEY_HEADER, MANAGEMENT
from triptych.python_models.contract.tensors import CHAT_TEXT

with warnings.catch_warnings():
    # the client's own imports warn
    warnings.simplefilter("ignore")
    import tritonclient.grpc as grpc

DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@pytest.fixture
def client(scripted: Any) -> Iterator[Any]:
    """A plain gRPC client of a server that the launcher made a key for."""
    with grpc.InferenceServerClient(
        scripted.server.grpc_url, channel_args=[("grpc.enable_http_proxy", 0)]
    ) as connection:
        yield connection


def post(server: Any, path: str, key: str = "") -> tuple[int, str]:
    """(status, body) of a request to the HTTP endpoint."""
    headers = {KEY_HEADER: key} if key else {}
    request = urllib.request.Request(f"{server.http_url}{path}", data=b"{}", headers=headers, method="POST")
    try:
        with DIRECT.open(request, timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_over_grpc(scripted: Any, client: Any) -> None:
    header = f"triton-grpc-protocol-{KEY_HEADER}"
    for headers in ({}, {header: "wrong"}, {KEY_HEADER: scripted.server.management_key}):
        with pytest.raises(grpc.InferenceServerException, match="restricted"):
            client.unload_model(CHAT_TEXT.name, headers=headers)
    assert client.is_model_ready(CHAT_TEXT.name)
    key = {header: scripted.server.management_key}
    client.unload_model(CHAT_TEXT.name, headers=key)
    assert not client.is_model_ready(CHAT_TEXT.name)
    client.load_model(CHAT_TEXT.name, headers=key)
    assert client.is_model_ready(CHAT_TEXT.name)
    assert client.get_model_repository_index(headers=key).models


def test_over_http(scripted: Any) -> None:
    server = scripted.server
    for key in ("", "wrong"):
        assert post(server, f"/v2/repository/models/{CHAT_TEXT.name}/unload", key)[0] == 403
        assert post(server, "/v2/repository/index", key)[0] == 403
    for action in ("unload", "load"):
        assert post(server, f"/v2/repository/models/{CHAT_TEXT.name}/{action}", server.management_key)[0] == 200
    found = json.loads(post(server, "/v2/repository/index", server.management_key)[1])
    assert {"name": CHAT_TEXT.name, "version": "1", "state": "READY"}.items() <= {
        name: value for model in found if model["name"] == CHAT_TEXT.name for name, value in model.items()
    }.items()


def test_the_key_is_shown_nowhere(scripted: Any) -> None:
    server = scripted.server
    key = server.management_key
    assert len(key) >= 32
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                shown = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            assert key.encode() not in shown, entry.name
    command = Path(f"/proc/{server.pid}/cmdline").read_text()
    assert f"{MANAGEMENT}:{KEY_HEADER}={'*' * len(key)}" in command
    assert key not in server.log.read_text()


def test_what_describes_a_model_is_open(client: Any) -> None:
    assert client.get_model_config(CHAT_TEXT.name)
    assert client.get_model_metadata(CHAT_TEXT.name)
    assert client.get_inference_statistics(CHAT_TEXT.name)
    for forbidden in (client.get_trace_settings, client.get_log_settings, client.get_system_shared_memory_status):
        with pytest.raises(grpc.InferenceServerException, match="restricted"):
            forbidden()
