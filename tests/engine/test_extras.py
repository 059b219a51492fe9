"""What a decoder knows of each token beside its position: from the plan to the decoder, in mixed batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from triptych.python_models.contract.errors import TriptychError
from triptych.python_models.language_model.runner.executor import ModulesExecutor, make_executor

LENGTHS = (23, 9, 14)


class Kinds(nn.Module):
    """A decoder stack that adds a row of a table to each token, by its kind and shade."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner
        self.table = nn.Embedding(12, 64)

    def set_attn_implementation(self, name: str) -> None:
        self.inner.set_attn_implementation(name)

    def forward(self, inputs_embeds: torch.Tensor, kind: torch.Tensor, shade: torch.Tensor, **options: Any) -> Any:
        return self.inner(inputs_embeds=inputs_embeds + self.table(4 * shade + kind), **options)


@pytest.fixture
def tiny(make_tiny: Callable[..., Any]) -> Any:
    made = make_tiny()
    torch.manual_seed(0)
    model = Kinds(made.decoder.text_model).requires_grad_(False)
    # kind is 0 for generated tokens, shade stays what it was
    made.decoder = dataclasses.replace(made.decoder, text_model=model, token_extras={"kind": 0, "shade": None})
    return made


def prompt_of(number: int) -> list[int]:
    return [(7 * k + 31 * number) % 299 + 1 for k in range(LENGTHS[number])]


def extras_of(number: int) -> dict[str, Any]:
    return {"kind": [(k + number) % 4 for k in range(LENGTHS[number])], "shade": number}


def expected(tiny: Any, prompt: Sequence[int], extras: dict[str, Any], count: int) -> list[int]:
    """Greedy tokens without cache and batch, by the reference model."""
    table, found = tiny.decoder.text_model.table, []
    kinds = list(extras["kind"])
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            shades = torch.full((len(ids),), extras["shade"])
            rows = tiny.reference.get_input_embeddings()(torch.tensor(ids)) + table(4 * shades + torch.tensor(kinds))
            found.append(int(tiny.reference(inputs_embeds=rows[None]).logits[0, -1].argmax()))
            ids.append(found[-1])
            kinds.append(0)
    return found


@pytest.mark.parametrize("chunk", [0, 8])
@pytest.mark.parametrize("overlap", ["off", "on"])
def test_each_token_gets_its_own(tiny: Any, chunk: int, overlap: str) -> None:
    stage = tiny.stage(chunked_prefill_size=chunk, overlap=overlap)
    answers = [tiny.ask(stage, prompt_of(n), extras=extras_of(n), max_tokens=9) for n in range(3)]
    for number, answer in enumerate(answers):
        assert answer.ok().token_ids == expected(tiny, prompt_of(number), extras_of(number), 9)


def test_what_the_plan_leaves_out_is_as_for_generated_tokens(tiny: Any) -> None:
    stage = tiny.stage()
    found = tiny.ask(stage, prompt_of(0), extras={"shade": 1}, max_tokens=9).ok().token_ids
    assert found == expected(tiny, prompt_of(0), {"kind": [0] * LENGTHS[0], "shade": 1}, 9)


def test_prefixes_are_shared_only_where_they_are_equal(tiny: Any) -> None:
    stage = tiny.stage()
    prompt = prompt_of(0)

    def ask(kind: list[int], shade: int) -> int:
        extras = {"kind": kind, "shade": shade}
        answer = tiny.ask(stage, prompt, extras=extras, max_tokens=5).ok()
        assert answer.token_ids == expected(tiny, prompt, extras, 5)
        return int(answer.usage.cached_tokens)

    kind = [k % 4 for k in range(len(prompt))]
    assert [ask(kind, 1), ask(kind, 1), ask(kind, 2)] == [0, 20, 0]
    # the first eight tokens are as before
    assert ask([*kind[:9], 3, *kind[10:]], 1) == 8


@pytest.mark.parametrize(
    ("extras", "message"),
    [
        ({"shade": 1, "hue": 2}, "does not know: hue"),
        ({"kind": [1, 2]}, "kind must be an integer, or one for each of the 9 tokens"),
        ({"kind": 1.5, "shade": 1}, "kind must be an integer"),
        ({"kind": 1}, "shade must be an integer"),
    ],
)
def test_extras_that_do_not_fit_are_named(tiny: Any, extras: dict[str, Any], message: str) -> None:
    answer = tiny.ask(tiny.stage(), prompt_of(1), extras=extras).wait()
    assert message in answer.error.message


def test_fused_layers_decline(tiny: Any) -> None:
    assert isinstance(make_executor(tiny.decoder, "auto"), ModulesExecutor)
    with pytest.raises(TriptychError, match="kind, shade of each token"):
        make_executor(tiny.decoder, "fused")


def test_padded_decode_steps(tiny: Any) -> None:
    """As for CUDA graphs: padding has extras too."""
    from triptych.python_models.language_model.runner.options import RunnerOptions
    from triptych.python_models.language_model.runner.runner import DecoderRunner
    from triptych.python_models.language_model.runner.step import Slice

    runner = DecoderRunner(ModulesExecutor(tiny.decoder), 3, 4, "cpu", RunnerOptions(graph_batch=4, context_length=64))
    runner.allocate([16])
    runner.warm_up()
    prompt, extras = prompt_of(1), extras_of(1)
    found: list[int] = []
    tables = (np.arange(16, dtype=np.int32),)
    with torch.no_grad():
        while len(found) < 6:
            start, ids = (len(prompt) + len(found) - 1, found[-1:]) if found else (0, prompt)
            kinds, shades = [0] if found else extras["kind"], [extras["shade"]] * len(ids)
            positions = np.array([np.arange(start, start + len(ids)), kinds, shades])
            found.append(int(runner.forward([Slice(np.array(ids), positions, start, tables)])[0].argmax()))
    assert found == expected(tiny, prompt, extras, 6)
