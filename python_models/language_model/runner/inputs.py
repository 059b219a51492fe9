"""Slices of requests -> the tensors of one step, in one upload.

All arithmetic is numpy over the whole batch, so that a step of 128 requests costs a fraction of a millisecond of
Python; one copy from pinned memory carries the result to the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .step import Slice

Array = NDArray[Any]

IDS, SOURCE, POSITIONS = 0, 1, 2
"""Rows of the per-token matrix; slots of each group follow the position ids."""


@dataclass
class HostBatch:
    """What the host knows of a batch, in the order it is computed: slices of one token first.

    Attributes:
        matrix: int64 [2 + axes + groups, >= T]: ids, the slot of ``last_tokens`` that an id comes from (or -1),
            position ids, slots of each group. Columns from T on hold anything.
        num_tokens: T.
        contexts: int32 [B], tokens of each request in the cache after the step.
        starts: int64 [B], tokens before it.
        lengths: int64 [B].
        tables: int32 [B, M] of each group.
        num_singles: slices of one token.
        spans: int32 [T - num_singles, 2], absolute [start, end) of each token of a longer slice, or None.
        logit_rows: int64 [N], tokens whose logits are wanted, in the order of the slices as they were given.
        in_order: logit_rows are all tokens in their order.
        media_places: int64 [n], tokens that are media.
        media_rows: [n_i, H * (1 + k)] of each part.
        slices: what it was made of.
        embeds: of ``logit_rows``, the indices of those whose hidden states are wanted too.
    """

    matrix: Array
    num_tokens: int
    contexts: Array
    starts: Array
    lengths: Array
    tables: list[Array]
    num_singles: int
    spans: Array | None
    logit_rows: Array
    in_order: bool
    media_places: Array | None
    media_rows: list[torch.Tensor]
    slices: Sequence[Slice] = ()
    embeds: Sequence[int] = ()

    @property
    def tokens(self) -> Array:
        """The matrix, [2 + axes + groups, T]."""
        return self.matrix[:, : self.num_tokens]

    def one_token_each(self) -> HostBatch:
        """The same step with every token as a slice of its own: equal, as all are stored before any attends."""
        if self.num_singles == len(self.lengths):
            return self
        rows = np.repeat(np.arange(len(self.lengths)), self.lengths)
        starts = np.arange(self.num_tokens) + np.repeat(self.contexts - self.lengths.cumsum(), self.lengths)
        return replace(
            self,
            contexts=(starts + 1).astype(np.int32),
            starts=starts,
            lengths=np.ones_like(starts),
            tables=[table[rows] for table in self.tables],
            num_singles=self.num_tokens,
        )


@dataclass
class Batch:
    """A step's tensors on the device.

    Attributes:
        tokens: int64 [2 + axes + groups, T], see :class:`HostBatch`.
        slots: int64 [groups, T]; -1 stores nothing.
        context_lens: int32 [B]; 0 is padding.
        tables: int32 [B, M] of each group.
        num_singles: the first slices, and tokens, that are one token each.
        max_query_len: of the other slices; 0 where there are none.
        query_starts: int32 [B - num_singles + 1], from 0; where there are longer slices.
        spans: see :class:`HostBatch`.
        is_media: bool [T].
        media_places, logit_rows: see :class:`HostBatch`; None where there is nothing to pick.
        late: some ids come from ``last_tokens``.
        host: the same on the host; a captured step does not look at it.
    """

    tokens: torch.Tensor
    num_groups: int
    context_lens: torch.Tensor
    tables: tuple[torch.Tensor, ...]
    num_singles: int
    max_query_len: int
    is_media: torch.Tensor
    late: bool
    host: HostBatch
    query_starts: torch.Tensor | None = None
    spans: torch.Tensor | None = None
    media_places: torch.Tensor | None = None
    logit_rows: torch.Tensor | None = None

    @property
    def position_ids(self) -> torch.Tensor:
        """int64 [axes, T]."""
        return self.tokens[POSITIONS : self.tokens.shape[0] - self.num_groups]

    @property
    def slots(self) -> torch.Tensor:
        """int64 [groups, T]."""
        return self.tokens[self.tokens.shape[0] - self.num_groups :]

    def token_ids(self, last_tokens: torch.Tensor) -> torch.Tensor:
        """int64 [T]; ids that the host does not know yet come from ``last_tokens``."""
        ids = self.tokens[IDS]
        if not self.late:
            return ids
        source = self.tokens[SOURCE]
        return torch.where(source < 0, ids, last_tokens[source.clamp(min=0)])


def token_matrix(rows: int, count: int) -> Array:
    """int64 [rows, >= count], not filled; every row begins at a multiple of 128 bytes, whatever the count.

    Triton compiles a kernel anew for addresses and strides that are no multiples of 16.
    """
    return np.empty((rows, -(-count // 16) * 16), dtype=np.int64)


class StepInputs:
    """Makes the inputs of steps."""

    def __init__(self, axes: int, block_size: int, pad_blocks: Sequence[int], device: str) -> None:
        """Args: position axes; tokens of a block; for each group the block that pads its tables; torch device."""
        self._axes = axes
        self._block_size = block_size
        self._pad_blocks = tuple(pad_blocks)
        self._device = torch.device(device)
        self._staging = Staging(device)
        self._no_media = torch.zeros(0, dtype=torch.bool, device=device)

    def prepare(self, slices: Sequence[Slice]) -> HostBatch:
        """Lay out a step on the host; ``slices`` is not empty."""
        lengths = np.array([part.token_ids.shape[0] for part in slices])
        singles = lengths == 1
        num_singles = int(singles.sum())
        count = len(slices)
        ordered: Sequence[Slice] = slices
        order: Array | None = None
        if not singles[:num_singles].all():
            order = np.argsort(~singles, kind="stable")
            ordered, lengths = [slices[i] for i in order], lengths[order]
        starts = np.array([part.start for part in ordered])
        contexts = starts + lengths
        ends = lengths.cumsum()
        total = int(ends[-1])
        size, axes = self._block_size, self._axes

        matrix = token_matrix(2 + axes + len(self._pad_blocks), total)
        tokens = matrix[:, :total]
        np.concatenate([part.token_ids for part in ordered], out=tokens[IDS])
        np.concatenate([part.position_ids for part in ordered], axis=1, out=tokens[POSITIONS : POSITIONS + axes])
        source = tokens[SOURCE]
        late = [part.slot if part.first_on_device else -1 for part in ordered]
        if num_singles == count:
            source[:] = late
            rows, places = np.arange(count), starts
        else:
            source.fill(-1)
            source[ends - lengths] = late
            rows = np.repeat(np.arange(count), lengths)
            places = np.arange(total) + np.repeat(contexts - ends, lengths)
        columns, offsets = np.divmod(places, size)
        tables = self._tables(ordered, -(-contexts // size))
        for group, table in enumerate(tables):
            tokens[2 + axes + group] = table[rows, columns] * np.int64(size) + offsets

        places_of_media, rows_of_media = _media(ordered, ends - lengths)
        logit_rows = _logit_rows(slices, ends, order)
        return HostBatch(
            matrix=matrix,
            num_tokens=total,
            contexts=contexts.astype(np.int32),
            starts=starts,
            lengths=lengths,
            tables=tables,
            num_singles=num_singles,
            spans=_spans(ordered[num_singles:], total - num_singles),
            logit_rows=logit_rows,
            in_order=total == count == len(logit_rows) and order is None,
            media_places=places_of_media,
            media_rows=rows_of_media,
            slices=ordered,
            embeds=_embeds(slices),
        )

    def upload(self, host: HostBatch) -> Batch:
        """Copy a step to the device, in memory of its own."""
        arrays = [host.matrix, host.contexts, *host.tables]
        names = []
        long = host.lengths[host.num_singles :]
        if len(long):
            names.append("query_starts")
            arrays.append(np.concatenate([np.zeros(1, np.int64), long.cumsum()]).astype(np.int32))
        if host.spans is not None:
            names.append("spans")
            arrays.append(host.spans)
        if host.media_places is not None:
            names.append("media_places")
            arrays.append(host.media_places)
        if not host.in_order:
            names.append("logit_rows")
            arrays.append(host.logit_rows)
        matrix, contexts, *rest = self._staging.send(arrays)
        groups = len(self._pad_blocks)
        batch = Batch(
            tokens=matrix[:, : host.num_tokens],
            num_groups=groups,
            context_lens=contexts,
            tables=tuple(rest[:groups]),
            num_singles=host.num_singles,
            max_query_len=int(long.max()) if len(long) else 0,
            is_media=self.no_media(host.num_tokens),
            late=bool((host.tokens[SOURCE] >= 0).any()),
            host=host,
            **dict(zip(names, rest[groups:], strict=True)),
        )
        if batch.media_places is not None:
            batch.is_media = torch.zeros_like(batch.is_media).index_fill_(0, batch.media_places, True)
        return batch

    def send(self, arrays: Sequence[Array], target: torch.Tensor) -> list[torch.Tensor]:
        """See :meth:`Staging.send`."""
        return self._staging.send(arrays, target)

    def no_media(self, count: int) -> torch.Tensor:
        """bool [count], all False; not to be written."""
        if self._no_media.shape[0] < count:
            self._no_media = torch.zeros(count, dtype=torch.bool, device=self._device)
        return self._no_media[:count]

    def _tables(self, slices: Sequence[Slice], needed: Array) -> list[Array]:
        counts, width = needed.tolist(), int(needed.max())
        tables = []
        for group, pad in enumerate(self._pad_blocks):
            table = np.full((len(slices), width), pad, dtype=np.int32)
            for row, part, count in zip(table, slices, counts, strict=True):
                row[:count] = part.block_tables[group][:count]
            tables.append(table)
        return tables


class Staging:
    """Pinned host memory in turns: a buffer is written again only after its last copy to the device has ended."""

    def __init__(self, device: str, turns: int = 2) -> None:
        self._device = torch.device(device)
        self._on_gpu = self._device.type == "cuda"
        self._buffers = [torch.empty(0, dtype=torch.uint8) for _ in range(turns)]
        self._events: list[torch.cuda.Event | None] = [None] * turns
        self._turn = 0

    def send(self, arrays: Sequence[Array], target: torch.Tensor | None = None) -> list[torch.Tensor]:
        """Copy arrays to the device in one piece, on the current stream.

        Args:
            arrays: of any numeric dtype and shape.
            target: uint8 on the device, to hold them; None takes new memory.

        Returns:
            A tensor for each array. On a CPU without ``target`` they are valid until the next call but one.
        """
        ends = []
        total = 0
        for array in arrays:
            total += -(-array.nbytes // ALIGN) * ALIGN
            ends.append(total)
        host = self._buffer(total)
        view = host.numpy()
        for start, array in zip((0, *ends), arrays, strict=False):
            view[start : start + array.nbytes] = array.reshape(-1).view(np.uint8)
        if target is None:
            device = host.to(self._device, non_blocking=True)
        else:
            device = target[:total]
            device.copy_(host, non_blocking=True)
        if self._on_gpu:
            event = self._events[self._turn] or torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
            self._events[self._turn] = event
        return [
            device[start : start + array.nbytes].view(_TORCH[array.dtype.char]).view(array.shape)
            for start, array in zip((0, *ends), arrays, strict=False)
        ]

    def _buffer(self, size: int) -> torch.Tensor:
        self._turn = (self._turn + 1) % len(self._buffers)
        event = self._events[self._turn]
        if event is not None:
            event.synchronize()
        if self._buffers[self._turn].shape[0] < size:
            # twice as much, so that growing contexts rarely pin anew
            self._buffers[self._turn] = torch.empty(2 * size, dtype=torch.uint8, pin_memory=self._on_gpu)
        return self._buffers[self._turn][:size]


ALIGN = 128
_TORCH = {np.dtype(np.int64).char: torch.int64, np.dtype(np.int32).char: torch.int32}


def _logit_rows(slices: Sequence[Slice], ends: Array, order: Array | None) -> Array:
    """The last ``num_logits`` tokens of each slice, in the order given; ``ends`` is in the order computed."""
    counts = np.array([part.num_logits for part in slices])
    if order is not None:
        given = np.empty_like(ends)
        given[order] = ends
        ends = given
    firsts = np.repeat(ends - counts.cumsum(), counts)
    rows: Array = firsts + np.arange(len(firsts))
    return rows


def _embeds(slices: Sequence[Slice]) -> list[int]:
    """Indices among the logits, in the order given, of the last tokens of slices that ask for hidden states."""
    if not any(part.embed for part in slices):
        return []
    lasts = np.cumsum([part.num_logits for part in slices]) - 1
    return [int(last) for last, part in zip(lasts, slices, strict=True) if part.embed]


def _media(slices: Sequence[Slice], offsets: Array) -> tuple[Array | None, list[torch.Tensor]]:
    places, rows = [], []
    for part, offset in zip(slices, offsets, strict=True):
        for media in part.media:
            places.append(media.positions + offset)
            rows.append(media.rows)
    return (np.concatenate(places) if places else None), rows


def _spans(slices: Sequence[Slice], total: int) -> Array | None:
    """[start, end) in the request's own count for each token of these slices; 0, 0 outside of all spans."""
    if not any(part.spans for part in slices):
        return None
    spans = np.zeros((total, 2), dtype=np.int32)
    offset = 0
    for part in slices:
        for start, end in part.spans:
            spans[offset + start : offset + end] = part.start + start, part.start + end
        offset += len(part)
    return spans
