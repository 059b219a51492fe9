"""Janus and Janus-Pro (Wu et al. 2024, arXiv:2410.13848; Chen et al. 2025, arXiv:2501.17811): image.

Answers in text about pictures. The half that draws pictures (``vqmodel``, ``generation_*``) is loaded by no stage.

The published checkpoints, ``model_type`` "multi_modality", load as they are. Compared with the repository
deepseek-ai/Janus: names of the weights, the tower that a model name stands for, prompt, tokens of a picture. Sides of a
resized picture are rounded as transformers rounds them; the published code cuts them off.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from ..contract.errors import ErrorKind, TriptychError
from ..contract.settings import Settings
from . import composite
from .deepseek_published import processor_options
from .loading import model_class
from .squares import SquareEncoder, SquarePreprocessor
from .templates import TEMPLATES
from .timm_names import timm_rules
from .transformers_encoder import TransformersEncoder
from .transformers_family import TransformersFamily
from .transformers_preprocessor import TransformersPreprocessor

_TOKENS = {"image_token": "<image_placeholder>", "boi_token": "<begin_of_image>", "eoi_token": "<end_of_image>"}
# What a model name of the published configuration stands for; ``params`` beside it may say otherwise.
_TOWERS: Mapping[str, Mapping[str, Any]] = {
    "siglip_large_patch16_384": {"patch_size": 16, "width": 1024, "layers": 24, "heads": 16, "mlp_ratio": 4},
    "siglip_so400m_patch14_384": {"patch_size": 14, "width": 1152, "layers": 27, "heads": 16, "mlp_ratio": 3.7362},
}
_IMAGE_OPTIONS = ("do_normalize", "image_mean", "image_std", "min_size", "rescale_factor")


class Janus(TransformersFamily):
    """Janus in transformers' format."""

    model_class = "JanusForConditionalGeneration"
    towers: ClassVar[Mapping[str, tuple[str, ...]]] = {"vision": ("vision_model", "aligner")}
    modality_encoders: ClassVar[Mapping[str, str]] = {"image": "vision"}
    preprocessor_class: ClassVar[type[TransformersPreprocessor]] = SquarePreprocessor
    encoder_classes: ClassVar[Mapping[str, type[TransformersEncoder]]] = {"vision": SquareEncoder}


class PublishedPreprocessor(SquarePreprocessor):
    """The published checkpoints bring no processor that transformers knows."""

    def load_processor(self, folder: Path, settings: Settings) -> Any:
        """JanusProcessor with the published options."""
        path = folder / "preprocessor_config.json"
        if not path.is_file():
            raise TriptychError(ErrorKind.MODEL_NOT_FOUND, f"{folder} has no {path.name}", "settings.model")
        raw = json.loads(path.read_text(encoding="utf-8"))
        side = composite.required(raw, "image_size")
        tokenizer = _load_tokenizer(folder)
        return model_class("JanusProcessor")(
            image_processor=model_class("JanusImageProcessor")(
                size={"height": side, "width": side}, **{key: raw[key] for key in _IMAGE_OPTIONS if key in raw}
            ),
            tokenizer=tokenizer,
            chat_template=composite.chat_template(folder, tokenizer) or TEMPLATES["janus-pro"].text,
            num_image_tokens=int(processor_options(folder).get("num_image_tokens", 576)),
        )


class PublishedJanus(Janus):
    """Janus as it is published."""

    preprocessor_class = PublishedPreprocessor

    def load_class(self) -> Any:
        """With rules for the published names."""
        return _published_class()

    def load_config(self) -> Any:
        """Raises TriptychError (UNSUPPORTED) for another model of this ``model_type``, such as DeepSeek-VL."""
        raw = self.checkpoint.config
        vision = composite.required(raw, "vision_config").get("params", {})
        name = vision.get("model_name")
        if name not in _TOWERS or "gen_vision_config" not in raw:
            raise TriptychError(
                ErrorKind.UNSUPPORTED,
                f"{self.settings.model!r} is not supported: of the checkpoints with model_type 'multi_modality' only "
                f"Janus is, with a tower named {' or '.join(_TOWERS)}; this one names {name!r}",
                "settings.model",
            )
        tower = {**_TOWERS[name], **vision}
        aligner = composite.required(raw, "aligner_config")["params"]
        tokenizer = self.load_tokenizer()
        text = composite.text_config("llama", composite.required(raw, "language_config"))
        # the published configuration leaves them out
        text.bos_token_id, text.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
        text.pad_token_id = tokenizer.pad_token_id
        return self.load_class().config_class(
            text_config=text,
            vision_config={
                "hidden_size": tower["width"],
                "num_hidden_layers": tower["layers"],
                "num_attention_heads": tower["heads"],
                "mlp_ratio": tower["mlp_ratio"],
                "image_size": tower["image_size"],
                "patch_size": tower["patch_size"],
                "projection_dim": aligner["n_embed"],
                "depth": aligner["depth"],
            },
            image_token_id=tokenizer.convert_tokens_to_ids(_TOKENS["image_token"]),
            tie_word_embeddings=text.tie_word_embeddings,
        )

    def load_tokenizer(self) -> Any:
        """That of tokenizer.json."""
        return _load_tokenizer(self.checkpoint.folder)


def _load_tokenizer(folder: Path) -> Any:
    tokenizer = composite.load_tokenizer(folder)
    for attribute, token in _TOKENS.items():
        if token not in tokenizer.get_vocab():
            raise TriptychError(ErrorKind.UNSUPPORTED, f"the tokenizer of {folder} has no {token}", "settings.model")
        setattr(tokenizer, attribute, token)
    return tokenizer


@functools.cache
def _published_class() -> Any:
    from transformers.conversion_mapping import register_checkpoint_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    name = "PublishedJanusForConditionalGeneration"
    names = [
        (r"^language_model\.model\.", "model.language_model."),
        (r"^language_model\.lm_head\.", "lm_head."),
        (r"^aligner\.layers\.0\.", "model.aligner.fc1."),
        # between linear layers lie activations
        *((rf"^aligner\.layers\.{2 * k + 2}\.", f"model.aligner.hidden_layers.{k}.") for k in range(4)),
    ]
    rules = [
        *(WeightRenaming(*pair) for pair in names),
        *timm_rules(r"^vision_model\.vision_tower", "model.vision_model", "projection_layer"),
    ]
    register_checkpoint_conversion_mapping(name, rules, overwrite=True)
    return type(name, (model_class(Janus.model_class),), {"__module__": __name__})
