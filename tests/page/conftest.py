"""The playground in a headless Chromium, before a real server with the built-in model."""

from __future__ import annotations

import functools
import http.server
import importlib.util
import json
import shutil
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, Locator, Page, Playwright, Request, expect, sync_playwright

ROOT = Path(__file__).parents[2]
MEDIA = ROOT / "examples" / "media"
# Generous: the machines that run tests are small and busy.
WAIT_MS = 120_000
expect.set_options(timeout=WAIT_MS)
# A microphone that beeps, and nothing that the browser would ask the network for by itself.
ARGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
    *("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"),
]


def _http() -> ModuleType:
    """tests/http/conftest.py, which starts servers."""
    spec = importlib.util.spec_from_file_location("http_conftest", ROOT / "tests" / "http" / "conftest.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # dataclasses look their module up
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@dataclass
class Play:
    """The page, and what it asked for.

    Attributes:
        page: open at the playground.
        url: of the server.
        asked: bodies of its chat completions.
        problems: what a page without faults never has: errors in the console, exceptions, requests that failed or
            went elsewhere.
    """

    page: Page
    url: str
    asked: list[dict[str, Any]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def message(self) -> Locator:
        return self.page.get_by_role("textbox", name="Message")

    @property
    def answers(self) -> Locator:
        return self.page.locator(".answer")

    def button(self, name: str, exact: bool = False) -> Locator:
        return self.page.get_by_role("button", name=name, exact=exact)

    def set(self, name: str, value: str) -> None:
        """Fill in one of the settings; they count once the field is left."""
        box = self.page.get_by_role("textbox", name=name, exact=True)
        box.fill(value)
        box.press("Tab")

    def form(self, name: str) -> None:
        self.page.get_by_label("Form of the answer").select_option(name)

    def attach(self, *names: str) -> None:
        with self.page.expect_file_chooser() as chooser:
            self.button("Attach files").click()
        chooser.value.set_files([MEDIA / name for name in names])

    def send(self, text: str) -> None:
        self.message.fill(text)
        self.message.press("Enter")

    def ask(self, text: str, *files: str) -> str:
        """Send a message, wait for its answer and return it."""
        before = self.answers.count()
        if files:
            self.attach(*files)
        self.send(text)
        self.page.wait_for_function("n => document.querySelectorAll('.answer').length > n", arg=before)
        return self.answered()

    def answered(self) -> str:
        """The last answer, once it is complete."""
        self.wait_for("done")
        return self.answers.last.locator(".markdown").inner_text().strip()

    def wait_for(self, state: str) -> None:
        self.page.locator(f".turn:last-child .answer[data-state={state}]").wait_for()


def watch(play: Play) -> None:
    """Note what the page asks for, and its faults."""

    def on_request(request: Request) -> None:
        if not request.url.startswith((play.url, "blob:")):
            play.problems.append(f"request to {request.url}")
        if request.url.endswith("/v1/chat/completions"):
            play.asked.append(json.loads(request.post_data or ""))

    play.page.on("request", on_request)
    play.page.on("requestfailed", lambda request: play.problems.append(f"{request.url}: {request.failure}"))
    play.page.on("pageerror", lambda error: play.problems.append(str(error)))
    play.page.on(
        "console",
        lambda message: play.problems.append(message.text) if message.type in ("error", "warning") else None,
    )


@pytest.fixture(scope="session")
def files() -> Iterator[str]:
    """Base URL of a web server with examples/media."""
    handler = functools.partial(_Quiet, directory=str(MEDIA))
    web = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    web.daemon_threads = True
    threading.Thread(target=web.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{web.server_port}"
    web.shutdown()
    web.server_close()


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture(scope="session")
def server(files: str) -> Iterator[Any]:
    """One server for all tests of this folder: the built-in model, whose answers have a sense."""
    with _http().serving("builtin", "--port=0", f"--allowed-media-host={files.removeprefix('http://')}") as served:
        served.url = served.wait_for("ready: ").split()[1]
        yield served


@pytest.fixture(scope="module")
def playwright() -> Iterator[Playwright]:
    """Not for the whole session: as long as it lives, nothing else in this thread can run an event loop."""
    with sync_playwright() as made:
        yield made


@pytest.fixture(scope="module")
def browser(playwright: Playwright) -> Iterator[Browser]:
    """Playwright's own Chromium, else the system's."""
    own = Path(playwright.chromium.executable_path)
    found = (
        own
        if own.exists()
        else next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    )
    if found is None:
        pytest.skip("no Chromium: neither playwright's (python -m playwright install chromium) nor chromium in PATH")
    made = playwright.chromium.launch(executable_path=found, args=ARGS)
    yield made
    made.close()


@pytest.fixture
def context(browser: Browser) -> Iterator[BrowserContext]:
    made = browser.new_context(viewport={"width": 1280, "height": 860}, reduced_motion="reduce")
    made.set_default_timeout(WAIT_MS)
    yield made
    made.close()


@pytest.fixture
def play(context: BrowserContext, server: Any) -> Play:
    """The page, ready for a question that has one answer."""
    play = Play(context.new_page(), server.url)
    watch(play)
    play.page.goto(server.url)
    play.page.get_by_text("triptych-builtin").wait_for()
    play.set("Temperature", "0")
    return play
