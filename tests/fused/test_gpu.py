"""Fused layers agree with transformers' on a GPU, where they run on kernels of their own."""

from __future__ import annotations

import copy

import pytest
import torch

from triptych.python_models.language_model.runner.executor import make_executor
from triptych.python_models.language_model.runner.fused import FusedDecoder, build
from triptych.python_models.language_model.runner.options import RunnerOptions
from triptych.python_models.language_model.runner.runner import DecoderRunner

from .conftest import FAMILIES
from .test_runner import BLOCK, greedy, prompts

pytestmark = pytest.mark.gpu


def on_gpu(tiny, dtype):
    decoder = copy.deepcopy(tiny.reference)
    decoder.text_model.to("cuda", dtype)
    decoder.lm_head.to("cuda", dtype)
    return decoder


@pytest.mark.parametrize("name", FAMILIES)
def test_every_layer_agrees(make_tiny, name):
    built = build(on_gpu(make_tiny(name), torch.bfloat16))
    assert isinstance(built, FusedDecoder), built


@pytest.mark.parametrize("name", ["qwen2", "gemma3", "qwen3_vl", "qwen3_moe", "glm4v_moe"])
def test_graphs_give_the_tokens_of_eager_steps(make_tiny, name):
    tiny = make_tiny(name)
    requests = list(prompts(tiny.decoder.num_axes))
    answers = []
    for graph_batch in (0, 4):
        executor = make_executor(on_gpu(tiny, torch.float32), "fused")
        options = RunnerOptions(context_length=80, graph_batch=graph_batch)
        runner = DecoderRunner(executor, tiny.decoder.num_axes, BLOCK, "cuda", options)
        runner.allocate([60] * len(runner.kv_groups))
        runner.warm_up(32)
        with torch.inference_mode():
            answers.append(greedy(runner, requests, 100))
    assert answers[0] == answers[1]
