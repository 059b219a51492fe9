"""The page for everyone: keyboard, screen readers, small screens, dark and still ones; and without a network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page, Route, expect

from .conftest import Play, watch

AXE = (Path(__file__).parent / "axe.min.js").read_text()
# https://www.deque.com/axe/core-documentation/api-documentation/#axecore-tags
RULES = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]
FOCUSED = """
() => {
  const element = document.activeElement;
  const style = getComputedStyle(element);
  const box = element.closest('.stepper, .composer') ?? element;
  const around = getComputedStyle(box);
  const seen = [style, around].some((s) => s.outlineStyle !== 'none' && parseFloat(s.outlineWidth) > 0)
    || around.borderColor === getComputedStyle(document.querySelector('.send')).backgroundColor;
  const name = element.getAttribute('aria-label') || element.labels?.[0]?.textContent || element.textContent;
  return [element.tagName, name, seen];
}
"""


def violations(page: Page) -> list[str]:
    """What axe-core finds, each with where."""
    # as the console of the developer tools would: the page's own policy allows no such script
    page.evaluate(AXE)
    found: dict[str, Any] = page.evaluate("rules => axe.run(document, {runOnly: rules})", RULES)
    assert len(found["passes"]) > 15
    return [f"{item['id']}: {[node['html'] for node in item['nodes']]}" for item in found["violations"]]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(play: Play, scheme: str) -> None:
    play.page.emulate_media(color_scheme="dark" if scheme == "dark" else "light")
    assert violations(play.page) == []
    play.ask("What is in the picture?", "picture.png")
    play.button("Time in the server").click()
    play.form("Regular expression")
    play.set("Regular expression", "(")
    play.attach("picture.png", "clip.mp4", "digits.wav")
    play.send("Who are you?")
    play.wait_for("failed")
    play.button("Edit the question").first.click()
    play.attach("picture.png", "clip.mp4", "digits.wav")
    expect(play.page.get_by_role("table")).to_be_visible()
    assert violations(play.page) == []
    play.button("Attach by web address").click()
    expect(play.page.get_by_role("dialog")).to_be_visible()
    assert violations(play.page) == []


def test_small_screens(play: Play) -> None:
    page = play.page
    page.set_viewport_size({"width": 360, "height": 640})
    play.ask("What is in the picture?", "picture.png")
    play.button("Time in the server").click()
    assert page.evaluate("document.documentElement.scrollWidth") == 360, "nothing sticks out"
    assert page.locator(".scroller").evaluate("e => e.scrollWidth - e.clientWidth") == 0
    assert violations(page) == []
    play.button("Settings", exact=True).click()
    dialog = page.get_by_role("dialog", name="Settings")
    expect(dialog).to_be_visible()
    assert violations(page) == []
    play.set("Seed", "5")
    page.keyboard.press("Escape")
    expect(dialog).to_have_count(0)
    expect(play.button("Settings", exact=True)).to_be_focused()
    play.ask("Who are you?")
    assert play.asked[-1]["seed"] == 5


def test_with_the_keyboard_alone(play: Play) -> None:
    page = play.page
    page.reload()
    expect(play.message).to_be_focused()
    page.keyboard.type("Who are")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("you?")
    page.keyboard.press("Enter")
    play.wait_for("done")
    assert play.asked[0]["messages"][0]["content"] == "Who are\nyou?"
    expect(play.message).to_be_focused()

    # every stop has a name, is seen to have the focus, and they come in the order in which they lie
    stops: list[str] = []
    for _ in range(60):
        page.keyboard.press("Tab")
        tag, name, seen = page.evaluate(FOCUSED)
        if tag == "BODY":
            # past the last one: from the first on
            stops.append("")
            continue
        assert name, f"a {tag} without a name after {stops}"
        assert seen, f"the focus on {name!r} is not seen"
        stops.append(name.strip())
        if name == "Message":
            break
    end = stops.index("") if "" in stops else next(i for i, name in enumerate(stops) if name == "New conversation")
    names = [name for name in (*stops[end:], *stops[:end]) if name]
    wanted = [
        *("New conversation", "Settings", "Edit the question", "Copy the answer", "Answer again", "Time in the server"),
        *("Message", "Attach files", "Attach by web address", "Record from the microphone"),
        *("System prompt", "Temperature", "Top p", "Top k", "Max tokens", "Seed", "Form of the answer"),
    ]
    places = [next((i for i, name in enumerate(names) if name.startswith(word)), -1) for word in wanted]
    assert -1 not in places, dict(zip(wanted, places, strict=True))
    assert places == sorted(places), names

    play.button("Time in the server").focus()
    page.keyboard.press("Enter")
    expect(page.get_by_role("table")).to_be_visible()
    play.button("New conversation").focus()
    page.keyboard.press("Enter")
    expect(play.answers).to_have_count(0)
    expect(play.message).to_be_focused()


def test_colours_can_be_chosen(play: Play) -> None:
    def ground() -> str:
        return str(play.page.evaluate("getComputedStyle(document.documentElement).backgroundColor"))

    play.page.emulate_media(color_scheme="light")
    light = ground()
    play.page.emulate_media(color_scheme="dark")
    dark = ground()
    assert light != dark
    play.button("Colours: as the system").click()
    assert ground() == light
    play.button("Colours: light").click()
    play.page.emulate_media(color_scheme="light")
    assert ground() == dark
    play.page.reload()
    assert ground() == dark


def test_nothing_moves_where_that_is_asked_for(play: Play) -> None:
    # the dots of an answer that has not begun
    moving = """() => {
        const dots = document.createElement('p');
        dots.className = 'waiting';
        dots.append(document.createElement('span'));
        document.body.append(dots);
        const name = getComputedStyle(dots.firstChild).animationName;
        dots.remove();
        return name;
    }"""
    assert play.page.evaluate(moving) == "none"
    play.page.emulate_media(reduced_motion="no-preference")
    assert play.page.evaluate(moving) != "none"


def test_without_a_network_but_for_the_server(context: Any, server: Any) -> None:
    elsewhere: list[str] = []

    def judge(route: Route) -> None:
        if route.request.url.startswith(server.url):
            route.continue_()
        else:
            elsewhere.append(route.request.url)
            route.abort()

    context.route("**/*", judge)
    play = Play(context.new_page(), server.url)
    watch(play)
    play.page.goto(server.url)
    play.set("Temperature", "0")
    assert play.ask("How many shapes are there?", "picture.png") == "3"
    assert elsewhere == []
    assert play.problems == []
