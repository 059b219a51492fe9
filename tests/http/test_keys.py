"""API keys: who is let in, and that nobody else gets to see one."""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest

from triptych.client.cli import access
from triptych.client.cli.main import build
from triptych.client.cli.parser import CommandError
from triptych.client.launcher.hide import hide
from triptych.client.openai_api import Service, ShimOptions, create_app
from triptych.client.openai_api.keys import ApiKeys

FIRST, SECOND, FROM_FILE = "sk-first-1234567890", "sk-second-!$%&/()=", "sk-file-öffnet-nicht".replace("ö", "o")


def serve_args(*args: str) -> argparse.Namespace:
    return build().parse(["serve", *args])


def test_which_headers_open() -> None:
    keys = ApiKeys([FIRST, SECOND])
    for header in (f"Bearer {FIRST}", f"bearer {SECOND}", f"Bearer   {FIRST} "):
        assert keys.allow(header), header
    for header in (
        "",
        FIRST,
        "Bearer ",
        "Bearer None",
        f"Basic {FIRST}",
        f"Bearer {FIRST}x",
        f"Bearer {FIRST[:-1]}",
        "ü",
    ):
        assert not keys.allow(header), header
    assert ApiKeys().allow(""), "without keys everybody may ask"
    assert FIRST not in repr(ShimOptions("m", api_keys=keys)), "options are shown in errors and logs"
    assert FIRST not in str(vars(keys)), "only hashes are kept"


def test_all_sources_of_keys(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# those of the team\n\n{FROM_FILE}\n")
    environment = {access.ENVIRONMENT: f"{SECOND}, other", "PATH": "/"}
    args = serve_args("--api-key", FIRST, "--api-key", "again", "--api-key-file", str(file))
    keys = access.take_keys(args, environment)
    assert len(keys) == 5
    assert all(keys.allow(f"Bearer {key}") for key in (FIRST, "again", SECOND, "other", FROM_FILE))
    assert environment == {"PATH": "/"}, "stages must not inherit it"
    assert FIRST not in str(vars(args))
    assert len(access.take_keys(serve_args(), {})) == 0


@pytest.mark.parametrize(
    ("args", "environment", "file"),
    [
        (["--api-key", ""], {}, None),
        (["--api-key", "secret word"], {}, None),
        (["--api-key", "secret,word"], {}, None),
        (["--api-key", "secretß"], {}, None),
        ([], {access.ENVIRONMENT: ""}, None),
        ([], {access.ENVIRONMENT: "secret\nword"}, None),
        ([], {}, ""),
        ([], {}, "# secret\n\n"),
        ([], {}, "secret word"),
        (["--api-key-file", "/nowhere/secret"], {}, None),
    ],
)
def test_keys_that_cannot_be_are_refused_without_showing_them(
    args: list[str], environment: dict[str, str], file: str | None, tmp_path: Path
) -> None:
    if file is not None:
        (tmp_path / "keys").write_text(file)
        args = [*args, "--api-key-file", str(tmp_path / "keys")]
    with pytest.raises(CommandError) as caught:
        access.take_keys(serve_args(*args), environment)
    assert "secret" not in str(caught.value).replace("/nowhere/secret", "")
    assert any(name in str(caught.value) for name in ("--api-key", access.ENVIRONMENT))


def test_the_key_of_the_triton_server() -> None:
    assert access.take_triton_key(serve_args(), {}) is None
    assert access.take_triton_key(serve_args("--open-triton-management"), {}) == ""
    key = "abcdefgh-ABCDEF_0123"
    environment = {access.TRITON_KEY: key}
    assert access.take_triton_key(serve_args(), environment) == key
    assert environment == {}
    for args, wrong in ((["--open-triton-management"], key), ([], f"{key}:"), ([], key[:15]), ([], "")):
        with pytest.raises(CommandError, match=access.TRITON_KEY):
            access.take_triton_key(serve_args(*args), {access.TRITON_KEY: wrong})


def test_a_secret_leaves_the_command_line() -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", "print('read', flush=True); input()", "--key=open-sesame"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"read\n"
        assert "--key=open-sesame" in psutil.Process(child.pid).cmdline()
        assert hide("open-sesame", child.pid)
        assert psutil.Process(child.pid).cmdline()[-1] == f"--key={'*' * len('open-sesame')}"
        child.communicate(b"\n")
    assert child.returncode == 0
    assert not hide("open-sesame", child.pid), "it is gone"


def test_what_needs_a_key() -> None:
    """The application alone: every route of it, with and without."""
    service = Service(ShimOptions("m", api_keys=ApiKeys([FIRST])))
    app = create_app(service)
    free = {"/health", "/ready", "/live", "/metrics", "/version"}

    async def ask(method: str, path: str, key: str = "") -> httpx.Response:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            return await client.request(method, path, headers=headers, content=b"{}" if method == "POST" else b"")

    async def run() -> None:
        paths = (await ask("GET", "/openapi.json", FIRST)).json()["paths"]
        assert free < set(paths)
        for path, item in paths.items():
            for method, operation in item.items():
                answer = await ask(method.upper(), re.sub(r"\{.*?\}", "m", path))
                is_free = path in free | {"/health_generate"} or path == "/" or path.startswith("/assets/")
                assert (answer.status_code != 401) == is_free, (method, path, answer.text)
                assert ("401" in operation["responses"]) != is_free, (method, path)
                assert (operation.get("security") == [{"key": []}]) != is_free, (method, path)
                if not is_free:
                    assert (await ask(method.upper(), path, FIRST)).status_code != 401, (method, path)
        assert (await ask("GET", "/nowhere")).status_code == 401, "nobody learns which paths there are"
        assert (await ask("OPTIONS", "/v1/models")).status_code == 405
        refused = await ask("GET", "/v1/models", "wrong")
        assert refused.headers["www-authenticate"] == "Bearer"
        assert refused.headers["x-request-id"]
        error = refused.json()["error"]
        assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", None, "invalid_api_key")
        assert "Bearer" in error["message"]
        assert "wrong" not in refused.text

    asyncio.run(run())


@pytest.fixture(scope="module")
def guarded(start: Any, server: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """An endpoint with keys over the running server."""
    file = tmp_path_factory.mktemp("keys") / "keys"
    file.write_text(FROM_FILE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(access.ENVIRONMENT, SECOND)
        context = start(
            *(f"--triton-url=127.0.0.1:{server.grpc_port}", f"--metrics-port={server.metrics_port}", "--port=0"),
            *("--served-model-name=m", "--api-key", FIRST, f"--api-key-file={file}", "--log-level=debug"),
        )
        with context as served:
            served.url = served.wait_for("ready: ").split()[1]
            yield served


def test_a_server_with_keys(guarded: Any, command: list[str]) -> None:
    """The official client, with the right key and with others; and no key to be seen anywhere."""
    base = f"{guarded.url}/v1"
    ask: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}
    for key in (FIRST, SECOND, FROM_FILE):
        with openai.OpenAI(base_url=base, api_key=key, max_retries=0) as client:
            assert client.chat.completions.create(**ask).choices[0].finish_reason
            assert client.models.list().data[0].id == "m"
    with openai.OpenAI(base_url=base, api_key="None", max_retries=0) as client:
        with pytest.raises(openai.AuthenticationError) as caught:
            client.chat.completions.create(**ask)
        assert caught.value.code == "invalid_api_key"
    large = httpx.post(f"{base}/chat/completions", content=b"x" * 3 * 2**20, trust_env=False, timeout=60)
    assert large.status_code == 401
    for path in ("/health", "/ready", "/live", "/metrics", "/version"):
        assert httpx.get(guarded.url + path, trust_env=False).status_code == 200, path
    seen = " ".join(psutil.Process(guarded.process.pid).cmdline())
    assert "--api-key" in seen
    assert not any(key in seen + guarded.output() for key in (FIRST, SECOND, FROM_FILE))
    assert "Authorization: Bearer KEY" in guarded.output()
    chat = [*command, "chat", "--url", guarded.url, "--max-tokens=1", "hello"]
    for key, status in ((FIRST, 0), ("wrong", 1)):
        done = subprocess.run(chat, capture_output=True, text=True, env=os.environ | {access.ENVIRONMENT: key})
        assert (done.returncode, "API key" in done.stderr) == (status, bool(status)), done.stderr
