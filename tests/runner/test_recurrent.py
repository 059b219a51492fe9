"""Decoders with recurrent layers, of every kind that transformers has them in."""

from __future__ import annotations

import random

import pytest
import transformers

_COMMON = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
_LINEAR = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"] * 2,
}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 2, "mamba_d_state": 8, "mamba_chunk_size": 8}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
KINDS = {
    "bamba": ("Bamba", {"attn_layer_indices": [1, 3], **_MAMBA}),
    # both side by side in each layer
    "falcon_h1": ("FalconH1", {**_MAMBA, "head_dim": 16, "mamba_d_ssm": 64, "mamba_n_heads": 4}),
    "granite": (
        "GraniteMoeHybrid",
        {
            **_MAMBA,
            "layer_types": ["mamba", "attention"] * 2,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 32,
        },
    ),
    "lfm2_moe": ("Lfm2Moe", {**_EXPERTS, "layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1}),
    # a convolution for each of queries, keys and values
    "olmo_hybrid": ("OlmoHybrid", {**_LINEAR, "linear_num_key_heads": 4}),
    "qwen3_next": (
        "Qwen3Next",
        {**_LINEAR, **_EXPERTS, "head_dim": 16, "shared_expert_intermediate_size": 32},
    ),
}


@pytest.mark.parametrize("chunk", [10**6, 7])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_generate(make_rig, add_model, kind, chunk):
    name, options = KINDS[kind]
    config = getattr(transformers, f"{name}Config")(**_COMMON, **options)
    add_model(kind, lambda: getattr(transformers, f"{name}ForCausalLM")(config))
    rig = make_rig(kind)
    assert rig.runner.saved_states == 0
    prompts = [random.Random(n).choices(range(1, 290), k=n) for n in (1, 5, 17, 30)]
    assert rig.generate(prompts, 12, chunk) == [rig.expected(prompt, 12) for prompt in prompts]
