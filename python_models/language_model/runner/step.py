"""What the engine and the runner say to each other: slices of requests in, logits out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

    from .cross import CrossMedia


@dataclass(frozen=True)
class KVGroup:
    """Layers that keep the same tokens of a request, and so share one block table.

    Attributes:
        layers: indices of the decoder's layers.
        window: a token sees itself and the window - 1 tokens before it, so older blocks can be given back; None
            keeps all.
    """

    layers: tuple[int, ...]
    window: int | None = None


@dataclass(frozen=True)
class MediaRows:
    """Embedding rows and where they go.

    Attributes:
        positions: int64 [n], ascending; indices into the prompt (or into a :class:`Slice`).
        rows: [n, H * (1 + k)]: the embedding, then k deepstack rows that deeper layers add.
    """

    positions: NDArray[np.int64]
    rows: torch.Tensor


@dataclass(frozen=True)
class Slice:
    """Consecutive tokens of one request for one step.

    Attributes:
        token_ids: int64 [n].
        position_ids: int64 [axes, n]; token extras are axes too, the last ones.
        start: tokens of the request that lie in the KV cache already.
        block_tables: one int32 array per :class:`KVGroup`, indexed by token // block_size, long enough for start + n
            tokens. Blocks that fell out of a group's window hold any valid number: they are not read.
        slot: the request's row of :attr:`Runner.last_tokens`; -1 for none.
        first_on_device: token_ids[0] is not known to the host yet; it is ``last_tokens[slot]``.
        media: rows for placeholders in this slice, positions counted from its first token.
        spans: [start, end) of bidirectional attention, counted from the slice's first token; never cut by a slice.
        num_logits: logits of that many last tokens are wanted: 0 inside a prompt, 1, or 1 + drafts.
        cross: the request's media for cross-attention layers.
        load: saved state of recurrent layers that the request begins with, in its first slice behind a prefix that
            is not computed again; else -1: with the state in its slot, or with none where start is 0.
        saves: (tokens of the slice, number): the states after that many tokens are saved there; ascending.
        embed: the last token's hidden state is wanted too, see :attr:`Runner.hidden`.
    """

    token_ids: NDArray[np.int64]
    position_ids: NDArray[np.int64]
    start: int
    block_tables: tuple[NDArray[np.int32], ...]
    slot: int = -1
    first_on_device: bool = False
    media: tuple[MediaRows, ...] = ()
    spans: tuple[tuple[int, int], ...] = ()
    num_logits: int = 1
    cross: CrossMedia | None = None
    load: int = -1
    saves: tuple[tuple[int, int], ...] = ()
    embed: bool = False

    def __len__(self) -> int:
        return int(self.token_ids.shape[0])


class Runner(Protocol):
    """Computes the next logits; the engine knows a model only through this."""

    @property
    def vocab_size(self) -> int:
        """Width of the logits."""

    @property
    def kv_groups(self) -> tuple[KVGroup, ...]:
        """How the layers share block tables."""

    @property
    def last_tokens(self) -> torch.Tensor:
        """int64 [slots] on the device: the newest sampled token of each slot; the sampler writes it."""

    @property
    def hidden(self) -> torch.Tensor:
        """[E, H]: of the newest `forward`, hidden states after the final norm, one for each slice with ``embed``.

        They stay as they are when `forward` is called again.
        """

    def forward(self, slices: Sequence[Slice]) -> torch.Tensor:
        """Compute all slices; logits [sum of num_logits, V] in their order.

        On a GPU it returns as soon as the work is queued on the current stream. The tensor is valid until the next
        call.
        """

    def scrub(self, group: int, blocks: Sequence[int]) -> None:
        """Blank the content of blocks whose request failed."""
