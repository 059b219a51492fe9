"""Which class serves which ``model_type`` of config.json; imported lazily."""

from __future__ import annotations

from difflib import get_close_matches
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
    "ernie4_5_moe_vl": ("ernie_published", "PublishedErnie45VL"),
    "ernie4_5_vl_moe": ("ernie4_5_vl", "Ernie45VLMoe"),
    "gemma3": ("gemma3", "Gemma3"),
    "gemma3_text": ("gemma3", "Gemma3Text"),
    "gemma3n": ("gemma3n", "Gemma3n"),
    "glm46v": ("glm4v", "Glm46V"),
    "glm4v": ("glm4v", "Glm4v"),
    "glm4v_moe": ("glm4v", "Glm4vMoe"),
    "glm_ocr": ("glm4v", "GlmOcr"),
    "internvl": ("internvl", "InternVL"),
    "internvl_chat": ("internvl_original", "InternVLChat"),
    "janus": ("janus", "Janus"),
    "kimi_k25": ("kimi", "Kimi25"),
    "kimi_vl": ("kimi", "KimiVL"),
    "lighton_ocr": ("mistral3", "LightOnOcr"),
    "llava": ("llava", "Llava"),
    "llava_llama": ("nvila_original", "published"),
    "llava_mistral": ("llava_original", "original"),
    "llava_mixtral": ("llava_original", "original"),
    "llava_next": ("llava_next", "LlavaNext"),
    "llava_next_video": ("llava_next", "LlavaNextVideo"),
    "llava_onevision": ("llava_onevision", "LlavaOnevision"),
    "llava_qwen": ("llava_original", "original"),
    "minicpm_ocr": ("minicpm_v4", "MiniCPMOcr"),
    "minicpmo": ("minicpm", "MiniCPMO"),
    "minicpmv": ("minicpm", "MiniCPMV"),
    "minicpmv4_6": ("minicpm_v4", "MiniCPMV46"),
    "minicpmv4_7": ("minicpm_v4", "MiniCPMV47"),
    "mistral3": ("mistral3", "Mistral3"),
    "mllama": ("mllama", "Mllama"),
    "multi_modality": ("janus", "PublishedJanus"),
    "NemotronH_Nano_VL_V2": ("nemotron_published", "NemotronNanoVL"),
    "nemotron-nas": ("nemotron_nas", "NemotronNas"),
    "nemotron_h_omni": ("nemotron", "NemotronOmni"),
    "nvila": ("nvila", "NVILA"),
    "nvila_lite": ("nvila", "NVILALite"),
    "paddleocr_vl": ("paddleocr_vl", "PaddleOCRVL"),
    "phi4_multimodal": ("phi4_multimodal", "Phi4Multimodal"),
    "phi4mm": ("phi4_multimodal", "Phi4Multimodal"),
    "qwen2_5_omni": ("qwen2_5_omni", "Qwen25Omni"),
    "qwen2_5_omni_thinker": ("qwen2_5_omni", "Qwen25Omni"),
    "qwen2_5_vl": ("qwen2_5_vl", "Qwen25VL"),
    "qwen2_audio": ("qwen2_audio", "Qwen2Audio"),
    "qwen2_vl": ("qwen2_5_vl", "Qwen2VL"),
    "qwen3_omni_moe": ("qwen3_omni", "Qwen3Omni"),
    "qwen3_omni_moe_thinker": ("qwen3_omni", "Qwen3Omni"),
    "qwen3_vl": ("qwen3_vl", "Qwen3VL"),
    "qwen3_vl_moe": ("qwen3_vl", "Qwen3VLMoe"),
    "step3p7": ("step3", "Step3p7"),
    "step_robotics": ("step3", "Step3VL"),
    "vila": ("nvila_original", "published"),
    "voxtral": ("voxtral", "Voxtral"),
}

# A key of config.json -> class, where model_type is that of another format too.
_BY_KEY = {"mm_vision_tower": ("llava_original", "original")}


def supported_model_types() -> tuple[str, ...]:
    """Every ``model_type`` there is a family for."""
    return tuple(sorted(_FAMILIES))


def family_files() -> dict[str, str]:
    """Each of them and the module of this package that serves it."""
    return {model_type: module for model_type, (module, _) in _FAMILIES.items()}


def load_family(settings: Settings) -> Family:
    """The family of the checkpoint that ``settings.model`` names. Reads config.json, no weights.

    What no family here is written for goes to the generic adapter (see :mod:`.generic`).

    Raises:
        TriptychError: MODEL_NOT_FOUND where there is no checkpoint, UNSUPPORTED where no family fits it.
    """
    checkpoint = find_checkpoint(settings)
    place = next((place for key, place in _BY_KEY.items() if key in checkpoint.config), None)
    place = place or _FAMILIES.get(checkpoint.model_type)
    if place is not None:
        module, name = place
        family: Family = getattr(import_module(f".{module}", __package__), name)(checkpoint, settings)
        return family
    from . import generic

    found = generic.find(checkpoint, settings)
    if found is None:
        near = get_close_matches(checkpoint.model_type, {*_FAMILIES, *generic.known_model_types()}, n=1)
        hint = f"; the nearest name that is known is {near[0]!r}" if near else ""
        raise TriptychError(
            ErrorKind.UNSUPPORTED,
            f"{settings.model!r} is not supported because neither Triptych nor transformers knows its model_type "
            f"{checkpoint.model_type!r}{hint}; families of their own: {', '.join(supported_model_types())}",
            "settings.model",
        )
    return found
