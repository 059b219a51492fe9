"""What a caller asks for one picture, video or sound of a request."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from . import _check as check
from .errors import invalid


@dataclass(frozen=True)
class MediaOptions:
    """What a caller asks for one medium; None is as the checkpoint and the deployment have it.

    Attributes:
        detail: of a picture, OpenAI's: "low" gives it at most 512 x 512 pixels, and one tile where there are tiles;
            "high" and "auto" change nothing.
        min_pixels, max_pixels: of a picture, once it is resized.
        min_dynamic_patch, max_dynamic_patch: tiles that a picture is cut into, beside a small one of the whole.
        fps: frames of a video for each second; not with ``num_frames``.
        num_frames: frames of a video.
        max_frames: frames of a video at most.
    """

    detail: str = "auto"
    min_pixels: int | None = None
    max_pixels: int | None = None
    min_dynamic_patch: int | None = None
    max_dynamic_patch: int | None = None
    fps: float | None = None
    num_frames: int | None = None
    max_frames: int | None = None

    @classmethod
    def from_json(cls, modality: str, data: Mapping[str, Any], where: str) -> MediaOptions:
        """Check the options of a medium.

        Args:
            modality: of the medium.
            data: option -> value; null is as if it were left out.
            where: field that holds them.

        Raises:
            TriptychError: INVALID_REQUEST naming the option.
        """
        check.known_keys(data, MEDIA_OPTIONS[modality], where)
        given: dict[str, Any] = {}
        for name, value in data.items():
            field = f"{where}.{name}"
            if value is None:
                continue
            if name == "detail":
                if value not in DETAILS:
                    raise invalid(f"{field} must be one of {', '.join(DETAILS)}, got {value!r}", field)
                given[name] = value
            elif name == "fps":
                given[name] = check.number(value, field, 0.001, 1000)
            else:
                given[name] = check.integer(value, field, 1, 2**31 - 1)
        for low, high in (("min_pixels", "max_pixels"), ("min_dynamic_patch", "max_dynamic_patch")):
            if low in given and high in given and given[low] > given[high]:
                raise invalid(
                    f"{where}.{low} must be at most {high} ({given[high]}), got {given[low]}", f"{where}.{low}"
                )
        if "fps" in given and "num_frames" in given:
            raise invalid(f"{where}: only one of fps and num_frames is allowed", f"{where}.num_frames")
        return cls(**given)

    def to_json(self) -> dict[str, Any]:
        """Those that are given."""
        return {name: value for name, value in asdict(self).items() if value != _DEFAULTS[name]}

    @property
    def key(self) -> str:
        """The same for options that ask for the same, "" for nothing."""
        return json.dumps({name: value for name, value in self.to_json().items() if value != "high"}) if self else ""

    def __bool__(self) -> bool:
        return any(value != "high" for value in self.to_json().values())


_DEFAULTS = {f.name: f.default for f in fields(MediaOptions)}
DETAILS = ("auto", "low", "high")
MEDIA_OPTIONS = {
    "image": ("detail", "min_pixels", "max_pixels", "min_dynamic_patch", "max_dynamic_patch"),
    "video": ("fps", "num_frames", "max_frames"),
    "audio": (),
}
NO_OPTIONS = MediaOptions()
