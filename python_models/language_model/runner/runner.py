"""Runs one flat batch of all scheduled tokens through the decoder."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import torch

from ...contract.errors import ErrorKind, TriptychError
from .attention import Backend, load_backend, resolve
from .cross import CrossStep
from .executor import Deepstack, Executor, ModulesExecutor
from .graphs import GraphRunner, refuse_uncapturable
from .inputs import Batch, HostBatch, StepInputs
from .kv_cache import FP8, KVCache, group_layers
from .options import RunnerOptions
from .recurrent import StatePool, StateStep
from .step import KVGroup, Slice

logger = logging.getLogger(__name__)

_REHEARSED = (1, 2, 7, 16, 17, 33, 48, 64, 100, 128, 200, 256, 500, 512, 1000, 1024, 2000)


class DecoderRunner:
    """A :class:`~.step.Runner`: the KV cache in pages, an attention backend, and decode steps as CUDA graphs.

    `allocate` comes before `forward`; `warm_up`, in between, is needed where there are graphs.
    """

    def __init__(
        self,
        executor: Executor,
        num_axes: int,
        block_size: int,
        device: str,
        options: RunnerOptions | None = None,
        num_slots: int = 256,
    ) -> None:
        """Make it.

        Args:
            executor: the decoder.
            num_axes: of position ids, token extras included.
            block_size: tokens of a KV block.
            device, options: where and how it runs.
            num_slots: rows of ``last_tokens``, and states of recurrent layers.

        Raises:
            TriptychError: there is no memory for the states.
        """
        self._executor = executor
        self._axes = num_axes
        self._block_size = block_size
        self._device = device
        self._options = options = options or RunnerOptions()
        self._backend_name = resolve(options.attention_backend, device)
        self._dtype = FP8 if options.kv_cache_dtype == "fp8" else executor.dtype
        # a state that is lost is computed again from the first token on, for which no block may be missing
        if options.window_groups and not executor.states:
            self._groups = group_layers(executor.layers, options.context_length)
        else:
            self._groups = (KVGroup(tuple(i for i, shape in enumerate(executor.layers) if shape.keeps)),)
        self._states: StatePool | None = None
        if executor.states:
            self._states = StatePool(executor.states, num_slots, options.saved_states, device)
            logger.info(
                "recurrent state of %d layers: %d requests and %d saved prefixes, %.0f MiB on %s",
                len(executor.states),
                num_slots,
                options.saved_states,
                self._states.nbytes / 2**20,
                device,
            )
        with torch.inference_mode():
            nothing = torch.zeros(1, dtype=torch.int64, device=device)
            self._example = executor.logits(executor.embed(nothing, nothing > 0))
        self._cache: KVCache | None = None
        self._backend: Backend | None = None
        self._inputs: StepInputs | None = None
        self._graphs: GraphRunner | None = None
        self._last_tokens = torch.zeros(num_slots, dtype=torch.int64, device=device)
        self._hidden: torch.Tensor | None = None

    @property
    def vocab_size(self) -> int:
        """Width of the logits."""
        return int(self._example.shape[-1])

    @property
    def kv_groups(self) -> tuple[KVGroup, ...]:
        """See :class:`~.step.Runner`."""
        return self._groups

    @property
    def saved_states(self) -> int | None:
        """States of recurrent layers that it can save; None where the decoder has no such layers."""
        return None if self._states is None else self._states.num_saved

    @property
    def last_tokens(self) -> torch.Tensor:
        """See :class:`~.step.Runner`."""
        return self._last_tokens

    @property
    def hidden(self) -> torch.Tensor:
        """See :class:`~.step.Runner`."""
        if self._hidden is None:
            raise RuntimeError("no slice of the newest step asked for its hidden state")
        return self._hidden

    @property
    def bytes_per_token(self) -> tuple[int, ...]:
        """Bytes that one token takes in the KV cache of each group."""
        layers = self._executor.layers
        return tuple(
            self._dtype.itemsize * sum(heads * width for i in group.layers for heads, width in layers[i].stored)
            for group in self._groups
        )

    def allocate(self, num_blocks: Sequence[int]) -> None:
        """Make the KV cache. Args: blocks of each group.

        Raises:
            TriptychError: there is not that much memory, or the attention backend cannot read such a cache.
        """
        if len(num_blocks) != len(self._groups):
            raise ValueError(f"{len(num_blocks)} numbers of blocks for {len(self._groups)} groups")
        layers = self._executor.layers
        try:
            cache = KVCache(layers, self._groups, num_blocks, self._block_size, self._dtype, self._device)
        except (RuntimeError, MemoryError) as error:
            size = sum(
                count * self._block_size * width for count, width in zip(num_blocks, self.bytes_per_token, strict=True)
            )
            raise TriptychError(
                ErrorKind.STAGE_FAILED,
                f"no memory for a KV cache of {num_blocks[0] * self._block_size} tokens ({size / 2**20:.0f} MiB): "
                f"lower kv_cache_tokens or mem_fraction_static ({error})",
                "settings.kv_cache_tokens",
                "language_model",
            ) from error
        self._cache = cache
        self._backend = load_backend(self._backend_name, layers, cache)
        # a table's padding is read by nobody, or masked
        self._inputs = StepInputs(self._axes, self._block_size, cache.num_blocks, self._device)

    def warm_up(self, longest: int = 0) -> None:
        """Compile what prompts of up to ``longest`` tokens need, and capture the decode steps.

        Raises:
            TriptychError: UNSUPPORTED where a decode step of fused layers cannot be captured.
        """
        cache, backend, inputs = self._parts()
        if longest and cache.device.type == "cuda":
            with torch.inference_mode():
                self._rehearse(cache, inputs, longest)
        if not self._options.graph_batch:
            return
        if self._states is not None:
            logger.info("decode steps are launched one kernel at a time: graphs do not hold recurrent state")
            return
        if cache.device.type == "cuda":
            refuse_uncapturable(backend, self._backend_name)
        graphs = GraphRunner(
            self._executor,
            backend,
            cache,
            inputs,
            self._last_tokens,
            self._axes,
            self._options.graph_batch,
            # with overlap a step may be queued for a request that turns out to have ended
            self._options.context_length // self._block_size + 1,
            self._example,
        )
        try:
            with torch.inference_mode():
                graphs.capture()
        except TriptychError as error:
            if not isinstance(self._executor, ModulesExecutor):
                raise
            # code of transformers may wait for the device in the middle of a step
            logger.warning("%s; decode steps are launched one kernel at a time, which is slower", error.message)
            return
        self._graphs = graphs

    def free(self) -> None:
        """Give the KV cache's memory back; `allocate` makes a new one."""
        self._cache = self._backend = self._inputs = self._graphs = None
        if torch.device(self._device).type == "cuda":
            torch.cuda.empty_cache()

    def forward(self, slices: Sequence[Slice]) -> torch.Tensor:
        """See :class:`~.step.Runner`."""
        _, _, inputs = self._parts()
        host = inputs.prepare(slices)
        if self._graphs is not None and self._graphs.serves(host):
            return self._graphs.forward(host)
        return self._compute(inputs.upload(host))

    def scrub(self, group: int, blocks: Sequence[int]) -> None:
        """See :class:`~.step.Runner`."""
        if self._cache is not None and blocks:
            self._cache.scrub(group, blocks)

    def _parts(self) -> tuple[KVCache, Backend, StepInputs]:
        if self._cache is None or self._backend is None or self._inputs is None:
            raise RuntimeError("allocate() comes before forward()")
        return self._cache, self._backend, self._inputs

    def _compute(self, batch: Batch, rehearsing: bool = False) -> torch.Tensor:
        """Logits [N, V] of an eager step."""
        cache, backend, _ = self._parts()
        executor = self._executor
        embeddings = executor.embed(batch.token_ids(self._last_tokens), batch.is_media)
        deepstack = None
        if batch.media_places is not None:
            embeddings, deepstack = _splice(embeddings, batch.media_places, batch.host)
        context = backend(cache, batch)
        context.rehearsing = rehearsing
        if self._states is not None:
            context.states = StateStep(self._states, batch.host.slices, batch.num_singles)
        context.cross = CrossStep.of(batch.host.slices)
        hidden = executor.forward(embeddings, batch.position_ids, context, deepstack)
        if batch.logit_rows is not None:
            if not len(batch.logit_rows):
                return self._example[:0]
            hidden = hidden.index_select(0, batch.logit_rows)
        self._hidden = hidden[batch.host.embeds] if batch.host.embeds else None
        return executor.logits(hidden)

    def _rehearse(self, cache: KVCache, inputs: StepInputs, longest: int) -> None:
        """Steps of many sizes, in the blocks that belong to nobody, so that no request waits for a compiler."""
        tables = tuple(np.full(-(-longest // self._block_size), pad, dtype=np.int32) for pad in cache.num_blocks)
        spans = ((0, 2),) if self._options.spans else ()

        def part(count: int, spans: tuple[tuple[int, int], ...] = ()) -> Slice:
            ids, positions = np.zeros(count, dtype=np.int64), np.zeros((self._axes, count), dtype=np.int64)
            return Slice(ids, positions, 0, tables, spans=spans)

        # kernels are chosen by the number of tokens, and compiled anew where it is 1 or a multiple of 16
        lengths = [length for length in _REHEARSED if length < longest]
        steps = [[part(length)] for length in (*lengths, longest)]
        for parts in ([part(1), part(min(17, longest), spans)], [part(1)] * 3, *steps):
            self._compute(inputs.upload(inputs.prepare(parts)), rehearsing=True)
        for group, pad in enumerate(cache.num_blocks):
            cache.scrub(group, [pad])
        torch.cuda.synchronize(cache.device)


def _splice(embeddings: torch.Tensor, places: torch.Tensor, host: HostBatch) -> tuple[torch.Tensor, Deepstack | None]:
    """Put media rows into embeddings [T, H]; rows wider than H carry what deeper layers add."""
    width = embeddings.shape[-1]
    parts = [rows.to(embeddings.device, non_blocking=True) for rows in host.media_rows]
    rows = torch.cat([part[:, :width].to(embeddings.dtype) for part in parts])
    spliced = embeddings.index_copy(0, places, rows)
    if all(part.shape[1] == width for part in parts):
        return spliced, None
    assert host.media_places is not None
    deep = np.concatenate([np.full(len(part), part.shape[1] > width) for part in parts])
    chosen = np.flatnonzero(deep)
    order = np.argsort(host.media_places[chosen])
    index = torch.from_numpy(chosen[order]).to(embeddings.device)
    stacked = torch.cat([part[:, width:] for part in parts if part.shape[1] > width]).to(embeddings.dtype)
    stacked = stacked.index_select(0, torch.from_numpy(order).to(embeddings.device))
    layers = tuple(stacked[:, start : start + width] for start in range(0, stacked.shape[1], width))
    return spliced, Deepstack(places.index_select(0, index), layers)
