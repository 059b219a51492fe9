"""Qwen2.5-VL and Qwen2-VL (Bai et al. 2025, arXiv:2502.13923; Wang et al. 2024, arXiv:2409.12191): image, video."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, ClassVar

import torch

from ..contract.features import EncoderItem
from ..media.types import Medium
from .qwen_vision import QwenVisionEncoder, QwenVisionPreprocessor
from .tower_graphs import Grids, TowerGraphs
from .transformers_encoder import TransformersEncoder
from .transformers_family import TransformersFamily
from .transformers_preprocessor import Tensors, TransformersPreprocessor


class Qwen25VLPreprocessor(QwenVisionPreprocessor):
    """Qwen2.5-VL: positions on the time axis follow real time."""

    def position_arguments(
        self, batch: Mapping[str, Any], features: Mapping[str, Sequence[Tensors]], media: Mapping[str, Sequence[Medium]]
    ) -> dict[str, Any]:
        """Grids and the seconds of a grid step."""
        arguments = super().position_arguments(batch, features, media)
        if "video" in media:
            arguments["second_per_grid_ts"] = batch["second_per_grid_ts"]
        return arguments


class Qwen25VLEncoder(QwenVisionEncoder):
    """The tower of Qwen2-VL and Qwen2.5-VL; on a GPU as CUDA graphs."""

    def __init__(self, model: Any, device: str, dtype: torch.dtype) -> None:
        super().__init__(model, device, dtype)
        self._graphs = TowerGraphs(self.run, self.device) if self.device.type == "cuda" else None
        self._fixed = lru_cache(maxsize=64)(self._inputs)

    def features(self, modality: str, items: Sequence[EncoderItem]) -> Any:
        """All items packed into one run of the tower."""
        grids: Grids = tuple(tuple(map(int, item.tensors["grid"])) for item in items)  # type: ignore[misc]
        pixels = torch.cat([self._pixels(item) for item in items])
        return self.run(pixels, grids) if self._graphs is None else self._graphs(pixels, grids)

    def run(self, pixels: torch.Tensor, grids: Grids) -> torch.Tensor:
        """Rows [n, H] of pixels [P, width]."""
        rows: torch.Tensor = self.base.visual(pixels, **self._fixed(grids)).pooler_output
        return rows

    def _inputs(self, grids: Grids) -> dict[str, Any]:
        """What the tower would compute from the grids, step by step on the device, at each run."""
        from transformers import vision_utils

        config = self.config.vision_config
        grid, merge = torch.tensor(grids), int(config.spatial_merge_size)
        bounds = vision_utils.get_vision_cu_seqlens(grid)
        found = {
            "grid_thw": grid,
            "position_ids": vision_utils.get_vision_position_ids(grid, merge),
            "cu_seqlens": bounds,
            "max_seqlen": _longest(bounds),
        }
        if window := getattr(config, "window_size", None):
            index, windows = vision_utils.get_vision_window_index(grid, merge, window, config.patch_size)
            found |= {"window_index": index, "cu_window_seqlens": windows, "max_window_seqlen": _longest(windows)}
        return {k: v.to(self.device) if isinstance(v, torch.Tensor) else v for k, v in found.items()}


def _longest(bounds: torch.Tensor) -> int:
    return int((bounds[1:] - bounds[:-1]).max())


class Qwen2VL(TransformersFamily):
    """Qwen2-VL."""

    model_class = "Qwen2VLForConditionalGeneration"
    towers: ClassVar[Mapping[str, tuple[str, ...]]] = {"vision": ("visual",)}
    packs_sequences = True
    modality_encoders: ClassVar[Mapping[str, str]] = {"image": "vision", "video": "vision"}
    preprocessor_class: ClassVar[type[TransformersPreprocessor]] = QwenVisionPreprocessor
    encoder_classes: ClassVar[Mapping[str, type[TransformersEncoder]]] = {"vision": Qwen25VLEncoder}


class Qwen25VL(Qwen2VL):
    """Qwen2.5-VL."""

    model_class = "Qwen2_5_VLForConditionalGeneration"
    preprocessor_class = Qwen25VLPreprocessor
