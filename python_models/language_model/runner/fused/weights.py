"""Weights of fused layers: queries, keys and values in one matrix, gate and up in one, each rank its part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ....families.base import WeightSource
from ..context import HeadNorm, How
from .shard import Shard
from .source import ModuleSource
from .spec import AttentionSpec, DecoderSpec, LayerSpec, MlpSpec, MoeSpec, UnfitError


@dataclass(frozen=True, eq=False, slots=True)
class Linear:
    """weight [N, K] and bias [N] of this rank."""

    weight: torch.Tensor
    bias: torch.Tensor | None = None


@dataclass(frozen=True, eq=False, slots=True)
class Attention:
    """qkv [(H + 2 Hk) * D, hidden], o [hidden, H * D]; heads = (H, Hk) of this rank."""

    qkv: Linear
    o: Linear
    heads: tuple[int, int]
    head_dim: int
    head_norm: HeadNorm | None
    how: How
    rope: str | None


@dataclass(frozen=True, eq=False, slots=True)
class Mlp:
    """gate_up [2 F, hidden], gate rows first; down [hidden, F]."""

    gate_up: Linear
    down: Linear


@dataclass(frozen=True, eq=False, slots=True)
class Moe:
    """Experts gate_up [E, 2 F, hidden] and down [E, hidden, F] of this rank, the first of them number first_expert.

    ``router`` [all experts, hidden] is float32 where the family routes in float32.
    """

    spec: MoeSpec
    router: torch.Tensor
    correction: torch.Tensor | None
    gate_up: torch.Tensor
    down: torch.Tensor
    first_expert: int
    shared: Mlp | None
    shared_gate: torch.Tensor | None


@dataclass(frozen=True, eq=False, slots=True)
class Layer:
    """One decoder layer."""

    attention: Attention
    mlp: Mlp | Moe
    input_norm: torch.Tensor
    mlp_norm: torch.Tensor
    post_attention_norm: torch.Tensor | None
    post_mlp_norm: torch.Tensor | None


class Fuser:
    """Takes weights from a source, layer by layer.

    Whole modules keep working afterwards: their weights become views of the fused ones, so nothing is held twice and
    at most one layer's copy exists on the way.
    """

    def __init__(self, spec: DecoderSpec, source: WeightSource, shard: Shard) -> None:
        self._spec = spec
        self._source = source
        self._shard = shard

    def layer(self, spec: LayerSpec) -> Layer:
        """The weights of one layer."""
        mlp = self._moe(spec.mlp) if isinstance(spec.mlp, MoeSpec) else self._mlp(spec.mlp)
        return Layer(
            attention=self._attention(f"{spec.path}.self_attn", spec.attention),
            mlp=mlp,
            input_norm=self._norm(spec, spec.input_norm),
            mlp_norm=self._norm(spec, spec.mlp_norm),
            post_attention_norm=self._norm(spec, spec.post_attention_norm) if spec.post_attention_norm else None,
            post_mlp_norm=self._norm(spec, spec.post_mlp_norm) if spec.post_mlp_norm else None,
        )

    def whole(self, name: str) -> torch.Tensor:
        """A weight that every rank has."""
        return self._source.get(name)

    def head(self, table: torch.Tensor) -> Linear:
        """Rows of the vocabulary that this rank has, filled up with zeros to the size of the largest part.

        A tied head is a view of ``table``, the token table.
        """
        spec, shard = self._spec, self._shard
        start, stop, part = shard.vocabulary(spec.vocab_size)
        span: tuple[int | None, ...] = (None, None, None) if shard.size == 1 else (0, start, stop)
        weight = table[start:stop] if spec.tied else self._source.get("lm_head.weight", *span)
        bias = self._source.get("lm_head.bias", *span) if spec.head_bias else None
        return Linear(_padded(weight, part), None if bias is None else _padded(bias, part))

    def _norm(self, spec: LayerSpec, name: str) -> torch.Tensor:
        return self._source.get(f"{spec.path}.{name}.weight")

    def _attention(self, path: str, spec: AttentionSpec) -> Attention:
        shard, width = self._shard, spec.head_dim
        if reason := shard.unfit(spec.heads, spec.kv_heads):
            raise UnfitError(reason)
        queries, keys = shard.even(spec.heads), shard.kv_heads(spec.kv_heads)
        heads = queries[1] - queries[0], keys[1] - keys[0]
        sizes = (spec.heads, spec.kv_heads, spec.kv_heads)
        wanted = [(start * width, stop * width) for start, stop in (queries, keys, keys)]
        if len(spec.qkv) == 1:
            # parts of one matrix lie one after the other
            offsets = (0, sizes[0] * width, (sizes[0] + sizes[1]) * width)
            wanted = [(o + start, o + stop) for o, (start, stop) in zip(offsets, wanted, strict=True)]
        names = [f"{path}.{name}" for name in spec.qkv]
        norm = None
        if spec.head_norm:
            query, key = (self._source.get(f"{path}.{name}.weight") for name in ("q_norm", "k_norm"))
            norm = HeadNorm(query, key, self._spec.eps, self._spec.norm_offset)
        sinks = None
        if spec.sinks:
            sinks = self._source.get(f"{path}.sinks", 0, *queries)
        return Attention(
            qkv=self._columns(names, wanted, spec.qkv_bias),
            o=self._rows(f"{path}.o_proj", (queries[0] * width, queries[1] * width), spec.o_bias),
            heads=heads,
            head_dim=width,
            head_norm=norm,
            how=How(spec.scaling, spec.window, spec.softcap, sinks),
            rope=spec.rope,
        )

    def _mlp(self, spec: MlpSpec) -> Mlp:
        if spec.width % self._shard.size:
            raise UnfitError(f"an MLP of width {spec.width} cannot be split over {self._shard.size} ranks")
        start, stop = self._shard.even(spec.width)
        second = spec.width if len(spec.gate_up) == 1 else 0
        names = [f"{spec.path}.{name}" for name in spec.gate_up]
        return Mlp(
            gate_up=self._columns(names, [(start, stop), (second + start, second + stop)], spec.gate_up_bias),
            down=self._rows(f"{spec.path}.down_proj", (start, stop), spec.down_bias),
        )

    def _moe(self, spec: MoeSpec) -> Moe:
        shard, get = self._shard, self._source.get
        names = f"{spec.path}.experts.gate_up_proj", f"{spec.path}.experts.down_proj"
        first = 0
        if shard.size == 1:
            gate_up, down = (get(name) for name in names)
        elif shard.expert_parallel:
            if spec.experts % shard.size:
                raise UnfitError(f"{spec.experts} experts cannot be split over {shard.size} ranks")
            first, stop = shard.even(spec.experts)
            gate_up, down = (get(name, 0, first, stop).clone() for name in names)
        else:
            if spec.width % shard.size:
                raise UnfitError(f"experts of width {spec.width} cannot be split over {shard.size} ranks")
            start, stop = shard.even(spec.width)
            halves = [get(names[0], 1, o + start, o + stop) for o in (0, spec.width)]
            gate_up = torch.cat(halves, dim=1)
            down = get(names[1], 2, start, stop).contiguous()
        router = get(f"{spec.path}.gate.weight")
        correction = get(spec.correction).reshape(-1).float() if spec.correction else None
        return Moe(
            spec=spec,
            router=router.float() if spec.wide_router else router,
            correction=correction,
            gate_up=gate_up.contiguous(),
            down=down.contiguous(),
            first_expert=first,
            shared=self._mlp(spec.shared) if spec.shared else None,
            shared_gate=get(spec.shared_gate) if spec.shared_gate else None,
        )

    def _columns(self, names: Sequence[str], wanted: Sequence[tuple[int, int]], bias: bool) -> Linear:
        """Output rows [start, stop) of several projections, or several ranges of one, in one matrix."""
        return Linear(
            self._stacked([f"{name}.weight" for name in names], wanted),
            self._stacked([f"{name}.bias" for name in names], wanted) if bias else None,
        )

    def _stacked(self, names: Sequence[str], wanted: Sequence[tuple[int, int]]) -> torch.Tensor:
        source, alone = self._source, self._shard.size == 1
        if len(names) == 1:
            # the checkpoint's own order is the one that is needed
            whole = names[0]
            return source.get(whole) if alone else torch.cat([source.get(whole, 0, *span) for span in wanted])
        stacked = torch.cat([source.get(name, 0, *span) for name, span in zip(names, wanted, strict=True)])
        if alone and isinstance(source, ModuleSource):
            parts = torch.split(stacked, [stop - start for start, stop in wanted])
            for name, part in zip(names, parts, strict=True):
                source.share(name, part)
        return stacked

    def _rows(self, name: str, span: tuple[int, int], bias: bool) -> Linear:
        """Input columns [start, stop); the bias is added once, by the first rank."""
        if self._shard.size == 1:
            weight = self._source.get(f"{name}.weight")
        else:
            # a copy, so that the whole weight can go
            weight = self._source.get(f"{name}.weight", 1, *span).contiguous()
        mine = bias and self._shard.rank == 0
        return Linear(weight, self._source.get(f"{name}.bias") if mine else None)


def _padded(tensor: torch.Tensor, rows: int) -> torch.Tensor:
    """A copy of ``tensor`` [n, ...] with zeros up to ``rows`` rows; a view where it is that long already."""
    if len(tensor) == rows:
        return tensor
    padded = tensor.new_zeros(rows, *tensor.shape[1:])
    padded[: len(tensor)] = tensor
    return padded
