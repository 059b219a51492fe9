"""Whole runs of a vision tower as CUDA graphs: launching a thousand small kernels takes longer than a picture's work.

Pictures of a deployment often come in few sizes. A run for the same grids as before is captured at its second time
and replayed from then on; all others are launched kernel by kernel.
"""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

logger = logging.getLogger(__name__)

Grids = tuple[tuple[int, int, int], ...]
"""(frames, rows, columns) of patches of each picture of a batch."""

_MOST = 16
"""Graphs that are kept; they share their working memory."""
_REMEMBERED = 1024


@dataclass(frozen=True)
class _Captured:
    graph: Any
    pixels: torch.Tensor
    rows: torch.Tensor


class TowerGraphs:
    """Runs a tower, by replay where it can. One thread at a time."""

    def __init__(self, run: Callable[[torch.Tensor, Grids], torch.Tensor], device: torch.device) -> None:
        """Make it without graphs.

        Args:
            run: (pixels [P, width], grids) -> rows [n, H]; with equal grids it queues the same work, and neither waits
                for the device nor reads host memory.
            device: a GPU.
        """
        self._run = run
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._captured: OrderedDict[Grids, _Captured] = OrderedDict()
        self._seen: Counter[Grids] = Counter()
        self._broken = False

    def __call__(self, pixels: torch.Tensor, grids: Grids) -> torch.Tensor:
        """Rows [n, H] of a batch; the caller's own."""
        if (known := self._captured.get(grids)) is not None:
            self._captured.move_to_end(grids)
            known.pixels.copy_(pixels)
            known.graph.replay()
            return known.rows.clone()
        rows = self._run(pixels, grids)
        if len(self._seen) >= _REMEMBERED:
            self._seen.clear()
        self._seen[grids] += 1
        if self._seen[grids] == 2 and not self._broken:
            self._capture(pixels, grids)
        return rows

    def _capture(self, pixels: torch.Tensor, grids: Grids) -> None:
        own = pixels.clone()
        graph = torch.cuda.CUDAGraph()
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream):
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    rows = self._run(own, grids)
                finally:
                    graph.capture_end()
        except Exception as error:  # noqa: BLE001 - the run itself has just succeeded: only speed is lost
            self._broken = True
            logger.warning(
                "the vision tower cannot be captured as CUDA graphs, and is launched kernel by kernel: %s", error
            )
            return
        finally:
            current.wait_stream(self._stream)
        if len(self._captured) >= _MOST:
            self._captured.popitem(last=False)
        self._captured[grids] = _Captured(graph, own, rows)
