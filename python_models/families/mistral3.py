"""Mistral Small 3.1 and LightOnOCR (Taghadouini et al. 2026, arXiv:2601.14251): image.

Pixtral's tower, which takes pictures of any size, with patches merged in squares. Rows of patches are divided by
break tokens in Mistral's prompts; these are text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from ..contract.features import EncoderItem
from .llava import Llava, LlavaEncoder
from .transformers_encoder import TransformersEncoder


class Mistral3Encoder(LlavaEncoder):
    """Tower and projector."""

    def features(self, modality: str, items: Sequence[EncoderItem]) -> Any:
        """All pictures in one run of the tower."""
        if sum(item.num_rows for item in items) > 1:
            return super().features(modality, items)
        # transformers takes a single row of a single picture for no rows at all
        return super().features(modality, [*items, *items])[: len(items)]


class Mistral3(Llava):
    """Mistral Small 3.1."""

    model_class = "Mistral3ForConditionalGeneration"
    encoder_classes: ClassVar[Mapping[str, type[TransformersEncoder]]] = {"vision": Mistral3Encoder}


class LightOnOcr(Llava):
    """LightOnOCR."""

    model_class = "LightOnOcrForConditionalGeneration"
    towers: ClassVar[Mapping[str, tuple[str, ...]]] = {"vision": ("vision_encoder", "vision_projection")}
