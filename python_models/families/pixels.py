"""Pixels travel between processes as bytes and are normalised by the encoder, with the processor's own values."""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray
from PIL import Image as PILImage

from ...kernels.image import normalise_patchify
from ..contract.errors import ErrorKind, TriptychError

RAW = {"do_rescale": False, "do_normalize": False}
"""Options of an image or video processor that leave pixels as they are."""


def check_bytes(processor: Any) -> None:
    """Refuse an image processor that does not keep pixels as bytes.

    This is also the first call of lazily imported code, which would otherwise delay the first request.
    """
    probe = processor(PILImage.new("RGB", (64, 64)), return_tensors="pt", **RAW)
    if probe["pixel_values"].dtype != torch.uint8:
        raise TriptychError(
            ErrorKind.UNSUPPORTED,
            f"{type(processor).__name__} does not keep pixels as uint8: install torchvision, with which transformers "
            "uses its torchvision image processors",
        )


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


def keep_pictures_whole(processor: Any) -> bool:
    """Have an image processor of the Qwen-VL line give whole pictures where it would cut patches, if it can be done.

    Afterwards ``pixel_values`` [patches, channels * patch pixels] is, picture by picture, the memory of uint8
    [channels, height, width]; cutting it is the encoder's work (``kernels.image.normalise_patchify``).

    Returns:
        Whether it does so now; where its patches are not those of that kernel, it is left as it was.
    """
    if not hasattr(type(processor), "patchify"):
        return False
    side = 2 * processor.patch_size * processor.merge_size
    pixels = torch.randint(0, 256, (2 * side, side, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    options = {"return_tensors": "pt", "do_resize": False, **RAW}
    expected = processor(pixels.permute(2, 0, 1), **options)["pixel_values"]
    own = type(processor)

    def whole(self: Any, images: torch.Tensor, patch_size: int, *_: Any, **__: Any) -> tuple[torch.Tensor, int, int]:
        grid_h, grid_w = images.shape[-2] // patch_size, images.shape[-1] // patch_size
        return images.reshape(len(images), grid_h * grid_w, -1), grid_h, grid_w

    # by class: what an instance holds is part of its options, by which results are known
    processor.__class__ = type(own.__name__, (own,), {"patchify": whole, "__module__": own.__module__})
    found = processor(pixels.permute(2, 0, 1), **options)["pixel_values"].reshape(3, 2 * side, side)
    ones = torch.ones(3)
    cut = normalise_patchify(
        found.permute(1, 2, 0).contiguous(),
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
