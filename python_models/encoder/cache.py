"""Embeddings of media seen before, by content."""

from __future__ import annotations

from collections import OrderedDict

import torch

from ..families.base import PrunedRows


class EmbeddingCache:
    """Least-recently-used cache: content digest -> embedding rows [n, width], within a budget of bytes.

    Rows are given on the device that they came from. Not thread-safe: one worker owns it.
    """

    def __init__(self, budget_bytes: int, device: str | None = None) -> None:
        """Args: what all entries together may take, 0 keeps nothing; where they are kept, None for where they are."""
        self.budget_bytes = budget_bytes
        self.device = device
        self.used_bytes = 0
        self.num_evicted = 0
        self._entries: OrderedDict[str, tuple[torch.Tensor | PrunedRows, torch.device]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, digest: str) -> torch.Tensor | PrunedRows | None:
        """The rows of a digest, or None; makes them the most recently used."""
        found = self._entries.get(digest)
        if found is None:
            return None
        self._entries.move_to_end(digest)
        rows, home = found
        return _moved(rows, PrunedRows.tensor(rows).to(home))

    def put(self, digest: str, rows: torch.Tensor | PrunedRows) -> None:
        """Keep a copy of rows, dropping what was used longest ago; rows over the whole budget are not kept."""
        tensor = PrunedRows.tensor(rows)
        size = tensor.nbytes
        if size > self.budget_bytes or digest in self._entries:
            return
        while self.used_bytes + size > self.budget_bytes:
            _, (dropped, _) = self._entries.popitem(last=False)
            self.used_bytes -= PrunedRows.tensor(dropped).nbytes
            self.num_evicted += 1
        # A copy: a view would keep the whole batch it was cut from alive.
        own = tensor.to(self.device or tensor.device, copy=True)
        self._entries[digest] = _moved(rows, own), tensor.device
        self.used_bytes += size

    def clear(self) -> None:
        """Drop everything."""
        self._entries.clear()
        self.used_bytes = 0


def _moved(rows: torch.Tensor | PrunedRows, tensor: torch.Tensor) -> torch.Tensor | PrunedRows:
    """The same, as this tensor."""
    return PrunedRows(tensor, rows.runs) if isinstance(rows, PrunedRows) else tensor
