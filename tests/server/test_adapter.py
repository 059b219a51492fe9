"""The rules of the Triton adapter, each with a test that its breach would fail, in the real server."""

from __future__ import annotations

import json
import queue
import time
from typing import Any

import numpy as np
import pytest

from triptych.python_models.contract.delta import Delta, Usage
from triptych.python_models.contract.errors import ErrorKind, TriptychError


def script(**steps: Any) -> dict[str, Any]:
    return {"request": [json.dumps(steps)]}


def report(responses: list[dict[str, Any]]) -> dict[str, Any]:
    """What the scripted language model says it was given, from its last delta."""
    found: dict[str, Any] = json.loads(responses[-1]["info"][0])
    return found


def test_deltas_arrive_in_order_with_their_end(scripted: Any) -> None:
    responses = scripted.stream("chat_text", script(language_model={"count": 50})).all()
    assert [int(r["token_ids"][0]) for r in responses] == list(range(50))
    assert [r["finish_reason"][0] for r in responses] == [b""] * 49 + [b"stop"]


def test_deltas_that_come_too_fast_leave_merged_and_whole(scripted: Any) -> None:
    streams = [scripted.stream("chat_text", script(language_model={"count": 3000, "choices": c})) for c in (1, 3)]
    for stream, choices in zip(streams, (1, 3), strict=True):
        deltas = [Delta.from_tensors(response) for response in stream.all()]
        assert len(deltas) < 300 * choices
        assert next(delta for delta in deltas if delta.index == 0).usage is not None
        for index in range(choices):
            mine = [delta for delta in deltas if delta.index == index]
            assert [token for delta in mine for token in delta.token_ids] == list(range(3000))
            assert "".join(delta.text for delta in mine) == "".join(f"{n} " for n in range(3000))
            assert [delta.finish_reason for delta in mine if delta.finish_reason] == ["length"]
        assert deltas[-1].usage == Usage(4, 0, 3000 * choices)


def test_an_error_comes_behind_the_deltas_that_wait(scripted: Any) -> None:
    stream = scripted.stream("chat_text", script(language_model={"count": 900, "choices": 2, "fail_at": 800}))
    deltas: list[Delta] = []
    with pytest.raises(TriptychError, match="told to fail here"):
        deltas.extend(Delta.from_tensors(response) for response in iter(stream.next, None))
    for index in range(2):
        assert [t for d in deltas if d.index == index for t in d.token_ids] == list(range(800))


def test_absent_inputs_are_absent(scripted: Any) -> None:
    text = scripted.stream("chat_text", script()).all()
    assert report(text)["inputs"] == ["input_ids", "plan", "position_ids"]
    # the ensemble with encoders that have nothing to do
    idle = scripted.stream("chat", script()).all()
    assert report(idle)["inputs"] == ["input_ids", "plan", "position_ids"]
    one = scripted.stream("chat", script(audio={"rows": 2, "width": 4})).all()
    assert report(one)["inputs"] == ["audio_embeddings", "input_ids", "plan", "position_ids"]


def test_settings_reach_a_stage_whole(scripted: Any) -> None:
    assert report(scripted.stream("chat_text", script()).all())["model"] == scripted.server.settings.model


def test_embeddings_keep_bfloat16_through_the_ensemble(scripted: Any) -> None:
    steps = script(vision={"rows": 300, "width": 64}, audio={"rows": 1, "width": 3})
    found = report(scripted.stream("chat", steps).all())
    assert found["vision"] == {"dtype": "torch.bfloat16", "shape": [300, 64], "exact": True}
    assert found["audio"] == {"dtype": "torch.bfloat16", "shape": [1, 3], "exact": True}


def test_large_embeddings_of_many_requests_do_not_mix(scripted: Any) -> None:
    """A stage may keep its inputs as long as it likes, whatever the server does with its buffers."""
    sizes = [(3000 + 7 * k, 128) for k in range(12)]
    streams = [
        scripted.stream("chat", script(vision={"rows": r, "width": w}, language_model={"count": 20, "interval": 0.01}))
        for r, w in sizes
    ]
    found = [report(stream.all())["vision"] for stream in streams]
    assert [tuple(f["shape"]) for f in found] == sizes
    assert all(f["exact"] for f in found)


def test_an_empty_embedding_is_no_accident(scripted: Any) -> None:
    found = report(scripted.stream("chat", script(vision={"rows": 0, "width": 8})).all())
    assert found["vision"] == {"dtype": "torch.bfloat16", "shape": [0, 8], "exact": True}


def test_strings_survive_as_bytes(scripted: Any) -> None:
    blobs = [b"", b"\0", b"a\0b\0", bytes(range(256)), "ü 漢 😀".encode(), b"\xff\xfe", b"x" * 3_000_000]
    found = report(scripted.stream("chat", script() | {"media": blobs}).all())
    assert [bytes.fromhex(item) for item in found["media"]] == blobs
    for text in ("", "\0", "a\0b\0", "ü 漢 😀", 'line\nline\r\n\t\\"'):
        answer = scripted.stream("chat_text", script(language_model={"text": text})).all()
        assert answer[0]["text"][0].decode() == text


def test_a_busy_encoder_holds_nobody_up(scripted: Any) -> None:
    slow = scripted.stream("chat", script(vision={"sleep": 30, "rows": 1, "width": 1}))
    scripted.wait_metric(lambda v: v > 0, "triptych_media_items_total", stage="vision_encoder", modality="image")
    # text through the same encoders, and a second picture, both done while the first one sleeps
    assert scripted.stream("chat", script()).all()
    assert scripted.stream("chat", script(vision={"rows": 1, "width": 1})).all()
    with pytest.raises(queue.Empty):
        slow.next(timeout_s=0)
    scripted.cancel("vision_encoder", slow.request_id)
    with pytest.raises(TriptychError):
        slow.next()


def test_cancel_reaches_a_running_step(scripted: Any) -> None:
    stream = scripted.stream("chat_text", script(language_model={"count": 100_000, "interval": 0.005}))
    other = scripted.stream("chat_text", script(language_model={"count": 100, "interval": 0.005}))
    for _ in range(3):
        stream.next()
    assert scripted.cancel("language_model", stream.request_id, "not-a-request") == []
    with pytest.raises(TriptychError) as caught:
        stream.all()
    assert (caught.value.kind, caught.value.stage) == (ErrorKind.CANCELLED, "language_model")
    assert len(other.all()) == 100


def test_cancel_reaches_an_encoder_inside_an_ensemble(scripted: Any) -> None:
    stream = scripted.stream("chat", script(audio={"sleep": 60, "rows": 1, "width": 1}))
    scripted.wait_metric(lambda v: v > 0, "triptych_media_items_total", stage="audio_encoder", modality="audio")
    scripted.cancel("audio_encoder", stream.request_id)
    with pytest.raises(TriptychError) as caught:
        stream.all()
    assert (caught.value.kind, caught.value.stage) == (ErrorKind.CANCELLED, "audio_encoder")


@pytest.mark.parametrize("stage", ["preprocess", "vision_encoder", "audio_encoder", "language_model"])
def test_an_empty_control_request_is_a_probe(scripted: Any, stage: str) -> None:
    started = time.monotonic()
    assert scripted.cancel(stage) == []
    assert scripted.cancel(stage, "") == []
    assert time.monotonic() - started < 10


def test_renew_reaches_the_language_model(scripted: Any) -> None:
    assert scripted.stream("language_model", {"renew": ["lease-1", "ü"]}).all() == []
    found = report(scripted.stream("chat_text", script()).all())
    assert found["renewed"][-2:] == ["lease-1", "ü"]


def test_a_cancel_without_ids_ends_no_request_without_an_id(scripted: Any) -> None:
    stream = scripted.stream("chat_text", script(language_model={"count": 50, "interval": 0.005}), request_id=" ")
    stream.next()
    scripted.cancel("language_model", "")
    assert len(stream.all()) == 49


def test_error_before_the_first_answer_names_kind_field_and_stage(scripted: Any) -> None:
    with pytest.raises(TriptychError) as caught:
        scripted.stream("chat", script(preprocess={"fail": True})).all()
    error = caught.value
    assert error == TriptychError(ErrorKind.INVALID_MEDIA, "no picture: ü", "messages[0].content[1]", "preprocess")


def test_error_in_mid_stream_is_the_last_thing_sent(scripted: Any) -> None:
    stream = scripted.stream("chat_text", script(language_model={"count": 9, "fail_at": 3}))
    got = [stream.next() for _ in range(3)]
    assert [int(r["token_ids"][0]) for r in got] == [0, 1, 2]
    with pytest.raises(TriptychError, match="told to fail here"):
        stream.next()


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ({"preprocess": {"wrong": "dtype"}}, "input_ids has dtype int64, not int32"),
        ({"preprocess": {"wrong": "shape"}}, r"position_ids has shape \[4\], not \[-1, -1\]"),
        ({"preprocess": {"wrong": "name"}}, "it sent 'colour'; its outputs are input_ids, "),
        ({"preprocess": {"wrong": "string"}}, "plan is a bare string"),
        ({"preprocess": {"two": True}}, "more than one answer"),
        ({"vision": {"rows": 1, "width": 1, "raise": True}}, "ZeroDivisionError: as told"),
    ],
)
def test_a_stage_that_misbehaves_ends_its_request_alone(scripted: Any, steps: dict[str, Any], message: str) -> None:
    with pytest.raises(TriptychError, match=message) as caught:
        scripted.stream("chat", script(**steps)).all()
    assert caught.value.kind is ErrorKind.STAGE_FAILED
    assert scripted.stream("chat", script()).all()


def test_metrics_from_many_threads_are_exact(scripted: Any) -> None:
    before = scripted.settled("triptych_generation_tokens_total", stage="language_model")
    seen = scripted.settled("triptych_inter_token_seconds_count", stage="language_model")
    streams = [scripted.stream("chat_text", script(language_model={"threads": 8})) for _ in range(4)]
    for stream in streams:
        stream.all()
    total = before + 4 * 8 * 1000
    assert (
        scripted.wait_metric(lambda v: v >= total, "triptych_generation_tokens_total", stage="language_model") == total
    )
    total = seen + 4 * 8 * 1000
    assert (
        scripted.wait_metric(lambda v: v >= total, "triptych_inter_token_seconds_count", stage="language_model")
        == total
    )
    assert scripted.metric("triptych_inter_token_seconds_bucket", stage="language_model", le="0.0025") == 0
    assert scripted.metric("triptych_kv_cache_usage_ratio", stage="language_model") == 0.25
    scripted.wait_metric(lambda v: v == 0, "triptych_requests_running", stage="language_model")


@pytest.mark.parametrize("stage", ["preprocess", "vision_encoder", "audio_encoder", "language_model"])
def test_every_stage_shows_a_heartbeat(scripted: Any, stage: str) -> None:
    first = scripted.metric("triptych_heartbeat_timestamp_seconds", stage=stage)
    assert first is not None
    assert abs(first - time.time()) < 60
    scripted.wait_metric(lambda v: v > first, "triptych_heartbeat_timestamp_seconds", stage=stage)


def test_a_metric_outside_the_contract_is_logged_and_harms_nobody(scripted: Any) -> None:
    scripted.stream("chat_text", script(language_model={"misspell": True})).all()
    assert scripted.metric("triptych_misspelt") is None
    assert "metric triptych_misspelt" in scripted.server.log.read_text()


def test_many_streams_at_once(scripted: Any) -> None:
    streams = [
        scripted.stream("chat", script(vision={"rows": 4, "width": 4}, language_model={"count": 40})) for _ in range(24)
    ]
    for stream in streams:
        ids = np.concatenate([r["token_ids"] for r in stream.all()])
        assert ids.tolist() == list(range(40))


def test_the_heartbeat_of_a_stage_itself_counts_more(scripted: Any) -> None:
    """A process that lives says little: once a stage reports its own beats, nobody else does it for it."""
    scripted.stream("chat", script(vision={"rows": 1, "width": 1, "beat": 1000.0})).all()
    labels = {"stage": "vision_encoder"}
    scripted.wait_metric(lambda v: v == 1000, "triptych_heartbeat_timestamp_seconds", **labels)
    time.sleep(2.5)
    assert scripted.metric("triptych_heartbeat_timestamp_seconds", **labels) == 1000
