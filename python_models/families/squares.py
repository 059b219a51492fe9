"""Pictures that a processor puts into one square each; resized by the encoder instead where there is a GPU.

Squares travel as uint8; the encoder normalises them, bit for bit as the processor would.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image as PILImage

from ...kernels.image import normalise_patches
from ..contract.features import EncoderItem
from ..contract.settings import Settings
from ..media.types import Image, Medium
from .checkpoint import Checkpoint
from .pixels import RAW, check_bytes, equal, normalisation, probe, resized, small_enough
from .transformers_encoder import TransformersEncoder
from .transformers_preprocessor import Tensors, TransformersPreprocessor

_MODES = {int(PILImage.Resampling.BILINEAR): "bilinear", int(PILImage.Resampling.BICUBIC): "bicubic"}
_STEPS = 2
"""By which a value may differ from the processor's, see :func:`.pixels.resized`."""


class SquarePictures:
    """Stands before an image processor: pictures keep their size, and only their places in the square are computed.

    What is far larger than the square goes through the processor itself, as do other calls.
    """

    def __init__(self, processor: Any, settled: Collection[str]) -> None:
        """Args: see :meth:`before`."""
        self._processor = processor
        self._outputs = dict(processor([probe(64, 64)], return_tensors="pt", **RAW))
        self._side = int(self._outputs.pop("pixel_values").shape[-1])
        colour = np.asarray(getattr(processor, "background_color", 0), dtype=np.uint8).reshape(-1)
        self._colour = np.resize(colour, 3)
        self._mode = int(processor.resample)
        self._settled = {"return_tensors", *RAW, *settled}

    @staticmethod
    def before(processor: Any, settled: Collection[str] = ()) -> Any:
        """Put one before a processor that resizes as :meth:`tensors` says; any other is given back as it is.

        Args:
            processor: of pictures.
            settled: options that calls may name, but never with values that make another picture.
        """
        crops = getattr(processor, "do_center_crop", None)
        if crops or not processor.do_resize or int(processor.resample) not in _MODES:
            return processor
        own = SquarePictures(processor, settled)
        side = own._side
        for size in ((64, 64), (3 * side // 2, side), (side // 2 + 5, side + 7), (40, 200)):
            picture = probe(*size)
            outputs = dict(processor([picture], return_tensors="pt", **RAW))
            expected = outputs.pop("pixel_values")[0]
            if not equal(outputs, own._outputs):
                # it makes more of a picture than a square
                return processor
            tensors = own.tensors(picture)
            found = in_square(*(torch.from_numpy(np.array(tensors[name])) for name in ("picture", "place", "colour")))
            if found.shape != expected.shape or int((found.int() - expected.int()).abs().max()) > _STEPS:
                return processor
        return own

    def __getattr__(self, name: str) -> Any:
        return getattr(self._processor, name)

    def __call__(self, images: Any, **options: Any) -> Mapping[str, Any]:
        """As the processor; where every picture may keep its size, ``pixel_values`` has no squares."""
        parts = images if isinstance(images, list) else [images]
        flat = [image for part in parts for image in (part if isinstance(part, list) else [part])]
        own = (isinstance(image, PILImage.Image) and small_enough(image, self._side, self._side) for image in flat)
        if set(options) - self._settled or not all(own):
            return dict(self._processor(images, **options))
        outputs = {
            name: value.expand(len(flat), *value.shape[1:]) if isinstance(value, torch.Tensor) else value * len(flat)
            for name, value in self._outputs.items()
        }
        return {**outputs, "pixel_values": torch.empty(0, 3, self._side, self._side, dtype=torch.uint8)}

    def tensors(self, picture: PILImage.Image) -> dict[str, NDArray[Any]]:
        """``picture`` uint8 [height, width, channels]; ``colour`` uint8 [channels] of what it leaves of the square.

        ``place`` int64 [6]: height and width that it gets, top and left edge in the square, the square's side, Pillow's
        number of the filter.
        """
        side, longest = self._side, max(picture.size)
        height = width = side
        if hasattr(self._processor, "pad_to_square"):
            # the longer side fills the square
            least = self._processor.min_size
            height = max(round(picture.height * (side / longest)), least)
            width = max(round(picture.width * (side / longest)), least)
        place = [height, width, (side - height) // 2, (side - width) // 2, side, self._mode]
        return {"picture": np.asarray(picture), "place": np.array(place, dtype=np.int64), "colour": self._colour}


def in_square(picture: torch.Tensor, place: torch.Tensor, colour: torch.Tensor) -> torch.Tensor:
    """A picture resized and put into its square. Args: as :meth:`SquarePictures.tensors` gives them.

    Returns:
        uint8 [channels, side, side].
    """
    height, width, top, left, side, mode = place.tolist()
    planes = resized(picture, height, width, _MODES[mode]).permute(2, 0, 1)
    if (height, width) == (side, side):
        return planes.contiguous()
    square = colour[:, None, None].expand(-1, side, side).clone()
    square[:, top : top + height, left : left + width] = planes
    return square


def square_features(
    pixels: torch.Tensor, media: Sequence[Medium], processor: Any, mean: NDArray[Any], std: NDArray[Any]
) -> list[dict[str, NDArray[np.generic]]]:
    """Per picture what the encoder takes: its square, or where the processor made none what :func:`square_of` does."""
    if len(pixels):
        return [{"pixels": square.numpy(), "mean": mean, "std": std} for square in pixels]
    tensors = processor.image_processor.tensors
    pictures = [medium.data.pixels for medium in media if isinstance(medium.data, Image)]
    return [{**tensors(picture), "mean": mean, "std": std} for picture in pictures]


def square_of(item: EncoderItem, to_device: Callable[[NDArray[np.generic]], torch.Tensor]) -> torch.Tensor:
    """The square of a picture, uint8 [channels, side, side]."""
    if "pixels" in item.tensors:
        return to_device(item.tensors["pixels"])
    place = torch.from_numpy(np.array(item.tensors["place"]))
    return in_square(to_device(item.tensors["picture"]), place, to_device(item.tensors["colour"]))


class SquarePreprocessor(TransformersPreprocessor):
    """Pictures that are one square each and a fixed number of tokens."""

    settled: ClassVar[Collection[str]] = ()
    """See :meth:`SquarePictures.before`."""

    def __init__(self, checkpoint: Checkpoint, settings: Settings, model: Any, encoders: Mapping[str, str]) -> None:
        super().__init__(checkpoint, settings, model, encoders)
        check_bytes(self.processor.image_processor)
        self._mean, self._std = normalisation(self.processor.image_processor, "image")
        self._rows = self.tokens_per_picture()
        if settings.gpu_preprocessing == "on":
            self.processor.image_processor = SquarePictures.before(self.processor.image_processor, self.settled)

    def tokens_per_picture(self) -> int:
        """As the processor says it."""
        return int(self.processor.num_image_tokens)

    def processor_arguments(self, media: Mapping[str, Sequence[Medium]]) -> dict[str, Any]:
        """Pixels stay uint8."""
        images = [m.data.pixels for m in media["image"] if isinstance(m.data, Image)]
        return {"images": images, "images_kwargs": dict(RAW)}

    def split_features(
        self, batch: Mapping[str, Any], media: Mapping[str, Sequence[Medium]]
    ) -> dict[str, list[Tensors]]:
        """Per picture: ``pixels`` uint8 [channels, side, side], ``mean``, ``std``.

        A picture that the encoder resizes has the tensors of :meth:`.squares.SquarePictures.tensors` for its pixels.
        """
        return {"image": square_features(batch["pixel_values"], media["image"], self.processor, self._mean, self._std)}

    def num_rows(self, modality: str, tensors: Tensors) -> int:
        """The same for every picture."""
        return self._rows


class SquareEncoder(TransformersEncoder):
    """A tower over squares, and its projector."""

    def features(self, modality: str, items: Sequence[EncoderItem]) -> Any:
        """All pictures in one run of the tower."""
        pixels = torch.cat([self._pixels(item) for item in items])
        return self.base.get_image_features(pixels, return_dict=True).pooler_output

    def _pixels(self, item: EncoderItem) -> torch.Tensor:
        """[1, channels, side, side] in the tower's dtype."""
        return self._normalise(item, square_of(item, self.to_device), "mean", "std")[None]

    def normalised(self, item: EncoderItem, pixels: str, mean: str, std: str) -> torch.Tensor:
        """A tensor of an item, uint8 [..., channels, height, width], in the tower's dtype."""
        return self._normalise(item, self.to_device(item.tensors[pixels]), mean, std)

    def _normalise(self, item: EncoderItem, square: torch.Tensor, mean: str, std: str) -> torch.Tensor:
        # to the kernel a picture is one patch of one frame
        patches = square.reshape(-1, square.shape[-3], 1, square.shape[-2] * square.shape[-1])
        values, deviations = self.to_device(item.tensors[mean]), self.to_device(item.tensors[std])
        return normalise_patches(patches, values, deviations, 1, self.dtype).view(square.shape)
