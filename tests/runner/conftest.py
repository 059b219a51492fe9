"""Tiny decoders of transformers, and a rig that drives a runner over them as an engine would."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

from triptych.python_models.families import torchvision_fix
from triptych.python_models.language_model.runner.executor import make_executor
from triptych.python_models.language_model.runner.options import RunnerOptions
from triptych.python_models.language_model.runner.runner import DecoderRunner
from triptych.python_models.language_model.runner.step import Slice

torchvision_fix.install()

import transformers  # noqa: E402

torch.set_num_threads(1)

BLOCK = 4
WINDOW = 9

_COMMON = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
_MIXED = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"] * 2}


def _model(kind: str) -> Any:
    if kind == "qwen2":
        return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**_COMMON))
    if kind == "gemma2":
        config = transformers.Gemma2Config(
            **_COMMON, **_MIXED, attn_logit_softcapping=3.0, query_pre_attn_scalar=24, final_logit_softcapping=None
        )
        return transformers.Gemma2ForCausalLM._from_config(config, attn_implementation="eager")
    if kind == "gemma3":
        config = transformers.Gemma3TextConfig(**_COMMON, **_MIXED, query_pre_attn_scalar=24)
        return transformers.Gemma3ForCausalLM._from_config(config, attn_implementation="eager")
    if kind == "gpt_oss":
        config = transformers.GptOssConfig(**_COMMON, **_MIXED, num_local_experts=4, num_experts_per_tok=2)
        return transformers.GptOssForCausalLM._from_config(config, attn_implementation="eager")
    raise ValueError(kind)


def _draw(model: torch.nn.Module) -> None:
    """Weights wide enough that logits are far from flat."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.copy_(torch.rand(parameter.shape, generator=generator) * 0.2 + ("norm" in name))
            else:
                scale = 1.0 if "embed" in name else parameter.shape[-1] ** -0.5
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)


@dataclass
class Own:
    """A :class:`~triptych.python_models.families.base.Decoder` of a model, as far as the runner looks at it."""

    text_model: Any
    lm_head: Any
    config: Any
    table: Any
    num_axes: int = 1
    token_extras: Mapping[str, int | None] = field(default_factory=dict)
    token_arguments: Callable[[torch.Tensor], Mapping[str, torch.Tensor]] | None = None

    def embed(self, ids: torch.Tensor, is_media: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.table(ids.masked_fill(is_media, 0))
        return out


@dataclass
class Request:
    """Tokens, and a block table for each group."""

    tokens: list[int]
    slot: int
    tables: list[list[int]]
    done: int = 0
    spans: tuple[tuple[int, int], ...] = ()


@dataclass
class Rig:
    """A runner and the plainest engine around it: blocks are handed out in turn, and given back out of windows."""

    reference: Any
    runner: DecoderRunner
    num_blocks: list[int]
    device: str
    free: list[list[int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        # block 0 stands in tables for what was given back
        self.free = [list(range(count - 1, 0, -1)) for count in self.num_blocks]
        for group in range(len(self.num_blocks)):
            self._poison(group, 0)

    def request(self, tokens: Sequence[int], slot: int, spans: tuple[tuple[int, int], ...] = ()) -> Request:
        return Request(list(tokens), slot, [[] for _ in self.runner.kv_groups], spans=spans)

    def slice(self, request: Request, count: int, **options: Any) -> Slice:
        """The next ``count`` tokens; blocks that no later token of these will see go back, full of NaN."""
        end = request.done + count
        for group, (table, shape) in enumerate(zip(request.tables, self.runner.kv_groups, strict=True)):
            if shape.window is not None:
                self._give_back(group, table, (request.done - shape.window + 1) // BLOCK)
            while len(table) * BLOCK < end:
                block = self.free[group].pop()
                self.runner.scrub(group, [block])
                table.append(block)
        options = {
            "position_ids": np.arange(request.done, end, dtype=np.int64)[None],
            "token_ids": np.array(request.tokens[request.done : end], dtype=np.int64),
            "num_logits": int(end == len(request.tokens)),
            "spans": tuple((a - request.done, b - request.done) for a, b in request.spans if request.done <= a < end),
        } | options
        tables = tuple(np.array(table, dtype=np.int32) for table in request.tables)
        return Slice(start=request.done, block_tables=tables, slot=request.slot, **options)

    def _give_back(self, group: int, table: list[int], upto: int) -> None:
        for place in range(max(upto, 0)):
            block, table[place] = table[place], 0
            if block:
                self._poison(group, block)
                self.free[group].insert(0, block)

    def _poison(self, group: int, block: int) -> None:
        for layer in self.runner.kv_groups[group].layers:
            for pages in self.runner._cache.pages[layer]:
                pages[block] = torch.full((), torch.nan, device=self.device).to(pages.dtype)

    def step(self, work: dict[int, tuple[Request, Slice]]) -> None:
        """Compute slices; greedy tokens go to `last_tokens`, and to the requests as if they were read later."""
        with torch.inference_mode():
            logits = self.runner.forward([part for _, part in work.values()])
            wanting = [(request, part) for request, part in work.values() if part.num_logits]
            assert logits.shape == (len(wanting), self.runner.vocab_size)
            assert logits.isfinite().all()
            tokens = logits.argmax(-1)
            slots = torch.tensor([request.slot for request, _ in wanting], device=self.device, dtype=torch.int64)
            self.runner.last_tokens[slots] = tokens
        for request, part in work.values():
            request.done += len(part)
        for (request, _), token in zip(wanting, tokens.tolist(), strict=True):
            request.tokens.append(token)

    def generate(self, prompts: Sequence[Sequence[int]], count: int, chunk: int = 10**6) -> list[list[int]]:
        """Greedy tokens; requests join one step after the other, and decode together with the next one's prompt."""
        waiting = [self.request(prompt, slot) for slot, prompt in enumerate(prompts)]
        lengths = [len(prompt) for prompt in prompts]
        running: list[Request] = []
        while waiting or any(len(r.tokens) < lengths[r.slot] + count for r in running):
            if waiting:
                running.append(waiting.pop(0))
            work: dict[int, tuple[Request, Slice]] = {}
            # the newest first: the runner must sort
            for request in reversed(running):
                pending = len(request.tokens) - request.done
                if request.done >= lengths[request.slot]:
                    if len(request.tokens) < lengths[request.slot] + count:
                        # the host claims not to know the token
                        ids = np.zeros(1, dtype=np.int64)
                        part = self.slice(request, 1, token_ids=ids, first_on_device=True)
                        work[request.slot] = request, part
                else:
                    work[request.slot] = request, self.slice(request, min(pending, chunk))
            self.step(work)
        return [r.tokens[lengths[r.slot] :] for r in sorted(running, key=lambda r: r.slot)]

    def expected(self, prompt: Sequence[int], count: int) -> list[int]:
        """Greedy tokens of transformers' ``generate``."""
        ids = torch.tensor([list(prompt)], device=self.device)
        out = self.reference.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False
        )
        found: list[int] = out[0, len(prompt) :].tolist()
        return found


@pytest.fixture(scope="session")
def _models() -> dict[str, Any]:
    return {}


@pytest.fixture
def add_model(_models: dict[str, Any]) -> Callable[[str, Callable[[], Any]], None]:
    """Makes a further kind known to ``make_rig``: (kind, how the model is made)."""

    def add(kind: str, make: Callable[[], Any]) -> None:
        if kind not in _models:
            _models[kind] = make().eval()
            _draw(_models[kind])
            _models[kind].generation_config = transformers.GenerationConfig(eos_token_id=None, pad_token_id=0)

    return add


@pytest.fixture
def make_rig(_models: dict[str, Any], device: str) -> Iterator[Callable[..., Rig]]:
    """Makes rigs: (kind, num_blocks, executor backend, runner options)."""

    def make(kind: str = "qwen2", num_blocks: int = 120, decoder: str = "transformers", **options: Any) -> Rig:
        if kind not in _models:
            model = _model(kind)
            _draw(model)
            model.generation_config = transformers.GenerationConfig(eos_token_id=None, pad_token_id=0)
            _models[kind] = model.eval()
        reference = copy.deepcopy(_models[kind]).to(device)
        own = copy.deepcopy(_models[kind]).to(device)
        parts = Own(own.base_model, own.lm_head, own.config.get_text_config(), own.get_input_embeddings())
        values: dict[str, Any] = {"context_length": 256, "window_groups": True} | options
        executor = make_executor(parts, decoder)
        runner = DecoderRunner(executor, 1, BLOCK, device, RunnerOptions(**values), num_slots=16)
        blocks = [num_blocks] * len(runner.kv_groups)
        runner.allocate(blocks)
        runner.warm_up(64)
        return Rig(reference, runner, blocks, device)

    return make


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Every test that takes this runs on the CPU and, where there is one, on a GPU."""
    return str(request.param)
