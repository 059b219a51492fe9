"""Runs one flat batch of all scheduled tokens through the decoder."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from ...contract.errors import ErrorKind, TriptychError
from .attention import ATTENTION, KVCache, PagedStep, attention, register
from .context import How
from .step import KVGroup, Slice


class DecoderModel(Protocol):
    """What the runner needs of a decoder; see ``families.base.Decoder`` for the meaning of the attributes."""

    @property
    def text_model(self) -> nn.Module:
        """Decoder stack of transformers."""

    @property
    def lm_head(self) -> nn.Module:
        """[N, H] -> logits [N, V]."""

    @property
    def embed(self) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        """Token ids int64 [T], is_media bool [T] -> [T, H]."""

    @property
    def config(self) -> Any:
        """Text config of transformers."""

    @property
    def num_axes(self) -> int:
        """Axes of position ids."""


class DecoderRunner:
    """A :class:`~.step.Runner` around transformers' own decoder code, with the KV cache in pages.

    The constructor runs two tokens through the decoder to learn each layer's key and value shapes, then allocates the
    pages. It raises UNSUPPORTED for a decoder that keeps state elsewhere than in keys and values.
    """

    def __init__(self, decoder: DecoderModel, block_size: int, device: str, num_slots: int = 256) -> None:
        self._decoder = decoder
        self._block_size = block_size
        self._device = device
        _refuse_unsupported(decoder)
        register()
        model: Any = decoder.text_model
        model.set_attn_implementation(ATTENTION)
        probe = _Probe()
        with torch.inference_mode():
            logits = decoder.lm_head(self._forward([_dummy(decoder.num_axes)], probe)[0, -1:])
        self._vocab_size = int(logits.shape[-1])
        expected = int(decoder.config.num_hidden_layers)
        if len(probe.shapes) != expected or probe.calls != expected:
            raise TriptychError(
                ErrorKind.UNSUPPORTED,
                f"{type(model).__name__} has {expected} layers, but {len(probe.shapes)} of them keep keys and values "
                "that can be paged; decoders with other state are not supported",
                "model",
                "language_model",
            )
        self._shapes = probe.shapes
        self._dtype = probe.dtype
        self._cache: KVCache | None = None
        self._last_tokens = torch.zeros(num_slots, dtype=torch.int64, device=device)

    @property
    def vocab_size(self) -> int:
        """Width of the logits."""
        return self._vocab_size

    @property
    def kv_groups(self) -> tuple[KVGroup, ...]:
        """See :class:`~.step.Runner`."""
        return (KVGroup(tuple(self._shapes)),)

    @property
    def last_tokens(self) -> torch.Tensor:
        """See :class:`~.step.Runner`."""
        return self._last_tokens

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one token takes in the KV cache."""
        elements = sum(heads * width for pair in self._shapes.values() for heads, width in pair)
        return elements * self._dtype.itemsize

    def allocate(self, num_blocks: int) -> None:
        """Make the KV cache; needed before `forward`.

        Raises:
            TriptychError: there is not that much memory.
        """
        try:
            self._cache = KVCache(self._shapes, num_blocks, self._block_size, self._dtype, self._device)
        except (RuntimeError, MemoryError) as error:
            tokens = num_blocks * self._block_size
            raise TriptychError(
                ErrorKind.STAGE_FAILED,
                f"no memory for a KV cache of {tokens} tokens ({tokens * self.bytes_per_token / 2**20:.0f} MiB): "
                f"lower kv_cache_tokens or mem_fraction_static ({error})",
                "settings.kv_cache_tokens",
                "language_model",
            ) from error

    def free(self) -> None:
        """Give the KV cache's memory back; `allocate` makes a new one."""
        self._cache = None
        if torch.device(self._device).type == "cuda":
            torch.cuda.empty_cache()

    def forward(self, slices: Sequence[Slice]) -> torch.Tensor:
        """See :class:`~.step.Runner`."""
        if self._cache is None:
            raise RuntimeError("allocate() comes before forward()")
        # single tokens first: they attend together
        order = sorted(range(len(slices)), key=lambda i: len(slices[i]) > 1)
        ordered = [slices[i] for i in order]
        hidden = self._forward(ordered, PagedStep(self._cache, ordered))
        ends = list(itertools.accumulate(len(part) for part in ordered))
        end_of = dict(zip(order, ends, strict=True))
        wanted = [end_of[i] - k for i, part in enumerate(slices) for k in range(part.num_logits, 0, -1)]
        if not wanted:
            return torch.empty(0, self._vocab_size, device=self._device)
        logits: torch.Tensor = self._decoder.lm_head(hidden[0, torch.tensor(wanted, device=self._device)])
        return logits

    def scrub(self, group: int, blocks: Sequence[int]) -> None:
        """See :class:`~.step.Runner`."""
        if self._cache is not None and blocks:
            self._cache.scrub(blocks)

    def _forward(self, slices: Sequence[Slice], context: PagedStep | _Probe) -> torch.Tensor:
        """Hidden states [1, T, H] of the flat batch."""
        ids = self._token_ids(slices)
        positions = torch.from_numpy(np.concatenate([part.position_ids for part in slices], axis=1)).to(self._device)
        is_media, places, rows = self._media(slices, ids.shape[0])
        embeddings = self._decoder.embed(ids, is_media)
        width = embeddings.shape[-1]
        extra: dict[str, Any] = {}
        if rows:
            splice = torch.cat([r[:, :width].to(embeddings) for r in rows])
            embeddings = embeddings.index_copy(0, torch.cat(places), splice)
            extra = _deepstack(places, rows, embeddings)
        output = self._decoder.text_model(
            inputs_embeds=embeddings[None],
            position_ids=positions[:, None] if self._decoder.num_axes > 1 else positions,
            attention_mask=None,
            use_cache=False,
            context=context,
            **extra,
        )
        hidden: torch.Tensor = output.last_hidden_state
        return hidden

    def _token_ids(self, slices: Sequence[Slice]) -> torch.Tensor:
        """int64 [T]; tokens that the host does not know yet come from `last_tokens`."""
        ids = torch.from_numpy(np.concatenate([part.token_ids for part in slices])).to(self._device)
        late = [(offset, part.slot) for offset, part in _offsets(slices) if part.first_on_device]
        if late:
            places, slots = torch.tensor(late, device=self._device).unbind(1)
            ids[places] = self._last_tokens[slots]
        return ids

    def _media(
        self, slices: Sequence[Slice], total: int
    ) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
        """Which tokens of the flat batch are media (bool [T]), and places int64 [n] and rows [n, W] of each part."""
        mask = np.zeros(total, dtype=np.bool_)
        places, rows = [], []
        offset = 0
        for part in slices:
            for media in part.media:
                where = media.positions + offset
                mask[where] = True
                places.append(torch.from_numpy(where).to(self._device))
                rows.append(media.rows.to(self._device))
            offset += len(part)
        return torch.from_numpy(mask).to(self._device), places, rows


class _Probe:
    """An attention context that keeps nothing but shapes; every token of the batch belongs to one request."""

    def __init__(self) -> None:
        self.shapes: dict[int, tuple[tuple[int, int], tuple[int, int]]] = {}
        self.calls = 0
        self.dtype = torch.float32

    def attend(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, how: How) -> torch.Tensor:
        self.calls += 1
        self.shapes[layer] = ((key.shape[0], key.shape[2]), (value.shape[0], value.shape[2]))
        self.dtype = key.dtype
        return attention(query[None], key[None], value[None], None, how)[0].transpose(0, 1)


def _offsets(slices: Sequence[Slice]) -> Iterator[tuple[int, Slice]]:
    offset = 0
    for part in slices:
        yield offset, part
        offset += len(part)


def _dummy(axes: int) -> Slice:
    ids = np.zeros(2, dtype=np.int64)
    return Slice(ids, np.broadcast_to(np.arange(2, dtype=np.int64), (axes, 2)).copy(), 0, (np.zeros(1, np.int32),))


def _deepstack(places: list[torch.Tensor], rows: list[torch.Tensor], embeddings: torch.Tensor) -> dict[str, Any]:
    """Rows wider than the hidden size carry what transformers adds after its first layers (Qwen3-VL)."""
    width = embeddings.shape[-1]
    deep = [(p, r) for p, r in zip(places, rows, strict=True) if r.shape[1] > width]
    if not deep:
        return {}
    where = torch.cat([p for p, _ in deep])
    order = where.argsort()
    mask = torch.zeros(1, embeddings.shape[0], dtype=torch.bool, device=embeddings.device)
    mask[0, where] = True
    stacked = torch.cat([r[:, width:] for _, r in deep])[order].to(embeddings)
    layers = [stacked[:, start : start + width] for start in range(0, stacked.shape[1], width)]
    return {"visual_pos_masks": mask, "deepstack_visual_embeds": layers}


def _refuse_unsupported(decoder: DecoderModel) -> None:
    """Raise UNSUPPORTED for what would run but give other tokens than transformers."""
    config = decoder.config
    reason = None
    kinds = set(getattr(config, "layer_types", None) or ())
    if other := kinds - {"full_attention", "sliding_attention"}:
        reason = f"layers of type {', '.join(sorted(map(str, other)))}"
    elif getattr(config, "num_kv_shared_layers", 0):
        reason = "layers that share keys and values"
    elif getattr(config, "cross_attention_layers", None):
        reason = "cross-attention layers"
    else:
        rope = getattr(config, "rope_parameters", None) or {}
        # one set of parameters, or one for each type of layer
        kinds = {part.get("rope_type") for part in (rope, *rope.values()) if isinstance(part, dict)}
        # transformers picks their frequencies by the longest position of the batch, which here holds many requests
        if varying := kinds & {"dynamic", "longrope"}:
            reason = f"rope_type {', '.join(sorted(varying))}"
    if reason is not None:
        raise TriptychError(
            ErrorKind.UNSUPPORTED,
            f"{type(decoder.text_model).__name__} has {reason}, which the engine does not support yet",
            "model",
            "language_model",
        )
