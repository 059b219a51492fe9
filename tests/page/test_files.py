"""How the page is delivered: its files, their headers, the API key, the way to leave it out."""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import uvicorn
from playwright.sync_api import BrowserContext, expect
from starlette.testclient import TestClient

from triptych.client.cli import main
from triptych.client.openai_api import Service, ShimOptions, create_app
from triptych.client.openai_api.keys import ApiKeys
from triptych.client.openai_api.page import DIST

PAGE = Path(__file__).parents[2] / "client" / "page"
SCRIPT = re.compile(r'src="\./(assets/[^"]+\.js)"')


def get(path: str, options: ShimOptions = ShimOptions("m"), **headers: str) -> httpx.Response:  # noqa: B008
    """An answer of the endpoint, which needs no Triton server for the page."""
    return TestClient(create_app(Service(options))).get(path, headers=headers)


def test_the_build_is_of_these_sources() -> None:
    """`npm run build` in client/page makes it so; the hash is computed as vite.config.ts does."""
    files = [path for path in (PAGE / "src").rglob("*") if path.is_file()]
    files += [PAGE / name for name in ("package-lock.json", "package.json", "tsconfig.json", "vite.config.ts")]
    digest = hashlib.sha256()
    for name, path in sorted((path.relative_to(PAGE).as_posix(), path) for path in files):
        digest.update(f"{name}\n".encode() + path.read_bytes())
    assert (DIST / "sources.sha256").read_text().strip() == digest.hexdigest()


def test_everything_that_is_bundled_has_its_licence() -> None:
    licences = (DIST / "LICENSES.md").read_text()
    for name in json.loads((PAGE / "package.json").read_text())["dependencies"]:
        assert re.search(rf"^## {re.escape(name)} - \d", licences, re.MULTILINE), name


def test_the_lock_file_names_no_registry() -> None:
    packages = json.loads((PAGE / "package-lock.json").read_text())["packages"]
    assert len(packages) > 10
    assert [name for name, package in packages.items() if "resolved" in package] == []
    assert [name for name, package in packages.items() if name and "integrity" not in package] == []


def test_headers_and_caching() -> None:
    page = get("/")
    assert page.status_code == 200
    assert page.headers["cache-control"] == "no-cache"
    assert get("/", **{"if-none-match": page.headers["etag"]}).status_code == 304
    script = SCRIPT.search(page.text)
    assert script is not None
    asset = get(f"/{script[1]}")
    assert "immutable" in asset.headers["cache-control"]
    assert asset.headers["content-type"].startswith("text/javascript")
    for answer in (page, asset):
        policy = dict(rule.split(" ", 1) for rule in answer.headers["content-security-policy"].split("; "))
        assert policy["default-src"] == "'none'"
        assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
        assert answer.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize("path", ["/assets/none.js", "/assets/%2e%2e/index.html", "/assets/..%2fsources.sha256"])
def test_no_other_file_is_served(path: str) -> None:
    answer = get(path)
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "not_found"


def test_it_can_be_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    assert get("/", ShimOptions("m", playground=False)).status_code == 404
    with pytest.raises(SystemExit):
        main(["serve", "--help"])
    assert "--no-playground" in capsys.readouterr().out


@pytest.fixture
def guarded() -> Iterator[str]:
    """URL of an endpoint that wants the key "secret", and has no Triton server yet."""
    app = create_app(Service(ShimOptions("kept-model", api_keys=ApiKeys(["secret"]))))
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    until = time.monotonic() + 60
    while not server.started and time.monotonic() < until:
        time.sleep(0.02)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join()


def test_the_key_is_asked_for_and_kept_for_the_tab(context: BrowserContext, guarded: str) -> None:
    page = context.new_page()
    page.goto(guarded)
    dialog = page.get_by_role("dialog", name="API key")
    expect(dialog).to_contain_text("this server wants an API key")
    page.get_by_label("Key", exact=True).fill("wrong")
    page.keyboard.press("Enter")
    expect(dialog).to_contain_text("the API key is not one of this server's")
    page.get_by_label("Key", exact=True).fill("secret")
    page.keyboard.press("Enter")
    expect(dialog).to_have_count(0)
    expect(page.get_by_text("kept-model")).to_be_visible()
    page.reload()
    expect(page.get_by_text("kept-model")).to_be_visible()
    assert page.evaluate("JSON.stringify(localStorage)").find("secret") == -1

    # an error of a server that is still loading, in place
    page.get_by_role("textbox", name="Message").fill("hello")
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_contain_text("the model is loading")

    # the key can be changed, and a wrong one is found out with the next question
    page.get_by_role("button", name="API key").click()
    page.get_by_label("Key", exact=True).fill("")
    page.keyboard.press("Enter")
    expect(dialog).to_contain_text("this server wants an API key")
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Try again").last.click()
    expect(dialog).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_role("button", name="Enter an API key")).to_be_visible()
