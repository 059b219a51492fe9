"""What cannot be fused is refused with a reason, and a wrong result never serves."""

from __future__ import annotations

import pytest
import torch
import transformers

from triptych.python_models.language_model.runner.fused import FusedDecoder, build, random_weights
from triptych.python_models.language_model.runner.fused import spec as specs

from .conftest import _COMMON, Decoder, make_decoder


@pytest.mark.parametrize(
    ("family", "rules", "reason"),
    [
        ("glm", specs.Rules(), "layer 0 differs"),
        ("llama", specs.Rules(interleaved=True), "layer 0 differs"),
        ("qwen3_vl", specs.Rules(mrope="chunked"), "layer 0 differs"),
        ("qwen2_5_vl", specs.Rules(mrope="interleaved"), "layer 0 differs"),
        ("gemma3", specs.Rules(), "layer 0 differs"),
        ("gemma2", specs.Rules(norm_offset=1.0), "layer 0 attends as"),
        ("qwen3_moe", specs.Rules(router="softmax", renormalise=False), "layer 0 differs"),
        ("glm4_moe", specs.Rules(router="softmax_bias", renormalise=True), "layer 1 differs"),
    ],
)
def test_a_wrong_rule_is_found(make_tiny, monkeypatch, family, rules, reason):
    tiny = make_tiny(family)
    monkeypatch.setattr(specs, "RULES", {tiny.decoder.config.model_type: rules})
    result = build(tiny.decoder)
    assert isinstance(result, str)
    assert result.startswith(reason)


@pytest.mark.parametrize(
    ("attribute", "value", "reason"),
    [("sliding_window", 4000, "window=4000"), ("scaling", 0.26, "scaling=0.26")],
)
def test_a_layer_that_attends_otherwise_is_found(make_tiny, monkeypatch, attribute, value, reason):
    tiny = make_tiny("gemma3")
    module = tiny.decoder.text_model.layers[2].self_attn
    original = specs.read_spec

    def read(*args):
        found = original(*args)
        # what the module does from now on was not in what was read
        setattr(module, attribute, value)
        return found

    monkeypatch.setattr("triptych.python_models.language_model.runner.fused.builder.read_spec", read)
    result = build(tiny.decoder)
    assert isinstance(result, str)
    assert result.startswith("layer 2 attends as")
    assert reason in result


def test_a_broken_weight_is_found_and_modules_serve_on(make_tiny, context):
    tiny = make_tiny("qwen3")
    ids, position_ids = tiny.prompt(12)
    fused = build(tiny.decoder, check=False)
    assert isinstance(fused, FusedDecoder)
    down = tiny.decoder.text_model.layers[3].mlp.down_proj
    down.weight = torch.nn.Parameter(down.weight * 1.2, requires_grad=False)
    from triptych.python_models.language_model.runner.fused.verify import difference

    assert str(difference(tiny.decoder, fused)).startswith("layer 3 differs by")
    del ids, position_ids


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ("GptOssConfig", "no fused layers for gpt_oss"),
        ("CohereConfig", "no fused layers for cohere"),
    ],
)
def test_families_without_fused_layers(config, reason):
    config = getattr(transformers, config)(**_COMMON)
    with torch.device("meta"):
        model = transformers.AutoModel.from_config(config)
        head = torch.nn.Linear(96, 303, bias=False)
    result = build(Decoder(model, head, config, 1))
    assert isinstance(result, str)
    assert reason in result


def test_frequencies_that_depend_on_lengths():
    options = {"rope_theta": 1e4, "factor": 2.0}
    factors = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "original_max_position_embeddings": 32}
    decoder = make_decoder("llama", rope_parameters={"rope_type": "longrope", **options, **factors})
    assert build(decoder) == "rope_type longrope"
    # these do not up to the longest request
    decoder = make_decoder("llama", rope_parameters={"rope_type": "dynamic", **options})
    assert isinstance(build(decoder), FusedDecoder)


class Adapted(torch.nn.Linear):
    """Computes something else than its weight says."""


@pytest.mark.parametrize("path", ["self_attn.k_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"])
def test_linears_that_are_more_than_a_weight(make_tiny, path):
    decoder = make_tiny("llama").decoder
    parent, _, name = path.rpartition(".")
    owner = decoder.text_model.layers[1].get_submodule(parent)
    linear = getattr(owner, name)
    setattr(owner, name, Adapted(linear.in_features, linear.out_features))
    assert str(build(decoder)).endswith(f".{name} is a Adapted")


def test_attention_that_is_not_causal(make_tiny):
    decoder = make_tiny("gemma3").decoder
    decoder.text_model.layers[0].self_attn.is_causal = False
    assert build(decoder) == "attention that is not causal"


def test_half_precision_agrees_within_its_rounding(make_tiny):
    for name in ("qwen2", "gemma3", "glm4_moe"):
        tiny = make_tiny(name)
        tiny.decoder.text_model.to(torch.bfloat16)
        tiny.decoder.lm_head.to(torch.bfloat16)
        result = build(tiny.decoder)
        assert isinstance(result, FusedDecoder), result
        assert result.dtype == torch.bfloat16


def test_random_weights():
    config = transformers.Qwen2Config(**_COMMON)
    fused = random_weights(config, "cpu", torch.bfloat16, check=True)
    assert len(fused.layers) == 4
    assert fused.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="gpt_oss"):
        random_weights(transformers.GptOssConfig(**_COMMON, num_local_experts=4), "cpu", torch.float32)
