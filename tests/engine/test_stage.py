"""The stage: tensors in, tensors out, and what it says of input that does not fit."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from triptych.python_models.contract.errors import ErrorKind, TriptychError
from triptych.python_models.contract.plan import MediaItem, Plan
from triptych.python_models.contract.settings import Settings
from triptych.python_models.contract.tensors import DELTA
from triptych.python_models.language_model.runner.executor import make_executor
from triptych.python_models.language_model.runner.memory import CPU_BYTES
from triptych.python_models.language_model.runner.step import KVGroup
from triptych.python_models.language_model.sizing import kv_blocks
from triptych.python_models.language_model.stage import LanguageModelStage

ITEM = MediaItem("image", "d", ((2, 6),), "vision")


def inputs(length=10, items=(), extras=None, **tensors):
    plan = Plan(items, extras=extras or {})
    given = {
        "input_ids": np.arange(1, length + 1, dtype=np.int32),
        "position_ids": np.arange(length, dtype=np.int32)[None],
        "plan": [plan.to_json().encode()],
    }
    given.update(tensors)
    return {name: value for name, value in given.items() if value is not None}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (inputs(plan=None), "without a plan"),
        (inputs(plan=[b"{"]), "plan cannot be read: JSONDecodeError"),
        (inputs(position_ids=None), "without position_ids"),
        (inputs(position_ids=np.zeros((3, 10), np.int32)), r"shape \(3, 10\), but \(1, 10\)"),
        (inputs(items=(ITEM,)), "4 rows of the vision encoder, but vision_embeddings is absent"),
        (inputs(items=(ITEM,), vision_embeddings=np.zeros((3, 64), np.float32)), r"\(3, 64\).*need 4 rows"),
        (inputs(items=(ITEM,), vision_embeddings=np.zeros((4, 63), np.float32)), "63 columns.*multiple of 64"),
        (inputs(items=(ITEM,), vision_embeddings=np.zeros((4, 64), np.int32)), "int32.*floats"),
        (inputs(vision_embeddings=np.zeros((4, 64), np.float32)), r"\(4, 64\).*0 item\(s\) need 0 rows"),
        (inputs(items=(ITEM, ITEM), vision_embeddings=np.zeros((8, 64), np.float32)), "2 to 6 of 10, or twice"),
        (inputs(items=(MediaItem("image", "d", ((8, 12),), "vision"),)), "8 to 12 of 10"),
        (inputs(items=(MediaItem("image", "d", ((2, 6),), "taste"),)), "unknown encoder 'taste'"),
        (inputs(items=(MediaItem("smell", "d", ((2, 6),), "vision"),)), "unknown modality 'smell'"),
        (inputs(length=400), "1 to 400, but token ids are 0 to 299"),
        (inputs(input_ids=np.array([-1] * 10)), "-1 to -1"),
        (inputs(extras={"lora": 1}), "extras that the decoder does not know: lora"),
        (inputs(length=0), "prompt is empty"),
    ],
)
def test_input_that_does_not_fit_is_named(make_tiny, recorder, given, message):
    tiny = make_tiny()
    stage, answer = tiny.stage(), recorder()
    stage.submit("a", given, answer)
    error = answer.wait().error
    assert error is not None
    with pytest.raises(TriptychError, match=message):
        raise error
    assert answer.deltas == []
    assert tiny.ask(stage, [1, 2, 3], max_tokens=3).ok()


def test_a_flush_forgets_prompts_but_never_under_a_request(make_tiny, recorder):
    tiny = make_tiny()
    stage = tiny.stage()
    prompt = list(range(1, 41))
    running = tiny.ask(stage, prompt, request_id="long", max_tokens=400)
    running.wait_first()
    refused = recorder()
    stage.flush(refused)
    assert refused.wait().error.kind is ErrorKind.OVERLOADED
    stage.cancel(["long"])
    assert running.wait().error.kind is ErrorKind.CANCELLED
    first = tiny.ask(stage, prompt, max_tokens=3).ok()
    assert first.usage.cached_tokens > 0
    answer = recorder()
    stage.flush(answer)
    assert answer.ok().deltas == []
    again = tiny.ask(stage, prompt, max_tokens=3).ok()
    assert again.usage.cached_tokens == 0
    assert again.token_ids == first.token_ids


def test_control_requests_act_and_are_answered_with_nothing(make_tiny, recorder):
    tiny = make_tiny()
    stage = tiny.stage()
    running = tiny.ask(stage, [1, 2, 3], request_id="long", max_tokens=500)
    running.wait_first()
    for control in ({"renew": [b"long"]}, {"cancel": [b"other"]}, {}):
        answer = recorder()
        stage.submit("", control, answer)
        assert answer.ok().empty_final
        assert answer.deltas == []
    answer = recorder()
    stage.submit("", {"cancel": [b"long"], "renew": [b"x"]}, answer)
    assert answer.ok().empty_final
    assert running.wait().error.kind is ErrorKind.CANCELLED
    # the probe of a stage whose engine has stopped is an error
    stage.engine.close()
    answer = recorder()
    stage.submit("", {"renew": [b"x"]}, answer)
    assert answer.wait().error.kind is ErrorKind.STAGE_DEAD


def test_the_host_hears_of_an_engine_that_cannot_go_on(make_tiny, monkeypatch):
    tiny = make_tiny()
    stage = tiny.stage()
    ended = threading.Event()
    stage.on_fatal = ended.set

    def lost(slices):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(stage._runner, "forward", lost)
    assert tiny.ask(stage, [1, 2, 3], max_tokens=5).wait().error.kind is ErrorKind.STAGE_DEAD
    assert ended.wait(30)


def test_deltas_are_the_declared_tensors(make_tiny):
    tiny = make_tiny()
    seen = []

    class Raw:
        def send(self, answer, *, final):
            seen.append((answer.to_tensors(), final))

        def fail(self, error):
            raise AssertionError(error)

    stage = tiny.stage()
    stage.submit("", inputs(plan=[b'{"items": [], "sampling": {"max_tokens": 4, "temperature": 0}}']), Raw())
    while not (seen and seen[-1][1]):
        pass
    declared = {spec.name: spec.dtype for spec in DELTA}
    for tensors, _ in seen:
        assert set(tensors) == set(declared)
        for name, dtype in declared.items():
            assert (dtype == "TYPE_STRING") == isinstance(tensors[name], list)
            assert dtype != "TYPE_INT32" or tensors[name].dtype == np.int32
    assert [final for _, final in seen] == [False] * 4 + [True]


def test_the_kv_cache_has_the_tokens_asked_for(make_tiny, caplog):
    tiny = make_tiny()
    with caplog.at_level("INFO"):
        stage = tiny.stage(kv_cache_tokens=103, block_size=8)
    assert stage.engine.config.kv_tokens == 96
    assert "KV cache: 96 tokens in blocks of 8" in caplog.text


FULL, WINDOW = KVGroup((0,)), KVGroup((1,), 64)


def test_sizing_of_the_kv_cache():
    few = Settings(max_running_requests=2)
    assert kv_blocks(few, [FULL], [1000], 100, "cpu") == (2 * 7,)
    assert kv_blocks(Settings(), [FULL], [2**20], 10**6, "cpu") == (CPU_BYTES // 2**20 // 16,)
    with pytest.raises(TriptychError, match="less than one block of 16"):
        kv_blocks(Settings(kv_cache_tokens=15), [FULL], [1], 100, "cpu")
    with pytest.raises(TriptychError, match="mem_fraction_static"):
        kv_blocks(Settings(), [FULL], [2**30], 100, "cpu")


def test_windows_get_what_running_requests_see_and_the_rest_goes_to_full_layers():
    settings = Settings(max_running_requests=4, chunked_prefill_size=160)
    full, window = kv_blocks(settings, [FULL, WINDOW], [2**14, 2**14], 10**6, "cpu")
    # 4 requests with 64 tokens and two cut blocks each, 160 tokens of a step, half of it again for prefixes
    assert window == 1.5 * (4 * 6 + 10)
    assert full == CPU_BYTES // 2**14 // 16 - window
    # memory for less than that: no group starves the other
    full, window = kv_blocks(settings, [FULL, WINDOW], [2**20, 2**20], 10**6, "cpu")
    assert (full, window) == (32, 32)
    # never more blocks than a group that keeps everything
    assert kv_blocks(Settings(kv_cache_tokens=320), [FULL, WINDOW], [1, 1], 10**6, "cpu") == (20, 20)
    assert kv_blocks(settings, [WINDOW], [2**14], 10**6, "cpu") == (51,)


def test_context_length_is_checked_against_the_checkpoint(make_tiny):
    tiny = make_tiny()
    assert tiny.stage(context_length=77).engine.config.context_length == 77
    assert tiny.stage().engine.config.context_length == 512
    with pytest.raises(TriptychError, match="513 is more than the 512 positions"):
        tiny.stage(context_length=513)


def test_numpy_and_torch_and_half_precision_embeddings(make_tiny):
    tiny = make_tiny()
    stage = tiny.stage()
    rows = torch.randn(4, 64).bfloat16()
    prompt = list(range(1, 11))
    options = {"items": (ITEM,), "max_tokens": 8}
    answers = [
        tiny.ask(stage, prompt, tensors={"vision_embeddings": value}, **options).ok().token_ids
        for value in (rows, rows.float(), rows.float().numpy())
    ]
    assert answers[0] == answers[1] == answers[2]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"layer_types": ["full_attention", "chunked_attention", "full_attention"]}, "chunked_attention"),
        ({"num_kv_shared_layers": 1}, "share keys and values"),
        ({"hidden_size_per_layer_input": 4}, "embeddings of each token for every layer"),
        ({"use_bidirectional_attention": True}, "bidirectional attention over text"),
        ({"rope_parameters": {"full_attention": {"rope_type": "longrope"}}}, "longrope for one type of layers"),
        ({"rope_parameters": {"full_attention": {"rope_type": "dynamic"}}}, "dynamic for one type of layers"),
        ({"num_hidden_layers": 4}, "4 layers, 3 with attention"),
    ],
)
def test_decoders_that_would_give_other_tokens_are_refused(make_tiny, change, reason):
    tiny = make_tiny()
    for name, value in change.items():
        setattr(tiny.decoder.config, name, value)
    with pytest.raises(TriptychError, match=reason):
        make_executor(tiny.decoder, "transformers")


def test_the_stage_loads_a_checkpoint(tiny_checkpoint, meter, recorder):
    settings = Settings(model=str(tiny_checkpoint("qwen2_5_vl")), kv_cache_tokens=512)
    stage = LanguageModelStage(settings, meter, "cpu")
    answer = recorder()
    positions = np.broadcast_to(np.arange(10, dtype=np.int32), (3, 10))
    plan = Plan().to_json().replace('"sampling": {}', '"sampling": {"max_tokens": 12, "temperature": 0}')
    stage.submit("", inputs(position_ids=positions, plan=[plan.encode()]), answer)
    assert answer.ok().usage.completion_tokens in range(1, 13)
    stage.close()
    stage.engine.check()
