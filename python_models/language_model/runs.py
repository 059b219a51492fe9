"""Prompts of which only the encoder knows how many tokens each part of a medium has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from ..contract.plan import MediaItem


def settle(
    token_ids: NDArray[np.int64], items: Sequence[MediaItem], counts: Sequence[int]
) -> tuple[NDArray[np.int64], tuple[MediaItem, ...]]:
    """Give each run of a medium as many tokens as it has rows; the text between the runs moves.

    Args:
        token_ids: int64 [L], with some number of placeholders in each run.
        items: the media in prompt order.
        counts: rows of each run of those that have runs, one after the other.

    Returns:
        Token ids [L] and items with the spans that result.

    Raises:
        ValueError: the counts are not those of these runs.
    """
    wanted = sum(len(item.runs) for item in items)
    if len(counts) != wanted:
        raise ValueError(f"the encoder tells the length of {len(counts)} runs, but the plan has {wanted}")
    written = token_ids.copy()
    settled = []
    used = 0
    for item in items:
        if not item.runs:
            settled.append(item)
            continue
        own = counts[used : used + len(item.runs)]
        used += len(item.runs)
        if min(own) < 0 or sum(own) != item.num_tokens:
            raise ValueError(f"runs of {list(own)} rows do not fill the {item.num_tokens} tokens of a {item.modality}")
        placeholder = token_ids[item.spans[0][0]]
        # in the prompt as it was, and as it is written
        read = at = item.runs[0][0]
        runs = []
        for (start, end), count in zip(item.runs, own, strict=True):
            written[at : at + start - read] = token_ids[read:start]
            at += start - read
            written[at : at + count] = placeholder
            runs.append((at, at + count))
            at, read = at + count, end
        settled.append(replace(item, spans=tuple(run for run in runs if run[0] < run[1]), runs=tuple(runs)))
    return written, tuple(settled)
