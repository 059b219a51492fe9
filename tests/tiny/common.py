"""What the builders of tiny checkpoints share: a small tokenizer, and weights that tell computations apart."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers


@dataclass(frozen=True)
class Tiny:
    """How to make a tiny checkpoint, and what the tests ask of it.

    Attributes:
        make: () -> (model, processor); or (folder) -> None, which writes it: in another format than that of
            transformers it writes the same model in that of transformers into folder/whole.
        modalities: beside text.
        quick: it is part of ``make test``; the others are tested by ``make parity``.
        without: case of tests/parity -> why transformers itself cannot do it.
        system: its chat template has a system role.
        reference: (folder) -> (model, processor) that answer for the whole, where transformers has no class of it.
        inputs: (processor, text, media by modality) -> the model's inputs, where that processor is called otherwise
            than :meth:`Parts.reference_inputs` of tests/parity does.
    """

    make: Callable[..., Any]
    modalities: tuple[str, ...] = ()
    quick: bool = False
    without: Mapping[str, str] = field(default_factory=dict)
    system: bool = True
    reference: Callable[[Path], tuple[Any, Any]] | None = None
    inputs: Callable[[Any, str, Mapping[str, list[Any]]], Mapping[str, Any]] | None = None


_CORPUS = [
    "the quick brown fox jumps over the lazy dog. describe this image, video and audio in detail please! "
    "what is shown here? user assistant system hello world numbers 0123456789 "
    "How many objects are there and which colours do they have? Transcribe the audio."
] * 4 + [chr(c) * 2 for c in range(32, 127)]


def bpe(special: list[str]) -> Any:
    """A tokenizer of the tokenizers library: bytes, a few hundred merges, these special tokens first."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=480,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(_CORPUS, trainer)
    return raw


def draw_weights(model: Any) -> None:
    """Standard deviation 1/sqrt(inputs), 1 for token embeddings, and biases that are not zero."""
    generator = torch.Generator().manual_seed(0)
    # Gemma multiplies them by sqrt(width), and they are its head: larger ones would make it repeat each token
    embedding = 0.03 if hasattr(model.get_input_embeddings(), "embed_scale") else 1.0
    with torch.no_grad():
        corrections = [(name, buffer) for name, buffer in model.named_buffers() if name.endswith("correction_bias")]
        for name, parameter in (*model.named_parameters(), *corrections):
            if name.endswith("correction_bias"):
                # it decides which experts are chosen
                scale = 0.1
            elif parameter.dim() == 3 and "experts" in name:
                # one matrix for each expert
                scale = parameter.shape[-1] ** -0.5
            elif parameter.dim() >= 2:
                scale = embedding if "embed_tokens" in name else parameter[0].numel() ** -0.5
            elif "bias" in name:
                scale = 0.1
            elif not parameter.any():
                # of Gemma's norms, which add 1
                scale = 0.5
            else:
                continue
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
