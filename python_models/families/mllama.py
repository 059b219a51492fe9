"""Llama 3.2 Vision (Llama team 2024, arXiv:2407.21783, section 7): image.

Pictures take no place among the tokens: some decoder layers attend across to what the encoder made of them. A picture
is fitted into up to four square tiles, each of which gives 1 + patches rows. A token sees the tiles of the pictures
that stand last before it, as published. Tokens before the first picture are masked from all of them in that paper's
code, but in transformers only the layer's MLP is: their attention runs over every row of every picture, those of absent
tiles included. That is what generated tokens depend on, so it is done here too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import torch

from ...kernels.image import normalise_patches
from ..contract.features import EncoderItem
from ..contract.plan import CrossRows
from ..contract.request import NO_INPUTS, Message, RawPrompt, TemplateInputs
from ..contract.settings import Settings
from ..media.types import Image, Medium
from .base import Prepared
from .checkpoint import Checkpoint
from .pixels import RAW, normalisation
from .transformers_encoder import TransformersEncoder
from .transformers_family import TransformersFamily
from .transformers_preprocessor import Tensors, TransformersPreprocessor


class MllamaPreprocessor(TransformersPreprocessor):
    """Pictures through MllamaImageProcessor."""

    def __init__(self, checkpoint: Checkpoint, settings: Settings, model: Any, encoders: Mapping[str, str]) -> None:
        super().__init__(checkpoint, settings, model, encoders)
        self._mean, self._std = normalisation(self.processor.image_processor, "image")
        vision = self.config.vision_config
        self._rows_of_tile = int((vision.image_size // vision.patch_size) ** 2 + 1)
        self._max_tiles = int(self.processor.image_processor.max_image_tiles)

    def processor_arguments(self, media: Mapping[str, Sequence[Medium]]) -> dict[str, Any]:
        """Pixels keep their values from 0 to 255; the processor stacks them as float32 all the same."""
        images = [m.data.pixels for m in media["image"] if isinstance(m.data, Image)]
        return {"images": images, "images_kwargs": dict(RAW)}

    def _call(self, text: str, grouped: Mapping[str, Sequence[Medium]]) -> Mapping[str, Any]:
        # the processor begins every text itself, so that the tokenizer would do so twice
        arguments = self.processor_arguments(grouped) if grouped else {}
        result: Mapping[str, Any] = self.processor(
            text=[text], return_tensors="pt", add_special_tokens=False, **arguments
        )
        return result

    def split_features(
        self, batch: Mapping[str, Any], media: Mapping[str, Sequence[Medium]]
    ) -> dict[str, list[Tensors]]:
        """Per picture: ``tiles`` uint8 [tiles, channels, side, side], ``ratio`` int64 [1], ``mean``, ``std``."""
        counts = batch["aspect_ratio_mask"][0].sum(-1).tolist()
        ratios = batch["aspect_ratio_ids"][0].numpy()
        return {
            "image": [
                {
                    "tiles": tiles[:count].to(torch.uint8).numpy(),
                    "ratio": ratios[k : k + 1],
                    "mean": self._mean,
                    "std": self._std,
                }
                for k, (tiles, count) in enumerate(zip(batch["pixel_values"][0], counts, strict=True))
            ]
        }

    def num_rows(self, modality: str, tensors: Tensors) -> int:
        """Of all tiles that a picture may have, whether or not it has them."""
        return self._max_tiles * self._rows_of_tile

    def num_tokens(self, modality: str, tensors: Tensors) -> int:
        """The one that stands for the picture."""
        return 1

    def prepare(
        self, content: Sequence[Message] | RawPrompt, media: Sequence[Medium], template: TemplateInputs = NO_INPUTS
    ) -> Prepared:
        """See :meth:`.base.Preprocessor.prepare`; items say which tokens see their rows."""
        prepared = super().prepare(content, media, template)
        if not prepared.items:
            return prepared
        places = [item.spans[0][0] for item in prepared.items]
        seen_by = tokens_that_see(places, len(prepared.input_ids))
        visible = [len(item.tensors["tiles"]) * self._rows_of_tile for item in prepared.features["vision"]]
        rows = self._max_tiles * self._rows_of_tile
        items = tuple(
            replace(item, cross=CrossRows(rows, count, tokens))
            for item, count, tokens in zip(prepared.items, visible, seen_by, strict=True)
        )
        return replace(prepared, items=items)


def tokens_that_see(places: Sequence[int], length: int) -> list[tuple[int, int]]:
    """[start, end) of the tokens that see each picture: from its own token to the next picture's.

    Pictures that stand side by side are seen together, until the next one after them.

    Args:
        places: of the pictures' tokens, ascending.
        length: of the prompt.
    """
    ends = [*places[1:], length]
    for k in range(len(places) - 2, -1, -1):
        if places[k + 1] == places[k] + 1:
            ends[k] = ends[k + 1]
    return list(zip(places, ends, strict=True))


class MllamaVisionEncoder(TransformersEncoder):
    """The tower of tiles and the projector."""

    def features(self, modality: str, items: Sequence[EncoderItem]) -> Any:
        """All pictures in one run of the tower: [pictures, tiles * rows of a tile, H]."""
        pixels = torch.cat([self._pixels(item) for item in items])
        ratios = torch.from_numpy(np.stack([item.tensors["ratio"] for item in items])).to(self.device)
        present = torch.tensor([len(item.tensors["tiles"]) for item in items], device=self.device)
        mask = torch.arange(pixels.shape[1], device=self.device) < present[:, None]
        states = self.base.vision_model(
            pixel_values=pixels[None], aspect_ratio_ids=ratios.T, aspect_ratio_mask=mask[None].long()
        ).last_hidden_state
        return self.base.multi_modal_projector(states).flatten(0, 1).flatten(1, 2)

    def _pixels(self, item: EncoderItem) -> torch.Tensor:
        """[1, most tiles, channels, side, side] in the tower's dtype; tiles that it has not are zero."""
        tiles = self.to_device(item.tensors["tiles"])
        mean, std = self.to_device(item.tensors["mean"]), self.to_device(item.tensors["std"])
        # to the kernel each tile is one patch of one frame
        found = normalise_patches(tiles.flatten(2)[:, :, None], mean, std, 1, self.dtype).view(tiles.shape)
        out = found.new_zeros(1, int(self.config.vision_config.max_num_tiles), *found.shape[1:])
        out[0, : len(found)] = found
        return out


class Mllama(TransformersFamily):
    """Llama 3.2 Vision, 11B and 90B."""

    model_class = "MllamaForConditionalGeneration"
    towers: ClassVar[Mapping[str, tuple[str, ...]]] = {"vision": ("vision_model", "multi_modal_projector")}
    modality_encoders: ClassVar[Mapping[str, str]] = {"image": "vision"}
    preprocessor_class = MllamaPreprocessor
    encoder_classes: ClassVar[Mapping[str, type[TransformersEncoder]]] = {"vision": MllamaVisionEncoder}
