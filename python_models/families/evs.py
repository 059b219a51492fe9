"""Efficient Video Sampling (Bagrov et al. 2025, arXiv:2510.14624): leave out what changes least from frame to frame.

How many tokens stay of a video is known before its frames are encoded, so its prompt is written that short, an equal
share for each frame. Which ones stay is known behind the encoder, which keeps their rows alone and tells how many each
frame has; the language model then moves the text between the frames accordingly
(:func:`triptych.python_models.language_model.runs.settle`). The text itself, the prompt's length and what comes after
the video do not change. This needs positions that only count tokens. Nemotron's checkpoints say in their configuration
how much to leave out.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ...kernels.evs import frame_similarity, keep_mask, num_kept
from ..contract.errors import ErrorKind, TriptychError
from ..contract.features import EncoderItem
from ..contract.plan import MediaItem
from ..contract.settings import Settings
from .base import PrunedRows

TENSOR = "pruning"
"""Name of the tensor that tells the encoder of it: float64 [rate, frames, rows, columns]."""
Grid = tuple[int, int, int]
"""Frames of a video, rows and columns of the tokens of each."""


def square(frames: int, rows: int) -> Grid:
    """The grid of a video all of whose frames have as many tokens, in a square."""
    side = math.isqrt(rows // frames)
    if frames * side * side != rows:
        raise TriptychError(ErrorKind.STAGE_FAILED, f"{rows} rows are not those of {frames} square frames")
    return frames, side, side


def pruning_rate(settings: Settings, config: Any, *, possible: bool) -> float:
    """Share of a video's tokens to leave out: the option's, else the checkpoint's own; 0 for none.

    Raises:
        TriptychError: UNSUPPORTED, where it is not ``possible`` but asked for.
    """
    rate = float(settings.video_pruning_rate or getattr(config, "video_pruning_rate", None) or 0)
    if rate and not possible:
        raise TriptychError(
            ErrorKind.UNSUPPORTED,
            f"video_pruning_rate {rate:g}: tokens of videos can only be left out where positions count tokens and each "
            "frame has tokens of its own, which is not so in this model; it must be 0",
            "settings.video_pruning_rate",
        )
    return rate


def shorten(
    ids: NDArray[np.int32],
    items: Sequence[MediaItem],
    features: dict[str, list[EncoderItem]],
    grid_of: Callable[[EncoderItem], Grid],
    rate: float,
) -> tuple[NDArray[np.int32], tuple[MediaItem, ...], dict[str, list[EncoderItem]]]:
    """Write a prompt with fewer tokens for its videos.

    Args:
        ids: int32 [L].
        items: the media in prompt order; rows of a video go frame by frame.
        features: of each encoder, its items in the same order.
        grid_of: of a video.
        rate: share to leave out.

    Returns:
        The same of the shorter prompt; frames have about equal shares.
    """
    keep = np.ones(len(ids), dtype=np.bool_)
    queues = {encoder: iter(own) for encoder, own in features.items()}
    grids: list[Grid | None] = []
    shorter: dict[str, list[EncoderItem]] = {encoder: [] for encoder in features}
    for item in items:
        encoded = next(queues[item.encoder])
        grid = grid_of(encoded) if item.modality == "video" else None
        grids.append(grid)
        if grid is not None:
            area, places = grid[1] * grid[2], _places(item)
            for start, count in zip(range(0, len(places), area), _shares(grid, rate), strict=True):
                keep[places[start + count : start + area]] = False
            encoded = EncoderItem(
                encoded.modality,
                _digest(item, rate),
                num_kept(grid[0], area, rate),
                encoded.tensors | {TENSOR: np.array([rate, *grid], dtype=np.float64)},
            )
        shorter[item.encoder].append(encoded)
    # tokens before each place that remain
    before = np.concatenate([[0], keep.cumsum()])
    written = []
    for item, grid in zip(items, grids, strict=True):
        if grid is None:
            spans = tuple((int(before[start]), int(before[end])) for start, end in item.spans)
            written.append(replace(item, spans=spans))
            continue
        starts = before[_places(item)[:: grid[1] * grid[2]]].tolist()
        runs = tuple((start, start + count) for start, count in zip(starts, _shares(grid, rate), strict=True))
        spans = tuple(run for run in runs if run[0] < run[1])
        written.append(replace(item, digest=_digest(item, rate), spans=spans, runs=runs))
    return ids[keep], tuple(written), shorter


def prune(rows: torch.Tensor, pruning: NDArray[np.generic]) -> PrunedRows:
    """Keep what changes most.

    Args:
        rows: [frames * rows * columns, H].
        pruning: see `TENSOR`.
    """
    rate, *grid = (float(value) for value in pruning)
    frames, height, width = (int(size) for size in grid)
    similarity = frame_similarity(rows.reshape(frames, height, width, -1).contiguous())
    # by 1 - similarity, as published: what that rounds to the same counts as equally similar
    mask = keep_mask(-(1 - similarity), rate)
    return PrunedRows(rows[mask.flatten()], tuple(mask.flatten(1).sum(1).tolist()))


def _shares(grid: Grid, rate: float) -> list[int]:
    """Tokens of each frame before anybody knows which ones stay: about the same for all, never more than it has."""
    kept = num_kept(grid[0], grid[1] * grid[2], rate)
    return [kept * (frame + 1) // grid[0] - kept * frame // grid[0] for frame in range(grid[0])]


def _places(item: MediaItem) -> NDArray[np.int64]:
    return np.concatenate([np.arange(start, end) for start, end in item.spans])


def _digest(item: MediaItem, rate: float) -> str:
    return hashlib.blake2b(f"{item.digest}:{rate!r}".encode(), digest_size=32).hexdigest()
