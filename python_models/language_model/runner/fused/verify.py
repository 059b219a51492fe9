"""Compares a fused decoder with the modules it was made of, on their own weights, before it serves anything.

Every layer gets what transformers' layer got, so that rounding does not add up over layers and a difference names
its layer. The check costs two short steps.
"""

from __future__ import annotations

from typing import Any

import torch

from .....kernels.rope import rotate_and_store, store
from ..context import HeadNorm, How, Rope
from ..executor import DecoderModel, ModulesExecutor
from .decoder import FEW_ROWS, FusedDecoder

_PREFILL = FEW_ROWS + 9
"""Tokens of the first step: more than go the way of few rows, which the second step, of one token, goes."""
# of the change that a layer makes: what rounding may explain
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 2e-2}
# tokens that must agree: in low precision a router may choose otherwise where two experts are nearly equal
_ENOUGH = {torch.float32: 1.0, torch.bfloat16: 0.9, torch.float16: 0.9}


class DenseContext:
    """The attention context of a single request whose keys and values lie in one block; plain, for checks and tests.

    :meth:`place` comes before each step.
    """

    def __init__(self, capacity: int) -> None:
        """Args: ``capacity``: tokens."""
        self.hows: dict[int, How] = {}
        self.cross = None
        self._capacity = capacity
        self._pages: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._start = 0
        self._stop = 0

    def place(self, start: int, count: int) -> None:
        """The next step's tokens are number ``start`` and so on."""
        self._start, self._stop = start, start + count

    def attend(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, how: How) -> torch.Tensor:
        """See :class:`~..context.AttentionContext`."""
        keys, values = self._of(layer, key.shape[0], key.shape[2], value.shape[2], key)
        store(key.transpose(0, 1), value.transpose(0, 1), keys, values, self._slots(key))
        return self.attend_stored(layer, query.transpose(0, 1), how)

    def rotate_and_store(
        self, layer: int, qkv: torch.Tensor, heads: tuple[int, int], rope: Rope | None, norm: HeadNorm | None
    ) -> torch.Tensor:
        """See :class:`~..context.AttentionContext`."""
        width = qkv.shape[1] // (heads[0] + 2 * heads[1])
        keys, values = self._of(layer, heads[1], width, width, qkv)
        norms: dict[str, Any] = {}
        if norm is not None:
            norms = {"query_norm": norm.query, "key_norm": norm.key, "eps": norm.eps, "norm_offset": norm.offset}
        cos, sin = (None, None) if rope is None else (rope.cos, rope.sin)
        return rotate_and_store(
            qkv,
            cos,
            sin,
            keys,
            values,
            self._slots(qkv),
            num_heads=heads[0],
            num_kv_heads=heads[1],
            interleaved=rope is not None and rope.interleaved,
            **norms,
        )

    def attend_stored(self, layer: int, query: torch.Tensor, how: How) -> torch.Tensor:
        """See :class:`~..context.AttentionContext`; everything in float32."""
        self.hows[layer] = how
        keys, values = (pages[0, :, : self._stop].float() for pages in self._pages[layer])
        groups = query.shape[1] // keys.shape[0]
        keys, values = keys.repeat_interleave(groups, 0), values.repeat_interleave(groups, 0)
        scaling = query.shape[-1] ** -0.5 if how.scaling is None else how.scaling
        scores = torch.einsum("thd,hsd->hts", query.float(), keys) * scaling
        if how.softcap is not None:
            scores = torch.tanh(scores / how.softcap) * how.softcap
        places = torch.arange(self._stop, device=query.device)
        ages = places[self._start :, None] - places
        hidden = ages < 0
        if how.window is not None:
            hidden |= ages >= how.window
        scores = scores.masked_fill(hidden, -torch.inf)
        if how.sinks is not None:
            sinks = how.sinks.float()[:, None, None].expand(-1, scores.shape[1], 1)
            weights = torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]
        else:
            weights = scores.softmax(-1)
        return torch.einsum("hts,hsd->thd", weights, values).to(query.dtype)

    def _of(self, layer: int, heads: int, width: int, value_width: int, like: torch.Tensor) -> Any:
        if layer not in self._pages:
            self._pages[layer] = (
                like.new_zeros(1, heads, self._capacity, width),
                like.new_zeros(1, heads, self._capacity, value_width),
            )
        return self._pages[layer]

    def _slots(self, like: torch.Tensor) -> torch.Tensor:
        return torch.arange(self._start, self._stop, device=like.device)


@torch.inference_mode()
def difference(decoder: DecoderModel, fused: FusedDecoder) -> str | None:
    """Where the fused decoder departs from transformers' modules; None when they agree."""
    modules = ModulesExecutor(decoder)
    device = next(decoder.text_model.parameters()).device
    theirs, mine = DenseContext(_PREFILL + 1), DenseContext(_PREFILL + 1)
    for start, count in ((0, _PREFILL), (_PREFILL, 1)):
        places = torch.arange(start, start + count, device=device)
        ids = (places * 7919 + 13) % fused.spec.vocab_size
        # each axis goes its own way
        position_ids = torch.stack([places * (axis + 1) + axis for axis in range(decoder.num_axes)])
        is_media = places % 5 == 2
        embeddings = modules.embed(ids, is_media)
        if reason := _differs(fused.embed(ids, is_media)[~is_media], embeddings[~is_media], None):
            return f"embeddings differ by {reason}"
        for context in (theirs, mine):
            context.place(start, count)
        record = _Record(decoder.text_model)
        hidden = modules.forward(embeddings, position_ids, theirs, None)
        record.close()
        if reason := _compare(fused, record, embeddings, position_ids, hidden, modules, (theirs, mine)):
            return f"{reason} ({count} tokens)"
    return None


def _compare(
    fused: FusedDecoder,
    record: _Record,
    embeddings: torch.Tensor,
    position_ids: torch.Tensor,
    hidden: torch.Tensor,
    modules: ModulesExecutor,
    contexts: tuple[DenseContext, DenseContext],
) -> str | None:
    """One step; what it differs in."""
    theirs, mine = contexts
    if len(record.inputs) != len(fused.layers):
        return f"{len(record.inputs)} layers instead of {len(fused.layers)}"
    if reason := _differs(fused.enter(embeddings), record.inputs[0], None):
        return f"the first layer's input differs by {reason}"
    ropes = fused.ropes(position_ids)
    for index, (before, after) in enumerate(zip(record.inputs, record.outputs, strict=True)):
        x, rest = fused.layer(index, before, None, ropes, mine)
        first, second = theirs.hows[index], mine.hows[index]
        width = fused.layers[index].key[1]
        if _comparable(first, width) != _comparable(second, width):
            return f"layer {index} attends as {second} instead of {first}"
        if reason := _differs(x if rest is None else x + rest, after, before):
            return f"layer {index} differs by {reason}"
    if reason := _differs(fused.leave(record.outputs[-1], None), hidden, None):
        return f"the final norm differs by {reason}"
    spec = fused.spec
    logits = modules.logits(hidden).float()
    plain = spec.logit_scale == 1 and spec.logit_softcap is None
    if plain and (reason := _differs(fused.logits(hidden).float(), logits, None)):
        return f"logits differ by {reason}"
    return None


def _differs(mine: torch.Tensor, theirs: torch.Tensor, before: torch.Tensor | None) -> str | None:
    """How far [T, ...] lie apart, in parts of the change from ``before``; None when rounding explains it."""
    dtype = theirs.dtype
    mine, theirs = mine.float(), theirs.float()
    change = theirs if before is None else theirs - before.float()
    error = (mine - theirs).norm(dim=-1)
    allowed = _TOLERANCE[dtype] * change.norm(dim=-1) + 2 * torch.finfo(dtype).eps * theirs.norm(dim=-1)
    agreeing = (error <= allowed).float().mean()
    if agreeing >= _ENOUGH[dtype]:
        return None
    return f"{float((error / change.norm(dim=-1).clamp_min(1e-30)).max()):.2g} of its size"


def _comparable(how: How, width: int) -> tuple[Any, ...]:
    scaling = width**-0.5 if how.scaling is None else how.scaling
    return round(scaling, 6), how.window, how.softcap, how.sinks is not None


class _Record:
    """What transformers' layers take and give, [T, H] each."""

    def __init__(self, text_model: Any) -> None:
        self.inputs: list[torch.Tensor] = []
        self.outputs: list[torch.Tensor] = []
        self._hooks = [
            hook
            for layer in text_model.layers
            for hook in (
                layer.register_forward_pre_hook(self._before, with_kwargs=True),
                layer.register_forward_hook(self._after),
            )
        ]

    def close(self) -> None:
        """Take the hooks away."""
        for hook in self._hooks:
            hook.remove()

    def _before(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.inputs.append((args[0] if args else kwargs["hidden_states"])[0])

    def _after(self, _: Any, __: Any, output: Any) -> None:
        self.outputs.append((output[0] if isinstance(output, tuple) else output)[0])
