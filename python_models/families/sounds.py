"""What families with a Whisper-like front share: how long a sound may be, and mel frames without their padding."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..contract.errors import ErrorKind, TriptychError
from ..media.types import Audio, Medium


def check_sound(medium: Medium, sampling_rate: int, most: int | None, fewest: int) -> None:
    """Refuse a sound that a feature extractor would cut off, or that is too short for one token.

    Args:
        medium: of any modality; only sounds are looked at.
        sampling_rate: of the model, in Hz.
        most: samples; None is no limit.
        fewest: samples.
    """
    if not isinstance(medium.data, Audio):
        return
    count, rate = len(medium.data.samples), sampling_rate
    if medium.data.sampling_rate != rate:
        raise TriptychError(
            ErrorKind.STAGE_FAILED, f"{medium.param}: {medium.data.sampling_rate} Hz was not resampled to {rate} Hz"
        )
    if most is not None and count > most:
        raise TriptychError(
            ErrorKind.INVALID_MEDIA,
            f"{medium.param}: this sound lasts {count / rate:.1f} s; the model takes at most {most / rate:.0f} s",
            medium.param,
        )
    if count < fewest:
        raise TriptychError(
            ErrorKind.INVALID_MEDIA,
            f"{medium.param}: this sound lasts {1000 * count / rate:.1f} ms; the model needs at least "
            f"{1000 * fewest / rate:.0f} ms",
            medium.param,
        )


def without_tail(mel: NDArray[np.float32]) -> NDArray[np.float32]:
    """Mel frames [bins, frames] up to the first of those at the end that are all equal: silence that was padded."""
    differs = np.flatnonzero((mel != mel[:, -1:]).any(0))
    end = int(differs[-1]) + 2 if len(differs) else 1
    return np.ascontiguousarray(mel[:, :end])
