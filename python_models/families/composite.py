"""Families that transformers lacks, put together from its blocks: towers, a projector, one of its text models.

A family says in :class:`Composite` subclasses which modules there are and how the published checkpoint calls their
weights; configuration, loading part by part and slices for several ranks are then those of any other family.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from ..contract.errors import ErrorKind, TriptychError
from .loading import model_class
from .prompt import joining, renders_parts
from .transformers_family import TransformersFamily

# Of a configuration that describes a text model beside other things: what is none of the text model's.
_NOT_TEXT = frozenset(
    {"architectures", "auto_map", "dtype", "model_type", "torch_dtype", "transformers_version", "_name_or_path"}
)


class CompositeConfig(model_class("PreTrainedConfig")):  # type: ignore[misc]
    """A configuration of the text model and one for each tower; what else a family needs are attributes.

    ``image_token_id``, ``video_token_id`` and ``audio_token_id`` mark embedding rows (see
    :meth:`.transformers_preprocessor.TransformersPreprocessor.token_id`).
    """

    model_type = "triptych_composite"

    text_config: Any = None
    vision_config: Any = None
    audio_config: Any = None

    def __post_init__(self, **values: Any) -> None:
        self.tie_word_embeddings = bool(getattr(self.text_config, "tie_word_embeddings", False))
        super().__post_init__(**values)

    def get_text_config(self, *args: Any, **kwargs: Any) -> Any:
        """Of the language model; of itself where transformers builds one without arguments to compare it with."""
        return self if self.text_config is None else self.text_config


class Composite(model_class("PreTrainedModel")):  # type: ignore[misc]
    """Text model and head; subclasses add the towers, and ``get_image_features`` or ``get_audio_features``.

    These take what the family's encoder gives them and return rows [n, hidden size of the text model].
    """

    config_class = CompositeConfig
    base_model_prefix = ""
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "language_model.embed_tokens.weight"}

    published: ClassVar[tuple[tuple[str, str], ...]] = ()
    """(pattern, replacement): names of weights in the published checkpoint -> names here, applied in their order.

    Names below a module of transformers then change by transformers' own rules for it."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        text = config.text_config
        self.language_model = self.build_text(text)
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.build(config)
        self.post_init()

    def build_text(self, config: Any) -> Any:
        """The text model without its head."""
        return model_class("AutoModel").from_config(config)

    def build(self, config: Any) -> None:
        """Add the towers."""
        raise NotImplementedError

    def get_input_embeddings(self) -> Any:
        """The text model's table."""
        return self.language_model.get_input_embeddings()


class CompositeFamily(TransformersFamily):
    """A family whose model is a :class:`Composite`."""

    composite: ClassVar[type[Composite]]

    def load_class(self) -> Any:
        """The composite, its rules for the published names known to transformers."""
        from transformers.conversion_mapping import register_checkpoint_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        rules: list[WeightConverter | WeightRenaming] = [
            WeightRenaming(pattern, name) for pattern, name in self.composite.published
        ]
        register_checkpoint_conversion_mapping(self.composite.__name__, rules, overwrite=True)
        return self.composite

    def load_tokenizer(self) -> Any:
        """See :func:`load_tokenizer`."""
        return load_tokenizer(self.checkpoint.folder)


def block(family: str, name: str) -> Any:
    """A class of a family of transformers that it does not export."""
    module = import_module(f"transformers.models.{family}.modeling_{family}")
    return getattr(module, name)


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of tokenizer.json: the class that the checkpoint names may be one that it brings along.

    Without that file transformers makes it of the older ones (vocab.json, merges.txt) by the class of that name.
    """
    if (folder / "tokenizer.json").is_file():
        return load_piece("PreTrainedTokenizerFast", "tokenizer", folder)
    # of no type of model: config.json may be of a type that transformers does not know
    return load_piece("AutoTokenizer", "tokenizer", folder, config=model_class("PreTrainedConfig")())


def load_piece(class_name: str, what: str, folder: Path, **options: Any) -> Any:
    """A tokenizer or processor of transformers from the checkpoint, whatever class its files name.

    Raises:
        TriptychError: MODEL_NOT_FOUND where there are no files for it.
    """
    try:
        return model_class(class_name).from_pretrained(folder, local_files_only=True, **options)
    except (OSError, ValueError, ImportError) as error:
        raise TriptychError(
            ErrorKind.MODEL_NOT_FOUND, f"the {what} of {folder} cannot be loaded: {error}", "settings.model"
        ) from None


def chat_template(folder: Path, tokenizer: Any) -> str | None:
    """The checkpoint's own: of its processor, else of its tokenizer."""
    if (path := folder / "chat_template.jinja").is_file():
        return path.read_text(encoding="utf-8")
    if (path := folder / "chat_template.json").is_file():
        return str(json.loads(path.read_text(encoding="utf-8"))["chat_template"])
    found: str | None = tokenizer.chat_template
    return found


def write_parts(owner: Any, tokens: Mapping[str, str]) -> None:
    """Let messages of several parts reach a chat template that takes texts: as one text, tokens for the media.

    A template that writes these tokens itself is left to it.

    Args:
        owner: of ``apply_chat_template``, which is replaced.
        tokens: modality -> what stands for a medium.
    """
    render = owner.apply_chat_template
    if not renders_parts(render, tokens):
        owner.apply_chat_template = joining(render, tokens)


def text_config(model_type: str, raw: Mapping[str, Any]) -> Any:
    """transformers' configuration of a text model that a published one describes among other things.

    Args:
        model_type: of the text model.
        raw: what describes it; configurations of other parts (``*_config``) are left out.

    Raises:
        TriptychError: UNSUPPORTED where transformers refuses it.
    """
    values = {key: value for key, value in raw.items() if key not in _NOT_TEXT and not key.endswith("_config")}
    try:
        return model_class("AutoConfig").for_model(model_type, **values)
    except (TypeError, ValueError, KeyError) as error:
        raise TriptychError(
            ErrorKind.UNSUPPORTED, f"config.json describes no {model_type} text model: {error}", "settings.model"
        ) from None


def required(raw: Mapping[str, Any], key: str) -> Any:
    """A value of config.json that the family cannot do without; TriptychError (UNSUPPORTED) where it is missing."""
    if key not in raw:
        raise TriptychError(ErrorKind.UNSUPPORTED, f"config.json has no {key!r}", "settings.model")
    return raw[key]
