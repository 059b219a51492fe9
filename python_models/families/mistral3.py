"""Mistral Small 3.1 and LightOnOCR (Taghadouini et al. 2026, arXiv:2601.14251): image.

Pixtral's tower, which takes pictures of any size, with patches merged in squares. Rows of patches are divided by
break tokens in Mistral's prompts; these are text.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from .llava import Llava


class Mistral3(Llava):
    """Mistral Small 3.1."""

    model_class = "Mistral3ForConditionalGeneration"


class LightOnOcr(Llava):
    """LightOnOCR."""

    model_class = "LightOnOcrForConditionalGeneration"
    towers: ClassVar[Mapping[str, tuple[str, ...]]] = {"vision": ("vision_encoder", "vision_projection")}
