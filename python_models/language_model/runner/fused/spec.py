"""What a decoder computes, read from transformers' text config and modules; weights are not looked at.

A decoder on the meta device is enough. `RULES` holds what neither configuration nor modules tell; everything else
(norms, biases, head counts, windows, frequencies, experts) is read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn


class UnfitError(Exception):
    """The decoder is none that the fused layers can compute; says why."""


@dataclass(frozen=True)
class Rules:
    """What the code of an architecture does and its configuration does not say.

    Attributes:
        interleaved: rotary pairs are (2i, 2i + 1).
        mrope: which axis turns which frequency: "chunked" (Qwen2-VL: t, h, w one after the other), "interleaved"
            (Qwen3-VL: t, h, w by turns, the rest t); None for one axis.
        norm_offset: added to the weights of RMS norms.
        softcap: attention scores are soft-capped by ``attn_logit_softcapping``.
        router: "softmax" over all experts; "softmax_bias" and "sigmoid_bias" choose experts by a corrected score and
            compute it in float32.
        renormalise: the chosen experts' weights are made to sum to 1; None reads ``norm_topk_prob``.
    """

    interleaved: bool = False
    mrope: Literal["chunked", "interleaved"] | None = None
    norm_offset: float = 0.0
    softcap: bool = False
    router: Literal["softmax", "softmax_bias", "sigmoid_bias"] | None = None
    renormalise: bool | None = None


_PLAIN = Rules()
_QWEN2_VL = Rules(mrope="chunked")
_QWEN3_VL_MOE = Rules(mrope="interleaved", router="softmax", renormalise=True)
_GLM = Rules(interleaved=True)
_GLM_V = Rules(interleaved=True, mrope="chunked")

RULES: Mapping[str, Rules] = {
    "llama": _PLAIN,
    "mistral": _PLAIN,
    "ministral": _PLAIN,
    "qwen2": _PLAIN,
    "qwen3": _PLAIN,
    "phi3": _PLAIN,
    "granite": _PLAIN,
    "smollm3": _PLAIN,
    "qwen2_vl_text": _QWEN2_VL,
    "qwen2_5_vl_text": _QWEN2_VL,
    "qwen2_5_omni_text": _QWEN2_VL,
    "paddleocr_vl_text": _QWEN2_VL,
    "qwen3_vl_text": Rules(mrope="interleaved"),
    "gemma2": Rules(norm_offset=1.0, softcap=True),
    "gemma3_text": Rules(norm_offset=1.0),
    "glm": _GLM,
    "glm4": _GLM,
    "glm4v_text": _GLM_V,
    "glm_ocr_text": _GLM_V,
    "ernie4_5": Rules(interleaved=True),
    "mixtral": Rules(router="softmax", renormalise=True),
    "qwen2_moe": Rules(router="softmax"),
    "qwen3_moe": Rules(router="softmax"),
    "qwen3_vl_moe_text": _QWEN3_VL_MOE,
    "qwen3_omni_moe_text": Rules(mrope="interleaved", router="softmax"),
    "glm4_moe": Rules(router="sigmoid_bias"),
    "glm4v_moe_text": Rules(mrope="chunked", router="sigmoid_bias"),
    "ernie4_5_moe": Rules(interleaved=True, router="softmax_bias", renormalise=True),
}

_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}

_NORM_NAMES: tuple[tuple[str, str, str | None, str | None], ...] = (
    ("input_layernorm", "post_attention_layernorm", None, None),
    ("input_layernorm", "pre_feedforward_layernorm", "post_attention_layernorm", "post_feedforward_layernorm"),
    ("input_layernorm", "post_attention_layernorm", "post_self_attn_layernorm", "post_mlp_layernorm"),
)
# the norms a layer has -> before attention, before the MLP, after attention, after the MLP
_NORMS = {frozenset(filter(None, names)): names for names in _NORM_NAMES}


@dataclass(frozen=True, eq=False)
class RopeSpec:
    """Rotary embedding of some layers.

    Attributes:
        inv_freq: float32 [R], the module's own.
        axis: int64 [R], the axis of position ids that turns each frequency.
        scaling: factor on cosine and sine.
        interleaved: see :class:`Rules`.
    """

    inv_freq: torch.Tensor
    axis: torch.Tensor
    scaling: float
    interleaved: bool


@dataclass(frozen=True)
class AttentionSpec:
    """Attention of one layer.

    Attributes:
        qkv: names of the projections, three or one.
        heads, kv_heads, head_dim: of the whole layer.
        qkv_bias, o_bias, head_norm, sinks: whether there are such weights.
        scaling, window, softcap: see :class:`~..context.How`.
        rope: key into :attr:`DecoderSpec.ropes`; None in a layer without positions.
    """

    qkv: tuple[str, ...]
    heads: int
    kv_heads: int
    head_dim: int
    qkv_bias: bool
    o_bias: bool
    head_norm: bool
    sinks: bool
    scaling: float
    window: int | None
    softcap: float | None
    rope: str | None


@dataclass(frozen=True)
class MlpSpec:
    """A gated MLP: names of the gate and up projections (two or one), biases, inner width."""

    path: str
    gate_up: tuple[str, ...]
    gate_up_bias: bool
    down_bias: bool
    width: int


@dataclass(frozen=True)
class MoeSpec:
    """Routed experts beside shared ones.

    Attributes:
        experts, width: number and inner width of the routed experts.
        top_k, renormalise, scoring, scale, groups: see ``kernels.moe.route``.
        wide_router: the router computes in float32.
        correction: name of the bias that is added to scores when experts are chosen.
        shared: the shared experts, one MLP.
        shared_gate: name of the weight whose sigmoid scales the shared experts.
    """

    path: str
    experts: int
    width: int
    top_k: int
    renormalise: bool
    scoring: Literal["softmax", "sigmoid"]
    scale: float
    groups: tuple[int, int]
    wide_router: bool
    correction: str | None
    shared: MlpSpec | None
    shared_gate: str | None


@dataclass(frozen=True)
class LayerSpec:
    """One layer. Norms are names in it; ``post_*`` norms come before the residual addition, where there are any."""

    path: str
    attention: AttentionSpec
    mlp: MlpSpec | MoeSpec
    input_norm: str
    mlp_norm: str
    post_attention_norm: str | None
    post_mlp_norm: str | None


@dataclass(frozen=True)
class DecoderSpec:
    """A whole decoder.

    Attributes:
        activation: of the MLPs, as ``kernels.activation.gated`` names it.
        eps, norm_offset: of every RMS norm.
        embed_scale: factor on rows of the token table.
        input_scale: factor on all embeddings, media included (Granite).
        residual_scale: factor on what a sub-layer adds (Granite).
        logit_scale, logit_softcap: what becomes of the head's output.
        tied: the head is the token table.
        head_bias: the head has a bias.
    """

    layers: tuple[LayerSpec, ...]
    ropes: Mapping[str, RopeSpec]
    activation: str
    eps: float
    norm_offset: float
    embed_scale: float
    input_scale: float
    residual_scale: float
    logit_scale: float
    logit_softcap: float | None
    vocab_size: int
    tied: bool
    head_bias: bool


def read_spec(text_model: nn.Module, lm_head: nn.Module, config: Any, num_axes: int) -> DecoderSpec:
    """Describe a decoder of transformers.

    Raises:
        UnfitError: with the reason, when the fused layers cannot compute it.
    """
    kind = str(config.model_type)
    if kind not in RULES:
        raise UnfitError(f"there are no fused layers for {kind}")
    rules = RULES[kind]
    model: Any = text_model
    if not isinstance(lm_head, nn.Linear):
        raise UnfitError(f"its head is a {type(lm_head).__name__}")
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    if activation not in _ACTIVATIONS:
        raise UnfitError(f"activation {activation}")
    ropes = _ropes(model.rotary_emb, config, rules, num_axes)
    modules = list(model.layers)[: int(config.num_hidden_layers)]
    layers = tuple(_layer(index, module, config, rules, ropes) for index, module in enumerate(modules))
    table = model.embed_tokens
    return DecoderSpec(
        layers=layers,
        ropes=ropes,
        activation=_ACTIVATIONS[activation],
        eps=_eps(model.norm),
        norm_offset=rules.norm_offset,
        embed_scale=float(getattr(table, "scalar_embed_scale", 1.0)),
        input_scale=float(getattr(config, "embedding_multiplier", 1.0)),
        residual_scale=float(getattr(config, "residual_multiplier", 1.0)),
        logit_scale=1.0 / float(getattr(config, "logits_scaling", 1.0)),
        logit_softcap=getattr(config, "final_logit_softcapping", None),
        vocab_size=lm_head.out_features,
        tied=lm_head.weight is table.weight,
        head_bias=lm_head.bias is not None,
    )


def _ropes(rotary: Any, config: Any, rules: Rules, num_axes: int) -> dict[str, RopeSpec]:
    """One for each type of layer that has its own frequencies, else one under ""."""
    kinds = rotary.rope_type if isinstance(rotary.rope_type, dict) else {"": rotary.rope_type}
    if next(rotary.buffers()).is_meta:
        # frequencies are computed by the constructor, they are no weights
        with torch.device("cpu"):
            rotary = type(rotary)(config)
    found = {}
    for key, kind in kinds.items():
        # the other one that depends on lengths, dynamic, changes nothing up to the longest request
        if kind == "longrope":
            raise UnfitError(f"rope_type {kind}")
        prefix = f"{key}_" if key else ""
        inv_freq = getattr(rotary, f"{prefix}inv_freq").detach().float()
        scaling = getattr(rotary, f"{prefix}attention_scaling")
        axis = _axes(config, rules, num_axes, inv_freq.shape[0])
        found[key] = RopeSpec(inv_freq, axis, float(scaling), rules.interleaved)
    return found


def _axes(config: Any, rules: Rules, num_axes: int, count: int) -> torch.Tensor:
    axis = torch.zeros(count, dtype=torch.int64)
    if num_axes == 1 or rules.mrope is None:
        return axis
    # the default is the one of Glm4vTextRotaryEmbedding and its like; a wrong one is found when the layers are compared
    sections: Sequence[int] = config.rope_parameters.get("mrope_section") or ()
    if len(sections) < 3 or sum(sections) != count:
        raise UnfitError(f"mrope_section {list(sections)} for {count} frequencies")
    if rules.mrope == "interleaved":
        for number in (1, 2):
            axis[number : sections[number] * 3 : 3] = number
        return axis
    return torch.cat([torch.full((n,), i % 3, dtype=torch.int64) for i, n in enumerate(sections)])


def _layer(index: int, module: Any, config: Any, rules: Rules, ropes: Mapping[str, RopeSpec]) -> LayerSpec:
    names = frozenset(name for name, _ in module.named_children() if name.endswith("norm"))
    if names not in _NORMS:
        raise UnfitError(f"layers with {', '.join(sorted(names))}")
    norms = _NORMS[names]
    path = f"layers.{index}"
    mlp: MlpSpec | MoeSpec
    if hasattr(module.mlp, "experts"):
        mlp = _moe(f"{path}.mlp", module.mlp, config, rules)
    else:
        mlp = _mlp(f"{path}.mlp", module.mlp)
    return LayerSpec(path, _attention(index, module.self_attn, config, rules, ropes), mlp, *norms)


def _attention(index: int, module: Any, config: Any, rules: Rules, ropes: Mapping[str, RopeSpec]) -> AttentionSpec:
    width = int(module.head_dim)
    qkv = ("qkv_proj",) if hasattr(module, "qkv_proj") else ("q_proj", "k_proj", "v_proj")
    *projections, out = (_linear(module, name) for name in (*qkv, "o_proj"))
    heads = out.in_features // width
    kv_heads = (sum(p.out_features for p in projections) // width - heads) // 2
    if sum(p.out_features for p in projections) != (heads + 2 * kv_heads) * width:
        raise UnfitError("keys and values of different widths")
    if not getattr(module, "is_causal", True):
        raise UnfitError("attention that is not causal")
    head_norm = hasattr(module, "q_norm") and hasattr(module, "k_norm")
    if head_norm and {tuple(n.weight.shape) for n in (module.q_norm, module.k_norm)} != {(width,)}:
        raise UnfitError("query and key norms that are not over heads")
    layer_type = getattr(module, "layer_type", None)
    rope = layer_type if layer_type in ropes else ""
    if rope not in ropes:
        raise UnfitError(f"layers of type {layer_type} without rotary embedding")
    return AttentionSpec(
        qkv=qkv,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=width,
        qkv_bias=projections[0].bias is not None,
        o_bias=out.bias is not None,
        head_norm=head_norm,
        sinks=getattr(module, "sinks", None) is not None,
        scaling=float(module.scaling),
        window=_window(index, module, config),
        softcap=config.attn_logit_softcapping if rules.softcap else None,
        rope=rope if getattr(module, "use_rope", True) else None,
    )


def _window(index: int, module: Any, config: Any) -> int | None:
    if hasattr(module, "sliding_window"):
        window = module.sliding_window
    else:
        kinds = getattr(config, "layer_types", None)
        sliding = kinds is None or kinds[index] == "sliding_attention"
        window = getattr(config, "sliding_window", None) if sliding else None
    # some configurations say 0 for none
    return window or None


def _mlp(path: str, module: Any) -> MlpSpec:
    names = ("gate_up_proj",) if hasattr(module, "gate_up_proj") else ("gate_proj", "up_proj")
    *first, down = (_linear(module, name) for name in (*names, "down_proj"))
    return MlpSpec(
        path=path,
        gate_up=names,
        gate_up_bias=first[0].bias is not None,
        down_bias=down.bias is not None,
        width=down.in_features,
    )


def _moe(path: str, module: Any, config: Any, rules: Rules) -> MoeSpec:
    experts = module.experts
    unknown = {n for n, _ in experts.named_parameters()} ^ {"gate_up_proj", "down_proj"}
    if rules.router is None or unknown or not hasattr(module, "gate"):
        raise UnfitError(f"a {type(module).__name__}")
    count, double, hidden = experts.gate_up_proj.shape
    if tuple(experts.down_proj.shape) != (count, hidden, double // 2) or hidden != config.hidden_size:
        raise UnfitError(f"experts of shapes {tuple(experts.gate_up_proj.shape)}, {tuple(experts.down_proj.shape)}")
    correction = next(
        (
            f"{path}.gate.{name}"
            for name in ("e_score_correction_bias", "moe_statics.e_score_correction_bias")
            if _has(module.gate, name)
        ),
        None,
    )
    if (correction is not None) != (rules.router != "softmax"):
        raise UnfitError(f"a {type(module.gate).__name__}")
    shared_name = next((n for n in ("shared_experts", "shared_expert") if getattr(module, n, None) is not None), None)
    sigmoid = rules.router == "sigmoid_bias"
    return MoeSpec(
        path=path,
        experts=count,
        width=double // 2,
        top_k=int(config.num_experts_per_tok),
        renormalise=bool(config.norm_topk_prob) if rules.renormalise is None else rules.renormalise,
        scoring="sigmoid" if sigmoid else "softmax",
        scale=float(config.routed_scaling_factor) if sigmoid else 1.0,
        groups=(int(config.n_group), int(config.topk_group)) if sigmoid else (1, 1),
        wide_router=rules.router != "softmax",
        correction=correction,
        shared=None if shared_name is None else _mlp(f"{path}.{shared_name}", getattr(module, shared_name)),
        shared_gate=f"{path}.shared_expert_gate.weight" if hasattr(module, "shared_expert_gate") else None,
    )


def _linear(module: nn.Module, name: str) -> nn.Linear:
    """A plain linear layer: no quantised one, none with an adapter."""
    found = getattr(module, name, None)
    if type(found) is not nn.Linear:
        raise UnfitError(f"{type(module).__name__}.{name} is a {type(found).__name__}")
    return found


def _has(module: nn.Module, path: str) -> bool:
    parent, _, leaf = path.rpartition(".")
    try:
        return hasattr(module.get_submodule(parent), leaf)
    except AttributeError:
        return False


def _eps(norm: Any) -> float:
    eps = getattr(norm, "variance_epsilon", None)
    return float(norm.eps if eps is None else eps)
