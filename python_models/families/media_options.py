"""What a caller may ask for one medium, and an operator for all: sizes of pictures, tiles, frames of videos."""

from __future__ import annotations

import inspect
import math
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image as PILImage

from ..contract.errors import invalid
from ..contract.request import MediaOptions
from .base import FrameSampling

LOW_DETAIL_PIXELS = 512 * 512
"""Of a picture with ``detail: low``."""


def sampling_of(own: FrameSampling, options: MediaOptions) -> FrameSampling:
    """How a video is sampled. Args: as its family does it; what is asked for."""
    if options.fps is not None:
        own = replace(own, fps=options.fps, num_frames=None, fps_until=())
    if options.num_frames is not None:
        own = replace(own, num_frames=options.num_frames)
    most = options.max_frames
    if most is None:
        return own
    return replace(
        own,
        min_frames=min(own.min_frames, most),
        max_frames=min(own.max_frames, most),
        num_frames=None if own.num_frames is None else min(own.num_frames, most),
    )


def pixel_rule(processor: Any) -> Any:
    """The function by which an image processor of the Qwen-VL line gives a picture its size, or None.

    Such processors count pixels: ``size`` has the least and most of them as shortest and longest edge.
    """
    size = getattr(processor, "size", None)
    if size is None or "shortest_edge" not in size or "longest_edge" not in size:
        return None
    for own in type(processor).__mro__:
        if (rule := getattr(sys.modules[own.__module__], "smart_resize", None)) is not None:
            return rule
    return None


def counts_frames(rule: Any) -> bool:
    """Whether such a function counts the pixels of all frames of a video together."""
    return rule is not None and "num_frames" in inspect.signature(rule).parameters


def smaller_frames(frames: NDArray[np.uint8], most: int) -> NDArray[np.uint8]:
    """Frames [T, H, W, 3] of at most so many pixels each, in proportion."""
    height, width = frames.shape[1:3]
    if height * width <= most:
        return frames
    scale = math.sqrt(most / (height * width))
    size = max(math.floor(width * scale), 1), max(math.floor(height * scale), 1)
    pictures = (PILImage.fromarray(frame).resize(size, PILImage.Resampling.BICUBIC) for frame in frames)
    return np.stack([np.asarray(picture) for picture in pictures])


def low_detail(processor: Any) -> int:
    """Pixels of a picture of low detail, not less than the processor leaves to any."""
    if pixel_rule(processor) is None:
        return LOW_DETAIL_PIXELS
    return max(LOW_DETAIL_PIXELS, int(processor.size["shortest_edge"]))


def fit(processor: Any, picture: PILImage.Image, least: int | None, most: int | None, where: str) -> PILImage.Image:
    """A picture with so many pixels as are asked for.

    One for a processor of the Qwen-VL line gets the very size, and values, that this processor would give it with these
    bounds; for others it is only made smaller or larger, in proportion.

    Args:
        processor: the image processor that it goes to next.
        picture: RGB.
        least, most: pixels; None: as the processor has it.
        where: field of the request.

    Raises:
        TriptychError: INVALID_REQUEST where the processor's own bounds leave nothing between these.
    """
    rule = pixel_rule(processor)
    if rule is None:
        pixels = picture.width * picture.height
        wanted = min(max(pixels, least or 0), most or sys.maxsize)
        if wanted == pixels:
            return picture
        scale, whole = math.sqrt(wanted / pixels), math.floor if wanted < pixels else math.ceil
        size = max(whole(picture.width * scale), 1), max(whole(picture.height * scale), 1)
        return picture.resize(size, PILImage.Resampling.BICUBIC)
    low, high = int(processor.size["shortest_edge"]), int(processor.size["longest_edge"])
    least, most = max(least or 0, low), min(most or sys.maxsize, high)
    if least > most:
        raise invalid(f"{where}: min_pixels and max_pixels must leave sizes between {low} and {high} pixels", where)
    frames = int(processor.temporal_patch_size)
    extra = {"num_frames": frames, "temporal_factor": frames} if counts_frames(rule) else {}
    factor = processor.patch_size * processor.merge_size
    height, width = rule(
        **extra, height=picture.height, width=picture.width, factor=factor, min_pixels=least, max_pixels=most
    )
    if (width, height) == picture.size:
        return picture
    from transformers.image_processing_backends import TorchvisionBackend
    from transformers.image_utils import SizeDict

    # its own method would apply the rule with its own bounds
    planes = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    sides = SizeDict(height=height, width=width)
    resized = TorchvisionBackend.resize(processor, planes, sides, resample=processor.resample)
    return PILImage.fromarray(resized.permute(1, 2, 0).contiguous().numpy())
