"""What the time of a request went to: from ``preprocess`` in the plan, from there in the last delta of the answer.

All times are Unix times in seconds, which the stages of one machine agree on, so they can be laid side by side.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class MediumTimes:
    """One medium in ``preprocess``.

    Attributes:
        modality: "image", "video" or "audio".
        num_bytes: of its file.
        start: when it was its turn.
        fetched: when its bytes were there; ``start`` where they came with the request.
        decoded: when it was decoded and hashed.
    """

    modality: str
    num_bytes: int
    start: float
    fetched: float
    decoded: float


@dataclass(frozen=True)
class PreprocessTimes:
    """A request in ``preprocess``.

    Attributes:
        arrival: there.
        media: each distinct medium, in the order in which they were ready.
        process: when chat template, tokenizer and processor began.
        end: when the tensors were made.
    """

    arrival: float
    media: tuple[MediumTimes, ...]
    process: float
    end: float

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> PreprocessTimes:
        """Inverse of ``dataclasses.asdict``."""
        media = tuple(MediumTimes(**item) for item in data["media"])
        return cls(data["arrival"], media, data["process"], data["end"])


@dataclass(frozen=True)
class Timings:
    """A whole request, up to the last token of its last choice.

    Attributes:
        preprocess: None where a caller went to ``language_model`` directly.
        arrival: at the language model.
        admitted: when it got its place among the running requests.
        first_token: of the first choice.
        end: when the last token was read.
    """

    preprocess: PreprocessTimes | None
    arrival: float
    admitted: float
    first_token: float
    end: float

    def to_json(self) -> dict[str, Any]:
        """As in the ``info`` tensor."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Timings:
        """Inverse of :meth:`to_json`."""
        before = data["preprocess"]
        return cls(**{**data, "preprocess": None if before is None else PreprocessTimes.from_json(before)})

    def seconds(self) -> dict[str, float]:
        """Name of a part -> seconds. The parts do not overlap; together they last from the first arrival to the end.

        ``fetch``: while a medium was being fetched; ``decode``: while none was, but one was being decoded;
        ``preprocess``: the rest of that stage (waiting for a place there, template, tokenizer, processor);
        ``encode``: the encoders and the way to the language model; ``queue``: waiting there, with the way to it where
        there is nothing to encode; ``prefill``: to the first token; ``generate``: from there to the end.
        """
        before = self.preprocess
        fetch = decode = preprocess = encode = 0.0
        waited_since = self.arrival
        if before is not None:
            fetch = _covered((item.start, item.fetched) for item in before.media)
            decode = _covered((item.start, item.decoded) for item in before.media) - fetch
            preprocess = max(0.0, before.end - before.arrival - fetch - decode)
            if before.media:
                encode = max(0.0, self.arrival - before.end)
            else:
                waited_since = min(before.end, self.arrival)
        return {
            "fetch": fetch,
            "decode": decode,
            "preprocess": preprocess,
            "encode": encode,
            "queue": max(0.0, self.admitted - waited_since),
            "prefill": max(0.0, self.first_token - self.admitted),
            "generate": max(0.0, self.end - self.first_token),
        }


def _covered(intervals: Iterable[tuple[float, float]]) -> float:
    """Seconds that lie in at least one of the intervals."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
