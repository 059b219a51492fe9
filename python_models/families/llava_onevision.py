"""LLaVA-OneVision (Li et al. 2024, arXiv:2408.03326): image, several images, video.

The only picture of a prompt is cut into tiles as in LLaVA-NeXT, with more of them, and scaled down behind the tower
where they are too many; each of several pictures is one square. A video's frames are pooled.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from ..contract.features import EncoderItem
from ..media.types import Medium
from .base import FrameSampling
from .llava import sizes_of
from .llava_next import LlavaNextEncoder, LlavaNextPreprocessor, LlavaNextVideo
from .transformers_encoder import TransformersEncoder
from .transformers_preprocessor import Tensors, TransformersPreprocessor


class LlavaOnevisionPreprocessor(LlavaNextPreprocessor):
    """Tiles or squares, and frames."""

    default_sampling = FrameSampling(multiple=1, num_frames=32)

    def groups(self, modality: str, media: Sequence[Medium]) -> Sequence[Sequence[Medium]]:
        """Pictures together: their number decides whether they are cut into tiles."""
        return [media] if modality == "image" else super().groups(modality, media)

    def processor_arguments(self, media: Mapping[str, Sequence[Medium]]) -> dict[str, Any]:
        """Pictures are those of one prompt, as ``apply_chat_template`` gives them."""
        arguments = super().processor_arguments(media)
        if "images" in arguments:
            arguments["images"] = [arguments["images"]]
        return arguments

    def variant(self, modality: str, tensors: Tensors) -> str:
        """Cut or not."""
        return "square" if modality == "image" and _is_square(tensors) else ""

    def _image_expansion(self, tensors: Tensors) -> str:
        inputs = {
            "pixel_values": tensors["pixels"][None],
            "image_sizes": [tensors["size"].tolist()],
            "batch_num_images": [2 if _is_square(tensors) else 1],
        }
        text: str = self.processor.replace_image_token(inputs, 0)
        return text


class LlavaOnevisionEncoder(LlavaNextEncoder):
    """Tiles of all pictures in one run of the tower, squares in another."""

    def features(self, modality: str, items: Sequence[EncoderItem]) -> Any:
        """Rows of each item."""
        if modality == "video":
            return super().features(modality, items)
        rows: dict[int, torch.Tensor] = {}
        for square in (False, True):
            chosen = [k for k, item in enumerate(items) if _is_square(item.tensors) == square]
            if not chosen:
                continue
            group = [items[k] for k in chosen]
            pixels = torch.cat([self._pixels(item) for item in group])
            # more than one in a prompt are squares; those named beyond the last picture are not looked for
            counts = torch.tensor([len(group) + 1]) if square else None
            out = self.base.get_image_features(pixels, sizes_of(group), batch_num_images=counts).pooler_output
            rows.update(zip(chosen, out, strict=True))
        return [rows[k] for k in range(len(items))]


class LlavaOnevision(LlavaNextVideo):
    """LLaVA-OneVision."""

    model_class = "LlavaOnevisionForConditionalGeneration"
    preprocessor_class: ClassVar[type[TransformersPreprocessor]] = LlavaOnevisionPreprocessor
    encoder_classes: ClassVar[Mapping[str, type[TransformersEncoder]]] = {"vision": LlavaOnevisionEncoder}


def _is_square(tensors: Tensors) -> bool:
    # cut into tiles, a picture has at least one beside the whole of it
    return len(tensors["pixels"]) == 1
