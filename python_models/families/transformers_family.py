"""What every family of transformers shares; a family's own file adds how its media become features.

The split follows transformers' own: ``get_{image,video,audio}_features`` of the base model need only a tower, and
``language_model`` with ``lm_head`` takes the embeddings from there.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch

from ..contract.errors import ErrorKind, TriptychError
from ..contract.settings import Settings
from . import overrides, templates
from .base import Decoder, WeightSource
from .checkpoint import Checkpoint
from .loading import load_part, meta_model, model_class, outline, warn_of_strangers
from .reading import context_length, eos_token_ids, load_auto
from .tower_attention import choose_attention
from .tower_fusion import fuse_tower
from .transformers_encoder import TransformersEncoder
from .transformers_preprocessor import TransformersPreprocessor
from .weights import RandomSource, SafetensorsSource


class TransformersFamily(ABC):
    """A model architecture of transformers; subclasses name its classes and modules."""

    model_class: ClassVar[str]
    towers: ClassVar[Mapping[str, tuple[str, ...]]]
    """Encoder -> children of the base model that it needs."""
    modality_encoders: ClassVar[Mapping[str, str]]
    """Modality -> encoder."""
    packs_sequences: ClassVar[bool] = False
    """Its towers can attend in one call for all sequences (see :mod:`.tower_attention`)."""
    bidirectional: ClassVar[frozenset[str]] = frozenset()
    token_extras: ClassVar[Mapping[str, int | None]] = {}
    position_step: ClassVar[int] = 1
    """See :class:`.base.Decoder`, all three."""
    preprocessor_class: ClassVar[type[TransformersPreprocessor]]
    encoder_classes: ClassVar[Mapping[str, type[TransformersEncoder]]]

    def __init__(self, checkpoint: Checkpoint, settings: Settings) -> None:
        self.checkpoint = checkpoint
        self.settings = settings
        self.encoders = frozenset(self.towers)

    def load_class(self) -> Any:
        """The model class. A published format with other names of weights has a class of its own, derived from that of
        transformers, for which it calls ``transformers.conversion_mapping.register_checkpoint_conversion_mapping``.
        """
        return model_class(self.model_class)

    def load_config(self) -> Any:
        """The configuration of that class; a published format translates its own."""
        return self.load_class().config_class.from_pretrained(self.checkpoint.folder)

    def config(self) -> Any:
        """The same with what the operator overrides.

        Raises:
            TriptychError: INVALID_REQUEST for a key that the model's config does not have.
        """
        config = self.load_config()
        overrides.apply(config, self.checkpoint.overrides, self.checkpoint.original)
        return config

    def load_tokenizer(self) -> Any:
        """The checkpoint's tokenizer."""
        return load_auto("AutoTokenizer", "tokenizer", self.checkpoint.folder, self.settings)

    def load_preprocessor(self) -> TransformersPreprocessor:
        """See :meth:`.base.Family.load_preprocessor`."""
        model = meta_model(self.load_class(), self.config())
        return self.preprocessor_class(self.checkpoint, self.settings, model, self.modality_encoders).ready()

    def load_encoder(self, encoder: str, device: str, dtype: torch.dtype) -> TransformersEncoder:
        """See :meth:`.base.Family.load_encoder`."""
        if encoder not in self.towers:
            raise TriptychError(ErrorKind.UNSUPPORTED, f"{self.checkpoint.model_type} has no {encoder} encoder")

        def keep(model: Any) -> list[str]:
            prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
            return [prefix + name for name in self.towers[encoder]]

        model = self._load(keep, f"{encoder} encoder", device, dtype)
        towers = [model.base_model.get_submodule(name) for name in self.towers[encoder]]
        choose_attention(
            towers,
            self.checkpoint.model_type,
            self.settings.mm_attention_backend,
            device,
            dtype,
            packs=self.packs_sequences,
        )
        if torch.device(device).type == "cuda":
            for tower in towers:
                fuse_tower(tower)
        return self.encoder_classes[encoder](model, device, dtype)

    def decoder_parts(self, model: Any) -> list[str]:
        """Dotted paths of the modules that the language model needs."""
        # Where the text model lives differs from one version of transformers to the next.
        return ["lm_head", _path_of(model, self.text_model(model))]

    def text_model(self, model: Any) -> Any:
        """The decoder stack, see :class:`.base.Decoder`."""
        return model.get_decoder()

    def head(self, model: Any) -> Any:
        """The module that makes logits of hidden states."""
        return model.lm_head

    def load_decoder(self, device: str, dtype: torch.dtype) -> Decoder:
        """See :meth:`.base.Family.load_decoder`."""
        model = self._load(self.decoder_parts, "language model", device, dtype)
        if self.settings.load_format != "dummy":
            warn_of_strangers(self.load_class(), self.config(), self.checkpoint.folder)
        table = model.get_input_embeddings()

        def embed(ids: torch.Tensor, is_media: torch.Tensor) -> torch.Tensor:
            # Placeholder ids may lie outside the table; their rows are replaced anyway.
            rows: torch.Tensor = table(ids.masked_fill(is_media, 0))
            return rows

        return self._decoder(model, embed)

    def open_decoder(self, device: str, dtype: torch.dtype, *, progress: bool) -> tuple[Decoder, WeightSource]:
        """See :meth:`.base.Family.open_decoder`."""
        model = outline(self.load_class(), self.config(), self.decoder_parts, dtype)
        text = _path_of(model, self.text_model(model))

        def embed(ids: torch.Tensor, is_media: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("a decoder without weights cannot embed")

        decoder = self._decoder(model, embed)
        if self.settings.load_format == "dummy":
            return decoder, RandomSource(model, text, device, dtype)
        folder = self.checkpoint.folder
        if progress:
            # the first of several ranks
            warn_of_strangers(self.load_class(), self.config(), folder)
        return decoder, SafetensorsSource(model, folder, text, device, dtype, progress=progress)

    def _decoder(self, model: Any, embed: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Decoder:
        tokenizer = self.load_tokenizer()
        template = templates.chosen(self.settings)
        ends = frozenset[int]() if template is None else template.end_ids(tokenizer)
        return Decoder(
            text_model=self.text_model(model),
            lm_head=self.head(model),
            embed=embed,
            config=model.config.get_text_config(),
            tokenizer=tokenizer,
            eos_token_ids=eos_token_ids(self.checkpoint.folder, model.config, tokenizer) | ends,
            context_length=context_length(model.config),
            num_axes=3 if hasattr(model.base_model, "get_rope_index") else 1,
            bidirectional=self.bidirectional,
            token_extras=self.token_extras,
            position_step=self.position_step,
        )

    def _load(self, keep: Callable[[Any], Sequence[str]], part: str, device: str, dtype: torch.dtype) -> Any:
        return load_part(
            self.load_class(),
            self.config(),
            self.checkpoint.folder,
            keep,
            part=part,
            device=device,
            dtype=dtype,
            dummy=self.settings.load_format == "dummy",
        )


def _path_of(model: Any, wanted: Any) -> str:
    return next(str(path) for path, module in model.named_modules() if module is wanted)
