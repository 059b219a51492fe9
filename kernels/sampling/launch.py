"""Launch table of the samplers."""

from __future__ import annotations

import torch

from .._launch import next_power_of_2, pdl
from .kernel import _best_kernel, _draw_kernel, _merge_kernel

# most rows -> logits of a chunk. Few rows: many chunks, so that every SM reads
_CHUNKS = ((8, 1024), (32, 2048), (1 << 62, 4096))
# the drawing kernel bounds the k-th largest logit by the k-th largest chunk: small chunks are better bounds
_DRAW_CHUNK = 1024
# logits that a program of the drawing kernel holds at once, and its warps
_TILE, _WARPS = 4096, 8


def _best(logits: torch.Tensor, chunk: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest logit of each chunk of each row, float32 [N, chunks], and its token, int32."""
    if logits.stride(1) != 1:
        raise ValueError("logits of a row must lie next to each other")
    rows, vocabulary = logits.shape
    chunks = -(-vocabulary // chunk)
    values = torch.empty((rows, chunks), dtype=torch.float32, device=logits.device)
    tokens = torch.empty((rows, chunks), dtype=torch.int32, device=logits.device)
    flag = pdl(logits)
    _best_kernel[(rows, chunks)](
        logits,
        values,
        tokens,
        logits.stride(0),
        vocabulary,
        chunks,
        CHUNK=chunk,
        PDL=flag,
        num_warps=4,
        launch_pdl=flag,
    )
    return values, tokens


def launch_greedy(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`triptych.kernels.sampling.greedy`."""
    rows = len(logits)
    out = torch.empty(rows, dtype=torch.int64, device=logits.device)
    usable = torch.empty(rows, dtype=torch.bool, device=logits.device)
    if rows:
        values, tokens = _best(logits, next(chunk for most, chunk in _CHUNKS if rows <= most))
        chunks = values.shape[1]
        flag = pdl(logits)
        _merge_kernel[(rows,)](
            values,
            tokens,
            out,
            usable,
            chunks,
            BLOCK=next_power_of_2(chunks),
            PDL=flag,
            num_warps=1 if chunks <= 256 else 4,
            launch_pdl=flag,
        )
    return out, usable


def launch_draw(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    uniform: torch.Tensor,
    *,
    chunk: int = _DRAW_CHUNK,
    tile: int = _TILE,
    warps: int = _WARPS,
) -> torch.Tensor:
    """See :func:`triptych.kernels.sampling.draw`; chunk, tile (powers of two), warps: for tests and tuning."""
    rows, vocabulary = logits.shape
    out = torch.empty(rows, dtype=torch.int64, device=logits.device)
    if rows:
        values, tokens = _best(logits, chunk)
        chunks = values.shape[1]
        flag = pdl(logits)
        _draw_kernel[(rows,)](
            logits,
            values,
            tokens,
            temperature,
            top_k,
            top_p,
            min_p,
            uniform,
            torch.empty((rows, tile), dtype=torch.int32, device=logits.device),
            out,
            logits.stride(0),
            vocabulary,
            chunks,
            BLOCK=next_power_of_2(chunks),
            TILE=tile,
            PDL=flag,
            num_warps=warps,
            launch_pdl=flag,
        )
    return out
