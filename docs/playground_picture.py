"""Takes docs/images/playground.png anew: the playground of a running server with the built-in model.

Use: python docs/playground_picture.py http://127.0.0.1:30000
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

ROOT = Path(__file__).parents[1]
TARGET = ROOT / "docs" / "images" / "playground.png"


def main(url: str) -> None:
    """Ask about a picture that no cache holds, open the times, write the picture."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 860}, color_scheme="light")
        page.set_default_timeout(120_000)
        page.goto(url)
        page.get_by_role("textbox", name="Temperature").fill("0")
        # the first request of all warms the stages up, with another picture
        for name, question in (("text.png", "What does the text say?"), ("picture.png", "What is in the picture?")):
            if page.locator(".turn").count():
                page.get_by_role("button", name="New conversation").click()
            with page.expect_file_chooser() as chooser:
                page.get_by_role("button", name="Attach files").click()
            chooser.value.set_files(ROOT / "examples" / "media" / name)
            page.get_by_role("textbox", name="Message").fill(question)
            page.get_by_role("textbox", name="Message").press("Enter")
            page.locator(f".turn:has-text({question!r}) .answer[data-state=done]").wait_for()
        page.get_by_role("button", name="Time in the server").click()
        page.mouse.move(0, 0)
        page.evaluate("document.activeElement.blur()")
        page.get_by_role("table").wait_for()
        TARGET.parent.mkdir(exist_ok=True)
        page.screenshot(path=TARGET)
        browser.close()


if __name__ == "__main__":
    main(sys.argv[1])
