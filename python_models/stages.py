"""Which class hosts which stage; imported lazily, so that no process loads what it does not run."""

from __future__ import annotations

from importlib import import_module

from .contract.errors import invalid
from .stage import Stage

_STAGES = {
    "preprocess": ("triptych.python_models.preprocess.stage", "PreprocessStage"),
    "vision_encoder": ("triptych.python_models.encoder.stage", "VisionEncoderStage"),
    "audio_encoder": ("triptych.python_models.encoder.stage", "AudioEncoderStage"),
    "language_model": ("triptych.python_models.language_model.stage", "LanguageModelStage"),
}


def stage_class(name: str) -> type[Stage]:
    """The class of a stage.

    Raises:
        TriptychError: for a name that is no stage.
    """
    if name not in _STAGES:
        raise invalid(f"unknown stage {name!r}; there are: {', '.join(_STAGES)}", "stage")
    module, attribute = _STAGES[name]
    found: type[Stage] = getattr(import_module(module), attribute)
    return found
