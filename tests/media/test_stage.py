"""The preprocess stage with a small preprocessor of its own: requests, limits, errors, deadlines, cancelling."""

from __future__ import annotations

import gc
import io
import logging
import os
import signal
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image as PILImage

from triptych.python_models.contract.errors import ErrorKind, TriptychError
from triptych.python_models.contract.features import unpack
from triptych.python_models.contract.plan import Plan
from triptych.python_models.contract.request import Message, TemplateInputs
from triptych.python_models.contract.tensors import PREPROCESS
from triptych.python_models.families.base import Prepared
from triptych.python_models.media.types import Audio, Image, Medium, Video
from triptych.python_models.preprocess import loader

Make = Callable[..., bytes]
SECONDS = 30.0


def png(size: tuple[int, int] = (8, 6), colour: tuple[int, int, int] = (1, 2, 3), **options: Any) -> bytes:
    out = io.BytesIO()
    PILImage.new("RGB", size, colour).save(out, "PNG", **options)
    return out.getvalue()


def blob(modality: str, index: int = 0) -> dict[str, Any]:
    return {"type": modality, "blob": index}


def url(modality: str, address: str) -> dict[str, Any]:
    return {"type": modality, "url": address}


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def test_text(shared: Any) -> None:
    out = shared.start(
        "hi", sampling={"temperature": 0, "max_tokens": 5, "seed": 3}, stream=False, lease_s=4, timeout_s=9
    ).ok
    assert set(out) == {"input_ids", "position_ids", "plan"}
    assert (out["input_ids"].dtype, out["position_ids"].dtype) == (np.int32, np.int32)
    assert out["position_ids"].tolist() == [[0, 1]]
    plan = Plan.from_json(out["plan"][0])
    assert (plan.sampling.temperature, plan.sampling.max_tokens, plan.sampling.seed) == (0, 5, 3)
    assert (plan.stream, plan.lease_s, plan.timeout_s, plan.rope_delta, plan.items) == (False, 4, 9, 7, ())


def test_every_modality_at_once(shared: Any, web: Any, make_clip: Make, make_tone: Make, make_m4a: Make) -> None:
    text = {"type": "text", "text": "ab"}
    address = web.serve("/a.mp4", make_clip(30, 10))
    content = [blob("image"), text, url("video", address), blob("audio", 1), blob("audio", 2)]
    shared.letters.seen.clear()
    out = shared.start(content, png(), make_tone(44100, 2, fmt="MP3"), make_m4a()).ok
    # the others are of token ids to spell out
    assert set(out) == {spec.name for spec in PREPROCESS.outputs} - {"text", "token_strings", "about"}
    plan = Plan.from_json(out["plan"][0])
    assert [(i.modality, i.spans, i.encoder) for i in plan.items] == [
        ("image", ((0, 4),), "vision"),
        ("video", ((6, 10),), "vision"),
        ("audio", ((10, 14),), "audio"),
        ("audio", ((14, 18),), "audio"),
    ]
    vision, audio = unpack(out["vision_features"]), unpack(out["audio_features"])
    assert [i.digest for i in (*vision, *audio)] == [i.digest for i in plan.items]
    assert vision[1].tensors["x"].tolist() == [6, 6, 6]
    image, video, sound, other = shared.letters.seen[0]
    assert [m.param for m in shared.letters.seen[0]] == [f"messages[0].content[{k}]" for k in (0, 2, 3, 4)]
    assert isinstance(image.data, Image)
    assert image.data.pixels.size == (8, 6)
    assert isinstance(video.data, Video)
    assert video.data.frames.shape == (6, 48, 64, 3)
    assert video.data.indices == (0, 6, 12, 17, 23, 29)
    assert (video.data.total_frames, video.data.duration_s, video.data.source_fps) == (30, 3.0, 10.0)
    assert video.data.sampled_fps == 2.0
    assert isinstance(sound.data, Audio)
    assert isinstance(other.data, Audio)
    assert sound.data.sampling_rate == other.data.sampling_rate == 16000


def test_same_file_same_digest(shared: Any, web: Any) -> None:
    address = web.serve("/a.png", png())
    content = [blob("image"), blob("image", 1), url("image", address), blob("image", 2)]
    out = shared.start(content, png(), png(compress_level=0), png((6, 8))).ok
    one, again, fetched, other = (item.digest for item in Plan.from_json(out["plan"][0]).items)
    assert one == fetched
    assert len({one, again, other}) == 3


def test_used_twice_is_decoded_once(shared: Any, web: Any) -> None:
    shared.letters.seen.clear()
    before = shared.counted("triptych_media_items_total", "image")
    address = web.serve("/a.png", png((5, 5)))
    out = shared.start([blob("image"), url("image", address), blob("image"), url("image", address)], png()).ok
    first, second, third, fourth = shared.letters.seen[0]
    assert first.data is third.data
    assert second.data is fourth.data
    assert (first.param, third.param) == ("messages[0].content[0]", "messages[0].content[2]")
    assert len(web.seen) == 1
    assert shared.counted("triptych_media_items_total", "image") - before == 2
    assert len(unpack(out["vision_features"])) == 4


SILENCE = b"RIFF\x44\0\0\0WAVEfmt \x10\0\0\0\x01\0\x01\0\x80>\0\0\0}\0\0\x02\0\x10\0data\x20\0\0\0" + bytes(32)


@pytest.mark.parametrize(
    ("content", "blobs", "kind", "param", "words"),
    [
        ([blob("image")], [b"no picture"], "invalid_media", "messages[0].content[0]", "PNG"),
        ([blob("image")], [b""], "invalid_media", "messages[0].content[0]", "0 bytes"),
        ([blob("image")], [png((300, 200))[:120]], "invalid_media", "messages[0].content[0]", "damaged"),
        ([blob("video")], [b"no video"], "invalid_media", "messages[0].content[0]", "MP4"),
        ([blob("video")], [b""], "invalid_media", "messages[0].content[0]", "0 bytes"),
        ([blob("audio")], [b"no sound"], "invalid_media", "messages[0].content[0]", "WAV"),
        ([blob("audio")], [SILENCE], "invalid_media", "messages[0].content[0]", "silent"),
        ([blob("image"), blob("image", 1)], [png(), b"x"], "invalid_media", "messages[0].content[1]", "PNG"),
        ([blob("image")], [png() + bytes(200_000)], "too_large", "messages[0].content[0]", "200000"),
        ([blob("image")] * 5, [png()], "too_large", "messages", "at most 4"),
        ([blob("image")], [png(), png()], "invalid_request", "media[1]", "no part of the request"),
        ("text", [png()], "invalid_request", "media[0]", "no part of the request"),
        ([blob("image", 1)], [png()], "invalid_request", "messages[0].content[0]", "1 media blobs"),
        ([url("image", "http://127.0.0.2/a.png")], [], "invalid_request", "messages[0].content[0]", "loopback"),
        ([url("image", "http://169.254.169.254/a")], [], "invalid_request", "messages[0].content[0]", "link-local"),
        ([url("image", "file:///etc/passwd")], [], "invalid_request", "messages[0].content[0]", "http"),
        ([{"type": "smell"}], [], "invalid_request", "messages[0].content[0].type", "image"),
        ("x" * 1000, [], "context_length_exceeded", "messages", "1000"),
    ],
)
def test_bad_input(shared: Any, content: Any, blobs: list[bytes], kind: str, param: str, words: str) -> None:
    error = shared.start(content, *blobs).error
    assert (error.kind.value, error.param) == (kind, param)
    assert words in error.message
    assert 400 <= error.kind.status < 500
    if kind == "invalid_media":
        assert error.message.startswith(param)
    shared.check_healthy()


def test_bad_json(shared: Any) -> None:
    for text in (b"{", b"[]", b"\xff\xfe", b"{}", b'{"messages": [], "x": 1}', b"[" * 100_000):
        answer = shared.submit({"request": [text]})
        assert answer.error.kind is ErrorKind.INVALID_REQUEST
    shared.check_healthy()


def test_first_fault_in_prompt_order_is_no_race(shared: Any) -> None:
    # the message names one of the faulty fields, never a good one
    error = shared.start([blob("image"), blob("audio", 1), blob("image", 2)], png(), b"bad", b"bad").error
    assert error.param in ("messages[0].content[1]", "messages[0].content[2]")


def test_unsupported_modality(make: Callable[..., Any]) -> None:
    running = make(("image",))
    for modality in ("video", "audio"):
        error = running.start([blob(modality)], b"x").error
        assert error.kind is ErrorKind.UNSUPPORTED
        assert error.param == "messages[0].content[0]"
        names = {"video": "videos", "audio": "audio"}
        assert error.message.endswith(f": fake takes images, not {names[modality]}")
    running.check_healthy()


def test_context_length(make: Callable[..., Any]) -> None:
    running = make(context_length=10)
    assert len(running.start("x" * 9).ok["input_ids"]) == 9
    error = running.start("x" * 10).error
    assert error.kind is ErrorKind.CONTEXT_LENGTH_EXCEEDED
    assert "10 tokens" in error.message
    # media count too
    assert running.start([blob("image"), {"type": "text", "text": "x" * 5}], png()).ok["input_ids"].size == 9
    error = running.start([blob("image"), {"type": "text", "text": "x" * 8}], png()).error
    assert "12 tokens" in error.message
    assert "context length is 10" in error.message


def test_checkpoint_bounds_the_context_length(make: Callable[..., Any]) -> None:
    running = make(context_length=5000)
    assert "1000" in running.start("x" * 1000).error.message


def test_unexpected_error(shared: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        error = shared.start("explode", request_id="r-77").error
    assert (error.kind, error.stage) == (ErrorKind.STAGE_FAILED, "preprocess")
    assert "r-77" in error.message
    assert "secret" not in error.message
    assert "RuntimeError: secret detail" in caplog.text


def test_frames_of_a_video_are_those_asked_for(shared: Any, make_clip: Make) -> None:
    clip = make_clip(30, 10)
    parts = [blob("video") | options for options in ({}, {"fps": 4}, {"num_frames": 2}, {"max_frames": 4})]
    shared.letters.seen.clear()
    plan = Plan.from_json(shared.start(parts, clip).ok["plan"][0])
    seen = shared.letters.seen[0]
    assert [len(medium.data.frames) for medium in seen] == [6, 12, 2, 4]
    assert len({item.digest for item in plan.items}) == 4
    error = shared.start([blob("video") | {"num_frames": 10_000}], clip).error
    assert (error.kind, error.param) == (ErrorKind.INVALID_REQUEST, "messages[0].content[0].num_frames")


def test_control_requests(shared: Any) -> None:
    for inputs in ({}, {"cancel": [b"nobody", b""]}):
        answer = shared.submit(inputs, "c")
        assert answer.ok == {}


def test_concurrency_limit(make: Callable[..., Any], web: Any) -> None:
    running = make(mm_max_concurrent_calls=3)
    address = web.stall("/slow")
    answers = [running.start([url("image", address)], request_id=f"r{k}") for k in range(8)]
    until(lambda: web.open_now == 3 and running.counted("triptych_requests_waiting") == 5)
    time.sleep(0.2)
    assert web.most_open == 3
    web.serve("/slow", png())
    web.release.set()
    for answer in answers:
        # three of them got an empty answer from the stalled handler
        assert answer.done.wait(SECONDS)
    assert web.most_open <= 3
    assert running.counted("triptych_requests_waiting") == running.counted("triptych_requests_running") == 0
    running.check_healthy()


def test_concurrency_limit_covers_the_processor(make: Callable[..., Any]) -> None:
    running = make(mm_max_concurrent_calls=1)
    running.letters.gate.clear()
    answers = [running.start([blob("image")], png()) for _ in range(4)]
    until(lambda: running.letters.inside == 1)
    time.sleep(0.1)
    running.letters.gate.set()
    assert all(answer.ok for answer in answers)
    assert running.letters.most_inside == 1


def test_queue_limit(make: Callable[..., Any], web: Any) -> None:
    running = make(mm_max_concurrent_calls=1, max_queued_requests=2)
    address = web.stall("/slow")
    for k in range(3):
        running.start([url("image", address)], request_id=f"r{k}")
    until(lambda: running.counted("triptych_requests_waiting") == 2)
    assert running.start([blob("image")], png()).error.kind is ErrorKind.OVERLOADED
    running.start("text still works").ok  # noqa: B018


def test_memory_budget_of_a_request(make: Callable[..., Any], web: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "MAX_REQUEST_BYTES", 3 * 100 * 100 * 3)
    running = make()
    parts = [blob("image", k) for k in range(4)]
    pictures = [png((100, 100), (k, 0, 0)) for k in range(4)]
    assert running.start(parts[:3], *pictures[:3]).ok
    error = running.start(parts, *pictures).error
    assert (error.kind, error.kind.status) == (ErrorKind.TOO_LARGE, 413)
    assert "90000 bytes" in error.message
    # what is fetched counts while it arrives
    assert running.start([url("image", web.serve("/a", bytes(90_001)))]).error.kind is ErrorKind.TOO_LARGE
    assert running.stage._loader._held == 0
    assert running.start(parts[:3], *pictures[:3]).ok


def test_memory_budget_of_the_stage(make: Callable[..., Any]) -> None:
    running = make()
    running.stage._loader._budget = 3 * 100 * 100
    running.letters.gate.clear()
    held = running.start([blob("image")], png((100, 100)))
    until(lambda: running.stage._loader._held == 3 * 100 * 100)
    assert running.start([blob("image")], png()).error.kind is ErrorKind.OVERLOADED
    running.letters.gate.set()
    assert held.ok
    assert running.stage._loader._held == 0
    running.check_healthy()


def test_text_never_waits_behind_media(make: Callable[..., Any], web: Any) -> None:
    """32 requests hang on a URL and 8 inside the processor; text answers at once."""
    running = make(mm_max_concurrent_calls=40)
    address = web.stall("/slow")
    for _ in range(32):
        running.start([url("image", address)])
    running.letters.gate.clear()
    for _ in range(8):
        running.start([blob("image")], png())
    until(lambda: web.open_now == 32 and running.letters.inside >= 1)
    start = time.monotonic()
    for _ in range(20):
        running.start("hello").ok  # noqa: B018
    assert time.monotonic() - start < 5


def test_slow_urls_do_not_block_other_media(make: Callable[..., Any], web: Any) -> None:
    running = make(mm_max_concurrent_calls=32)
    address = web.stall("/slow")
    for _ in range(31):
        running.start([url("image", address)])
    until(lambda: web.open_now == 31)
    assert "vision_features" in running.start([blob("image")], png()).ok


def test_deadline(make: Callable[..., Any], web: Any) -> None:
    running = make(mm_per_request_timeout=0.3, mm_max_concurrent_calls=1)
    address = web.stall("/slow")
    first = running.start([blob("image"), url("image", address)], png())
    second = running.start([url("image", address)])
    # the second waits for the first and has its whole time after that
    for answer, field in ((first, "messages[0].content[1]"), (second, "messages[0].content[0]")):
        assert (answer.error.kind, answer.error.param) == (ErrorKind.TIMEOUT, field)
        assert "0.3 s" in answer.error.message
    running.letters.gate.clear()
    stuck = running.start([blob("image")], png())
    assert stuck.error.kind is ErrorKind.TIMEOUT
    running.letters.gate.set()
    running.check_healthy()
    assert stuck.count == 1
    assert running.counted("triptych_requests_total", "timeout") == 3


def test_deadline_ends_the_work_and_frees_its_memory(make: Callable[..., Any], web: Any) -> None:
    running = make(mm_per_request_timeout=0.5)
    kept: list[weakref.ref[Any]] = []
    prepare = running.letters.prepare

    def keep(messages: Sequence[Message], media: Sequence[Medium], template: TemplateInputs) -> Prepared:
        kept.extend(weakref.ref(medium.data) for medium in media)
        return prepare(messages, media)

    running.letters.prepare = keep  # type: ignore[method-assign]
    running.letters.gate.clear()
    error = running.start([blob("image")], png((500, 500))).error
    assert (error.kind, error.kind.status) == (ErrorKind.TIMEOUT, 504)
    assert running.stage._loader._held == 0
    # a fetch that hangs is given up, not waited for
    assert running.start([url("image", web.stall("/slow"))]).error.kind is ErrorKind.TIMEOUT
    web.release.set()
    until(lambda: web.open_now == 0)
    assert running.counted("triptych_requests_running") == running.counted("triptych_requests_waiting") == 0
    running.letters.gate.set()

    def freed() -> bool:
        running.letters.seen.clear()
        gc.collect()
        return kept[0]() is None

    until(freed)
    running.check_healthy()


def test_limits_of_each_kind(make: Callable[..., Any]) -> None:
    running = make(("image", "audio"), limit_mm_data_per_request='{"image": 2, "audio": 0}')
    assert running.start([blob("image"), blob("image", 1)], png(), png(colour=(4, 5, 6))).ok
    error = running.start([blob("image")] * 3, png()).error
    assert (error.kind, error.param) == (ErrorKind.INVALID_REQUEST, "messages")
    assert "has 3 media of type image; at most 2 are allowed (limit_mm_data_per_request)" in error.message
    assert "at most 0" in running.start([blob("audio")], b"x").error.message


def test_media_are_refused_where_they_are_off(make: Callable[..., Any]) -> None:
    running = make(enable_multimodal="off")
    error = running.start([blob("image")], png()).error
    assert (error.kind, error.param) == (ErrorKind.UNSUPPORTED, "messages[0].content[0]")
    assert "enable_multimodal is off" in error.message
    assert running.start("text").ok
    assert not list(running.workers)
    with pytest.raises(TriptychError, match="takes text alone") as caught:
        make((), enable_multimodal="on")
    assert caught.value.param == "settings.enable_multimodal"


def test_deadline_kills_a_stuck_decoder(
    make: Callable[..., Any], make_clip: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "FIRST_DECODER_SHARE", 2.0)
    # long enough for a new worker to start on a busy machine
    running = make(("video",), mm_per_request_timeout=5)
    (worker,) = running.workers
    os.kill(worker.pid, signal.SIGSTOP)
    assert running.start([blob("video")], make_clip()).error.kind is ErrorKind.TIMEOUT
    until(lambda: not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE)
    assert running.start([blob("video")], make_clip()).ok
    running.check_healthy()


def test_second_decoder_takes_over_from_a_stuck_one(
    make: Callable[..., Any], make_clip: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = make(("video",), mm_per_request_timeout=SECONDS)
    monkeypatch.setattr(loader, "FIRST_DECODER_SHARE", 0.5 / SECONDS)
    (worker,) = running.workers
    os.kill(worker.pid, signal.SIGSTOP)
    assert "vision_features" in running.start([blob("video")], make_clip()).ok
    until(lambda: not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE)
    running.check_healthy()


def test_killed_decoder_fails_one_request(make: Callable[..., Any], make_clip: Make) -> None:
    running = make(("video",))
    (worker,) = running.workers
    os.kill(worker.pid, signal.SIGSTOP)
    answer = running.start([blob("video")], make_clip())
    time.sleep(0.2)
    text = running.start("hello")
    os.kill(worker.pid, signal.SIGKILL)
    assert (answer.error.kind, answer.error.param) == (ErrorKind.STAGE_FAILED, "messages[0].content[0]")
    assert text.ok
    assert running.start([blob("video")], make_clip()).ok


@pytest.mark.parametrize("how", ["method", "input"])
def test_cancel(make: Callable[..., Any], web: Any, how: str) -> None:
    running = make(mm_max_concurrent_calls=1)
    address = web.stall("/slow")
    fetching = running.start([url("image", address)], request_id="a")
    until(lambda: web.open_now == 1)
    waiting = running.start([url("image", address)], request_id="b")
    other = running.start([blob("image")], png(), request_id="c")
    until(lambda: running.counted("triptych_requests_waiting") == 2)
    if how == "method":
        running.stage.cancel(["a", "b", "unknown"])
    else:
        control = running.submit({"cancel": [b"a", b"b", b"unknown"]}, "z")
        assert control.ok == {}
    assert fetching.error.kind is waiting.error.kind is ErrorKind.CANCELLED
    assert "vision_features" in other.ok
    running.stage.cancel(["a", "c"])
    running.check_healthy()
    assert (fetching.count, waiting.count, other.count) == (1, 1, 1)
    assert running.counted("triptych_requests_total", "cancelled") == 2


def test_cancel_at_once(make: Callable[..., Any]) -> None:
    """A cancel that arrives before the request's first step still gets it an answer."""
    running = make()
    for k in range(50):
        answer = running.start([blob("image")], png(), request_id=f"r{k}")
        running.stage.cancel([f"r{k}"])
        assert answer.done.wait(SECONDS)
        assert answer.count == 1
    until(lambda: running.counted("triptych_requests_running") == 0)


def test_requests_without_id_are_never_cancelled(make: Callable[..., Any]) -> None:
    running = make()
    running.letters.gate.clear()
    answer = running.start([blob("image")], png())
    running.stage.cancel([""])
    time.sleep(0.1)
    running.letters.gate.set()
    assert answer.ok


def test_cancel_frees_memory(make: Callable[..., Any]) -> None:
    running = make()
    running.letters.gate.clear()
    kept: list[weakref.ref[Any]] = []
    original = running.letters.prepare

    def prepare(messages: Sequence[Message], media: Sequence[Medium], template: TemplateInputs) -> Prepared:
        kept.extend(weakref.ref(medium.data) for medium in media)
        return original(messages, media)

    running.letters.prepare = prepare  # type: ignore[method-assign]
    answer = running.start([blob("image")], png(), request_id="a")
    until(lambda: running.letters.inside == 1)
    running.stage.cancel(["a"])
    assert answer.error.kind is ErrorKind.CANCELLED
    running.letters.gate.set()
    running.letters.seen.clear()

    def freed() -> bool:
        running.letters.seen.clear()
        gc.collect()
        return kept[0]() is None

    until(freed)


def test_close_answers_everything(make: Callable[..., Any], web: Any) -> None:
    before = set(psutil.Process().children())
    threads = threading.active_count()
    running = make(("image", "video"), mm_max_concurrent_calls=2)
    address = web.stall("/slow")
    answers = [running.start([url("image", address)]) for _ in range(5)]
    until(lambda: web.open_now == 2)
    running.stage.close()
    for answer in (*answers, running.start("late")):
        assert answer.error.kind is ErrorKind.STAGE_DEAD
        assert answer.count == 1
    running.stage.close()
    running.stage.cancel(["x"])
    assert set(psutil.Process().children()) <= before
    web.close()
    until(lambda: threading.active_count() <= threads)


def test_metrics(make: Callable[..., Any]) -> None:
    running = make(heartbeat_s=0.05)
    assert running.start("a").ok
    assert running.start([blob("image")], png()).ok
    assert running.start([blob("image")], b"bad").error
    until(lambda: running.counted("triptych_heartbeat_timestamp_seconds") >= 3)
    assert running.counted("triptych_requests_total", "ok") == 2
    assert running.counted("triptych_requests_total", "invalid_media") == 1
    assert running.counted("triptych_stage_seconds") == 3
    assert running.counted("triptych_media_items_total", "image") == 1
    assert running.counted("triptych_media_bytes_total", "image") == len(png())
    assert running.counted("triptych_media_decode_seconds", "image") == 1
    assert running.counted("triptych_requests_running") == 0


def test_many_at_once(make: Callable[..., Any], make_tone: Make, make_clip: Make) -> None:
    running = make(("image", "video", "audio"))
    sound, video = make_tone(), make_clip(4, 4)
    answers = []
    for k in range(24):
        answers.append(running.start([blob("image"), blob("audio", 1)], png((8 + k, 8)), sound))
        answers.append(running.start(f"text {k}"))
        if k % 6 == 0:
            answers.append(running.start([blob("video")], video))
    assert all(answer.ok for answer in answers)
    widths = {m.data.pixels.width for media in running.letters.seen for m in media if isinstance(m.data, Image)}
    assert widths == set(range(8, 32))
