"""DeepSeek-VL2 (Wu et al. 2024, arXiv:2412.10302): image."""

from __future__ import annotations

from ..contract.errors import ErrorKind, TriptychError
from ..contract.settings import Settings
from .checkpoint import Checkpoint
from .deepseek_ocr import DeepseekOcr, PublishedDeepseekOcr2
from .transformers_family import TransformersFamily


def published(checkpoint: Checkpoint, settings: Settings) -> TransformersFamily:
    """The family of a checkpoint of ``model_type`` "deepseek_vl_v2": three of them share it.

    Raises:
        TriptychError: UNSUPPORTED for towers that none of them has.
    """
    vision = checkpoint.config.get("vision_config", {})
    width = vision.get("width")
    names = set(width) if isinstance(width, dict) else set()
    if names == {"clip-l-14-224", "sam_vit_b"}:
        return DeepseekOcr(checkpoint, settings)
    if names == {"qwen2-0-5b", "sam_vit_b"}:
        return PublishedDeepseekOcr2(checkpoint, settings)
    raise TriptychError(
        ErrorKind.UNSUPPORTED,
        f"{settings.model!r} is not supported because its vision_config names towers {sorted(names)!r}",
        "settings.model",
    )
