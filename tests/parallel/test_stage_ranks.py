"""The stage on two ranks: the tokens of one rank and of generate; what happens when a rank is lost."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from parallel_decoders import generate, prompts

from triptych.python_models.contract.delta import Delta
from triptych.python_models.contract.errors import ErrorKind, TriptychError
from triptych.python_models.contract.plan import MediaItem
from triptych.python_models.contract.sampling import SamplingParams
from triptych.python_models.contract.settings import Settings
from triptych.python_models.families import torchvision_fix
from triptych.python_models.language_model.engine.engine import Submission
from triptych.python_models.language_model.engine.request import Prompt
from triptych.python_models.language_model.runner.step import MediaRows
from triptych.python_models.language_model.stage import LanguageModelStage
from triptych.python_models.stage import NoTelemetry

torchvision_fix.install()

import transformers  # noqa: E402


class Answer:
    """A responder that keeps the tokens."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.error: TriptychError | None = None
        self.first = threading.Event()
        self.done = threading.Event()

    def send(self, content: Any, *, final: bool) -> None:
        if isinstance(content, Delta):
            self.tokens += content.token_ids
        if self.tokens:
            self.first.set()
        if final:
            self.done.set()

    def fail(self, error: TriptychError) -> None:
        self.error = error
        self.first.set()
        self.done.set()

    def ok(self) -> list[int]:
        assert self.done.wait(60)
        assert self.error is None, self.error
        return self.tokens


@pytest.fixture
def make_stage(tiny_checkpoint: Callable[[str], Path]) -> Iterator[Callable[..., LanguageModelStage]]:
    """Stages around the tiny Qwen2.5-VL checkpoint."""
    stages = []

    def make(**options: Any) -> LanguageModelStage:
        values: dict[str, Any] = {
            "model": str(tiny_checkpoint("qwen2_5_vl")),
            "kv_cache_tokens": 2048,
            "block_size": 4,
            "torch_threads": 1,
        }
        stages.append(LanguageModelStage(Settings(**(values | options)), NoTelemetry(), "cpu"))
        return stages[-1]

    yield make
    for stage in stages:
        stage.close()


@pytest.fixture
def reference(tiny_checkpoint: Callable[[str], Path]) -> Callable[[Sequence[int], int], list[int]]:
    """transformers' greedy tokens."""
    model: Any = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(tiny_checkpoint("qwen2_5_vl"))
    return lambda prompt, count: generate(model, prompt, count)


def ask(stage: LanguageModelStage, prompt: Sequence[int], count: int, media: tuple[int, int] | None = None) -> Answer:
    """Submit; tokens [start, end) come as rows of media: those that the same tokens have as text."""
    answer = Answer()
    ids = np.array(prompt, dtype=np.int64)
    items: tuple[MediaItem, ...] = ()
    rows: tuple[MediaRows, ...] = ()
    if media is not None:
        where = np.arange(*media)
        table = _table(stage.settings.model)
        rows = (MediaRows(where, table[torch.from_numpy(ids[where])]),)
        items = (MediaItem("image", "digest", (media,), "vision"),)
        ids[where] = 5
    positions = np.broadcast_to(np.arange(len(ids), dtype=np.int64), (3, len(ids))).copy()
    params = SamplingParams(max_tokens=count, temperature=0, ignore_eos=True)
    stage.engine.submit(Submission("", Prompt(ids, positions, 0, items, rows), params, answer))
    return answer


def _table(folder: str) -> torch.Tensor:
    model: Any = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(folder)
    return model.get_input_embeddings().weight.detach()  # type: ignore[no-any-return]


def test_two_ranks_answer_like_generate(make_stage: Any, reference: Any) -> None:
    """Together, in chunks, with media, and with too few blocks for all of them."""
    expected = {tuple(prompt): reference(prompt, 12) for prompt in prompts(5)}
    for options in ({"tp": 1}, {"tp": 2, "chunked_prefill_size": 16, "kv_cache_tokens": 96, "overlap": "on"}):
        stage = make_stage(**options)
        answers = [(prompt, ask(stage, prompt, 12)) for prompt in prompts(5)]
        answers += [(prompt, ask(stage, prompt, 12, media=(3, len(prompt) - 1))) for prompt in prompts(5)[1:]]
        for prompt, answer in answers:
            assert answer.ok() == expected[tuple(prompt)], options
        stage.close()


@pytest.mark.parametrize(("number", "words"), [(signal.SIGKILL, "signal SIGKILL"), (signal.SIGSTOP, "stuck")])
def test_a_lost_rank_ends_the_requests(make_stage: Any, number: signal.Signals, words: str) -> None:
    stage = make_stage(tp=2)
    (pid,) = stage._runner.pids
    answers = [ask(stage, prompt, 2000) for prompt in prompts(3)]
    for answer in answers:
        assert answer.first.wait(30)
    began = time.monotonic()
    os.kill(pid, number)
    for answer in answers:
        assert answer.done.wait(10)
        assert answer.error is not None
        assert answer.error.kind is ErrorKind.STAGE_DEAD
        assert "rank 1" in answer.error.message
        assert words in answer.error.message
    assert time.monotonic() - began < 10
    # the server's probe finds the stage dead, and loads it again
    probe = Answer()
    stage.submit("", {}, probe)
    assert probe.done.wait(5)
    assert probe.error is not None
    assert probe.error.kind is ErrorKind.STAGE_DEAD


def test_an_engine_held_by_its_device_is_given_up(make_stage: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = make_stage()
    held, ended, exits = threading.Event(), threading.Event(), list[int]()
    forward = stage._runner.forward
    monkeypatch.setattr(stage._runner, "forward", lambda slices: (held.wait(60), forward(slices))[1])
    monkeypatch.setattr(os, "_exit", exits.append)
    stage.on_fatal = ended.set
    answers = [ask(stage, prompt, 5) for prompt in prompts(2)]
    stage._give_up(TriptychError(ErrorKind.STAGE_DEAD, "rank 3 is stuck", None, "language_model"))
    for answer in answers:
        assert answer.done.is_set()
        assert answer.error is not None
        assert answer.error.message == "rank 3 is stuck"
    assert ended.is_set()
    assert exits == [1]
    late = ask(stage, [1, 2, 3], 5)
    assert late.done.is_set()
    assert late.error is not None
    assert late.error.kind is ErrorKind.STAGE_DEAD
    held.set()
