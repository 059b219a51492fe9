"""Launch table of the samplers."""

from __future__ import annotations

import torch

from .._launch import next_power_of_2, pdl
from .kernel import _BINS, _best_kernel, _count_kernel, _draw_kernel, _gather_kernel, _merge_kernel, _window_kernel

# most rows -> logits of a chunk. Few rows: many chunks, so that every SM reads
_CHUNKS = ((8, 1024), (32, 2048), (1 << 62, 4096))
# the same for drawing, whose programs take more registers
_DRAW_CHUNKS = ((8, 1024), (1 << 62, 2048))
# what the list between the brackets holds of a row: with more in between, as in rows almost flat, one program reads the
# whole row again and again. Items of it that stay in registers, and the warps that hold them
_ROOM, _TILE, _WARPS = 16384, 4096, 16


def _chunk(rows: int, table: tuple[tuple[int, int], ...]) -> int:
    return next(chunk for most, chunk in table if rows <= most)


def _best(logits: torch.Tensor, chunk: int, tally: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest logit of each chunk of each row, float32 [N, chunks], and its token, int32; zeros in ``tally``."""
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
        tally,
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
        values, tokens = _best(logits, _chunk(rows, _CHUNKS))
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
    chunk: int | None = None,
    tile: int = _TILE,
    room: int = _ROOM,
) -> torch.Tensor:
    """See :func:`triptych.kernels.sampling.draw`; chunk, tile, room (powers of two): for tests."""
    rows, vocabulary = logits.shape
    device = logits.device
    out = torch.empty(rows, dtype=torch.int64, device=device)
    if not rows:
        return out
    chunk = chunk or _chunk(rows, _DRAW_CHUNKS)
    tally = torch.empty((rows, _BINS.value + 1), dtype=torch.int32, device=device)
    values, tokens = _best(logits, chunk, tally)
    chunks = values.shape[1]
    flag = pdl(logits)
    sizes = (logits.stride(0), vocabulary, chunks)
    warps = 4 if chunk <= 1024 else 8
    options = {"BLOCK": next_power_of_2(chunks), "CHUNK": chunk, "PDL": flag, "launch_pdl": flag}
    _count_kernel[(rows, chunks)](
        logits, values, tokens, temperature, top_k, top_p, tally, *sizes, **options, num_warps=warps
    )
    bounds = torch.empty((rows, 4), dtype=torch.int32, device=device)
    _window_kernel[(rows,)](top_k, top_p, min_p, tally, bounds, vocabulary, PDL=flag, num_warps=4, launch_pdl=flag)
    sums = torch.empty((rows, 2, chunks), dtype=torch.int64, device=device)
    listed = torch.empty((rows, 2, room), dtype=torch.int32, device=device)
    _gather_kernel[(rows, chunks)](
        logits,
        values,
        tokens,
        temperature,
        top_k,
        tally,
        bounds,
        sums,
        listed,
        *sizes,
        ROOM=room,
        **options,
        num_warps=warps,
    )
    _draw_kernel[(rows,)](
        logits,
        values,
        tokens,
        temperature,
        top_k,
        top_p,
        min_p,
        uniform,
        tally,
        bounds,
        sums,
        listed,
        out,
        *sizes,
        ROOM=room,
        TILE=tile,
        **options,
        num_warps=_WARPS,
    )
    return out
