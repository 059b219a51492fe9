"""What the files of a checkpoint say: processor and tokenizer, ends of answers, context length, sampling of videos."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from ..contract.errors import ErrorKind, TriptychError
from ..contract.settings import Settings
from .base import FrameSampling
from .loading import model_class


def context_length(config: Any) -> int:
    """Positions a checkpoint was made for."""
    return int(config.get_text_config().max_position_embeddings)


_FILES = {
    "tokenizer": ("tokenizer.json", "*.model", "vocab.json", "vocab.txt", "*.tiktoken", "tekken.json"),
    "processor": ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"),
}


def load_auto(auto_class: str, what: str, folder: Path, settings: Settings, **options: Any) -> Any:
    """The checkpoint's processor or tokenizer; code that it brings along runs only where the operator trusts it.

    Raises:
        TriptychError: MODEL_NOT_FOUND, naming the files that are not there.
    """
    # transformers may make do with an empty tokenizer of the family's usual kind
    wanted = _FILES["tokenizer"] if auto_class in ("AutoProcessor", "AutoTokenizer") else ()
    for needed in (wanted, _FILES["processor"] if auto_class == "AutoProcessor" else ()):
        if needed and not any(next(folder.glob(name), None) for name in needed):
            raise TriptychError(
                ErrorKind.MODEL_NOT_FOUND,
                f"the {what} of {folder} cannot be loaded: there is none of {', '.join(needed)}",
                "settings.model",
            )
    old = (folder / "tokenizer.model").is_file() and not (folder / "tokenizer.json").is_file()
    if old and importlib.util.find_spec("sentencepiece") is None:
        # transformers would go on and read the file as what it is not
        message = f"the tokenizer of {folder} is a tokenizer.model: it needs the packages sentencepiece and protobuf"
        raise TriptychError(ErrorKind.MODEL_NOT_FOUND, message, "settings.model")
    try:
        return model_class(auto_class).from_pretrained(
            folder, local_files_only=True, trust_remote_code=settings.trust_remote_code, **options
        )
    except (OSError, ValueError, ImportError) as error:
        raise TriptychError(
            ErrorKind.MODEL_NOT_FOUND, f"the {what} of {folder} cannot be loaded: {error}", "settings.model"
        ) from None


def eos_token_ids(folder: Path, config: Any, tokenizer: Any) -> frozenset[int]:
    """As ``generate`` takes them: from generation_config.json, else config.json; else the tokenizer's."""
    generation = model_class("GenerationConfig")
    if (folder / "generation_config.json").is_file():
        found = generation.from_pretrained(folder, local_files_only=True).eos_token_id
    else:
        found = generation.from_model_config(config).eos_token_id
    if found is None:
        found = tokenizer.eos_token_id
    if found is None:
        return frozenset()
    return frozenset(int(i) for i in (found if isinstance(found, (list, tuple)) else [found]))


def frame_sampling(video_processor: Any, settings: Settings, default: FrameSampling) -> FrameSampling:
    """How a checkpoint's video processor samples. Args: it, or None; options; what it does not say."""
    if video_processor is None:
        return default

    def option(name: str, otherwise: Any) -> Any:
        value = getattr(video_processor, name, None)
        return otherwise if value is None else value

    multiple = int(option("temporal_patch_size", 1))
    # Never below one full temporal patch.
    most = max(min(int(option("max_frames", default.max_frames)), settings.max_video_frames), multiple)
    fixed = getattr(video_processor, "num_frames", None)
    if fixed is None and getattr(video_processor, "fps", None) is None:
        fixed = default.num_frames
    return FrameSampling(
        fps=float(option("fps", default.fps)),
        min_frames=min(int(option("min_frames", default.min_frames)), most),
        max_frames=most,
        multiple=multiple,
        num_frames=None if fixed is None else min(int(fixed), most),
    )
