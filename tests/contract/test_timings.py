"""Where the time of a request went: intervals that may overlap become parts that do not."""

from __future__ import annotations

import pytest

from triptych.python_models.contract.delta import Delta, Usage, merge
from triptych.python_models.contract.plan import Plan
from triptych.python_models.contract.timings import MediumTimes, PreprocessTimes, Timings

MEDIA = (
    MediumTimes("image", 10, 100.0, 101.0, 101.5),
    MediumTimes("image", 10, 100.0, 103.0, 104.0),
    # came with the request
    MediumTimes("audio", 10, 100.0, 100.0, 100.5),
)
BEFORE = PreprocessTimes(99.0, MEDIA, 104.5, 106.0)


def test_media_that_are_fetched_at_once_count_once() -> None:
    found = Timings(BEFORE, 107.0, 110.0, 111.0, 115.0).seconds()
    # 100 to 103 something was fetched, 103 to 104 something was only decoded
    assert found == {
        "fetch": 3.0,
        "decode": 1.0,
        "preprocess": 3.0,
        "encode": 1.0,
        "queue": 3.0,
        "prefill": 1.0,
        "generate": 4.0,
    }
    assert sum(found.values()) == 115.0 - 99.0


def test_between_media_that_are_far_apart_nothing_is_counted() -> None:
    apart = (MediumTimes("image", 10, 0.0, 1.0, 2.0), MediumTimes("image", 10, 5.0, 6.0, 7.0))
    found = Timings(PreprocessTimes(0.0, apart, 7.0, 8.0), 8.0, 8.0, 8.0, 8.0).seconds()
    assert (found["fetch"], found["decode"], found["preprocess"]) == (2.0, 2.0, 4.0)


def test_without_media_nothing_is_encoded() -> None:
    found = Timings(PreprocessTimes(1.0, (), 1.5, 2.0), 3.0, 5.0, 6.0, 6.0).seconds()
    assert found["encode"] == 0
    assert found["queue"] == 3.0
    assert sum(found.values()) == 5.0


def test_without_preprocess_the_rest_is_known() -> None:
    found = Timings(None, 3.0, 5.0, 6.0, 8.0).seconds()
    assert (found["preprocess"], found["queue"], found["prefill"], found["generate"]) == (0, 2.0, 1.0, 2.0)


def test_a_clock_that_was_set_back_gives_no_negative_part() -> None:
    assert min(Timings(BEFORE, 50.0, 49.0, 48.0, 47.0).seconds().values()) == 0


@pytest.mark.parametrize("before", [None, BEFORE])
def test_they_travel(before: PreprocessTimes | None) -> None:
    assert Plan.from_json(Plan(times=before).to_json()).times == before
    delta = Delta("x", (1,), finish_reason="stop", usage=Usage(1), timings=Timings(before, 1.0, 2.0, 3.0, 4.0))
    assert Delta.from_tensors(delta.to_tensors()) == delta
    assert merge(Delta("w"), delta).timings == delta.timings
