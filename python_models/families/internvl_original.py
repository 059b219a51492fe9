"""InternVL 2, 2.5 and 3 as OpenGVLab publishes them (model_type ``internvl_chat``), without the code they bring along.

The models are transformers' InternVL with a text model of InternLM 2, Qwen2, Llama or Phi-3; InternLM 2 is a Llama
whose queries, keys and values are one matrix, interleaved by groups of heads. Names of weights, configuration,
processor and conversation format are translated. Compared with the published configurations and names of weights and
with the repository OpenGVLab/InternVL.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from ..contract.errors import ErrorKind, TriptychError
from ..contract.settings import Settings
from .base import Decoder
from .checkpoint import Checkpoint
from .composite import required, text_config
from .internvl import InternVL, InternVLPreprocessor
from .loading import model_class
from .reading import load_auto
from .templates import TEMPLATES, ChatTemplate
from .transformers_preprocessor import TransformersPreprocessor

_NAMES = (
    (r"^vision_model\.", "model.vision_tower."),
    (r"vision_tower\.encoder\.layers\.", "vision_tower.encoder.layer."),
    (r"\.ls1$", ".lambda_1"),
    (r"\.ls2$", ".lambda_2"),
    (r"(layer\.\d+)\.attn\.proj\.", r"\1.attention.projection_layer."),
    (r"(layer\.\d+)\.attn\.(?=[qk]_norm\.)", r"\1.attention."),
    (r"(layer\.\d+)\.norm1\.", r"\1.layernorm_before."),
    (r"(layer\.\d+)\.norm2\.", r"\1.layernorm_after."),
    (r"\.embeddings\.class_embedding$", ".embeddings.cls_token"),
    (r"\.embeddings\.position_embedding$", ".embeddings.position_embeddings"),
    (r"\.embeddings\.patch_embedding\.", ".embeddings.patch_embeddings.projection."),
    (r"^mlp1\.0\.", "model.multi_modal_projector.layer_norm."),
    (r"^mlp1\.1\.", "model.multi_modal_projector.linear_1."),
    (r"^mlp1\.3\.", "model.multi_modal_projector.linear_2."),
    (r"^language_model\.lm_head\.", "lm_head."),
    # of InternLM 2
    (r"^language_model\.output\.", "lm_head."),
    (r"^language_model\.model\.tok_embeddings\.", "model.language_model.embed_tokens."),
    (r"^language_model\.model\.", "model.language_model."),
    (r"(layers\.\d+)\.attention\.wo\.", r"\1.self_attn.o_proj."),
    (r"(layers\.\d+)\.feed_forward\.w1\.", r"\1.mlp.gate_proj."),
    (r"(layers\.\d+)\.feed_forward\.w2\.", r"\1.mlp.down_proj."),
    (r"(layers\.\d+)\.feed_forward\.w3\.", r"\1.mlp.up_proj."),
    (r"(layers\.\d+)\.attention_norm\.", r"\1.input_layernorm."),
    (r"(layers\.\d+)\.ffn_norm\.", r"\1.post_attention_layernorm."),
)
_MEAN, _STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
_TOKENS = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}


class InternVLChatPreprocessor(InternVLPreprocessor):
    """transformers' processor, made from config.json."""

    def __init__(self, checkpoint: Checkpoint, settings: Settings, model: Any, encoders: Mapping[str, str]) -> None:
        self._raw = checkpoint.config
        self._rows = int(model.config.image_seq_length)
        super().__init__(checkpoint, settings, model, encoders)

    def load_processor(self, folder: Path, settings: Settings) -> Any:
        """As transformers' converted checkpoints have it."""
        raw = self._raw
        dynamic = bool(raw.get("dynamic_image_size", True))
        if dynamic and not raw.get("use_thumbnail", True):
            raise TriptychError(
                ErrorKind.UNSUPPORTED,
                f"{folder} has use_thumbnail false; only tiles beside the whole picture are supported",
                "settings.model",
            )
        side = image_side(raw)
        options = {"size": {"height": side, "width": side}, "image_mean": _MEAN, "image_std": _STD}
        tokenizer = load_tokenizer(folder, settings)
        for name, token in _TOKENS.items():
            setattr(tokenizer, name, token)
            setattr(tokenizer, f"{name}_id", tokenizer.convert_tokens_to_ids(token))
        tokenizer.video_token = "<video>"
        return model_class("InternVLProcessor")(
            image_processor=model_class("GotOcr2ImageProcessor")(
                crop_to_patches=True,
                min_patches=int(raw.get("min_dynamic_patch", 1)),
                max_patches=int(raw.get("max_dynamic_patch", 12)) if dynamic else 1,
                **options,
            ),
            video_processor=model_class("InternVLVideoProcessor")(**options),
            tokenizer=tokenizer,
            image_seq_length=self._rows,
            chat_template=chat_template(raw).text,
        )

    def token_id(self, modality: str) -> int:
        """Pictures and frames alike."""
        return int(self.processor.image_token_id)


class InternVLChat(InternVL):
    """InternVL in OpenGVLab's format."""

    preprocessor_class: ClassVar[type[TransformersPreprocessor]] = InternVLChatPreprocessor

    def load_class(self) -> Any:
        """transformers' class under another name, for which the published names of weights are known."""
        return _class()

    def load_config(self) -> Any:
        """Translated.

        Raises:
            TriptychError: UNSUPPORTED for the order of pixels of versions before 2, and for text models that
                transformers lacks.
        """
        raw = self.checkpoint.config
        if raw.get("ps_version", "v2") != "v2":
            raise TriptychError(
                ErrorKind.UNSUPPORTED,
                f"{self.checkpoint.folder} has ps_version {raw['ps_version']!r}; InternVL from version 2 on is "
                "supported, which has 'v2'",
                "settings.model",
            )
        tower, text = required(raw, "vision_config"), dict(required(raw, "llm_config"))
        side, patch, ratio = image_side(raw), int(tower["patch_size"]), float(raw.get("downsample_ratio", 0.5))
        model_type = text.get("model_type")
        scaling = dict(text.get("rope_scaling") or {})
        kind = scaling.pop("rope_type", scaling.pop("type", None))
        if kind == "dynamic":
            # changes nothing up to max_position_embeddings, and no request is longer than that
            text["rope_scaling"] = None
        elif kind is not None:
            # LongRoPE as Phi-3 first called it
            text["rope_scaling"] = scaling | {"rope_type": "longrope" if kind == "su" else kind}
        if model_type == "internlm2":
            text["attention_bias"] = text.pop("bias", False)
        return model_class("InternVLConfig")(
            vision_config={
                "hidden_size": tower["hidden_size"],
                "intermediate_size": tower["intermediate_size"],
                "num_hidden_layers": tower["num_hidden_layers"],
                "num_attention_heads": tower["num_attention_heads"],
                "attention_bias": tower["qkv_bias"],
                "use_qk_norm": tower["qk_normalization"],
                "norm_type": tower["norm_type"],
                "layer_norm_eps": tower["layer_norm_eps"],
                "hidden_act": tower["hidden_act"],
                "image_size": [side, side],
                "patch_size": [patch, patch],
            },
            text_config=text_config("llama" if model_type == "internlm2" else str(model_type), text),
            image_seq_length=int((side // patch) ** 2 * ratio**2),
            downsample_ratio=ratio,
            vision_feature_layer=raw.get("select_layer", -1),
            tie_word_embeddings=bool(text.get("tie_word_embeddings", False)),
        )

    def load_tokenizer(self) -> Any:
        """See :func:`load_tokenizer`."""
        return load_tokenizer(self.checkpoint.folder, self.settings)

    def _decoder(self, model: Any, embed: Any) -> Decoder:
        decoder = super()._decoder(model, embed)
        # some generation_config.json name no end
        ends = chat_template(self.checkpoint.config).end_ids(decoder.tokenizer)
        return replace(decoder, eos_token_ids=decoder.eos_token_ids | ends)


def image_side(raw: Mapping[str, Any]) -> int:
    """Of a tile, in pixels."""
    return int(raw.get("force_image_size") or raw["vision_config"]["image_size"])


def chat_template(raw: Mapping[str, Any]) -> ChatTemplate:
    """The one that config.json names.

    Raises:
        TriptychError: UNSUPPORTED where it is none that is known.
    """
    name = str(required(raw, "template"))
    if name not in TEMPLATES:
        raise TriptychError(
            ErrorKind.UNSUPPORTED,
            f"config.json names the conversation format {name!r}, which is unknown; known are "
            f"{', '.join(sorted(TEMPLATES))}",
            "settings.model",
        )
    return TEMPLATES[name]


def load_tokenizer(folder: Path, settings: Settings) -> Any:
    """The checkpoint's; InternLM 2's class, which it brings along, is Llama's without a space before the first word."""
    path = folder / "tokenizer_config.json"
    named = str(json.loads(path.read_text(encoding="utf-8")).get("tokenizer_class")) if path.is_file() else ""
    if not named.startswith("InternLM2"):
        # a configuration of no type of model, so that the tokenizer's own files alone say which it is
        return load_auto("AutoTokenizer", "tokenizer", folder, settings, config=model_class("PreTrainedConfig")())
    if (folder / "tokenizer.json").is_file():
        return load_auto("PreTrainedTokenizerFast", "tokenizer", folder, settings)
    return load_auto("LlamaTokenizer", "tokenizer", folder, settings, legacy=False, add_prefix_space=False)


@functools.cache
def _class() -> Any:
    from transformers.conversion_mapping import register_checkpoint_conversion_mapping
    from transformers.core_model_loading import Chunk, ConversionOps, WeightConverter, WeightRenaming

    class SplitGroups(ConversionOps):
        """One matrix [groups * (queries + 2) * head, width]: the queries of a group of heads, its key, its value."""

        def convert(
            self, input_dict: Any, source_patterns: list[str], target_patterns: list[str], **kwargs: Any
        ) -> Any:
            """Three matrices."""
            found = next(iter(input_dict.values()))
            joined = found[0] if isinstance(found, list) else found
            text = kwargs["config"].get_text_config()
            groups = text.num_key_value_heads
            head = text.hidden_size // text.num_attention_heads
            parts = joined.view(groups, -1, head, *joined.shape[1:])
            pieces = parts[:, :-2], parts[:, -2], parts[:, -1]
            return {
                name: piece.reshape(-1, *joined.shape[1:]).contiguous()
                for name, piece in zip(target_patterns, pieces, strict=True)
            }

        @property
        def reverse_op(self) -> Any:
            """Nothing is written in this format."""
            raise NotImplementedError

    def split(source: str, attention: str, ending: str, operation: Any) -> Any:
        targets = [f"{attention}.{part}_proj.{ending}" for part in "qkv"]
        return WeightConverter(source_patterns=[f"{source}.{ending}"], target_patterns=targets, operations=[operation])

    cls = type("InternVLChatForConditionalGeneration", (model_class("InternVLForConditionalGeneration"),), {})
    rules: list[WeightRenaming | WeightConverter] = [WeightRenaming(pattern, name) for pattern, name in _NAMES]
    rules += [split("attn.qkv", "attention", ending, Chunk(dim=0)) for ending in ("weight", "bias")]
    rules += [split("attention.wqkv", "self_attn", ending, SplitGroups()) for ending in ("weight", "bias")]
    register_checkpoint_conversion_mapping(cls.__name__, rules, overwrite=True)
    return cls
