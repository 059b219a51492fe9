"""NVILA and NVILA-Lite (Liu et al. 2024, arXiv:2412.04468): image, video.

SigLIP without its last layer, a projector over squares of patches, Qwen2. NVILA joins the features of a picture at
three scales (dynamic S2, Shi et al. 2024, arXiv:2403.13043): tiles are merged to maps, the smaller maps resized to
the largest and laid beside it as further columns. A video is eight frames, each seen as a picture once. Compared with
the config.json, the names of weights (``vision_tower.vision_model.*``, ``mm_projector.layers.N``, ``llm.*``) and the
public inference code of the checkpoints in one folder (``*-hf``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from ..contract.features import EncoderItem
from ..contract.settings import Settings
from ..media.types import Image, Medium, Video
from .base import FrameSampling
from .checkpoint import Checkpoint
from .composite import (
    Composite,
    CompositeConfig,
    CompositeFamily,
    chat_template,
    load_piece,
    load_tokenizer,
    required,
    text_config,
)
from .llava import LlavaEncoder
from .loading import model_class
from .nvila_processing import Blocks, NVILAProcessor, Tiles
from .pixels import check_bytes, normalisation
from .transformers_encoder import TransformersEncoder
from .transformers_preprocessor import Tensors, TransformersPreprocessor


class NVILAPreprocessor(TransformersPreprocessor):
    """Pictures and frames as tiles."""

    default_sampling = FrameSampling(min_frames=1, multiple=1, num_frames=8)
    scales: ClassVar[tuple[int, ...]] = (1, 2, 3)
    """Of dynamic S2, in tiles."""
    merge: ClassVar[int] = 2
    """Patches along a side of the square that becomes a row."""
    tokenizer_folder: ClassVar[str] = "."
    image_processor_folder: ClassVar[str] = "."
    strips: ClassVar[bool] = False
    """See :class:`.nvila_processing.NVILAProcessor`."""

    def __init__(self, checkpoint: Checkpoint, settings: Settings, model: Any, encoders: Mapping[str, str]) -> None:
        self._vision = model.config.vision_config
        super().__init__(checkpoint, settings, model, encoders)
        check_bytes(self.processor.image_processor)
        self._mean, self._std = normalisation(self.processor.image_processor, "image")

    def load_processor(self, folder: Path, settings: Settings) -> NVILAProcessor:
        """Made of its parts; the checkpoint's own is code."""
        tokenizer = load_tokenizer(folder / self.tokenizer_folder)
        side = math.ceil(self._vision.image_size // self._vision.patch_size / self.merge)
        return NVILAProcessor(
            tokenizer,
            load_piece("SiglipImageProcessor", "image processor", folder / self.image_processor_folder),
            chat_template(folder, tokenizer),
            tile_rows=side * side,
            scales=self.scales,
            strips=self.strips,
        )

    def token_id(self, modality: str) -> int:
        """The tokenizer knows."""
        token = self.processor.image_token if modality == "image" else self.processor.video_token
        return int(self.processor.tokenizer.convert_tokens_to_ids(token))

    def processor_arguments(self, media: Mapping[str, Sequence[Medium]]) -> dict[str, Any]:
        """What was decoded, as it is."""
        return {
            "images": [m.data.pixels for m in media.get("image", ()) if isinstance(m.data, Image)],
            "videos": [m.data.frames for m in media.get("video", ()) if isinstance(m.data, Video)],
        }

    def split_features(
        self, batch: Mapping[str, Any], media: Mapping[str, Sequence[Medium]]
    ) -> dict[str, list[Tensors]]:
        """Per medium ``pixels`` uint8 [tiles, channels, side, side], ``mean``, ``std``, ``rows`` int64 [runs].

        With tiles to be merged also ``blocks`` int64 [2], rows and columns of the largest scale.
        """
        names = {"image": "images", "video": "videos"}
        return {modality: [self._tensors(tiles) for tiles in batch[names[modality]]] for modality in media}

    def num_rows(self, modality: str, tensors: Tensors) -> int:
        """Of all runs."""
        return int(tensors["rows"].sum())

    def variant(self, modality: str, tensors: Tensors) -> str:
        """A picture is seen otherwise beside other pictures."""
        return f"{len(tensors['pixels'])}"

    def _tensors(self, tiles: Tiles) -> Tensors:
        tensors: Tensors = {"pixels": tiles.pixels, "mean": self._mean, "std": self._std, "rows": np.array(tiles.rows)}
        if tiles.blocks is not None:
            tensors["blocks"] = np.array(tiles.blocks)
        return tensors


class NVILALitePreprocessor(NVILAPreprocessor):
    """One scale, larger squares."""

    scales = ()
    merge = 3


class Squares(nn.Module):
    """Squares of patches side by side as columns; zeros where a map does not divide."""

    def __init__(self, merge: int) -> None:
        super().__init__()
        self.merge = merge

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        """[tiles, channels, side, side] -> [tiles, squares, merge * merge * channels]."""
        tiles, channels, side, _ = maps.shape
        missing = -side % self.merge
        maps = functional.pad(maps, (0, missing, 0, missing))
        count = (side + missing) // self.merge
        squares = maps.view(tiles, channels, count, self.merge, count, self.merge)
        return squares.permute(0, 2, 4, 3, 5, 1).reshape(tiles, count * count, -1)


class Projector(nn.Module):
    """Its layers."""

    def __init__(self, layers: nn.Sequential) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        """[tiles, channels, side, side] -> rows [tiles, squares, width]."""
        rows: torch.Tensor = self.layers(maps)
        return rows


class NVILAModel(Composite):
    """Tower, projector, text model."""

    published: ClassVar[tuple[tuple[str, str], ...]] = (
        (r"^llm\.model\.", "language_model."),
        (r"^llm\.lm_head\.", "lm_head."),
        (r"^vision_tower\.vision_model\.", "vision_tower."),
    )

    def build(self, config: Any) -> None:
        """Add tower and projector."""
        self.vision_tower = model_class("SiglipVisionModel")(config.vision_config)
        # what is seen are the states before it
        self.vision_tower.post_layernorm = nn.Identity()
        width = config.text_config.hidden_size
        self.mm_projector = Projector(self.projector(config.vision_config.hidden_size, width))

    def projector(self, seen: int, width: int) -> nn.Sequential:
        """Columns of a patch and of a row -> the layers, numbered as they are published."""
        joined = seen * len(NVILAPreprocessor.scales) * NVILAPreprocessor.merge**2
        return nn.Sequential(
            Squares(NVILAPreprocessor.merge),
            nn.LayerNorm(joined),
            nn.Linear(joined, width),
            nn.GELU(),
            nn.Linear(width, width),
        )

    def get_image_features(self, pixels: torch.Tensor, blocks: Sequence[Blocks | None]) -> list[torch.Tensor]:
        """All tiles [tiles, channels, side, side]; for each picture its blocks, None for a tile -> rows of each."""
        maps = self.maps(pixels)
        scales, out, start = NVILAPreprocessor.scales, [], 0
        for block in blocks:
            if block is None:
                joined, block = maps[start : start + 1].repeat(1, len(scales), 1, 1), (1, 1)
                start += 1
            else:
                joined, start = self._joined(maps, start, block)
            rows = self.mm_projector(_cut(joined, block))
            side = math.isqrt(rows.shape[1])
            out.append(_merged(rows.transpose(1, 2).unflatten(2, (side, side)), block)[0].flatten(1).T)
        return out

    def maps(self, pixels: torch.Tensor) -> torch.Tensor:
        """The tower's states of each tile [tiles, channels, patches, patches]."""
        states = self.vision_tower(pixels).last_hidden_state
        side = math.isqrt(states.shape[1])
        maps: torch.Tensor = states.transpose(1, 2).unflatten(2, (side, side))
        return maps

    def _joined(self, maps: torch.Tensor, start: int, block: Blocks) -> tuple[torch.Tensor, int]:
        """Maps of all scales at the size of the largest [1, scales * channels, height, width], and the next tile."""
        found = []
        for grid in [(scale, scale) for scale in NVILAPreprocessor.scales[:-1]] + [block]:
            count = grid[0] * grid[1]
            found.append(_merged(maps[start : start + count], grid))
            start += count
        size = found[-1].shape[2:]
        resized = [functional.interpolate(part.float(), size=size, mode="area").to(maps.dtype) for part in found]
        return torch.cat(resized, dim=1), start


class NVILALiteModel(NVILAModel):
    """Every tile for itself."""

    def projector(self, seen: int, width: int) -> nn.Sequential:
        """See :meth:`NVILAModel.projector`."""
        joined = seen * NVILALitePreprocessor.merge**2
        return nn.Sequential(
            Squares(NVILALitePreprocessor.merge),
            nn.LayerNorm(joined),
            nn.Linear(joined, 3 * seen),
            nn.GELU(),
            nn.LayerNorm(3 * seen),
            nn.Linear(3 * seen, width),
            nn.GELU(),
            nn.Linear(width, width),
        )

    def get_image_features(self, pixels: torch.Tensor, blocks: Sequence[Blocks | None]) -> list[torch.Tensor]:
        """See :meth:`NVILAModel.get_image_features`."""
        return list(self.mm_projector(self.maps(pixels)))


class NVILAEncoder(LlavaEncoder):
    """Tower and projector."""

    def features(self, modality: str, items: Sequence[EncoderItem]) -> Any:
        """All tiles in one run of the tower."""
        blocks: list[Blocks | None] = []
        for item in items:
            if "blocks" in item.tensors:
                rows, columns = item.tensors["blocks"].tolist()
                blocks.append((rows, columns))
            else:
                blocks += [None] * len(item.tensors["pixels"])
        return self.base.get_image_features(torch.cat([self._pixels(item) for item in items]), blocks)


class NVILA(CompositeFamily):
    """NVILA."""

    composite = NVILAModel
    towers: ClassVar[Mapping[str, tuple[str, ...]]] = {"vision": ("vision_tower", "mm_projector")}
    modality_encoders: ClassVar[Mapping[str, str]] = {"image": "vision", "video": "vision"}
    preprocessor_class: ClassVar[type[TransformersPreprocessor]] = NVILAPreprocessor
    encoder_classes: ClassVar[Mapping[str, type[TransformersEncoder]]] = {"vision": NVILAEncoder}

    def load_config(self) -> Any:
        """The parts lie in it as they are."""
        return self._config(
            required(self.checkpoint.config, "text_config"), required(self.checkpoint.config, "vision_config")
        )

    def _config(self, text: Mapping[str, Any], vision: Mapping[str, Any]) -> Any:
        seen = {key: value for key, value in vision.items() if key != "model_type"}
        # the states before the last layer are seen, and nothing behind them
        seen |= {"num_hidden_layers": seen.get("num_hidden_layers", 12) - 1, "vision_use_head": False}
        return CompositeConfig(
            text_config=text_config("qwen2", text), vision_config=model_class("SiglipVisionConfig")(**seen)
        )


class NVILALite(NVILA):
    """NVILA-Lite."""

    composite = NVILALiteModel
    preprocessor_class = NVILALitePreprocessor


def _merged(maps: torch.Tensor, grid: Blocks) -> torch.Tensor:
    """Tiles of a grid, row by row [rows * columns, channels, h, w] -> [1, channels, rows * h, columns * w]."""
    rows, columns = grid
    _, channels, height, width = maps.shape
    laid = maps.view(rows, columns, channels, height, width).permute(2, 0, 3, 1, 4)
    return laid.reshape(1, channels, rows * height, columns * width)


def _cut(whole: torch.Tensor, grid: Blocks) -> torch.Tensor:
    """The other way round."""
    rows, columns = grid
    channels, height, width = whole.shape[1], whole.shape[2] // rows, whole.shape[3] // columns
    laid = whole.view(channels, rows, height, columns, width).permute(1, 3, 0, 2, 4)
    return laid.reshape(rows * columns, channels, height, width)
