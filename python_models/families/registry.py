"""Which class serves which ``model_type`` of config.json; imported lazily."""

from __future__ import annotations

from importlib import import_module

from ..contract.errors import ErrorKind, TriptychError
from ..contract.settings import Settings
from .base import Family
from .checkpoint import find_checkpoint

_FAMILIES = {
    "deepseek_ocr2": ("deepseek_ocr", "DeepseekOcr2"),
    "deepseek_vl": ("deepseek_vl", "DeepseekVL"),
    "deepseek_vl_hybrid": ("deepseek_vl", "DeepseekVLHybrid"),
    "deepseek_vl_v2": ("deepseek_vl2", "published"),
    "dots_ocr": ("dots", "DotsOCR"),
    "dots_vlm": ("dots", "DotsVLM"),
    "ernie4_5_vl_moe": ("ernie4_5_vl", "Ernie45VLMoe"),
    "gemma3": ("gemma3", "Gemma3"),
    "gemma3_text": ("gemma3", "Gemma3Text"),
    "glm46v": ("glm4v", "Glm46V"),
    "glm4v": ("glm4v", "Glm4v"),
    "glm4v_moe": ("glm4v", "Glm4vMoe"),
    "glm_ocr": ("glm4v", "GlmOcr"),
    "internvl": ("internvl", "InternVL"),
    "janus": ("janus", "Janus"),
    "lighton_ocr": ("mistral3", "LightOnOcr"),
    "llava": ("llava", "Llava"),
    "llava_next": ("llava_next", "LlavaNext"),
    "llava_next_video": ("llava_next", "LlavaNextVideo"),
    "llava_onevision": ("llava_onevision", "LlavaOnevision"),
    "mistral3": ("mistral3", "Mistral3"),
    "mllama": ("mllama", "Mllama"),
    "paddleocr_vl": ("paddleocr_vl", "PaddleOCRVL"),
    "qwen2_5_omni": ("qwen2_5_omni", "Qwen25Omni"),
    "qwen2_5_omni_thinker": ("qwen2_5_omni", "Qwen25Omni"),
    "qwen2_5_vl": ("qwen2_5_vl", "Qwen25VL"),
    "qwen2_audio": ("qwen2_audio", "Qwen2Audio"),
    "qwen2_vl": ("qwen2_5_vl", "Qwen2VL"),
    "qwen3_omni_moe": ("qwen3_omni", "Qwen3Omni"),
    "qwen3_omni_moe_thinker": ("qwen3_omni", "Qwen3Omni"),
    "qwen3_omni_moe": ("qwen3_omni", "Qwen3Omni"),
    "qwen3_omni_moe_thinker": ("qwen3_omni", "Qwen3Omni"),
    "qwen3_vl": ("qwen3_vl", "Qwen3VL"),
    "qwen3_vl_moe": ("qwen3_vl", "Qwen3VLMoe"),
}


def supported_model_types() -> tuple[str, ...]:
    """Every ``model_type`` there is a family for."""
    return tuple(sorted(_FAMILIES))


def load_family(settings: Settings) -> Family:
    """The family of the checkpoint that ``settings.model`` names. Reads config.json, no weights.

    Raises:
        TriptychError: MODEL_NOT_FOUND where there is no checkpoint, UNSUPPORTED where no family fits it.
    """
    checkpoint = find_checkpoint(settings)
    if checkpoint.model_type not in _FAMILIES:
        raise TriptychError(
            ErrorKind.UNSUPPORTED,
            f"{settings.model!r} is not supported because no family is written for its model_type "
            f"{checkpoint.model_type!r}; supported: {', '.join(supported_model_types())}",
            "settings.model",
        )
    module, name = _FAMILIES[checkpoint.model_type]
    family: Family = getattr(import_module(f".{module}", __package__), name)(checkpoint, settings)
    return family
