"""Pictures of DeepSeek-VL2 (Wu et al. 2024, arXiv:2412.10302, section 2.1): the whole of each, and tiles.

A picture is padded to the one of some sizes, all made of square tiles, that keeps most of it and then wastes least; the
whole of it is padded to one tile. With more than two pictures in a conversation each has one tile beside its whole.
Compared with ``processing_deepseek_vl_v2.py`` of the repository deepseek-ai/DeepSeek-VL2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from ..contract.errors import ErrorKind, TriptychError
from .deepseek_published import IMAGE_TOKEN

Size = tuple[int, int]
"""Width and height in pixels."""
# Pictures of a conversation that are cut into tiles.
_MOST_CUT = 2


@dataclass(frozen=True)
class Tiling:
    """Stands for an image processor.

    Attributes:
        sizes: that a picture may be padded to; the first is one tile.
        patch_size: pixels along a side of the tower's patches.
        downsample_ratio: of patches to rows of the language model, along a side.
        image_mean, image_std: of pixels between 0 and 1.
    """

    sizes: tuple[Size, ...]
    patch_size: int
    downsample_ratio: int
    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]
    do_rescale: bool = True
    rescale_factor: float = 1 / 255
    do_normalize: bool = True

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Tiling:
        """From processor_config.json.

        Raises:
            TriptychError: UNSUPPORTED naming what it lacks, or where sizes are not made of square tiles.
        """
        if missing := {"candidate_resolutions", "patch_size", "downsample_ratio"} - set(options):
            raise _unsupported(f"processor_config.json lacks {', '.join(sorted(missing))}")
        sizes = tuple((int(width), int(height)) for width, height in options["candidate_resolutions"])
        if not sizes or sizes[0][0] != sizes[0][1] or any(side % sizes[0][0] for size in sizes for side in size):
            raise _unsupported(
                f"candidate_resolutions must begin with a square and be made of it, got {[list(s) for s in sizes]}"
            )
        if not options.get("normalize", True):
            raise _unsupported("processor_config.json must have normalize on")
        mean, std = (tuple(options.get(f"image_{name}", (0.5, 0.5, 0.5))) for name in ("mean", "std"))
        return cls(sizes, int(options["patch_size"]), int(options["downsample_ratio"]), mean, std)

    @property
    def side(self) -> int:
        """Pixels along a side of a tile."""
        return self.sizes[0][0]

    @property
    def rows(self) -> int:
        """Rows of the language model along a side of a tile."""
        return math.ceil(self.side // self.patch_size / self.downsample_ratio)

    def to_dict(self) -> dict[str, Any]:
        """All options."""
        return asdict(self)

    def choose(self, size: Size) -> Size:
        """The size that a picture is padded to."""
        width, height = size

        def merit(candidate: Size) -> tuple[int, int]:
            scale = min(candidate[0] / width, candidate[1] / height)
            kept = min(int(width * scale) * int(height * scale), width * height)
            return kept, kept - candidate[0] * candidate[1]

        return max(self.sizes, key=merit)

    def cut(self, image: Image.Image, *, whole: bool) -> tuple[NDArray[np.uint8], Size]:
        """Tiles [1 + columns * rows, 3, side, side], the whole picture first, and (columns, rows).

        Args:
            image: RGB.
            whole: one tile alone beside the whole.
        """
        side = self.side
        width, height = (side, side) if whole else self.choose(image.size)
        colour = tuple(int(value * 255) for value in self.image_mean)
        view = np.asarray(ImageOps.pad(image, (side, side), color=colour))
        wide = np.asarray(ImageOps.pad(image, (width, height), color=colour))
        columns, rows = width // side, height // side
        tiles = wide.reshape(rows, side, columns, side, 3).swapaxes(1, 2).reshape(-1, side, side, 3)
        return np.ascontiguousarray(np.concatenate([view[None], tiles]).transpose(0, 3, 1, 2)), (columns, rows)

    def count(self, columns: int, rows: int) -> int:
        """Tokens of a picture: every row ends in one more, and one stands between the whole and the tiles."""
        side = self.rows
        return side * (side + 1) + 1 + rows * side * (columns * side + 1)


class DeepseekVL2Processor:
    """Called like a processor of transformers, with the options that we give."""

    image_token = IMAGE_TOKEN

    def __init__(self, tiling: Tiling, tokenizer: Any) -> None:
        self.image_processor = tiling
        self.tokenizer = tokenizer

    def __call__(self, text: Sequence[str], images: Sequence[Image.Image] = (), **options: Any) -> dict[str, Any]:
        """Token ids of one prompt, ``tiles`` and ``grids`` (columns, rows) of its pictures.

        Raises:
            ValueError: another number of pictures than of places in the prompt.
        """
        (prompt,) = text
        pieces = prompt.split(self.image_token)
        if len(pieces) != len(images) + 1:
            raise ValueError(f"the prompt has {len(pieces) - 1} places for {len(images)} pictures")
        cuts = [self.image_processor.cut(image, whole=len(images) > _MOST_CUT) for image in images]
        counts = [self.image_processor.count(*grid) for _, grid in cuts]
        written = pieces[0] + "".join(
            self.image_token * count + piece for count, piece in zip(counts, pieces[1:], strict=True)
        )
        ids = self.tokenizer([written], add_special_tokens=options.get("add_special_tokens", True))["input_ids"]
        return {"input_ids": ids, "tiles": [tiles for tiles, _ in cuts], "grids": [grid for _, grid in cuts]}


def _unsupported(message: str) -> TriptychError:
    return TriptychError(ErrorKind.UNSUPPORTED, message, "settings.model")
