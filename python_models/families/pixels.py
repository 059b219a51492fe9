"""Pixels travel between processes as bytes and are normalised by the encoder, with the processor's own values."""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray
from PIL import Image as PILImage

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
