"""Embeddings of media seen before, by content."""

from __future__ import annotations

from collections import OrderedDict

import torch

from ..families.base import PrunedRows


class EmbeddingCache:
    """Least-recently-used cache: content digest -> embedding rows [n, width], within a budget of bytes.

    Tensors stay on the device they come from. Not thread-safe: one worker owns it.
    """

    def __init__(self, budget_bytes: int) -> None:
        """Args: ``budget_bytes``: what all entries together may take; 0 keeps nothing."""
        self.budget_bytes = budget_bytes
        self.used_bytes = 0
        self._entries: OrderedDict[str, torch.Tensor | PrunedRows] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, digest: str) -> torch.Tensor | PrunedRows | None:
        """The rows of a digest, or None; makes them the most recently used."""
        rows = self._entries.get(digest)
        if rows is not None:
            self._entries.move_to_end(digest)
        return rows

    def put(self, digest: str, rows: torch.Tensor | PrunedRows) -> None:
        """Keep a copy of rows, dropping what was used longest ago; rows over the whole budget are not kept."""
        tensor = PrunedRows.tensor(rows)
        size = tensor.nbytes
        if size > self.budget_bytes or digest in self._entries:
            return
        while self.used_bytes + size > self.budget_bytes:
            _, dropped = self._entries.popitem(last=False)
            self.used_bytes -= PrunedRows.tensor(dropped).nbytes
        # A copy: a view would keep the whole batch it was cut from alive.
        own = tensor.clone()
        self._entries[digest] = PrunedRows(own, rows.runs) if isinstance(rows, PrunedRows) else own
        self.used_bytes += size

    def clear(self) -> None:
        """Drop everything."""
        self._entries.clear()
        self.used_bytes = 0
