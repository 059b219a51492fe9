"""Prompts of which only the encoder knows how many tokens each frame has."""

from __future__ import annotations

import random

import numpy as np
import pytest

from triptych.python_models.contract.plan import MediaItem
from triptych.python_models.language_model.runs import settle

PLACEHOLDER = 9


def prompt(counts, start=2, gap=3):
    """Tokens 100, 101 ... with runs of placeholders between them."""
    ids, runs, text = list(range(100, 100 + start)), [], 100 + start
    for count in counts:
        runs.append((len(ids), len(ids) + count))
        ids += [PLACEHOLDER] * count + list(range(text, text + gap))
        text += gap
    return ids, tuple(runs)


def item(runs, digest="a"):
    return MediaItem("video", digest, tuple(r for r in runs if r[0] < r[1]), "vision", runs=runs)


def test_text_keeps_its_order_and_frames_get_their_rows():
    rng = random.Random(1)
    for _ in range(50):
        total, frames = rng.randrange(1, 30), rng.randrange(1, 6)
        cuts = sorted(rng.randrange(total + 1) for _ in range(frames - 1))
        true = [b - a for a, b in zip([0, *cuts], [*cuts, total], strict=True)]
        shares = [total * (k + 1) // frames - total * k // frames for k in range(frames)]
        given, runs = prompt(shares)
        wanted, spans = prompt(true)
        picture = MediaItem("image", "p", ((0, 1),), "vision")
        found, (other, settled) = settle(np.array(given), (picture, item(runs)), true)
        assert found.tolist() == wanted
        assert settled.runs == spans
        assert settled.spans == tuple(s for s in spans if s[0] < s[1])
        assert other == picture


def test_two_videos_and_what_lies_behind_them():
    first, runs = prompt([2, 2])
    second, more = prompt([3, 1], start=4)
    later = tuple((a + len(first), b + len(first)) for a, b in more)
    found, items = settle(np.array(first + second), (item(runs), item(later, "b")), [4, 0, 1, 3])
    assert found.tolist() == prompt([4, 0])[0] + prompt([1, 3], start=4)[0]
    assert [i.num_rows for i in items] == [4, 4]


@pytest.mark.parametrize("counts", [[], [4], [1, 2], [5, -1], [2, 2, 0]])
def test_counts_that_do_not_fit_are_refused(counts):
    ids, runs = prompt([2, 2])
    with pytest.raises(ValueError, match="runs"):
        settle(np.array(ids), (item(runs),), counts)
