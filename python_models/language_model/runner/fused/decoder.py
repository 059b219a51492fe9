"""The fused decoder: an executor that makes one call for one operation, over flat tensors [T, H]."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention

from .....kernels.linear import fits, linear
from .....kernels.moe import experts, route
from .....kernels.norm import rms_norm
from .....kernels.rope import rope_table
from ..context import AttentionContext, Rope
from ..executor import Deepstack, LayerShape
from ..recurrent import StateShape
from .shard import Alone, Collectives, Shard
from .spec import DecoderSpec, RopeSpec
from .weights import Layer, Linear, Mlp, Moe

FEW_ROWS = 64
"""Beyond so many rows no linear is a kernel of its own."""


class FusedDecoder:
    """An :class:`~..executor.Executor` of fused weights.

    Everything is asynchronous on a GPU and capturable in CUDA graphs. Ranks of a group call :meth:`forward` and
    :meth:`logits` together and get the same results.
    """

    def __init__(
        self,
        spec: DecoderSpec,
        table: torch.Tensor,
        layers: Sequence[Layer],
        norm: torch.Tensor,
        head: Linear,
        shard: Shard,
        collectives: Collectives | None = None,
    ) -> None:
        """Args: ``table`` [V, H], ``norm`` [H]: the same on all ranks; other weights are this rank's."""
        self._spec = spec
        self._table = table
        self._layers = tuple(layers)
        self._norm = norm
        self._head = head
        self._alone = shard.size == 1
        self._plain_residual = spec.residual_scale == 1
        # the residual is added by one rank, before the sum over all
        self._adds_residual = shard.rank == 0
        self._collectives = collectives or Alone()
        device = table.device
        self._ropes = {
            key: RopeSpec(rope.inv_freq.to(device), rope.axis.to(device), rope.scaling, rope.interleaved)
            for key, rope in spec.ropes.items()
        }
        # rounded as transformers rounds it
        self._embed_scale = torch.tensor(spec.embed_scale, device=device).to(table.dtype)
        self.device = device
        self.dtype = table.dtype
        self.layers = tuple(_shape(layer) for layer in self._layers)
        self.states: Mapping[int, StateShape] = {}

    @property
    def spec(self) -> DecoderSpec:
        """What it computes."""
        return self._spec

    def embed(self, ids: torch.Tensor, is_media: torch.Tensor) -> torch.Tensor:
        """See :class:`~..executor.Executor`."""
        # placeholder ids may lie outside the table; their rows are replaced anyway
        rows = F.embedding(ids.masked_fill(is_media, 0), self._table)
        return rows if self._spec.embed_scale == 1 else rows * self._embed_scale

    def ropes(self, position_ids: torch.Tensor) -> dict[str, Rope]:
        """Cosine and sine of each kind of layer for position_ids int64 [axes, T]."""
        return {
            key: Rope(*rope_table(position_ids, rope.inv_freq, rope.axis, rope.scaling), rope.interleaved)
            for key, rope in self._ropes.items()
        }

    def forward(
        self,
        embeddings: torch.Tensor,
        position_ids: torch.Tensor,
        context: AttentionContext,
        deepstack: Deepstack | None,
    ) -> torch.Tensor:
        """See :class:`~..executor.Executor`."""
        ropes = self.ropes(position_ids)
        x = self.enter(embeddings)
        rest: torch.Tensor | None = None
        deep = len(deepstack.rows) if deepstack is not None else 0
        for index in range(len(self._layers)):
            x, rest = self.layer(index, x, rest, ropes, context)
            if deepstack is not None and index < deep:
                x = x if rest is None else x + rest
                x.index_add_(0, deepstack.places, deepstack.rows[index].to(x.dtype))
                rest = None
        return self.leave(x, rest)

    def enter(self, embeddings: torch.Tensor) -> torch.Tensor:
        """What the first layer sees of embeddings [T, H]."""
        return embeddings if self._spec.input_scale == 1 else embeddings * self._spec.input_scale

    def leave(self, x: torch.Tensor, rest: torch.Tensor | None) -> torch.Tensor:
        """The final norm of ``x + rest``."""
        return self._normed(x, rest, self._norm)[0]

    def layer(
        self,
        index: int,
        x: torch.Tensor,
        rest: torch.Tensor | None,
        ropes: Mapping[str, Rope],
        context: AttentionContext,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """One layer on hidden states ``x + rest`` [T, H] -> its own, again in two parts of which the second may be
        None."""
        spec, layer = self._spec, self._layers[index]
        attention = layer.attention
        qkv, x = self._norm_linear(x, rest, layer.input_norm, attention.qkv)
        rope = None if attention.rope is None else ropes[attention.rope]
        query = context.rotate_and_store(index, qkv, attention.heads, rope, attention.head_norm)
        seen = context.attend_stored(index, query, attention.how).flatten(1)
        x, rest = self._add(x, seen, attention.o, layer.post_attention_norm)
        if isinstance(layer.mlp, Moe):
            normed, x = self._normed(x, rest, layer.mlp_norm)
            rest = self._collectives.all_reduce(self._moe(normed, layer.mlp))
            return x, self._scaled(rest, layer.post_mlp_norm)
        inner, x = self._norm_linear(x, rest, layer.mlp_norm, layer.mlp.gate_up, spec.activation)
        return self._add(x, inner, layer.mlp.down, layer.post_mlp_norm)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """See :class:`~..executor.Executor`."""
        spec = self._spec
        out = linear(hidden, self._head.weight, bias=self._head.bias)
        if not self._alone:
            out = self._collectives.all_gather(out)[:, : spec.vocab_size]
        if spec.logit_scale != 1:
            out = out * spec.logit_scale
        if spec.logit_softcap is not None:
            out = torch.tanh(out / spec.logit_softcap) * spec.logit_softcap
        return out

    def _normed(
        self, x: torch.Tensor, rest: torch.Tensor | None, weight: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The norm of ``x + rest``, and that sum."""
        if rest is None:
            return rms_norm(x, weight, self._spec.eps, offset=self._spec.norm_offset)
        return rms_norm(rest, weight, self._spec.eps, residual=x, offset=self._spec.norm_offset)

    def _norm_linear(
        self, x: torch.Tensor, rest: torch.Tensor | None, norm: torch.Tensor, into: Linear, gate: str | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Norm of ``x + rest`` through a linear, and that sum."""
        if rest is None:
            weights = norm, self._spec.eps, self._spec.norm_offset
            return linear(x, into.weight, bias=into.bias, norm=weights, gate=gate), x
        normed, x = self._normed(x, rest, norm)
        return linear(normed, into.weight, bias=into.bias, gate=gate), x

    def _add(
        self, x: torch.Tensor, inner: torch.Tensor, out: Linear, post_norm: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """``x`` plus a linear of ``inner``, in two parts of which the second may be None."""
        # where the linear is a kernel of its own the addition costs nothing in it; else it goes with the next norm,
        # one pass over the rows instead of two
        if post_norm is None and self._plain_residual and _is_kernel(inner, out.weight):
            residual = x if self._adds_residual else None
            x = linear(inner, out.weight, bias=out.bias, residual=residual)
            return (x if self._alone else self._collectives.all_reduce(x)), None
        added = linear(inner, out.weight, bias=out.bias)
        if not self._alone:
            added = self._collectives.all_reduce(added)
        return x, self._scaled(added, post_norm)

    def _scaled(self, added: torch.Tensor, post_norm: torch.Tensor | None) -> torch.Tensor:
        """What a sub-layer adds, after its own norm or factor where it has one."""
        if post_norm is not None:
            added = rms_norm(added, post_norm, self._spec.eps, offset=self._spec.norm_offset)[0]
        return added if self._spec.residual_scale == 1 else added * self._spec.residual_scale

    def _moe(self, normed: torch.Tensor, moe: Moe) -> torch.Tensor:
        """Routed and shared experts of this rank: a part of the sum over ranks."""
        spec = moe.spec
        scores = F.linear(normed.float(), moe.router) if spec.wide_router else linear(normed, moe.router)
        weights, chosen = route(
            scores,
            spec.top_k,
            renormalise=spec.renormalise,
            scoring=spec.scoring,
            bias=moe.correction,
            groups=spec.groups,
            scale=spec.scale,
        )
        out = experts(
            normed,
            moe.gate_up,
            moe.down,
            weights,
            chosen,
            activation=self._spec.activation,
            first_expert=moe.first_expert,
        )
        if moe.shared is None:
            return out
        if moe.shared_gate is None:
            return self._mlp(normed, moe.shared, out)
        return out + torch.sigmoid(F.linear(normed, moe.shared_gate)) * self._mlp(normed, moe.shared, None)

    def _mlp(self, normed: torch.Tensor, mlp: Mlp, residual: torch.Tensor | None) -> torch.Tensor:
        inner = linear(normed, mlp.gate_up.weight, bias=mlp.gate_up.bias, gate=self._spec.activation)
        return linear(inner, mlp.down.weight, bias=mlp.down.bias, residual=residual)


def _is_kernel(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether ``linear`` does everything in one kernel for this input."""
    return len(x) <= FEW_ROWS and fits(len(x), weight.shape[0], weight.shape[1], x.dtype, x.device)


def _shape(layer: Layer) -> LayerShape:
    attention = layer.attention
    kept = attention.heads[1], attention.head_dim
    return LayerShape(kept, kept, attention.how.window)
