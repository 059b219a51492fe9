"""How a runner computes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...contract.settings import Settings


@dataclass(frozen=True)
class RunnerOptions:
    """Options of a :class:`~.runner.DecoderRunner`.

    Attributes:
        attention_backend, kv_cache_dtype: see :class:`~triptych.python_models.contract.settings.Settings`.
        context_length: tokens of the longest request; a block table is never longer.
        graph_batch: decode steps of up to that many tokens are replayed as CUDA graphs; 0 captures none. On a CPU
            such steps are padded in the same way and computed eagerly.
        spans: prompts have runs of tokens that attend both ways.
        window_groups: layers with a sliding window have blocks of their own, and old ones can be given back.
        saved_states: states of recurrent layers that are kept for requests that begin alike.
    """

    attention_backend: str = "auto"
    kv_cache_dtype: str = "auto"
    context_length: int = 2**17
    graph_batch: int = 0
    spans: bool = False
    window_groups: bool = True
    saved_states: int = 0

    @classmethod
    def of(cls, settings: Settings, context_length: int, device: str, *, spans: bool = False) -> RunnerOptions:
        """What ``settings`` ask for on this device."""
        graphs = settings.cuda_graphs and torch.device(device).type == "cuda"
        return cls(
            attention_backend=settings.attention_backend,
            kv_cache_dtype=settings.kv_cache_dtype,
            context_length=context_length,
            # the guesses of a single request fit in any case
            graph_batch=max(settings.max_running_requests, settings.speculative_tokens + 1) if graphs else 0,
            spans=spans,
        )
