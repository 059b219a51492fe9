"""Decode steps as CUDA graphs: every launch of a step of a given batch size, replayed by one call.

A batch is padded to the next size that was captured; padding rows have no context, store nothing, and their logits
are cut off. Inputs lie at fixed addresses: one buffer that each step's upload overwrites, and one block table for
each group of layers, as wide as the longest request can become.
"""

from __future__ import annotations

import gc
import logging
import time
from bisect import bisect_left
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from ...contract.errors import ErrorKind, TriptychError
from .attention import Backend
from .executor import Executor
from .inputs import ALIGN, SOURCE, Batch, HostBatch, StepInputs, token_matrix
from .kv_cache import KVCache

logger = logging.getLogger(__name__)

_LONGEST_SLICE = 16
_READ_AGAIN = 2**14
"""Tokens whose keys and values a step may read more than once: on a GPU, less time than launching its kernels."""


def graph_sizes(largest: int) -> list[int]:
    """Batch sizes to capture, ascending; padding costs at most 7 rows up to a batch of 128."""
    sizes = [1, 2, 4, *range(8, 128, 8), *range(128, 256, 16), *range(256, largest + 1, 32)]
    return [size for size in sizes if size < largest] + [largest]


class GraphRunner:
    """Captured decode steps.

    On a CPU nothing can be captured: the same padded step is computed eagerly, which tests the padding there.
    """

    def __init__(
        self,
        executor: Executor,
        backend: Backend,
        cache: KVCache,
        inputs: StepInputs,
        last_tokens: torch.Tensor,
        axes: int,
        largest: int,
        max_blocks: int,
        logits: torch.Tensor,
    ) -> None:
        """Make the static buffers.

        Args:
            executor, backend, cache, inputs, last_tokens: of the runner.
            axes: of position ids.
            largest: batch size.
            max_blocks: of the longest request.
            logits: [1, V], an example.
        """
        self._executor = executor
        self._backend = backend
        self._cache = cache
        self._inputs = inputs
        self._last_tokens = last_tokens
        self._sizes = graph_sizes(largest)
        self._rows = 2 + axes + len(cache.groups)
        self._num_groups = len(cache.groups)
        self._device = cache.device
        # tokens, contexts, the used part of the block tables and logit rows, each rounded up to the upload's alignment
        size = token_matrix(self._rows, largest).nbytes + largest * (4 + 4 * max_blocks * self._num_groups + 8)
        size += ALIGN * (3 + self._num_groups)
        self._buffer = torch.zeros(size, dtype=torch.uint8, device=self._device)
        self._tables = [
            torch.full((largest, max_blocks), pad, dtype=torch.int32, device=self._device) for pad in cache.num_blocks
        ]
        self._logits = logits.new_zeros(largest, logits.shape[-1])
        self._batches: dict[int, Batch] = {}
        self._replays: dict[int, Callable[[], None]] = {}
        self._layer = -1
        self._stream: torch.cuda.Stream | None = None
        if self._device.type == "cuda":
            self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]

    def serves(self, host: HostBatch) -> bool:
        """Whether this step can be replayed: few tokens, no media to put in or to look at, nothing bidirectional,
        nothing wanted but logits.

        Slices of several tokens (guesses to verify, ends of prompts) run as that many rows, which all read the
        request's keys and values.
        """
        if host.num_tokens > self._sizes[-1] or host.media_places is not None or host.spans is not None:
            return False
        if any(part.cross is not None for part in host.slices) or host.embeds:
            return False
        again = (host.lengths - 1) * host.contexts
        return bool(host.lengths.max() <= _LONGEST_SLICE and again.sum() <= _READ_AGAIN)

    def capture(self) -> None:
        """Capture every batch size, the largest first, so that the others fit into its memory.

        Raises:
            TriptychError: UNSUPPORTED, naming the layer at which it failed.
        """
        began = time.monotonic()
        on_gpu = self._stream is not None
        pool = torch.cuda.graph_pool_handle() if on_gpu else None
        gc.collect()
        progress = tqdm(reversed(self._sizes), desc="CUDA graphs", total=len(self._sizes), disable=not on_gpu)
        for size in progress:
            progress.set_postfix_str(f"batch {size}")
            self._send(self._padding(size), size)
            self._replays[size] = self._capture(size, pool) if on_gpu else partial(self._compute, size)
        logger.info(
            "decode steps of %d batch sizes up to %d captured in %.1f s",
            len(self._sizes),
            self._sizes[-1],
            time.monotonic() - began,
        )

    def forward(self, host: HostBatch) -> torch.Tensor:
        """Logits [N, V] of a step that `serves` accepts; valid until the next call."""
        size = self._sizes[bisect_left(self._sizes, host.num_tokens)]
        rows = self._send(host.one_token_each(), size)
        self._replays[size]()
        return self._logits[: host.num_tokens] if rows is None else self._logits.index_select(0, rows)

    def _send(self, host: HostBatch, size: int) -> torch.Tensor | None:
        """Write a step's inputs into the static buffers, padded to ``size`` rows; rows whose logits are wanted."""
        count = host.num_tokens
        tokens = token_matrix(self._rows, size)
        tokens[:, :count] = host.tokens
        tokens[:, count:] = 0
        tokens[SOURCE, count:] = -1
        tokens[self._rows - self._num_groups :, count:] = -1
        contexts = np.zeros(size, dtype=np.int32)
        contexts[:count] = host.contexts
        every = np.array_equal(host.logit_rows, np.arange(count))
        arrays = [tokens, contexts, *host.tables, *([] if every else [host.logit_rows])]
        sent, lens, *rest = self._inputs.send(arrays, self._buffer)
        for static, table in zip(self._tables, rest, strict=False):
            if table.shape[1] > static.shape[1]:
                raise RuntimeError(f"a block table of {table.shape[1]} blocks, but requests have {static.shape[1]}")
            static[: table.shape[0], : table.shape[1]].copy_(table)
        if size not in self._batches:
            self._batches[size] = Batch(
                tokens=sent[:, :size],
                num_groups=self._num_groups,
                context_lens=lens,
                tables=tuple(table[:size] for table in self._tables),
                num_singles=size,
                max_query_len=0,
                is_media=torch.zeros(size, dtype=torch.bool, device=self._device),
                late=True,
                host=host,
            )
        self._batches[size].host = host
        return None if every else rest[-1]

    def _padding(self, size: int) -> HostBatch:
        tables = [np.zeros((0, 1), dtype=np.int32) for _ in range(self._num_groups)]
        none = np.zeros(0, dtype=np.int64)
        return HostBatch(
            token_matrix(self._rows, 0), 0, none.astype(np.int32), none, none, tables, 0, None, none, True, None, []
        )

    def _compute(self, size: int) -> None:
        batch = self._batches[size]
        context = self._backend(self._cache, batch)
        try:
            embeddings = self._executor.embed(batch.token_ids(self._last_tokens), batch.is_media)
            hidden = self._executor.forward(embeddings, batch.position_ids, context, None)
            self._logits[:size] = self._executor.logits(hidden)
        finally:
            self._layer = context.layer

    def _capture(self, size: int, pool: Any) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        stream = self._stream
        assert stream is not None
        stream.wait_stream(torch.cuda.current_stream(self._device))
        try:
            with torch.cuda.stream(stream):
                # kernels are compiled and libraries make their workspaces outside of the capture
                self._compute(size)
                stream.synchronize()
                # other threads of this process may go on using the device
                graph.capture_begin(pool=pool, capture_error_mode="thread_local")
                try:
                    self._compute(size)
                finally:
                    graph.capture_end()
        except Exception as error:
            raise _not_captured(size, self._layer, error) from error
        torch.cuda.current_stream(self._device).wait_stream(stream)
        return graph.replay


def _not_captured(size: int, layer: int, error: Exception) -> TriptychError:
    # a failing capture fails once more when it ends; what matters is why it failed first
    first: BaseException = error.__context__ or error
    return TriptychError(
        ErrorKind.UNSUPPORTED,
        f"a decode step of batch {size} cannot be captured as a CUDA graph: after the attention of layer {layer}: "
        f"{type(first).__name__}: {first}; start with --no-cuda-graphs",
        "settings.cuda_graphs",
        "language_model",
    )


def refuse_uncapturable(backend: Backend, name: str) -> None:
    """Raise UNSUPPORTED for an attention backend whose launches differ from step to step."""
    if not getattr(backend, "capturable", True):
        raise TriptychError(
            ErrorKind.UNSUPPORTED,
            f"attention_backend {name} cannot run in CUDA graphs; start with --no-cuda-graphs",
            "settings.cuda_graphs",
            "language_model",
        )
