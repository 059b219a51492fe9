"""dots.ocr and dots.vlm1 (rednote-hilab): image.

The tower is the dense half of transformers' ``Dots3NoteVisionModel`` without its norms of queries and keys: patches
of one frame, RMSNorm, SwiGLU, rotary positions on two axes, a merger of 2 x 2 patches. The text models are Qwen2
(dots.ocr) and DeepSeek-V3 (dots.vlm1); positions count tokens. Compared with the published config.json and names of
weights (``vision_tower.patch_embed.patchifier``, ``blocks.N.mlp.fc1/fc2/fc3``, ``post_trunk_norm``, ``model.*``) and
with the public inference code for both checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from ..contract.settings import Settings
from .composite import (
    Composite,
    CompositeConfig,
    CompositeFamily,
    chat_template,
    load_piece,
    load_tokenizer,
    required,
    text_config,
    write_parts,
)
from .loading import model_class
from .qwen_vision import QwenVisionEncoder, QwenVisionPreprocessor
from .transformers_encoder import TransformersEncoder
from .transformers_preprocessor import TransformersPreprocessor

_IMAGE_TOKEN = "<|imgpad|>"


class DotsPreprocessor(QwenVisionPreprocessor):
    """Pictures through Qwen2VLImageProcessor, patches of one frame."""

    def load_processor(self, folder: Path, settings: Settings) -> Any:
        """Qwen2-VL's: the checkpoint's own class differs from it by the name of the image token."""
        tokenizer = load_tokenizer(folder)
        processor = model_class("Qwen2VLProcessor")(
            image_processor=load_piece("Qwen2VLImageProcessor", "image processor", folder),
            tokenizer=tokenizer,
            video_processor=model_class("Qwen2VLVideoProcessor")(),
            chat_template=chat_template(folder, tokenizer),
        )
        processor.image_token = _IMAGE_TOKEN
        processor.image_token_id = tokenizer.convert_tokens_to_ids(_IMAGE_TOKEN)
        write_parts(processor, {"image": f"<|img|>{_IMAGE_TOKEN}<|endofimg|>"})
        return processor


class DotsModel(Composite):
    """Tower and text model."""

    published: ClassVar[tuple[tuple[str, str], ...]] = (
        (r"^model\.", "language_model."),
        (r"^vision_tower\.patch_embed\.patchifier\.", "vision_tower.patch_embed."),
    )

    def build(self, config: Any) -> None:
        """Add the tower."""
        self.vision_tower = model_class("Dots3NoteVisionModel")(config.vision_config)
        for block in self.vision_tower.blocks:
            for name in ("q_norm", "k_norm"):
                delattr(block.attn, name)
                setattr(block.attn, name, _unchanged)
        if not config.post_norm:
            self.vision_tower.norm = nn.Identity()

    def get_image_features(self, pixel_values: Any, image_grid_thw: Any, **_: Any) -> Any:
        """Patches [n, channels * frames * pixels], grids [pictures, 3] -> rows in ``pooler_output``."""
        return self.vision_tower(pixel_values, grid_thw=image_grid_thw)


class DotsOCR(CompositeFamily):
    """dots.ocr."""

    composite = DotsModel
    text_type: ClassVar[str] = "qwen2"
    towers: ClassVar[Mapping[str, tuple[str, ...]]] = {"vision": ("vision_tower",)}
    packs_sequences = True
    modality_encoders: ClassVar[Mapping[str, str]] = {"image": "vision"}
    preprocessor_class: ClassVar[type[TransformersPreprocessor]] = DotsPreprocessor
    encoder_classes: ClassVar[Mapping[str, type[TransformersEncoder]]] = {"vision": QwenVisionEncoder}

    def load_config(self) -> Any:
        """The text model's values lie beside ``vision_config``."""
        raw = self.checkpoint.config
        vision = required(raw, "vision_config")
        width, bias = vision.get("embed_dim", 1536), vision.get("use_bias", False)
        layers, merge = vision.get("num_hidden_layers", 42), vision.get("spatial_merge_size", 2)
        return CompositeConfig(
            text_config=text_config(self.text_type, raw),
            vision_config=model_class("Dots3NoteVisionConfig")(
                hidden_size=width,
                intermediate_size=vision.get("intermediate_size", 4224),
                num_hidden_layers=layers,
                num_attention_heads=vision.get("num_attention_heads", 12),
                num_channels=vision.get("num_channels", 3),
                patch_size=vision.get("patch_size", 14),
                rms_norm_eps=vision.get("rms_norm_eps", 1e-5),
                attention_bias=bias,
                mlp_bias=bias,
                mlp_layer_types=["dense"] * layers,
                spatial_merge_size=merge,
                adapter_merge_size=merge,
                adapter_in_dim=width,
                # "hidden_size" is that of the rows it gives
                adapter_out_dim=vision.get("hidden_size", 1536),
                temporal_patch_size=vision.get("temporal_patch_size", 1),
            ),
            image_token_id=required(raw, "image_token_id"),
            post_norm=vision.get("post_norm", True),
        )


class DotsVLM(DotsOCR):
    """dots.vlm1."""

    text_type = "deepseek_v3"


def _unchanged(heads: torch.Tensor) -> torch.Tensor:
    """In place of the norms: no module, so that the attention is known for what it is (see :mod:`.tower_fusion`)."""
    return heads
