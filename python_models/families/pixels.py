"""Pixels travel between processes as bytes and are normalised by the encoder, with the processor's own values."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image as PILImage
from torch.nn.functional import interpolate

from ...kernels.image import normalise_patchify
from ..contract.errors import ErrorKind, TriptychError

_MOST = 2.0
"""Pixels of a picture as it came for each that is left after resizing, where the encoder resizes."""

RAW = {"do_rescale": False, "do_normalize": False}
"""Options of an image or video processor that leave pixels as they are."""


def check_bytes(processor: Any, output: str = "pixel_values") -> None:
    """Refuse an image processor that does not keep pixels as bytes, and have it read pictures in place.

    Args: it; what it calls pixels.

    This is also the first call of lazily imported code, which would otherwise delay the first request.
    """
    probe = processor(PILImage.new("RGB", (64, 64)), return_tensors="pt", **RAW)
    if probe[output].dtype != torch.uint8:
        raise TriptychError(
            ErrorKind.UNSUPPORTED,
            f"{type(processor).__name__} does not keep pixels as uint8: install torchvision, with which transformers "
            "uses its torchvision image processors",
        )
    take_pictures_in_place(processor)


def normalisation(processor: Any, modality: str) -> tuple[NDArray[Any], NDArray[Any]]:
    """Mean and std in units of pixel values, float32 [channels], as the processor itself fuses them."""
    if not (processor.do_rescale and processor.do_normalize):
        raise TriptychError(
            ErrorKind.UNSUPPORTED,
            f"the checkpoint's {modality} processor must have do_rescale and do_normalize on",
            "settings.model",
        )
    factor = 1.0 / processor.rescale_factor
    mean, std = torch.tensor(processor.image_mean) * factor, torch.tensor(processor.image_std) * factor
    return mean.numpy(), std.numpy()


def take_pictures_in_place(processor: Any) -> bool:
    """Have an image processor read RGB pictures in the order that they have in memory, [height, width, channels].

    It would first copy them to [channels, height, width]. torchvision resizes either, with the same values, and the
    first one in half the time.

    Returns:
        Whether it does so now; where its results would differ, it is left as it was.
    """
    own = type(processor)
    if not hasattr(own, "process_image"):
        return False

    def process_image(self: Any, image: Any, *arguments: Any, **options: Any) -> Any:
        if isinstance(image, PILImage.Image) and image.mode == "RGB" and options.get("device") is None:
            return torch.from_numpy(np.array(image)).permute(2, 0, 1)
        return own.process_image(self, image, *arguments, **options)

    pictures = [probe(*size) for size in ((64, 64), (300, 75), (75, 300), (1100, 900))]

    def results() -> list[dict[str, Any]]:
        return [dict(processor([picture], return_tensors="pt", **RAW)) for picture in pictures]

    if not isinstance(processor.process_image(pictures[0]), torch.Tensor):
        return False
    return _derive_if_equal(processor, results, process_image=process_image)


def take_videos_in_place(processor: Any) -> bool:
    """The same for frames, uint8 [frames, height, width, channels] in an array, of a video processor."""
    own = type(processor)
    if not hasattr(own, "_prepare_input_videos"):
        return False

    def prepare(self: Any, videos: Any, **options: Any) -> Any:
        plain = options.get("device") is None and options.get("input_data_format") == "channels_last"
        if plain and all(isinstance(v, np.ndarray) and v.dtype == np.uint8 and v.shape[3:] == (3,) for v in videos):
            return [torch.from_numpy(video).permute(0, 3, 1, 2) for video in videos]
        return own._prepare_input_videos(self, videos=videos, **options)

    clips = [np.stack([np.array(probe(*size))] * 4) for size in ((64, 64), (300, 75), (640, 480))]
    options = {"return_tensors": "pt", "do_sample_frames": False, "input_data_format": "channels_last", **RAW}

    def results() -> list[dict[str, Any]]:
        return [dict(processor([clip], **options)) for clip in clips]

    return _derive_if_equal(processor, results, _prepare_input_videos=prepare)


def keep_pictures_whole(processor: Any) -> bool:
    """Have an image processor of the Qwen-VL line give whole pictures where it would cut patches, if it can be done.

    Afterwards ``pixel_values`` [patches, channels * patch pixels] is, picture by picture, the memory of uint8
    [height, width, channels]; cutting it is the encoder's work (``kernels.image.normalise_patchify``).

    Returns:
        Whether it does so now; where its patches are not those of that kernel, it is left as it was.
    """
    own = type(processor)
    if not hasattr(own, "patchify"):
        return False
    side = 2 * processor.patch_size * processor.merge_size
    picture = probe(side, 2 * side)
    options = {"return_tensors": "pt", "do_resize": False, **RAW}
    expected = processor(picture, **options)["pixel_values"]

    def whole(self: Any, images: torch.Tensor, patch_size: int, *_: Any, **__: Any) -> tuple[torch.Tensor, int, int]:
        grid_h, grid_w = images.shape[-2] // patch_size, images.shape[-1] // patch_size
        # no copy where the picture has kept its order in memory
        return images.permute(0, 2, 3, 1).reshape(len(images), grid_h * grid_w, -1), grid_h, grid_w

    _derive(processor, patchify=whole)
    found = processor(picture, **options)["pixel_values"].reshape(2 * side, side, 3)
    ones = torch.ones(3)
    cut = normalise_patchify(
        found,
        ones - 1,
        ones,
        processor.patch_size,
        processor.merge_size,
        processor.temporal_patch_size,
        torch.float32,
    )
    if cut.shape == expected.shape and torch.equal(cut, expected.float()):
        return True
    processor.__class__ = own
    return False


class PictureSizes:
    """Stands before an image processor of the Qwen-VL line: pictures keep their size, and only grids are computed.

    What is far larger than the tower will see it goes through the processor itself, as do other calls.
    """

    def __init__(self, processor: Any) -> None:
        self._processor = processor
        self._resized = sys.modules[_origin(processor).__module__].smart_resize
        # GLM's rule counts frames, of which a picture has as many as a patch
        counts_frames = "num_frames" in inspect.signature(self._resized).parameters
        frames = processor.temporal_patch_size
        self._frames = {"num_frames": frames, "temporal_factor": frames} if counts_frames else {}

    @staticmethod
    def fits(processor: Any) -> bool:
        """Whether a processor resizes by the rule of the Qwen-VL line, with the filter that :func:`resized` uses."""
        plain = processor.do_resize and int(processor.resample) == int(PILImage.Resampling.BICUBIC)
        return plain and hasattr(sys.modules[_origin(processor).__module__], "smart_resize")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._processor, name)

    def __call__(self, images: Any, **options: Any) -> Mapping[str, Any]:
        """As the processor; where every picture may keep its size, ``pixel_values`` has no rows."""
        own = self._processor
        flat = images if isinstance(images, list) else [images]
        if set(options) - {"return_tensors", *RAW} or not all(isinstance(image, PILImage.Image) for image in flat):
            return dict(own(images, **options))
        grids = []
        for image in flat:
            height, width = self._resized(
                **self._frames,
                height=image.height,
                width=image.width,
                factor=own.patch_size * own.merge_size,
                min_pixels=own.size["shortest_edge"],
                max_pixels=own.size["longest_edge"],
            )
            if not small_enough(image, height, width):
                return dict(own(images, **options))
            grids.append([1, height // own.patch_size, width // own.patch_size])
        return {"pixel_values": torch.empty(0, dtype=torch.uint8), "image_grid_thw": torch.tensor(grids)}


def small_enough(picture: PILImage.Image, height: int, width: int) -> bool:
    """Whether the encoder should get a picture as it is and resize it: moving far more pixels takes longer."""
    return picture.height * picture.width <= _MOST * height * width


def resized(picture: torch.Tensor, height: int, width: int, mode: str = "bicubic") -> torch.Tensor:
    """A picture of another size by interpolation with antialiasing, as torchvision resizes on a GPU.

    On a CPU torchvision computes in whole numbers: values differ by one step of 255 at most, now and then by two.

    Args:
        picture: uint8 [H, W, C].
        height, width: wanted.
        mode: "bicubic" or "bilinear".

    Returns:
        uint8 [height, width, C], contiguous.
    """
    if tuple(picture.shape[:2]) == (height, width):
        return picture
    planes = picture.permute(2, 0, 1)[None].float()
    # along rows first, and bytes in between: so the whole numbers do it, and sharp edges would show another order
    for size in ((picture.shape[0], width), (height, width)):
        planes = interpolate(planes, size=size, mode=mode, antialias=True, align_corners=False).round_().clamp_(0, 255)
    return planes[0].to(torch.uint8).permute(1, 2, 0).contiguous()


def probe(width: int, height: int) -> PILImage.Image:
    """A picture of noise, always the same."""
    pixels = torch.randint(0, 256, (height, width, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return PILImage.fromarray(pixels.numpy())


def equal(one: Any, other: Any) -> bool:
    """Whether results of a processor are the same."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, Mapping):
        return set(one) == set(other) and all(equal(value, other[name]) for name, value in one.items())
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(equal(a, b) for a, b in zip(one, other, strict=True))
    return bool(one == other)


def _derive(processor: Any, **methods: Any) -> None:
    """Give one processor methods of its own; by class, as what it holds is part of its options, by which results are
    known.
    """
    own = type(processor)
    processor.__class__ = type(own.__name__, (own,), {**methods, "__module__": own.__module__})


def _derive_if_equal(processor: Any, results: Callable[[], Any], **methods: Any) -> bool:
    """The same if its results stay what they are, bit for bit; otherwise it is left as it was."""
    own, expected = type(processor), results()
    _derive(processor, **methods)
    try:
        if equal(results(), expected):
            return True
    except (RuntimeError, ValueError, TypeError):
        pass  # its own code cannot work on what the new methods give
    processor.__class__ = own
    return False


def _origin(processor: Any) -> type:
    """The class of transformers behind those of :func:`_derive`."""
    own = type(processor)
    while own.__mro__[1].__name__ == own.__name__:
        own = own.__mro__[1]
    return own
