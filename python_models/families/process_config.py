"""``--mm-process-config``: what an operator asks of the processing of pictures, videos and sounds."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..contract import _check as check
from ..contract.errors import TriptychError, invalid
from ..contract.request import MediaOptions
from ..contract.settings import Settings
from .base import FrameSampling, refuse_modality
from .media_options import counts_frames, pixel_rule, sampling_of

PARTS = {"image": "image_processor", "video": "video_processor", "audio": "feature_extractor"}
"""Modality -> attribute of a processor."""
_WHERE = "settings.mm_process_config"
_BOUNDS = {"min_pixels": "shortest_edge", "max_pixels": "longest_edge"}
_BOUNDS_OF_ALL_FRAMES = {"total_pixels": "longest_edge"}
# options that the families themselves act upon, whatever the processor
_OWN: Mapping[str, tuple[str, ...]] = {
    "image": ("min_pixels", "max_pixels"),
    "video": ("fps", "num_frames", "min_frames", "max_frames", "max_pixels"),
    "audio": ("max_seconds",),
}
# those of processors that decide how large or how many the pieces are that a tower sees; never what it was built for
_OF_PROCESSORS: Mapping[str, tuple[str, ...]] = {
    "image": (
        *("size", "min_patches", "max_patches", "max_slice_nums", "slice_mode", "dynamic_hd"),
        *("in_token_limit", "min_num_patches", "max_num_patches", "do_image_splitting"),
    ),
    "video": (
        *("size", "max_video_tokens", "cap_pixels_per_frame", "max_slice_nums", "slice_mode", "frame_slice_nums"),
        *("max_patches", "video_target_num_patches"),
    ),
    "audio": (),
}


@dataclass(frozen=True)
class ProcessConfig:
    """The sections of the option.

    Attributes:
        sections: modality -> option -> value.
    """

    sections: Mapping[str, Mapping[str, Any]]

    @classmethod
    def of(cls, settings: Settings) -> ProcessConfig:
        """The settings' (whose form has been checked); values that are the same for all families are checked here.

        Raises:
            TriptychError: INVALID_REQUEST naming section and option.
        """
        sections = json.loads(settings.mm_process_config or "{}")
        image, video, audio = (sections.get(modality, {}) for modality in PARTS)
        bounds = {name: image[name] for name in _OWN["image"] if name in image}
        frames = {name: video[name] for name in ("fps", "num_frames", "max_frames") if name in video}
        try:
            MediaOptions.from_json("image", bounds, f"{_WHERE}.image")
            MediaOptions.from_json("video", frames, f"{_WHERE}.video")
            if "max_pixels" in video:
                check.integer(video["max_pixels"], f"{_WHERE}.video.max_pixels", 1)
            if "min_frames" in video:
                check.integer(video["min_frames"], f"{_WHERE}.video.min_frames", 1, video.get("max_frames", 2**31))
            if "max_seconds" in audio:
                check.number(audio["max_seconds"], f"{_WHERE}.audio.max_seconds", 0.1)
        except TriptychError as error:
            raise replace(error, param=_WHERE) from None
        return cls(sections)

    def apply(self, processor: Any, name: str, modalities: Iterable[str]) -> None:
        """Change a checkpoint's processor.

        Args:
            processor: with the parts that :data:`PARTS` names.
            name: of the family.
            modalities: that it takes.

        Raises:
            TriptychError: UNSUPPORTED for a modality, INVALID_REQUEST for an option that is not known here.
        """
        for modality, options in self.sections.items():
            if not options:
                continue
            if modality not in modalities:
                raise replace(refuse_modality(f"{_WHERE}.{modality}", modality, name, modalities), param=_WHERE)
            part: Any = getattr(processor, PARTS[modality], None)
            changes: dict[str, Any] = {}
            bounds = _bounds(part, modality)
            for option, value in options.items():
                where = f"{_WHERE}.{modality}.{option}"
                if option in bounds:
                    edge = _value(1, value, where)
                    changes["size"] = {**dict(part.size), **changes.get("size", {}), bounds[option]: edge}
                elif option in _OWN[modality]:
                    continue
                elif option in (known := _known(part, modality)):
                    changes[option] = _value(getattr(part, option), value, where)
                else:
                    allowed = sorted({*_OWN[modality], *known, *bounds})
                    raise invalid(
                        f"{where}: the {modality} processing of {name} has no such option; allowed: "
                        f"{', '.join(allowed)}",
                        _WHERE,
                    )
            _change(processor, part, modality, changes)

    def bounds(self, processor: Any) -> tuple[int | None, int | None]:
        """Least and most pixels of a picture, where the image processor itself does not see to them."""
        image = self.sections.get("image", {})
        if pixel_rule(processor) is not None:
            return None, None
        return image.get("min_pixels"), image.get("max_pixels")

    def frame_pixels(self, processor: Any) -> int | None:
        """Most pixels of a frame, where the video processor itself does not see to them."""
        if "max_pixels" in _bounds(processor, "video"):
            return None
        return self.sections.get("video", {}).get("max_pixels")

    def sampling(self, own: FrameSampling) -> FrameSampling:
        """How videos are sampled. Args: as the family does it."""
        video = self.sections.get("video", {})
        given = {name: video[name] for name in ("fps", "num_frames") if name in video}
        if "max_frames" in video:
            own = replace(own, max_frames=video["max_frames"])
            given["max_frames"] = video["max_frames"]
        if "min_frames" in video:
            own = replace(own, min_frames=video["min_frames"], max_frames=max(own.max_frames, video["min_frames"]))
        return sampling_of(own, MediaOptions(**given))

    @property
    def max_seconds(self) -> float | None:
        """Longer sounds are cut to this length."""
        return self.sections.get("audio", {}).get("max_seconds")

    def key(self, modality: str) -> str:
        """Changes whenever what is asked for a modality does; "" for nothing."""
        options = self.sections.get(modality)
        return json.dumps(options, sort_keys=True) if options else ""


def _bounds(part: Any, modality: str) -> Mapping[str, str]:
    """Option -> edge of the size of a processor that counts pixels."""
    rule = pixel_rule(part)
    if rule is None or modality == "audio":
        return {}
    return _BOUNDS_OF_ALL_FRAMES if modality == "video" and counts_frames(rule) else _BOUNDS


def _known(part: Any, modality: str) -> tuple[str, ...]:
    """What a part of a processor has of the options that may be changed."""
    names = [name for name in _OF_PROCESSORS[modality] if getattr(part, name, None) is not None]
    # a height and a width, or a shortest edge alone, are those of the tower
    if "size" in names and not any(edge in dict(part.size) for edge in ("longest_edge", "max_height")):
        names.remove("size")
    return tuple(names)


def _value(own: Any, value: Any, where: str) -> Any:
    """A value of the type of the one it takes the place of."""
    try:
        if isinstance(own, bool):
            return check.boolean(value, where)
        if isinstance(own, int):
            return check.integer(value, where, 1)
        size = dict(own)
        given = check.mapping(value, where)
        check.known_keys(given, size, where)
        return size | {edge: check.integer(length, f"{where}.{edge}", 1) for edge, length in given.items()}
    except TriptychError as error:
        raise replace(error, param=_WHERE) from None


def _change(processor: Any, part: Any, modality: str, changes: dict[str, Any]) -> None:
    if not changes:
        return
    if "size" in changes:
        size = changes["size"]
        if "shortest_edge" in size and "longest_edge" in size and size["shortest_edge"] > size["longest_edge"]:
            raise invalid(
                f"{_WHERE}.{modality}: at least {size['shortest_edge']} and at most {size['longest_edge']} pixels are "
                "no range",
                _WHERE,
            )
    if dataclasses.is_dataclass(part) and not isinstance(part, type):
        changed = replace(part, **changes)
        # one object may stand for several parts
        for attribute in PARTS.values():
            if getattr(processor, attribute, None) is part:
                setattr(processor, attribute, changed)
        return
    for option, value in changes.items():
        setattr(part, option, type(getattr(part, option))(**value) if option == "size" else value)
