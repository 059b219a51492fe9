"""Real decoders of a saved checkpoint as ranks build them, and a greedy loop over a runner."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from triptych.python_models.contract.errors import ErrorKind, TriptychError
from triptych.python_models.families.loading import model_class, outline
from triptych.python_models.families.weights import SafetensorsSource
from triptych.python_models.language_model.runner import fused
from triptych.python_models.language_model.runner.options import RunnerOptions
from triptych.python_models.language_model.runner.parallel.member import Member
from triptych.python_models.language_model.runner.runner import DecoderRunner
from triptych.python_models.language_model.runner.step import MediaRows, Slice

BLOCK = 4


class Bare:
    """What the fused decoder needs of a model without weights."""

    def __init__(self, model: Any) -> None:
        self.text_model = model.get_decoder()
        self.lm_head = model.lm_head
        self.config = model.config.get_text_config()
        self.num_axes = 1
        self.token_extras: dict[str, int | None] = {}
        self.token_arguments = None

    def embed(self, ids: torch.Tensor, is_media: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


def keep(model: Any) -> list[str]:
    text = model.get_decoder()
    return ["lm_head", *(path for path, module in model.named_modules() if module is text)]


def build(member: Member, folder: str, cls: str) -> DecoderRunner:
    """The recipe's function."""
    torch.set_num_threads(1)
    model = outline(model_class(cls), model_class(cls).config_class.from_pretrained(folder), keep, torch.float32)
    source = SafetensorsSource(model, Path(folder), keep(model)[1], member.device, torch.float32)
    shard = fused.Shard(member.rank, member.size, member.expert_parallel)
    built = fused.build(Bare(model), shard, member.collectives, source)
    source.close()
    if isinstance(built, str):
        raise TriptychError(ErrorKind.UNSUPPORTED, f"{cls} cannot be split: {built}")
    graphs = 0 if member.device == "cpu" else 4
    return DecoderRunner(built, 1, BLOCK, member.device, RunnerOptions(context_length=256, graph_batch=graphs))


def greedy(
    runner: Any,
    prompts: Sequence[Sequence[int]],
    count: int,
    chunk: int = 1000,
    media: tuple[tuple[int, int], torch.Tensor] | None = None,
) -> list[list[int]]:
    """Greedy tokens of prompts that run together, each in chunks; new tokens reach the next step on the device only.

    ``media``: tokens [start, end) of the first prompt come as rows [end - start, H].
    """
    done = [0] * len(prompts)
    out: list[list[int]] = [[] for _ in prompts]
    longest = max(map(len, prompts)) + count
    blocks = -(-longest // BLOCK)
    while any(len(tokens) < count for tokens in out):
        slices, owners = [], []
        for index, prompt in enumerate(prompts):
            if len(out[index]) == count:
                continue
            start, size = done[index], min(chunk, len(prompt) - done[index])
            decoding = size <= 0
            ids = np.array([0] if decoding else prompt[start : start + size], dtype=np.int64)
            rows: tuple[MediaRows, ...] = ()
            if media is not None and index == 0 and not decoding:
                (low, high), table = media
                places = np.arange(max(low, start), min(high, start + size))
                if len(places):
                    rows = (MediaRows(places - start, table[torch.from_numpy(places - low)]),)
                    ids[places - start] = 0
            done[index] += len(ids)
            table32 = np.arange(index * blocks, (index + 1) * blocks, dtype=np.int32)
            slices.append(
                Slice(
                    ids,
                    np.arange(start, start + len(ids), dtype=np.int64)[None],
                    start,
                    tuple(table32 for _ in runner.kv_groups),
                    slot=index,
                    first_on_device=decoding,
                    media=rows,
                    num_logits=int(decoding or done[index] == len(prompt)),
                )
            )
            owners += [index] * slices[-1].num_logits
        logits = runner.forward(slices)
        for row, index in enumerate(owners):
            token = logits[row].argmax()
            runner.last_tokens[index] = token
            out[index].append(int(token))
    return out


def generate(model: Any, prompt: Sequence[int], count: int) -> list[int]:
    if hasattr(model.base_model, "rope_deltas"):
        model.base_model.rope_deltas = None
    ids = torch.tensor([list(prompt)])
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return list(out[0, len(prompt) :].tolist())


def prompts(count: int, vocab: int = 300) -> list[list[int]]:
    rng = np.random.default_rng(1)
    return [rng.integers(20, vocab, size=5 + 13 * k).tolist() for k in range(count)]
