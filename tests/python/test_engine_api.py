"""triptych.Engine: transformers' tokens, whatever the way of asking; batches, streams, asyncio, cancel, errors."""

from __future__ import annotations

import asyncio
import gc
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import triptych
from triptych import BatchError, Delta, Engine, ErrorKind, ItemError, SamplingParams, TriptychError
from triptych.client.calls.results import Collector
from triptych.python_models.contract.answer import Syntax

COUNT = 8
LONG = 2000


def user(*content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(content)}]


def greedy(engine: Engine, messages: Any, **options: Any) -> list[int]:
    return list(engine.chat(messages, temperature=0, max_tokens=COUNT, **options).token_ids)


def scheduler(engine: Engine) -> Any:
    ensemble: Any = engine._local._ensemble
    return ensemble.stages["language_model"].engine._scheduler


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_media_in_any_form_give_the_tokens_of_transformers(
    engine: Engine, truth: Any, make: Any, tmp_path: Path
) -> None:
    import torch

    array = make.pixels(3)
    picture = Image.fromarray(array)
    (tmp_path / "picture.png").write_bytes(make.png(array))
    expected = truth.chat([{"type": "image"}, {"type": "text", "text": "what?"}], COUNT, images=[picture])
    forms = [
        picture,
        array,
        torch.from_numpy(array).permute(2, 0, 1),
        tmp_path / "picture.png",
        str(tmp_path / "picture.png"),
        (tmp_path / "picture.png").as_uri(),
        make.png(array),
    ]
    conversations = [user({"type": "image", "image": form}, "what?") for form in forms]
    conversations.append(user(picture, {"type": "text", "text": "what?"}))
    conversations.append(user({"type": "image_url", "image_url": {"url": make.png(array)}}, "what?"))
    for answer in engine.chat(conversations, temperature=0, max_tokens=COUNT):
        assert list(answer.token_ids) == expected
    assert expected != greedy(engine, user(Image.fromarray(make.pixels(4)), "what?"))


def test_sounds_by_array_and_by_file(engine: Engine, truth: Any, make: Any) -> None:
    integers = (make.samples(4) * 32767).astype(np.int16)
    floats = integers.astype(np.float32) / 32768
    expected = truth.chat([{"type": "audio"}, {"type": "text", "text": "what?"}], COUNT, audio=[floats])
    for form in ((integers, 16000), (floats, 16000), {"array": floats, "sampling_rate": 16000}, make.wav(integers)):
        assert greedy(engine, user({"type": "audio", "audio": form}, "what?")) == expected


def test_frames_are_sampled_like_a_file(engine: Engine, make: Any) -> None:
    frames = make.frames(1, 8)
    expected = engine.chat(user({"type": "video", "video": (frames, 4)}, "what?"), temperature=0, max_tokens=COUNT)
    assert expected.usage.video_tokens > 0
    pictures = [Image.fromarray(frame) for frame in frames]
    assert greedy(engine, user({"type": "video", "video": (pictures, 4.0)}, "what?")) == list(expected.token_ids)
    # twice as long: other frames
    slow = engine.chat(user({"type": "video", "video": (frames, 2)}, "what?"), temperature=0, max_tokens=COUNT)
    assert slow.usage.video_tokens > expected.usage.video_tokens


def test_raw_prompts_with_media(engine: Engine, truth: Any, make: Any) -> None:
    picture, sound = Image.fromarray(make.pixels(5)), make.samples(5)
    # the sound stands first, whatever the order of the arguments
    text = f"Hear {truth.processor.audio_token} see {truth.processor.image_token} and"
    expected = truth.generate(text, COUNT, images=[picture], audio=[sound])
    answer = engine.generate(text, images=picture, audios=[(sound, 16000)], temperature=0, max_tokens=COUNT)
    assert list(answer.token_ids) == expected
    ids = truth.processor.tokenizer("Once upon a time")["input_ids"]
    plain = truth.generate("Once upon a time", COUNT)
    assert list(engine.generate(ids, temperature=0, max_tokens=COUNT).token_ids) == plain
    both = engine.generate(
        ["Once upon a time", text],
        images=[None, [picture]],
        audios=[None, (sound, 16000)],
        sampling=[SamplingParams(max_tokens=3), {"max_tokens": COUNT}],
        temperature=0,
    )
    assert [list(answer.token_ids) for answer in both] == [plain[:3], expected]


def test_a_batch_comes_in_the_order_of_the_input(engine: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    words = [f"word {n} " * (1 + 7 * n % 5) for n in range(12)]
    alone = [engine.chat(text, temperature=0, max_tokens=2 + n % 5).token_ids for n, text in enumerate(words)]
    sampling = [{"max_tokens": 2 + n % 5} for n in range(12)]
    assert capsys.readouterr().err == ""
    answers = engine.chat(words, sampling=sampling, temperature=0, progress=True)
    assert [answer.token_ids for answer in answers] == alone
    assert "12/12" in capsys.readouterr().err
    assert engine.chat([]) == []
    engine.chat(words[:1], max_tokens=1)
    assert capsys.readouterr().err == ""


def test_what_an_answer_tells(engine: Engine) -> None:
    answer = engine.chat("hello", max_tokens=5, n=2, temperature=0.9, seed=3, logprobs=True, top_logprobs=2)
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert answer.choices[0].text == answer.text != answer.choices[1].text
    assert answer.usage.completion_tokens == sum(len(choice.token_ids) for choice in answer.choices)
    assert [item.token_id for item in answer.logprobs] == list(answer.token_ids)
    assert all(len(item.top) == 2 for item in answer.logprobs)
    assert answer.timings is not None
    whole = engine.chat("hello", max_tokens=12, temperature=0)
    assert whole.finish_reason == "length"
    stop = next(c for c in whole.text[2:] if c.isalnum())
    stopped = engine.chat("hello", max_tokens=12, temperature=0, stop=stop)
    assert (stopped.text, stopped.finish_reason) == (whole.text[: whole.text.index(stop)], "stop")
    assert stopped.choices[0].matched_stop == stop
    assert engine.chat("colour?", regex="red|blue", temperature=0).text in ("red", "blue")


def test_the_caches_of_a_server_are_there(engine: Engine, make: Any) -> None:
    question = user(Image.fromarray(make.pixels(9, 200, 160)), "what is this? " * 8)
    first, second = (engine.chat(question, temperature=0, max_tokens=2).usage for _ in range(2))
    assert first.cached_tokens < first.image_tokens < second.cached_tokens


def test_reasoning_and_tool_calls_are_set_apart() -> None:
    tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
    collected = Collector([tool])
    collected.add(Delta(syntax=Syntax("hermes", "qwen3")))
    for text in (
        "<think>\nBetter lo",
        "ok.\n</think>\n\n<tool_",
        'call>\n{"name": "look", "arguments": {"x": 1}}\n</tool_call>',
    ):
        collected.add(Delta(text))
    collected.add(Delta(finish_reason="stop"))
    (choice,) = collected.result("id").choices
    (call,) = choice.tool_calls
    assert (call.name, json.loads(call.arguments)) == ("look", {"x": 1})
    assert (choice.reasoning.strip(), choice.text, choice.finish_reason) == ("Better look.", "", "tool_calls")


def test_streams(engine: Engine) -> None:
    whole = engine.chat("hello", max_tokens=COUNT, temperature=0)
    with engine.stream_chat("hello", max_tokens=COUNT, temperature=0) as stream:
        first = next(stream)
        assert first.token_ids == whole.token_ids[: len(first.token_ids)]
        rest = list(stream)
    assert len(rest) > 1
    assert "".join(delta.text for delta in (first, *rest)) == whole.text
    result = stream.result()
    assert (result.token_ids, result.usage.completion_tokens) == (whole.token_ids, COUNT)
    deltas = list(engine.stream_generate("Once", max_tokens=3, temperature=0))
    assert "".join(d.text for d in deltas) == engine.generate("Once", max_tokens=3, temperature=0).text


def test_what_is_dropped_frees_its_blocks(engine: Engine) -> None:
    def idle() -> bool:
        # no KV block is held by a request
        return bool(scheduler(engine).idle)

    wait_until(idle)
    stream = engine.stream_chat("hello", max_tokens=LONG, ignore_eos=True)
    next(stream)
    assert not idle()
    stream.close()
    wait_until(idle)
    assert list(stream) == []
    for _ in engine.stream_chat("hello", max_tokens=LONG, ignore_eos=True):
        break
    gc.collect()
    wait_until(idle)


def test_asyncio(engine: Engine) -> None:
    async def run() -> None:
        whole = engine.chat("hello", max_tokens=COUNT, temperature=0)
        one = await engine.async_chat("hello", max_tokens=COUNT, temperature=0)
        assert one.token_ids == whole.token_ids
        prompt = await engine.async_generate("Once", max_tokens=3, temperature=0)
        streams = [await engine.async_stream_chat("hello", max_tokens=COUNT, temperature=0) for _ in range(3)]
        for stream in streams:
            assert "".join([delta.text async for delta in stream]) == whole.text
        async with await engine.async_stream_generate("Once", max_tokens=3, temperature=0) as stream:
            assert (await stream.result()).text == prompt.text
        words = [f"word {n}" for n in range(6)]
        answers = await engine.async_chat(words, max_tokens=3, temperature=0)
        assert [a.token_ids for a in answers] == [a.token_ids for a in engine.chat(words, max_tokens=3, temperature=0)]
        endless = [
            asyncio.create_task(engine.async_chat("hello", max_tokens=LONG, ignore_eos=True)),
            asyncio.create_task(engine.async_chat(["a", "b"], max_tokens=LONG, ignore_eos=True)),
        ]
        await asyncio.to_thread(wait_until, lambda: not scheduler(engine).idle)
        for task in endless:
            task.cancel()
        outcomes = await asyncio.gather(*endless, return_exceptions=True)
        assert all(isinstance(outcome, asyncio.CancelledError) for outcome in outcomes)
        await asyncio.to_thread(wait_until, lambda: scheduler(engine).idle)

    asyncio.run(asyncio.wait_for(run(), 120))


def test_a_bad_item_fails_alone(engine: Engine, make: Any, tmp_path: Path) -> None:
    bad: list[Any] = [
        user({"type": "image", "image": b"no picture"}),
        user({"type": "image", "image": tmp_path / "missing.png"}),
        [{"role": "king", "content": "x"}],
    ]
    batch = ["hello", bad[0], bad[1], "hello", bad[2]]
    expected = engine.chat("hello", max_tokens=3, temperature=0).token_ids
    answers = engine.chat(batch, max_tokens=3, temperature=0, return_exceptions=True)
    assert [isinstance(answer, ItemError) for answer in answers] == [False, True, True, False, True]
    found = [answer for answer in answers if isinstance(answer, ItemError)]
    assert [(error.index, error.kind) for error in found] == [
        (1, ErrorKind.INVALID_MEDIA),
        (2, ErrorKind.INVALID_MEDIA),
        (4, ErrorKind.INVALID_REQUEST),
    ]
    assert "missing.png" in found[1].message
    assert found[2].param == "messages[0].role"
    with pytest.raises(BatchError, match="3 of 5 items failed; item 1:") as caught:
        engine.chat(batch, max_tokens=3, temperature=0)
    assert sorted(caught.value.errors) == [1, 2, 4]
    results = caught.value.results
    assert [result.token_ids if result else None for result in results] == [expected, None, None, expected, None]


@pytest.mark.parametrize(
    ("ask", "param"),
    [
        (lambda engine: engine.chat("x", temperature=3), "temperature"),
        (lambda engine: engine.chat("x", temprature=1), "temprature"),
        (lambda engine: engine.chat("x", sampling={"topk": 1}), "sampling.topk"),
        (lambda engine: engine.chat("x", regex="a", json_schema={}), "json_schema"),
        (lambda engine: engine.chat("x", regex="(a"), "regex"),
        (lambda engine: engine.generate("x", tools=[]), "tools"),
        (lambda engine: engine.generate([-1]), "prompt[0]"),
        (lambda engine: engine.generate("x", images=[b"no picture"]), "images[0]"),
        (lambda engine: engine.generate("x", audios=[[0.0, 1.0]]), "audios[0]"),
        (lambda engine: engine.generate(["x", "y"], images=[None]), "images"),
        (lambda engine: engine.chat(["x", "y"], sampling=[{}]), "sampling"),
        (lambda engine: engine.chat(user({"type": "picture"})), "messages[0].content[0].type"),
        (lambda engine: engine.chat(user({"type": "image"})), "messages[0].content[0]"),
        (lambda engine: engine.chat(user(3.5)), "messages[0].content[0]"),
    ],
)
def test_errors_name_the_argument(engine: Engine, ask: Callable[[Engine], Any], param: str) -> None:
    with pytest.raises(TriptychError) as caught:
        ask(engine)
    assert caught.value.param == param
    assert param.split("[")[0] in caught.value.message


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"max_runing_requests": 3}, "max_runing_requests"),
        ({"max_running_requests": 0}, "max_running_requests"),
        ({"preprocess_instances": 2}, "preprocess_instances"),
        ({"mm_process_config": {"picture": {}}}, "mm_process_config.picture"),
        ({"device": "tpu"}, None),
        ({"model": "/no/such/folder"}, "model"),
    ],
)
def test_options_are_checked_before_anything_is_loaded(options: dict[str, Any], param: str | None) -> None:
    with pytest.raises(TriptychError) as caught:
        Engine(**options)
    assert caught.value.param == param


def test_a_closed_engine_says_so(checkpoint: Path) -> None:
    engine = Engine(checkpoint, device="cpu", torch_threads=1, kv_cache_tokens=2048, enable_multimodal="off")
    stream = engine.stream_chat("hello", max_tokens=LONG, ignore_eos=True)
    next(stream)
    engine.close()
    engine.close()
    with pytest.raises(TriptychError) as caught:
        list(stream)
    assert caught.value.kind is ErrorKind.STAGE_DEAD
    with pytest.raises(TriptychError, match="closed"):
        engine.chat("hello")


def test_every_name_is_there() -> None:
    for name in triptych.__all__:
        assert getattr(triptych, name).__name__ == name
    assert triptych.__version__
    with pytest.raises(AttributeError):
        triptych.Motor  # noqa: B018
