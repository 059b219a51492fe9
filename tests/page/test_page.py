"""What a reader does on the page, with mouse, clipboard, microphone and keyboard, and what it shows."""

from __future__ import annotations

import base64
import json
import re
import struct

import pytest
from playwright.sync_api import expect

from .conftest import MEDIA, Play

SHAPES = "a red circle at the top left, a blue star at the top right and a yellow triangle at the bottom"
STAGES = ["Fetch", "Decode media", "Preprocess", "Encode", "Queue", "Prefill", "Generate", "Other"]
# The built-in model answers in few words; a grammar makes it write on until it is stopped.
ENDLESS = "(again ){2000}"

TAKE_FILE = """
([name, kind, type, data]) => {
  const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
  const moved = new DataTransfer();
  moved.items.add(new File([bytes], name, {type}));
  const options = {bubbles: true, cancelable: true};
  const event = kind === 'paste'
    ? new ClipboardEvent('paste', {...options, clipboardData: moved})
    : new DragEvent(kind, {...options, dataTransfer: moved});
  document.querySelector('main').dispatchEvent(event);
}
"""


def give(play: Play, kind: str, name: str = "picture.png", mime: str = "image/png", data: bytes | None = None) -> None:
    """Drop or paste a file anywhere on the page."""
    content = (MEDIA / name).read_bytes() if data is None else data
    for event in ("dragenter", "dragover", "drop") if kind == "drop" else ("paste",):
        play.page.evaluate(TAKE_FILE, [name, event, mime, base64.b64encode(content).decode()])


def test_a_question_of_text_is_answered(play: Play) -> None:
    answer = play.ask("Who are you?")
    assert "Triptych" in answer
    assert play.asked[0]["messages"] == [{"role": "user", "content": "Who are you?"}]
    assert play.asked[0]["temperature"] == 0
    assert "top_p" not in play.asked[0], "what is left empty is the server's to choose"
    # read out as a whole, not word by word
    expect(play.page.get_by_role("status")).to_have_text(f"Answer: {answer}")
    expect(play.message).to_be_focused()
    assert not play.problems


def test_a_picture_from_a_file_with_tokens_and_times(play: Play) -> None:
    play.attach("picture.png")
    shown = play.page.get_by_role("img", name="Picture: picture.png")
    assert shown.evaluate("picture => picture.decode().then(() => picture.naturalWidth)") == 480
    assert play.ask("What is in the picture?") == SHAPES
    assert [part["type"] for part in play.asked[0]["messages"][0]["content"]] == ["image_url", "text"]
    counts = play.answers.get_by_role("list", name="Tokens and speed").inner_text()
    assert re.search(r"\d+ tokens in \((\d+) of pictures", counts), counts
    assert re.search(r"\d+ out", counts), counts
    assert "first text after" in counts
    assert "tokens/s" in counts

    play.button("Time in the server").click()
    table = play.answers.get_by_role("table")
    assert [row.split(" ")[0] for row in table.get_by_role("rowheader").all_inner_texts()] == [
        name.split(" ")[0] for name in STAGES
    ]
    bars = table.locator("tbody tr").evaluate_all(
        """rows => rows.map((row) => {
            const lane = row.querySelector('.lane').getBoundingClientRect();
            const bar = row.querySelector('.bar')?.getBoundingClientRect();
            return bar ? [(bar.left - lane.left) / lane.width, bar.width / lane.width] : null;
        })"""
    )
    times = [_milliseconds(text) for text in table.locator(".ms").all_inner_texts()]
    assert times[0] == 0, "nothing was fetched"
    assert bars[0] is None
    assert times[1] > 0, "a picture was decoded"
    assert times[6] > 0, "an answer was written"
    total = sum(times)
    passed = 0.0
    for bar, time in zip(bars[1:], times[1:], strict=True):
        assert bar is not None
        # a bar begins where those before it end; short ones are still 2 px wide
        assert bar[0] == pytest.approx(passed / total, abs=0.02)
        assert bar[1] == pytest.approx(time / total, abs=0.02)
        passed += time
    assert not play.problems


def _milliseconds(text: str) -> float:
    value, unit = text.split()
    return float(value) * {"ms": 1, "s": 1000}[unit]


@pytest.mark.parametrize("kind", ["drop", "paste"])
def test_a_picture_that_is_dropped_or_pasted(play: Play, kind: str) -> None:
    give(play, kind)
    expect(play.page.get_by_role("img", name="Picture: picture.png")).to_be_visible()
    assert play.ask("How many shapes are there?") == "3"
    assert not play.problems


def test_a_file_that_is_no_medium_is_refused(play: Play) -> None:
    give(play, "drop", "notes.pdf", "application/pdf", b"%PDF")
    expect(play.page.get_by_role("alert")).to_have_text("notes.pdf is no picture, video or sound.")
    expect(play.page.get_by_role("list", name="Attached")).to_have_count(0)


def test_a_video_and_a_sound_have_players(play: Play) -> None:
    assert play.ask("What happens in the video?", "clip.mp4") == "moving right"
    video = play.page.get_by_label("Video: clip.mp4")
    assert video.evaluate(
        "v => new Promise(r => v.readyState ? r(v.controls) : v.onloadedmetadata = () => r(v.controls))"
    )
    play.button("New conversation").click()
    assert play.ask("Which digits are spoken?", "digits.wav") == "4719"
    expect(play.page.get_by_label("Sound: digits.wav")).to_be_visible()
    assert [part["type"] for part in play.asked[1]["messages"][0]["content"]] == ["audio_url", "text"]
    assert not play.problems


def test_a_recording_is_sent_as_a_sound(play: Play) -> None:
    play.button("Record from the microphone").click()
    # the browser's microphone beeps once a second
    expect(play.page.get_by_role("timer")).to_have_text(re.compile(r"[1-9]\.\d s"))
    expect(play.button("Send")).to_be_disabled()
    play.button("Stop recording").click()
    expect(play.page.get_by_label("Sound: recording.wav")).to_be_visible()
    play.ask("What do you hear?")
    url = play.asked[0]["messages"][0]["content"][0]["audio_url"]["url"]
    wave = base64.b64decode(url.removeprefix("data:audio/wav;base64,"))
    kind, channels, rate, _, _, bits = struct.unpack_from("<HHIIHH", wave, 20)
    assert (wave[:4], kind, channels, rate, bits) == (b"RIFF", 1, 1, 16000, 16)
    samples = struct.unpack_from(f"<{(len(wave) - 44) // 2}h", wave, 44)
    assert len(samples) > 8000
    assert max(map(abs, samples)) > 1000, "silence"
    assert not play.problems


def test_a_medium_by_address_is_fetched_by_the_server(play: Play, files: str) -> None:
    play.button("Attach by web address").click()
    play.page.get_by_role("textbox", name="Address").fill(f"{files}/clip.mp4")
    expect(play.page.get_by_role("radio", name="Video")).to_be_checked()
    play.page.get_by_role("textbox", name="Address").press("Enter")
    assert play.ask("What happens in the video?") == "moving right"
    play.button("Time in the server").click()
    fetch = play.page.get_by_role("row", name=re.compile("^Fetch")).locator(".ms").inner_text()
    assert _milliseconds(fetch) > 0
    assert not play.problems, "the page itself fetched it, or failed"


def test_what_is_attached_can_be_removed(play: Play) -> None:
    play.attach("picture.png", "digits.wav")
    play.button("Remove picture.png").click()
    attached = play.page.get_by_role("list", name="Attached").get_by_role("listitem")
    expect(attached).to_have_count(1)
    assert play.ask("Which digits are spoken?") == "4719"
    assert len(play.asked[0]["messages"][0]["content"]) == 2


def test_several_turns_are_one_conversation(play: Play) -> None:
    play.ask("What is in the picture?", "picture.png")
    play.ask("How many shapes are there?")
    roles = [message["role"] for message in play.asked[1]["messages"]]
    assert roles == ["user", "assistant", "user"]
    first, answer, _ = play.asked[1]["messages"]
    assert first == play.asked[0]["messages"][0], "the picture comes along again"
    assert answer["content"] == SHAPES


def test_an_answer_can_be_stopped(play: Play) -> None:
    play.form("Regular expression")
    play.set("Regular expression", ENDLESS)
    play.send("Go on")
    expect(play.answers.last).to_contain_text("again again")
    play.button("Stop the answer").click()
    play.wait_for("stopped")
    expect(play.answers.last).to_contain_text("Stopped.")
    expect(play.answers.last).to_contain_text("again again")
    expect(play.message).to_be_editable()
    # and so it can be with the keyboard, in the field where the message was written
    play.send("Go on")
    expect(play.answers.last).to_contain_text("again again")
    play.message.press("Escape")
    play.wait_for("stopped")
    assert [message["role"] for message in play.asked[1]["messages"]] == ["user", "assistant", "user"]


def test_an_answer_can_be_made_again_and_a_question_changed(play: Play) -> None:
    play.ask("What is in the picture?", "picture.png")
    play.ask("Who are you?")
    play.button("Answer again", exact=True).click()
    play.page.wait_for_function("() => document.querySelectorAll('.answer[data-state=done]').length === 2")
    assert len(play.asked) == 3
    assert play.asked[2]["messages"] == play.asked[1]["messages"]

    play.button("Edit the question").first.click()
    field = play.page.get_by_role("textbox", name="Edit the question")
    expect(field).to_be_focused()
    field.press("Escape")
    expect(play.button("Edit the question").first).to_be_focused()
    play.button("Edit the question").first.click()
    field.fill("What colour is the star?")
    play.button("Ask again").click()
    expect(play.answers).to_have_count(1)
    assert play.answered() == "blue"
    assert len(play.asked[3]["messages"]) == 1, "what followed is gone"
    assert play.asked[3]["messages"][0]["content"][0] == play.asked[0]["messages"][0]["content"][0]


def test_the_controls_reach_the_request(play: Play) -> None:
    for name, value in (("Top p", "0.9"), ("Top k", "7"), ("Max tokens", "4"), ("Seed", "12345")):
        play.set(name, value)
    play.set("System prompt", "Be brief.")
    play.ask("What is in the picture?", "picture.png")
    sent = play.asked[0]
    wanted = {"temperature": 0, "top_p": 0.9, "top_k": 7, "max_tokens": 4, "seed": 12345}
    assert {name: sent[name] for name in wanted} == wanted
    assert sent["messages"][0] == {"role": "system", "content": "Be brief."}
    expect(play.answers).to_contain_text("Ended at the limit of tokens.")
    # they are there on the next visit too
    play.page.reload()
    expect(play.page.get_by_role("textbox", name="Seed", exact=True)).to_have_value("12345")
    play.button("Back to the defaults").click()
    play.ask("Who are you?")
    assert not set(wanted) & set(play.asked[1])


def test_answers_of_a_form(play: Play) -> None:
    play.form("JSON of a schema")
    play.set("JSON schema", '{"type": "object", "properties": {"count": {"enum": [3]}}, "required": ["count"]}')
    assert json.loads(play.ask("How many shapes are there?", "picture.png")) == {"count": 3}
    play.form("EBNF grammar")
    play.set("Grammar", 'root ::= "yes, indeed"')
    assert play.ask("Is it?") == "yes, indeed"
    play.form("JSON of a schema")
    play.set("JSON schema", "{")
    play.send("And now?")
    play.wait_for("failed")
    expect(play.page.get_by_role("alert")).to_contain_text("The JSON schema in the settings is no JSON")
    assert len(play.asked) == 2


def test_an_answer_can_show_markdown_but_do_nothing(play: Play) -> None:
    """The answer is forced by a grammar: what a model might write, or be made to write by a picture."""
    hostile = "**bold** <b onclick=x>tag</b> <img src=/x onerror=x> ![p](http://e.org/p) [l](javascript:x) `a<b`"
    play.form("Regular expression")
    play.set("Regular expression", re.escape(hostile).replace(r"\ ", " ").replace(r"\!", "!"))
    play.send("Write")
    play.wait_for("done")
    html = play.answers.last.locator(".markdown")
    expect(html.locator("strong")).to_have_text("bold")
    expect(html.locator("code")).to_have_text("a<b")
    expect(html).to_contain_text("<b onclick=x>tag</b>")
    expect(html.locator("img, script, b")).to_have_count(0)
    links = html.locator("a").evaluate_all("all => all.map(a => [a.getAttribute('href'), a.rel])")
    assert links[0] == ["http://e.org/p", "noopener noreferrer nofollow"]
    assert all(not (href or "").startswith("javascript") for href, _ in links)
    play.form("EBNF grammar")
    play.set("Grammar", r'root ::= "```py\nif a < b:\n    go()\n```"')
    play.send("Write")
    play.wait_for("done")
    expect(play.answers.last.locator("pre code")).to_have_text("if a < b:\n    go()")
    expect(play.answers.last.get_by_role("button", name="Copy", exact=True)).to_be_visible()
    assert not play.problems


def test_an_error_of_the_server_is_shown_in_place_and_can_be_retried(play: Play) -> None:
    play.form("Regular expression")
    play.set("Regular expression", "(")
    play.send("Who are you?")
    play.wait_for("failed")
    alert = play.answers.get_by_role("alert")
    expect(alert).to_contain_text("regex")
    expect(alert).to_contain_text(re.compile("status 400, request req_"))
    play.form("Free text")
    alert.get_by_role("button", name="Try again").click()
    assert "Triptych" in play.answered()
    expect(play.page.get_by_role("alert")).to_have_count(0)


def test_a_server_that_cannot_be_reached_is_shown_in_place(play: Play) -> None:
    play.page.context.set_offline(True)
    play.send("Who are you?")
    play.wait_for("failed")
    expect(play.answers.get_by_role("alert")).to_contain_text("The server cannot be reached")
    # the next question goes without the one that was never answered
    play.page.context.set_offline(False)
    assert "Triptych" in play.ask("Who are you?")
    assert len(play.asked[-1]["messages"]) == 1


def test_reasoning_and_an_error_in_the_middle_of_an_answer(play: Play) -> None:
    """Chunks made by hand: the built-in model does not reason, and its server does not fail when asked to."""
    chunks: list[dict[str, object]] = [
        {"choices": [{"index": 0, "delta": delta, "finish_reason": None}]}
        for delta in ({"role": "assistant"}, {"reasoning_content": "Let me *see*."}, {"content": "It is **red"})
    ]
    chunks.append({"error": {"message": "the stage language_model died", "code": "stage_dead"}})
    body = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks)
    play.page.route(
        "**/v1/chat/completions", lambda route: route.fulfill(content_type="text/event-stream", body=body), times=1
    )
    play.send("What colour?")
    play.wait_for("failed")
    answer = play.answers.last
    expect(answer.get_by_role("alert")).to_contain_text("the stage language_model died")
    expect(answer).to_contain_text("It is **red")
    answer.get_by_text("Reasoning").click()
    expect(answer.locator(".reasoning em")).to_have_text("see")
    # what was written is part of the conversation; what was thought is not
    play.ask("Who are you?")
    assert play.asked[-1]["messages"][1] == {"role": "assistant", "content": "It is **red"}
