"""For families that transformers lacks: checkpoints in their published format, and what to compare with.

The reference is transformers' text model, generating from embeddings, with rows that a plain forward pass of the
family's own test module computes from the published tensors.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from .common import draw_weights

Weights = dict[str, torch.Tensor]
# Of ``generate``; everything else is the model's.
_OPTIONS = ("max_new_tokens", "do_sample", "output_logits", "return_dict_in_generate")


def draw(shapes: Mapping[str, tuple[int, ...]]) -> Weights:
    """Random weights: matrices keep the size of what they multiply, norms and biases are not trivial."""
    generator = torch.Generator().manual_seed(1)
    out = {}
    for name, shape in shapes.items():
        tensor = torch.randn(shape, generator=generator)
        if len(shape) > 1:
            tensor *= tensor[0].numel() ** -0.5
        else:
            tensor = 0.1 * tensor + (name.endswith("weight"))
        out[name] = tensor
    return out


def write_checkpoint(
    folder: Path,
    config: Mapping[str, Any],
    tokenizer: Any,
    *,
    text: Any,
    prefix: str,
    towers: Weights,
    files: Mapping[str, Any],
) -> None:
    """Write a checkpoint of a composite, and its text model alone into folder/text.

    Args:
        folder: of the checkpoint.
        config: config.json.
        tokenizer: as it is saved.
        text: transformers' text model, which gets its weights here.
        prefix: of the text model's names in the published format.
        towers: all other weights, by their published names.
        files: further JSON files.
    """
    draw_weights(text)
    text.generation_config.eos_token_id = tokenizer.eos_token_id
    text.generation_config.pad_token_id = tokenizer.pad_token_id
    text.save_pretrained(folder / "text")
    stored = load_file(folder / "text" / "model.safetensors")
    save_file(
        {prefix + name: tensor for name, tensor in stored.items()} | towers,
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    tokenizer.save_pretrained(folder)
    generation = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    for name, content in {"config.json": config, "generation_config.json": generation, **files}.items():
        (folder / name).write_text(json.dumps(content))


class Reference:
    """Called like a model of transformers."""

    def __init__(
        self,
        folder: Path,
        text_class: Any,
        rows: Callable[[Weights, Mapping[str, Any]], Mapping[int, torch.Tensor]],
    ) -> None:
        """Args: the checkpoint; class of its text model; (weights, inputs) -> token id -> its rows, in their order."""
        self.text = text_class.from_pretrained(folder / "text", dtype=torch.float32).eval()
        self.weights = load_file(folder / "model.safetensors")
        self.rows = rows
        # tests reset what families of transformers remember there
        self.base_model = SimpleNamespace()

    def _embed(self, inputs: Mapping[str, Any]) -> torch.Tensor:
        ids = inputs["input_ids"]
        embeddings: torch.Tensor = self.text.get_input_embeddings()(ids).clone()
        for token, rows in self.rows(self.weights, inputs).items():
            embeddings[ids == token] = rows
        return embeddings

    def __call__(self, **inputs: Any) -> Any:
        """Logits of the prompt."""
        return self.text(inputs_embeds=self._embed(inputs))

    def generate(self, **inputs: Any) -> Any:
        """Token ids of prompt and answer; with ``return_dict_in_generate`` they are ``sequences`` of its answer."""
        options = {key: inputs.pop(key) for key in _OPTIONS if key in inputs}
        embeddings = self._embed(inputs)
        mask = torch.ones(embeddings.shape[:2], dtype=torch.long)
        answer = self.text.generate(inputs_embeds=embeddings, attention_mask=mask, **options)
        if isinstance(answer, torch.Tensor):
            return torch.cat([inputs["input_ids"], answer], dim=1)
        answer.sequences = torch.cat([inputs["input_ids"], answer.sequences], dim=1)
        return answer
