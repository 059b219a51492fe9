"""Which class hosts which stage; imported lazily, so that no process loads what it does not run."""

from __future__ import annotations

from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

from .contract.errors import invalid
from .stage import Stage

_STAGES = {
    "preprocess": ("triptych.python_models.preprocess.stage", "PreprocessStage"),
    "vision_encoder": ("triptych.python_models.encoder.stage", "VisionEncoderStage"),
    "audio_encoder": ("triptych.python_models.encoder.stage", "AudioEncoderStage"),
    "language_model": ("triptych.python_models.language_model.stage", "LanguageModelStage"),
}


def stage_class(name: str) -> type[Stage]:
    """The class of a stage: a name of the contract, or "/path/file.py:Class" for one of the user's own.

    Raises:
        TriptychError: for a name that is no stage, or a class that cannot be loaded.
    """
    path, _, own = name.rpartition(":")
    if path:
        return _from_file(path, own)
    if name not in _STAGES:
        raise invalid(f"unknown stage {name!r}; there are: {', '.join(_STAGES)}", "stage")
    module, attribute = _STAGES[name]
    found: type[Stage] = getattr(import_module(module), attribute)
    return found


def _from_file(path: str, attribute: str) -> type[Stage]:
    spec = spec_from_file_location(f"triptych_stage_{Path(path).stem}", path)
    if spec is None or spec.loader is None or not Path(path).is_file():
        raise invalid(f"stage class: {path!r} is no Python file", "stage")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    found = getattr(module, attribute, None)
    if not (isinstance(found, type) and issubclass(found, Stage)):
        raise invalid(f"stage class: {path} has no subclass of Stage named {attribute!r}", "stage")
    return found
