"""Multi-head latent attention: latents in pages, and the same tokens as transformers, which caches them too."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import nn

from triptych.python_models.contract.errors import TriptychError
from triptych.python_models.families import torchvision_fix
from triptych.python_models.language_model.runner.executor import LayerShape, ModulesExecutor, make_executor
from triptych.python_models.language_model.runner.latent import Latent

torchvision_fix.install()

import transformers  # noqa: E402

_BASE = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "kv_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 12,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
# experts in groups, of which a token sees two
_MOE = {
    "moe_intermediate_size": 32,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 1,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.5,
}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
}
# as in the published ones: with and without a compressed query, greedy choice of experts and that by groups
_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "deepseek_v2": ("DeepseekV2", {**_BASE, **_MOE, "q_lora_rank": None, "topk_method": "greedy"}),
    "deepseek_v2_groups": (
        "DeepseekV2",
        {**_BASE, **_MOE, "q_lora_rank": 20, "topk_method": "group_limited_greedy", "rope_parameters": _YARN},
    ),
    "deepseek_v3": ("DeepseekV3", {**_BASE, **_MOE, "q_lora_rank": 20, "rope_parameters": _YARN}),
    # the text model of Kimi-VL: no compressed query, plain rotation
    "kimi": ("DeepseekV3", {**_BASE, **_MOE, "q_lora_rank": None, "n_group": 1, "topk_group": 1}),
    "glm4_moe_lite": ("Glm4MoeLite", {**_BASE, **_MOE, "q_lora_rank": 20, "n_group": 1, "topk_group": 1}),
    "youtu": ("Youtu", {**_BASE, "q_lora_rank": 20}),
}


@pytest.fixture
def make_mla(make_tiny: Any) -> Any:
    def make(kind: str, device: str = "cpu") -> Any:
        name, options = _MODELS[kind]

        def build() -> Any:
            model = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**options))
            for path, buffer in model.named_buffers():
                if path.endswith("correction_bias"):
                    buffer.copy_(torch.randn(buffer.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
            return model

        return make_tiny(kind, device, build)

    return make


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return random.Random(seed * 1000 + length).choices(range(1, 290), k=length)


@pytest.mark.parametrize("kind", sorted(_MODELS))
@pytest.mark.parametrize("options", [{}, {"chunked_prefill_size": 8}], ids=["whole", "chunked"])
def test_requests_together(make_mla: Any, device: str, kind: str, options: dict[str, Any]) -> None:
    """Latents of several requests, experts chosen for tokens of all of them."""
    tiny = make_mla(kind, device)
    stage = tiny.stage(cuda_graphs=False, **options)
    prompts = [prompt_of(n) for n in (5, 40, 17, 1, 26)]
    counts = [12, 20, 4, 25, 8]
    answers = [tiny.ask(stage, prompt, max_tokens=count) for prompt, count in zip(prompts, counts, strict=True)]
    expected = [tiny.generate(prompt, count) for prompt, count in zip(prompts, counts, strict=True)]
    assert [a.ok().token_ids for a in answers] == expected


@pytest.mark.parametrize("backend", ["sdpa", "triton"])
@pytest.mark.parametrize(
    "options", [{}, {"overlap": "on"}, {"speculative_tokens": 3}], ids=["plain", "overlap", "guess"]
)
def test_backends(make_mla: Any, device: str, backend: str, options: dict[str, Any]) -> None:
    tiny = make_mla("deepseek_v3", device)
    stage = tiny.stage(attention_backend=backend, chunked_prefill_size=16, cuda_graphs=False, **options)
    prompts = [prompt_of(n) for n in (30, 9, 21)] + [[*range(1, 9)] * 3]
    answers = [tiny.ask(stage, prompt, max_tokens=16) for prompt in prompts]
    assert [a.ok().token_ids for a in answers] == [tiny.generate(prompt, 16) for prompt in prompts]


def test_logprobs(make_mla: Any) -> None:
    tiny = make_mla("deepseek_v3")
    prompt = prompt_of(20)
    answer = tiny.ask(tiny.stage(), prompt, max_tokens=8, logprobs=True).ok()
    expected = tiny.logits([*prompt, *answer.token_ids]).log_softmax(-1)
    for place, item in enumerate(answer.logprobs):
        token = answer.token_ids[place]
        assert abs(item.logprob - float(expected[len(prompt) - 1 + place, token])) < 1e-3


def test_a_prefix_is_found_again(make_mla: Any) -> None:
    tiny = make_mla("kimi")
    stage = tiny.stage()
    prompt = prompt_of(33)
    cached = []
    for tail in ([], [7, 8, 9], [11]):
        answer = tiny.ask(stage, [*prompt, *tail], max_tokens=6).ok()
        assert answer.token_ids == tiny.generate([*prompt, *tail], 6)
        cached.append(answer.usage.cached_tokens)
    assert cached == [0, 32, 32]


def test_only_latents_are_kept(make_mla: Any) -> None:
    tiny = make_mla("deepseek_v3")
    stage = tiny.stage()
    assert set(ModulesExecutor(tiny.decoder).layers) == {LayerShape((1, 32), (1, 24), None, True)}
    # float32, three layers, a latent of 24 and a rotated key of 8
    assert stage._runner.bytes_per_token == (4 * 3 * 32,)


def test_preempted_requests(make_mla: Any) -> None:
    tiny = make_mla("deepseek_v2")
    stage = tiny.stage(kv_cache_tokens=72, context_length=72)
    prompts = [prompt_of(n) for n in (9, 17, 30)]
    answers = [tiny.ask(stage, prompt, max_tokens=30) for prompt in prompts]
    assert [a.ok().token_ids for a in answers] == [tiny.generate(prompt, 30) for prompt in prompts]


def test_an_fp8_cache(make_mla: Any) -> None:
    """Not the same tokens, but both backends read the same pages."""
    tiny = make_mla("kimi")
    found = []
    for backend in ("sdpa", "triton"):
        stage = tiny.stage(kv_cache_dtype="fp8", attention_backend=backend, chunked_prefill_size=16)
        found.append(tiny.ask(stage, prompt_of(30), max_tokens=10).ok().token_ids)
    assert found[0] == found[1]


def test_a_linear_without_a_matrix(make_mla: Any) -> None:
    """Quantised linears give theirs by what they do."""

    class Other(nn.Module):
        def __init__(self, linear: nn.Linear) -> None:
            super().__init__()
            self.linear = linear

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x)

    module = make_mla("deepseek_v3").decoder.text_model.layers[0].self_attn
    query = torch.randn(3, 4, 24)
    expected = Latent(module).absorb(query)
    module.kv_b_proj = Other(module.kv_b_proj)
    with torch.no_grad():
        torch.testing.assert_close(Latent(module).absorb(query), expected)


def test_keys_that_are_made_otherwise_are_refused(make_mla: Any) -> None:
    tiny = make_mla("deepseek_v3")
    for layer in tiny.decoder.text_model.layers:
        attention = layer.self_attn
        attention.__class__ = type("Other", (type(attention),), {"expand_kv": _doubled})
    with pytest.raises(TriptychError, match="layer 0 makes keys and values of its latents in a way"):
        make_executor(tiny.decoder, "transformers")


def _doubled(self: Any, latent: torch.Tensor, rotated: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    key, value = super(type(self), self).expand_kv(latent, rotated)
    return key, 2 * value


def test_flash_attention_and_indexers_are_refused(make_mla: Any) -> None:
    tiny = make_mla("deepseek_v3")
    with pytest.raises(TriptychError, match="flash_attn cannot be used"):
        tiny.stage(attention_backend="flash_attn", block_size=256)
    tiny.decoder.config.index_topk = 4
    with pytest.raises(TriptychError, match="tokens that an indexer chooses"):
        make_executor(tiny.decoder, "transformers")
