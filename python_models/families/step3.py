"""Step3-VL-10B and Step 3.7 (StepFun): image.

A picture is seen whole in one square, and where it is larger or long also as windows of a grid. The tower is a
Perception Encoder (Bolya et al. 2025, arXiv:2504.13181) with rotary positions on two axes, two strided convolutions
and one linear layer; the text models are Qwen3 (Step3-VL-10B) and Step's own. Step3-VL-10B was compared with the
published config.json, names of weights (``vision_model.transformer.resblocks.N``, ``vit_large_projector``) and code.
Its pictures go through transformers' processor for Step 3.7, which resizes bytes where the published code for
Step3-VL-10B resizes normalised values: pixels may differ by a step of a byte.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from ..contract.features import EncoderItem
from ..contract.settings import Settings
from .checkpoint import Checkpoint
from .composite import (
    Composite,
    CompositeConfig,
    CompositeFamily,
    block,
    chat_template,
    load_tokenizer,
    required,
    text_config,
)
from .llava import LlavaEncoder, LlavaPreprocessor
from .loading import model_class
from .transformers_encoder import TransformersEncoder
from .transformers_family import TransformersFamily
from .transformers_preprocessor import Tensors, TransformersPreprocessor


class Step3p7Preprocessor(LlavaPreprocessor):
    """The whole of a picture and its windows."""

    needs_text = True

    def tensors(self, modality: str, batch: Mapping[str, Any], index: int) -> Tensors:
        """Per picture.

        ``pixels`` uint8 [1, channels, side, side], ``windows`` uint8 [windows, channels, side, side], ``mean``,
        ``std``, ``newlines`` bool [windows] (whether a row ends there).
        """
        tensors = super().tensors(modality, batch, index)
        ids = np.array(batch["input_ids"][0])
        end, newline = (
            self.processor.tokenizer.convert_tokens_to_ids(token) for token in ("<patch_end>", "<patch_newline>")
        )
        tensors["newlines"] = ids[np.flatnonzero(ids == end) + 1] == newline
        if "pixel_values_local" in batch:
            tensors["windows"] = batch["pixel_values_local"].contiguous().numpy()
        return tensors

    def _image_expansion(self, tensors: Tensors) -> str:
        newlines = tensors["newlines"].tolist()
        inputs = {"num_local_patches": [len(newlines)], "patch_newline_masks": [newlines]}
        text: str = self.processor.replace_image_token(inputs, 0)
        return text


class Step3p7Encoder(LlavaEncoder):
    """Tower and projector."""

    def features(self, modality: str, items: Sequence[EncoderItem]) -> Any:
        """All pictures in one run of the tower, all windows in another."""
        windows = [
            self._pixels(EncoderItem(modality, "", 0, {**item.tensors, "pixels": item.tensors["windows"]}))
            for item in items
            if "windows" in item.tensors
        ]
        return self.base.get_image_features(
            torch.cat([self._pixels(item) for item in items]),
            torch.cat(windows) if windows else None,
            [len(item.tensors["newlines"]) for item in items],
            return_dict=True,
        ).pooler_output


class Step3p7(TransformersFamily):
    """Step 3.7."""

    model_class = "Step3p7ForConditionalGeneration"
    towers: ClassVar[Mapping[str, tuple[str, ...]]] = {"vision": ("vision_model", "multi_modal_projector")}
    modality_encoders: ClassVar[Mapping[str, str]] = {"image": "vision"}
    preprocessor_class: ClassVar[type[TransformersPreprocessor]] = Step3p7Preprocessor
    encoder_classes: ClassVar[Mapping[str, type[TransformersEncoder]]] = {"vision": Step3p7Encoder}


class Step3VLPreprocessor(Step3p7Preprocessor):
    """With Step 3.7's processor."""

    def __init__(self, checkpoint: Checkpoint, settings: Settings, model: Any, encoders: Mapping[str, str]) -> None:
        self._vision = model.config.vision_config
        super().__init__(checkpoint, settings, model, encoders)

    def load_processor(self, folder: Path, settings: Settings) -> Any:
        """The published code has the sizes of squares and windows in it; preprocessor_config.json may say others."""
        side = self._vision.image_size
        options = {"size": {"height": side, "width": side}, "vision_patch_size": self._vision.patch_size}
        path = folder / "preprocessor_config.json"
        if path.is_file():
            options |= json.loads(path.read_text(encoding="utf-8"))
        tokenizer = load_tokenizer(folder)
        return model_class("Step3p7Processor")(
            image_processor=model_class("Step3p7ImageProcessor")(**options),
            tokenizer=tokenizer,
            chat_template=chat_template(folder, tokenizer),
        )


class Step3VLModel(Composite):
    """Tower, projector, text model."""

    published: ClassVar[tuple[tuple[str, str], ...]] = (
        (r"^model\.language_model\.", "model."),
        (r"^model\.vision_model\.", "vision_model."),
        (r"^model\.vit_large_projector\.", "vit_large_projector."),
        (r"^vit_large_projector\.", "multi_modal_projector."),
        (r"^model\.", "language_model."),
    )

    def build(self, config: Any) -> None:
        """Add tower and projector."""
        self.vision_model = block("step3p7", "Step3p7VisionModel")(config.vision_config)
        self.multi_modal_projector = nn.Linear(
            # both strided convolutions double it
            4 * config.vision_config.hidden_size,
            config.text_config.hidden_size,
            bias=config.projector_bias,
        )

    def get_image_features(
        self, pixels: torch.Tensor, windows: torch.Tensor | None, counts: Sequence[int], **_: Any
    ) -> SimpleNamespace:
        """Squares [pictures, channels, side, side], windows of all pictures, how many each has -> rows of each."""
        whole, *parts = [
            self.multi_modal_projector(self.vision_model(part).last_hidden_state)
            for part in (pixels, windows)
            if part is not None
        ]
        seen = parts[0].split(list(counts)) if parts else [whole[:0]] * len(counts)
        # the windows come first
        rows = [torch.cat([own.flatten(0, 1), square]) for own, square in zip(seen, whole, strict=True)]
        return SimpleNamespace(pooler_output=rows)


class Step3VL(CompositeFamily, Step3p7):
    """Step3-VL-10B."""

    composite = Step3VLModel
    preprocessor_class = Step3VLPreprocessor

    def load_config(self) -> Any:
        """The parts lie in it as they are."""
        raw = self.checkpoint.config
        vision = {key: value for key, value in required(raw, "vision_config").items() if key != "model_type"}
        return CompositeConfig(
            text_config=text_config("qwen3", required(raw, "text_config")),
            vision_config=model_class("Step3p7VisionConfig")(**vision),
            image_token_id=required(raw, "image_token_id"),
            projector_bias=raw.get("projector_bias", False),
        )
