"""What checkpoints without encoders have in place of a processor: their tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..contract.settings import Settings
from ..media.types import Medium
from .reading import load_auto
from .transformers_preprocessor import Tensors, TransformersPreprocessor


class TextPreprocessor(TransformersPreprocessor):
    """Template and tokenizer; every medium is refused."""

    def load_processor(self, folder: Path, settings: Settings) -> Any:
        """The tokenizer: one that was made beside pictures may name a processor that is not there."""
        return TextProcessor(load_auto("AutoTokenizer", "tokenizer", folder, settings))

    def processor_arguments(self, media: Mapping[str, Sequence[Medium]]) -> dict[str, Any]:
        """Of no media."""
        return {}

    def split_features(
        self, batch: Mapping[str, Any], media: Mapping[str, Sequence[Medium]]
    ) -> dict[str, list[Tensors]]:
        """Of no media."""
        return {}

    def num_rows(self, modality: str, tensors: Tensors) -> int:
        """Of no medium."""
        return 0


class TextProcessor:
    """Called like a processor."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __call__(self, text: Sequence[str], **options: Any) -> Any:
        """Token ids."""
        return self.tokenizer(text, **options)
