"""Cross-attention to media (Llama 3.2 Vision, arXiv:2407.21783): what its layers keep of a prompt, how a step reads it.

Keys and values of media belong to the prompt, not to its tokens: they are computed by the first step that needs them,
whichever tokens it brings, and go with the prompt. So chunks, preemption, prefixes from the cache and several answers
to one prompt all find them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention

from ...contract.plan import CrossRows

if TYPE_CHECKING:
    from .executor import DecoderModel
    from .step import Slice

_ALWAYS = 2**62


@dataclass(frozen=True)
class CrossLayout:
    """The cross-attention layers of a decoder.

    Attributes:
        layers: their indices.
        bytes_per_row: of the keys and values of all of them.
    """

    layers: frozenset[int]
    bytes_per_row: int

    @classmethod
    def of(cls, decoder: DecoderModel) -> CrossLayout | None:
        """None for a decoder that has none."""
        config = decoder.config
        layers = frozenset(getattr(config, "cross_attention_layers", None) or ())
        if not layers:
            return None
        width = config.num_key_value_heads * (config.hidden_size // config.num_attention_heads)
        size = next(decoder.text_model.parameters()).dtype.itemsize
        return cls(layers, 2 * len(layers) * width * size)


class CrossMedia:
    """The media of one prompt: rows until every layer has made its keys and values of them, then only those.

    They lie in another order than they came: what tokens may see in front, padding behind. So whatever a token sees is
    one stretch: of the media that it sees, or everything.

    Attributes:
        layout: of the decoder.
        nbytes: that it takes at most, rows included.
        rows: [n, H], until all layers have used them.
    """

    def __init__(
        self, layout: CrossLayout, rows: torch.Tensor, items: Sequence[CrossRows], num_prompt_tokens: int
    ) -> None:
        """Args: rows [n, H] of all items, in their order; items; length of the prompt.

        Raises:
            ValueError: the numbers do not fit together, or a token would see media that are no neighbours.
        """
        if sum(item.rows for item in items) != len(rows) or any(not 0 < i.visible <= i.rows for i in items):
            raise ValueError(f"{len(rows)} rows are not those of {[(item.rows, item.visible) for item in items]}")
        self.layout = layout
        self.nbytes = rows.nbytes + len(rows) * layout.bytes_per_row
        self.rows: torch.Tensor | None = rows
        self._items = tuple(items)
        self._ordered = False
        self._kept: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._runs = _runs(items, num_prompt_tokens)

    def runs(self, start: int, end: int) -> list[tuple[int, int, tuple[int, int] | None]]:
        """Tokens [start, end) cut where what they see changes: (start, end, stretch of rows), None for those that see
        no medium."""
        return [
            (max(first, start), min(last, end), stretch)
            for first, last, stretch in self._runs
            if first < end and last > start
        ]

    def keys_values(self, module: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [Hk, n, D] of a layer, in the order of the stretches. Args: transformers' layer."""
        layer = int(module.layer_idx)
        if layer not in self._kept:
            self._kept[layer] = self._project(module)
            if len(self._kept) == len(self.layout.layers):
                self.rows = None
        return self._kept[layer]

    def _project(self, module: Any) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.rows is not None
        weight = module.k_proj.weight
        if not self._ordered:
            parts = torch.split(self.rows.to(weight.device, weight.dtype), [item.rows for item in self._items])
            pairs = list(zip(parts, self._items, strict=True))
            self.rows = torch.cat([p[: i.visible] for p, i in pairs] + [p[i.visible :] for p, i in pairs])
            self._ordered = True
        shape = (len(self.rows), module.num_key_value_heads, module.head_dim)
        key = module.k_norm(module.k_proj(self.rows).view(shape)).transpose(0, 1).contiguous()
        return key, module.v_proj(self.rows).view(shape).transpose(0, 1).contiguous()


class CrossStep:
    """The media of one step's requests, as the layers see them.

    Attributes:
        layers: that attend across.
    """

    def __init__(self, slices: Sequence[Slice]) -> None:
        """Args: slices in the order of the flat batch; at least one has media."""
        self._parts: list[tuple[int, int, CrossMedia, tuple[int, int] | None]] = []
        offset = 0
        for part in slices:
            media = part.cross
            if media is not None:
                self.layers = media.layout.layers
                shift = offset - part.start
                runs = media.runs(part.start, part.start + len(part))
                self._parts += [(start + shift, end + shift, media, stretch) for start, end, stretch in runs]
            offset += len(part)
        self._total = offset
        self._seeing: torch.Tensor | None = None

    @staticmethod
    def of(slices: Sequence[Slice]) -> CrossStep | None:
        """None where no request has such media: the layers are then left out."""
        return CrossStep(slices) if any(part.cross is not None for part in slices) else None

    def seeing(self, like: torch.Tensor) -> torch.Tensor:
        """[1, 1, T, 1], in dtype and on the device of ``like``: 1 for tokens that see a medium, else 0."""
        if self._seeing is None:
            self._seeing = like.new_zeros(1, 1, self._total, 1)
            for start, end, _, stretch in self._parts:
                if stretch is not None:
                    self._seeing[:, :, start:end] = 1
        return self._seeing

    def attend(self, module: Any, query: torch.Tensor, scaling: float | None) -> torch.Tensor:
        """query [H, T, D] -> [T, H, D]; zero for requests without media.

        A token that sees none of its prompt's media attends to all of them, padding included, as in transformers.
        """
        out = query.new_zeros(query.shape[1], query.shape[0], query.shape[2])
        for start, end, media, stretch in self._parts:
            key, value = media.keys_values(module)
            if stretch is not None:
                key, value = key[:, stretch[0] : stretch[1]], value[:, stretch[0] : stretch[1]]
            found = F.scaled_dot_product_attention(
                query[None, :, start:end], key[None], value[None], scale=scaling, enable_gqa=True
            )
            out[start:end] = found[0].transpose(0, 1)
        return out


class _Stored:
    """A layer of a cache that is not empty, as far as transformers looks."""

    is_initialized = True

    def __init__(self) -> None:
        self.keys = self.values = torch.ones(1)


class StoredStates:
    """Given to transformers' decoder in the place of a cache: it holds media for every layer, and passes on what
    layers of the other kind bring. The attention function knows where either really lies."""

    def __init__(self, num_layers: int) -> None:
        self.layers = [_Stored()] * num_layers

    def update(self, key: torch.Tensor, value: torch.Tensor, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The new keys and values, unchanged."""
        return key, value


def _runs(items: Sequence[CrossRows], length: int) -> list[tuple[int, int, tuple[int, int] | None]]:
    """All tokens, generated ones too, cut where what they see changes."""
    spans = [(i.tokens[0], _ALWAYS if i.tokens[1] == length else i.tokens[1]) for i in items]
    firsts = [0]
    for item in items:
        firsts.append(firsts[-1] + item.visible)
    edges = sorted({0, _ALWAYS, *(edge for span in spans for edge in span)})
    runs: list[tuple[int, int, tuple[int, int] | None]] = []
    for start, end in pairwise(edges):
        seen = [k for k, span in enumerate(spans) if span[0] <= start and end <= span[1]]
        if seen and seen != list(range(seen[0], seen[-1] + 1)):
            raise ValueError(f"tokens {start} to {end} see media {seen}, which are no neighbours")
        runs.append((start, end, (firsts[seen[0]], firsts[seen[-1] + 1]) if seen else None))
    return runs
