"""What the engine's tests share: a recording responder, a toy model with a real paged memory, tiny decoders."""

from __future__ import annotations

import copy
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

from triptych.python_models.contract.delta import Delta, Usage
from triptych.python_models.contract.errors import TriptychError
from triptych.python_models.contract.plan import MediaItem, Plan
from triptych.python_models.contract.sampling import SamplingParams
from triptych.python_models.contract.settings import Settings
from triptych.python_models.families import torchvision_fix
from triptych.python_models.families.base import Decoder
from triptych.python_models.language_model.engine.config import EngineConfig
from triptych.python_models.language_model.engine.engine import Engine, Submission
from triptych.python_models.language_model.engine.request import Prompt
from triptych.python_models.language_model.runner.step import KVGroup, Slice
from triptych.python_models.language_model.stage import LanguageModelStage

torchvision_fix.install()

import transformers  # noqa: E402

torch.set_num_threads(1)

WAIT_S = 60.0


class Recorder:
    """A responder that keeps what it gets, and checks that nothing follows the end."""

    def __init__(self, on_delta: Callable[[Delta], None] | None = None) -> None:
        self.deltas: list[Delta] = []
        self.error: TriptychError | None = None
        self.ends = 0
        self.empty_final = False
        self.on_delta = on_delta
        self._done = threading.Event()
        self._first = threading.Event()

    def send(self, answer: Mapping[str, Any] | Delta, *, final: bool) -> None:
        if answer:
            delta = answer if isinstance(answer, Delta) else Delta.from_tensors(answer)
            self.deltas.append(delta)
            if delta.token_ids:
                self._first.set()
            if self.on_delta:
                self.on_delta(delta)
        else:
            self.empty_final = final
        if final:
            self._end()

    def fail(self, error: TriptychError) -> None:
        self.error = error
        self._end()

    def _end(self) -> None:
        self.ends += 1
        self._done.set()

    def wait(self) -> Recorder:
        assert self._done.wait(WAIT_S), "no end within a minute"
        assert self.ends == 1
        return self

    def wait_first(self) -> Recorder:
        assert self._first.wait(WAIT_S), "no token within a minute"
        return self

    def ok(self) -> Recorder:
        self.wait()
        assert self.error is None, self.error
        return self

    @property
    def token_ids(self) -> list[int]:
        return [i for delta in self.deltas for i in delta.token_ids]

    @property
    def text(self) -> str:
        return "".join(delta.text for delta in self.deltas)

    @property
    def logprobs(self) -> list[Any]:
        return [item for delta in self.deltas for item in delta.logprobs]

    @property
    def usage(self) -> Usage:
        assert self.deltas[-1].usage is not None
        return self.deltas[-1].usage

    @property
    def finish(self) -> tuple[str, Any]:
        return self.deltas[-1].finish_reason, self.deltas[-1].matched_stop


class Meter:
    """A telemetry that adds up."""

    def __init__(self) -> None:
        self.values: dict[tuple[str, str], float] = {}
        self.observed: dict[str, list[float]] = {}

    def add(self, name: str, value: float = 1.0, **labels: str) -> None:
        key = (name, ",".join(labels.values()))
        self.values[key] = self.values.get(key, 0) + value

    def set(self, name: str, value: float, **labels: str) -> None:
        self.values[(name, ",".join(labels.values()))] = value

    def observe(self, name: str, value: float, **labels: str) -> None:
        self.observed.setdefault(name, []).append(value)

    def __call__(self, name: str, label: str = "") -> float:
        return self.values.get((name, label), 0)


class ToyTokenizer:
    """Token k is the k-th small letter, over and over; token 0 is special."""

    def decode(self, token_ids: list[int], skip_special_tokens: bool = True, **_: Any) -> str:
        return "".join(chr(97 + i % 26) for i in token_ids if i or not skip_special_tokens)

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str | None]:
        return [chr(97 + i % 26) for i in ids]


class ToyRunner:
    """A model whose next token is a hash of all tokens it finds in its paged memory: any mix-up changes the answer.

    Each group of layers has a memory of its own; one with a window finds only what is in it. With ``saved_states`` the
    next token also depends on a state that each slot carries from step to step. ``fail`` may raise for the slices of a
    step, whose states are lost then; ``gate`` holds steps back while it is cleared.
    """

    vocab_size = 40

    def __init__(
        self,
        num_blocks: Sequence[int],
        block_size: int,
        eos: int | None = 0,
        windows: Sequence[int | None] = (None,),
        vocab_size: int = 40,
        saved_states: int | None = None,
    ) -> None:
        self.block_size = block_size
        self.vocab_size = vocab_size
        self.states: dict[int, int] | None = None if saved_states is None else {}
        self.saved = [0] * (saved_states or 0)
        self.loads: list[int] = []
        self.kv_groups = tuple(KVGroup((layer,), window) for layer, window in enumerate(windows))
        self.memories = [np.full(count * block_size, -1, dtype=np.int64) for count in num_blocks]
        self.eos = eos
        self.last_tokens = torch.zeros(256, dtype=torch.int64)
        self.fail: Callable[[Sequence[Slice]], None] = lambda slices: None
        self.gate = threading.Event()
        self.gate.set()
        self.steps: list[list[int]] = []
        self.late = 0
        self.scrubbed: list[int] = []

    def forward(self, slices: Sequence[Slice]) -> torch.Tensor:
        assert self.gate.wait(WAIT_S)
        self.steps.append([len(part) for part in slices])
        if self.states is None:
            self.fail(slices)
        else:
            kept = self.states.copy()
            # whatever a step that raises has done
            self.states.update((part.slot, -1) for part in slices)
            self.fail(slices)
            self.states = kept
        seeds = [seed for part in slices for seed in self._hashes(part)]
        logits = torch.zeros(len(seeds), self.vocab_size)
        for row, seed in enumerate(seeds):
            logits[row] = torch.randn(self.vocab_size, generator=torch.Generator().manual_seed(seed))
            if self.eos is None:
                logits[row, 0] = -torch.inf
        return logits

    def _hashes(self, part: Slice) -> list[int]:
        """Store a slice; a number for each of its logits."""
        ids = part.token_ids.copy()
        if part.first_on_device:
            self.late += 1
            ids[0] = self.last_tokens[part.slot]
        end = part.start + len(part)
        places = np.arange(end)
        # the position is stored too, so a token found at another place is seen
        values = ids * 100_003 + part.position_ids[0]
        for media in part.media:
            values[media.positions] = (media.rows[:, 0].numpy() * 1000).astype(np.int64)
        found = []
        for memory, table in zip(self.memories, part.block_tables, strict=True):
            slots = table[places // self.block_size].astype(np.int64) * self.block_size + places % self.block_size
            memory[slots[part.start :]] = values
            found.append(memory[slots])
        if self.states is not None:
            return self._recur(part, values)
        seeds = []
        for last in range(end - part.num_logits, end):
            seed = 0
            for group, content in zip(self.kv_groups, found, strict=True):
                first = 0 if group.window is None else max(0, last - group.window + 1)
                seed = zlib.crc32(content[first : last + 1].tobytes(), seed)
            seeds.append(seed % 2**31)
        return seeds

    def _recur(self, part: Slice, values: np.ndarray) -> list[int]:
        """Fold a slice into the state of its slot, beside what the first group's memory holds of all before."""
        assert self.states is not None
        state = self.states[part.slot] if part.start else 0
        if part.load >= 0:
            self.loads.append(part.start)
            state = self.saved[part.load]
        saves = dict(part.saves)
        table = part.block_tables[0]
        places = np.arange(part.start)
        before = self.memories[0][table[places // self.block_size] * self.block_size + places % self.block_size]
        seed = zlib.crc32(before.tobytes())
        for count, value in enumerate(values.tolist(), 1):
            state = zlib.crc32(str(value).encode(), state)
            seed = zlib.crc32(np.int64(value).tobytes(), seed)
            if count in saves:
                self.saved[saves[count]] = state
        self.states[part.slot] = state
        assert part.num_logits < 2, "a state cannot be taken back from a wrong guess"
        return [(seed ^ state) % 2**31] * part.num_logits

    def scrub(self, group: int, blocks: Sequence[int]) -> None:
        self.scrubbed.extend(blocks)
        for block in blocks:
            self.memories[group][block * self.block_size : (block + 1) * self.block_size] = -1


_OWN = ("lease_s", "timeout_s", "priority", "cache_salt")


@dataclass
class Toy:
    """An engine around a :class:`ToyRunner`."""

    engine: Engine
    runner: ToyRunner
    meter: Meter

    def submit(
        self, prompt: Sequence[int], request_id: str = "", recorder: Recorder | None = None, **options: Any
    ) -> Recorder:
        recorder = recorder or Recorder()
        stream = options.pop("stream", True)
        own = {name: options.pop(name) for name in _OWN if name in options}
        media, spans = options.pop("media", ()), options.pop("spans", ())
        options.setdefault("temperature", 0)
        ids = np.array(prompt, dtype=np.int64)
        given = Prompt(ids, np.arange(len(ids), dtype=np.int64)[None], media=media, spans=spans)
        self.engine.submit(Submission(request_id, given, SamplingParams(**options), recorder, stream, **own))
        return recorder


@pytest.fixture
def make_toy() -> Iterator[Callable[..., Toy]]:
    """Makes toy engines and, at the end, closes them and checks that they lost nothing."""
    toys = []

    def make(
        num_blocks: int | tuple[int, ...] = 10_000,
        block_size: int = 4,
        eos: int | None = None,
        windows: tuple[int | None, ...] = (None,),
        vocab_size: int = 40,
        on_fatal: Callable[[], None] | None = None,
        **options: Any,
    ) -> Toy:
        counts = (num_blocks,) * len(windows) if isinstance(num_blocks, int) else num_blocks
        saved_states = options.get("saved_states")
        runner, meter = ToyRunner(counts, block_size, eos, windows, vocab_size, saved_states), Meter()
        values: dict[str, Any] = {
            "context_length": 10_000,
            "max_running": 8,
            "max_queued": 100,
            "max_step_tokens": 64,
            "heartbeat_s": 1000.0,
            "timeout_s": 1000.0,
            "eos_token_ids": frozenset() if eos is None else frozenset({eos}),
        }
        config = EngineConfig(num_blocks=counts, block_size=block_size, windows=windows, **(values | options))
        toy = Toy(Engine(runner, ToyTokenizer(), config, meter, on_fatal=on_fatal), runner, meter)
        toys.append(toy)
        return toy

    yield make
    for toy in toys:
        toy.runner.gate.set()
        toy.engine.close()
        toy.engine.check()


def _reinit(model: torch.nn.Module) -> None:
    """Weights wide enough that logits are far from flat."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.copy_(torch.rand(parameter.shape, generator=generator) * 0.2 + ("norm" in name))
            else:
                scale = 1.0 if "embed" in name else parameter.shape[-1] ** -0.5
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)


_COMMON = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}


_LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0] * 8,
    "long_factor": [1.0, 1.5, 2.0, 3.0, 4.0, 4.0, 4.0, 4.0],
    "original_max_position_embeddings": 32,
    "factor": 16.0,
}
_ROPES = {
    "phi3_longrope": (transformers.Phi3ForCausalLM, transformers.Phi3Config, _LONGROPE),
    "llama_longrope": (transformers.LlamaForCausalLM, transformers.LlamaConfig, _LONGROPE),
    "llama_dynamic": (
        transformers.LlamaForCausalLM,
        transformers.LlamaConfig,
        {"rope_type": "dynamic", "factor": 2.0},
    ),
}


_LINEAR = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_NEMOTRON = {
    "vocab_size": 300,
    "hidden_size": 64,
    "layers_block_type": ["linear_attention", "mlp", "full_attention", "moe", "linear_attention"],
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "ssm_state_size": 8,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "n_groups": 2,
    "chunk_size": 8,
    "n_routed_experts": 4,
    "moe_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 32,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}


def _build(kind: str) -> Any:
    if kind == "qwen2":
        model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**_COMMON))
    elif kind == "gemma2":
        # soft-capped scores, alternating sliding windows
        config = transformers.Gemma2Config(
            **_COMMON,
            sliding_window=9,
            attn_logit_softcapping=3.0,
            query_pre_attn_scalar=24,
            final_logit_softcapping=None,
        )
        model = transformers.Gemma2ForCausalLM._from_config(config, attn_implementation="eager")
    elif kind == "gpt_oss":
        # sinks, sliding windows, experts
        config = transformers.GptOssConfig(**_COMMON, sliding_window=9, num_local_experts=4, num_experts_per_tok=2)
        model = transformers.GptOssForCausalLM._from_config(config, attn_implementation="eager")
    elif kind == "qwen3_5":
        # gated delta nets
        model = transformers.Qwen3_5ForCausalLM(transformers.Qwen3_5TextConfig(**_COMMON, **_LINEAR))
    elif kind == "nemotron_h":
        # Mamba-2, and feed-forward networks that are layers of their own
        model = transformers.NemotronHForCausalLM(transformers.NemotronHConfig(**_NEMOTRON))
    elif kind == "lfm2":
        # short convolutions
        config = transformers.Lfm2Config(
            **{name: value for name, value in _COMMON.items() if name != "head_dim"},
            layer_types=["conv", "full_attention", "conv"],
        )
        model = transformers.Lfm2ForCausalLM(config)
    elif kind in _ROPES:
        # requests of more than 32 tokens have other frequencies, or with "dynamic" of more than 512
        cls, config_cls, rope = _ROPES[kind]
        config = config_cls(**_COMMON, rope_parameters={"rope_theta": 1e4, **rope})
        # the default of Phi-3's
        config.original_max_position_embeddings = 32
        model = cls(config)
    elif kind == "qwen3_vl":
        # rows that deeper layers add
        text = {**_COMMON, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}
        vision = {"depth": 1, "hidden_size": 32, "out_hidden_size": 64, "num_heads": 2, "intermediate_size": 32}
        vision["deepstack_visual_indexes"] = [0]
        config = transformers.Qwen3VLConfig(text_config=text, vision_config=vision)
        model = transformers.Qwen3VLForConditionalGeneration(config)
    else:
        text = {**_COMMON, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}
        vision = {"depth": 1, "hidden_size": 32, "out_hidden_size": 64, "num_heads": 2, "intermediate_size": 32}
        config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision)
        model = transformers.Qwen2_5_VLForConditionalGeneration(config)
    return _ready(model)


def _ready(model: Any) -> Any:
    _reinit(model)
    model.generation_config = transformers.GenerationConfig(eos_token_id=None, pad_token_id=0)
    return model.eval()


@dataclass
class Tiny:
    """A tiny model: transformers' own as reference, and a copy of it as the engine's decoder."""

    reference: Any
    decoder: Decoder
    device: str = "cpu"
    stages: list[LanguageModelStage] = field(default_factory=list)

    def generate(self, prompt: Sequence[int], count: int, **options: Any) -> list[int]:
        """Greedy tokens of transformers' ``generate``."""
        ids = torch.tensor([list(prompt)], device=self.device)
        self._forget()
        out = self.reference.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, **options
        )
        return out[0, len(prompt) :].tolist()

    def logits(self, ids: Sequence[int], **inputs: Any) -> torch.Tensor:
        """Logits [len(ids), V] of one plain forward pass."""
        self._forget()
        with torch.no_grad():
            inputs = inputs or {"input_ids": torch.tensor([list(ids)], device=self.device)}
            out: torch.Tensor = self.reference(**inputs).logits[0]
        return out

    def stepwise(
        self, embeddings: torch.Tensor, positions: np.ndarray, rope_delta: int, count: int, **extra: Any
    ) -> list[int]:
        """Greedy tokens by transformers' decoder without any cache: every step computes everything anew.

        Args:
            embeddings: [L, H] of the prompt, media spliced in.
            positions: [axes, L].
            extra: more arguments of the decoder, for the prompt's tokens.
        """
        base = self.reference.base_model
        text_model = getattr(base, "language_model", base)
        out: list[int] = []
        with torch.no_grad():
            for _ in range(count):
                length = embeddings.shape[0]
                tail = np.arange(positions.shape[1], length) + rope_delta
                full = np.concatenate([positions, np.broadcast_to(tail, (positions.shape[0], len(tail)))], axis=1)
                ids = torch.from_numpy(full.astype(np.int64)).to(self.device)
                if (mask := extra.get("visual_pos_masks")) is not None:
                    pad = torch.zeros(1, length - mask.shape[1], dtype=torch.bool, device=mask.device)
                    extra = extra | {"visual_pos_masks": torch.cat([mask, pad], 1)}
                hidden = text_model(
                    inputs_embeds=embeddings[None],
                    position_ids=ids[:, None] if len(full) > 1 else ids,
                    use_cache=False,
                    **extra,
                ).last_hidden_state
                out.append(int(self.reference.lm_head(hidden[0, -1]).argmax()))
                new = self.reference.get_input_embeddings()(torch.tensor(out[-1:], device=self.device))
                embeddings = torch.cat([embeddings, new])
        return out

    def _forget(self) -> None:
        if hasattr(self.reference.base_model, "rope_deltas"):
            self.reference.base_model.rope_deltas = None

    def stage(self, meter: Meter | None = None, **settings: Any) -> LanguageModelStage:
        """A stage around a fresh copy of the decoder."""
        values: dict[str, Any] = {"kv_cache_tokens": 2048, "block_size": 4, "heartbeat_s": 1000.0} | settings
        stage = LanguageModelStage(Settings(**values), meter or Meter(), self.device, decoder=self.decoder)
        self.stages.append(stage)
        return stage

    def ask(
        self,
        stage: LanguageModelStage,
        prompt: Sequence[int],
        *,
        request_id: str = "",
        recorder: Recorder | None = None,
        positions: Any = None,
        rope_delta: int = 0,
        items: tuple[MediaItem, ...] = (),
        tensors: Mapping[str, Any] | None = None,
        extras: dict[str, Any] | None = None,
        stream: bool = True,
        embed: bool = False,
        **sampling: Any,
    ) -> Recorder:
        """Submit a prompt as the server would."""
        recorder = recorder or Recorder()
        sampling.setdefault("temperature", 0)
        plan = Plan(items, SamplingParams(**sampling), rope_delta, stream, embed=embed, extras=extras or {})
        axes = self.decoder.num_axes
        default = np.broadcast_to(np.arange(len(prompt), dtype=np.int32), (axes, len(prompt)))
        inputs = {
            "input_ids": np.array(prompt, dtype=np.int32),
            "position_ids": default if positions is None else positions,
            "plan": [plan.to_json().encode()],
            **(tensors or {}),
        }
        stage.submit(request_id, inputs, recorder)
        return recorder


@pytest.fixture(scope="session")
def _models() -> dict[str, Any]:
    return {}


@pytest.fixture
def make_tiny(_models: dict[str, Any]) -> Iterator[Callable[..., Tiny]]:
    """Makes tiny models, of a kind of `_build` or by ``build``; at the end closes their stages and checks that no block
    was lost.
    """
    made: list[Tiny] = []

    def make(kind: str = "qwen2", device: str = "cpu", build: Callable[[], Any] | None = None) -> Tiny:
        if kind not in _models:
            _models[kind] = _build(kind) if build is None else _ready(build())
        reference = copy.deepcopy(_models[kind]).to(device)
        own = copy.deepcopy(_models[kind]).to(device)
        text_model = getattr(own.base_model, "language_model", own.base_model)
        table = own.get_input_embeddings()

        def embed(ids: torch.Tensor, is_media: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = table(ids.masked_fill(is_media, 0))
            return out

        config = own.config.get_text_config()
        axes = 3 if kind.endswith("vl") else 1
        decoder = Decoder(text_model, own.lm_head, embed, config, ToyTokenizer(), frozenset(), 512, axes)
        made.append(Tiny(reference, decoder, device))
        return made[-1]

    yield make
    for tiny in made:
        for stage in tiny.stages:
            stage.close()
            stage.engine.check()


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Every test that takes this runs on the CPU and, where there is one, on a GPU."""
    return str(request.param)


@pytest.fixture
def recorder() -> type[Recorder]:
    """The :class:`Recorder` class."""
    return Recorder


@pytest.fixture
def meter() -> Meter:
    """A fresh :class:`Meter`."""
    return Meter()
