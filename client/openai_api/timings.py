"""What the time of an answer went to, as ``return_timings: true`` asks for it."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

from triptych.python_models.contract.delta import Delta
from triptych.python_models.contract.errors import ErrorKind, TriptychError
from triptych.python_models.contract.timings import Timings


def report(deltas: Iterable[Delta], arrival: float, num_choices: int = 1) -> dict[str, Any]:
    """The object ``timings`` of an answer that is complete.

    Args:
        deltas: those of the answer, the last one among them.
        arrival: of the HTTP request, by ``time.perf_counter``.
        num_choices: of the answer.

    Returns:
        Milliseconds by part (see ``Timings.seconds``); ``total_ms`` from the request's arrival to now; and
        ``tokens_per_second``, the tokens behind the first of each choice by the time in which they came, None where
        there are none.

    Raises:
        TriptychError: STAGE_FAILED where the server did not say.
    """
    for delta in deltas:
        if delta.timings is not None:
            return _report(delta.timings, delta, arrival, num_choices)
    raise TriptychError(ErrorKind.STAGE_FAILED, "the server's answer lacks timings", stage="language_model")


def _report(timings: Timings, last: Delta, arrival: float, num_choices: int) -> dict[str, Any]:
    seconds = timings.seconds()
    found: dict[str, Any] = {f"{name}_ms": _ms(value) for name, value in seconds.items()}
    found["total_ms"] = _ms(time.perf_counter() - arrival)
    later = last.usage.completion_tokens - num_choices if last.usage is not None else 0
    generate = seconds["generate"]
    found["tokens_per_second"] = round(later / generate, 2) if later > 0 and generate > 0 else None
    return found


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)
