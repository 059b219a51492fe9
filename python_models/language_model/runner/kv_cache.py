"""The paged KV cache: tensors of every layer, grouped by which tokens of a request they keep."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .executor import LayerShape
from .step import KVGroup

FP8 = torch.float8_e4m3fn
_FP8_MAX = 448.0


def group_layers(layers: Sequence[LayerShape], context_length: int) -> tuple[KVGroup, ...]:
    """Layers that keep every token first, then one group for each window that is shorter than the context.

    Layers that keep nothing of their own are in no group.
    """
    windows = {
        layer: None if shape.window is None or shape.window >= context_length else shape.window
        for layer, shape in enumerate(layers)
        if shape.keeps
    }
    order = sorted(set(windows.values()), key=lambda window: window or 0)
    return tuple(KVGroup(tuple(i for i, w in windows.items() if w == window), window) for window in order)


class KVCache:
    """Pages of every layer; layers may differ in heads and widths.

    Per layer one tensor for keys and one for values, [num_blocks + 1, Hk, block_size, D]: a head's tokens of a block
    lie side by side. Token ``t`` of a request lies in slot ``block_table[t // block_size] * block_size +
    t % block_size`` of its group. The last block, number ``num_blocks``, is nobody's: it pads block tables, and takes
    what padding tokens store.

    Attributes:
        groups: layers that share a block table.
        group_of: index of each layer's group; -1 for layers that keep nothing and share nothing.
        sharing: layers that read the pages of another and store nothing.
        num_blocks: blocks of each group, without the last one.
        pages: keys and values of each layer; where the values are part of the keys, views of the same memory.
        scale: what is stored is the value divided by this.
    """

    def __init__(
        self,
        layers: Sequence[LayerShape],
        groups: tuple[KVGroup, ...],
        num_blocks: Sequence[int],
        block_size: int,
        dtype: torch.dtype,
        device: str,
    ) -> None:
        self.groups = groups
        self.num_blocks = tuple(num_blocks)
        self.block_size = block_size
        self.device = torch.device(device)
        self.quantised = dtype == FP8
        self.scale = 1.0
        of = {layer: index for index, group in enumerate(groups) for layer in group.layers}
        sources = [layer if shape.shares is None else shape.shares for layer, shape in enumerate(layers)]
        self.group_of = tuple(of.get(source, -1) for source in sources)
        self.sharing = frozenset(layer for layer, source in enumerate(sources) if source != layer)
        self.pages: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._stored: list[list[torch.Tensor]] = []
        for layer, shape in enumerate(layers):
            if shape.shares is not None:
                self._stored.append(self._stored[shape.shares])
                self.pages.append(self.pages[shape.shares])
                continue
            count = self.num_blocks[self.group_of[layer]] + 1 if shape.keeps else 0
            own = [
                # bytes of zeros are zeros of every dtype; not every one can be made directly
                torch.zeros(count, heads, block_size, width * dtype.itemsize, dtype=torch.uint8, device=device)
                for heads, width in shape.stored
            ]
            own = [pages.view(dtype) for pages in own]
            self._stored.append(own)
            self.pages.append((own[0], own[0][..., : shape.value[1]] if shape.latent else own[1]))

    def write(
        self, layer: int, places: tuple[torch.Tensor, torch.Tensor], key: torch.Tensor, value: torch.Tensor
    ) -> None:
        """Store keys [T, Hk, D] and values [T, Hk, Dv] at places: blocks int64 [T] and offsets in them int64 [T].

        Block -1 is the last one, which takes the tokens of padding. Values that are part of the keys come with them.
        """
        for pages, new in zip(self._stored[layer], (key, value), strict=False):
            if self.quantised:
                new = (new / self.scale).clamp(-_FP8_MAX, _FP8_MAX).to(FP8).view(torch.uint8)
                pages = pages.view(torch.uint8)
            pages.transpose(1, 2).index_put_(places, new)

    def read(self, layer: int, blocks: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Blocks int64 [B, n] -> keys [B, Hk, n * block_size, D] and values likewise, in ``dtype``."""
        found = [self._gather(pages, blocks, dtype) for pages in self._stored[layer]]
        return found[0], found[1] if len(found) > 1 else found[0][..., : self.pages[layer][1].shape[-1]]

    def _gather(self, pages: torch.Tensor, blocks: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        _, heads, size, width = pages.shape
        batch, count = blocks.shape
        # one row for each block and head, so that the gather itself brings a head's tokens together
        rows = blocks[:, None] * heads + torch.arange(heads, device=blocks.device)[:, None]
        flat = pages.view(torch.uint8) if self.quantised else pages
        found = flat.view(-1, size * width).index_select(0, rows.view(-1)).view(batch, heads, count * size, width)
        return found.view(FP8).to(dtype) * self.scale if self.quantised else found

    def scrub(self, group: int, blocks: Sequence[int]) -> None:
        """Zero blocks of a group, so that a NaN left in them cannot reach their next owner through masked places."""
        index = torch.tensor(blocks, dtype=torch.int64, device=self.device)
        for layer in self.groups[group].layers:
            for pages in self._stored[layer]:
                pages.view(torch.uint8).index_fill_(0, index, 0)
