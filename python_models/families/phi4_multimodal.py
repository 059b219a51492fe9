"""Phi-4-multimodal (Microsoft 2025, arXiv:2503.01743): image and audio, each with a low-rank adapter of the decoder.

A request with a picture takes the vision adapter for all of its tokens, one with sounds alone the speech adapter, text
alone none; sounds beside a picture also have a projector of their own. Both forms of the checkpoint are read: that of
transformers, with the adapters in folders ``vision-lora`` and ``speech-lora`` (or without), and the published one
(``model_type`` phi4mm), which has them inside. Names and configuration of the latter were compared with transformers'
conversion script for it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from numpy.typing import NDArray

from ...kernels.image import normalise_patches
from ..contract.errors import ErrorKind, TriptychError
from ..contract.features import EncoderItem
from ..contract.settings import Settings
from ..media.types import Audio, Image, Medium
from . import composite
from .adapters import AdapterFolder, Switch, adapt, adapted
from .base import Decoder
from .checkpoint import Checkpoint
from .loading import meta_model, model_class
from .pixels import RAW, check_bytes, normalisation
from .sounds import check_sound
from .transformers_encoder import TransformersEncoder
from .transformers_family import TransformersFamily
from .transformers_preprocessor import TOKEN_TYPES, Tensors, TransformersPreprocessor

PUBLISHED = "phi4mm"
ADAPTERS = ("vision", "speech")
"""Their numbers as a token extra begin at 1; 0 is none."""
_ADAPTED = frozenset({"qkv_proj", "o_proj", "gate_up_proj", "down_proj"})
_TOKENS = {"image_token": "<|endoftext10|>", "audio_token": "<|endoftext11|>"}
_RENAMED = (
    (r"\.feed_forward_(in|out)\.net\.0\.linear\.", r".feed_forward_\1.gate_up_proj."),
    (r"\.feed_forward_(in|out)\.net\.2\.", r".feed_forward_\1.down_proj."),
    (r"\.self_attn\.linear_(q|k|v)\.", r".self_attn.\1_proj."),
    (r"\.self_attn\.linear_out\.", ".self_attn.o_proj."),
    (r"\.img_projection\.0\.", ".img_projection_up."),
    (r"\.img_projection\.2\.", ".img_projection_down."),
    (r"\.glb_GN$", ".global_img_feature_extensor"),
    (r"\.sub_GN$", ".sub_img_feature_extensor"),
    (r"\.audio_projection\.speech\.0\.", ".up_proj_for_speech."),
    (r"\.audio_projection\.speech\.2\.", ".down_proj_for_speech."),
    (r"\.audio_projection\.vision\.0\.", ".up_proj_for_vision_speech."),
    (r"\.audio_projection\.vision\.2\.", ".down_proj_for_vision_speech."),
    (r"\.base_layer\.weight$", ".weight"),
)
"""Published names of weights -> transformers'."""
_AUDIO_RENAMED = {"attention_dim": "hidden_size", "attention_heads": "num_attention_heads"}
_AUDIO_RENAMED |= {"linear_units": "intermediate_size"}
_OWN = ("embd_layer", "audio_processor", "img_processor", "vision_config", "vision_lora", "speech_lora")
_NOT_OURS = ("_name_or_path", "architectures", "auto_map", "transformers_version", "_attn_implementation", "model_type")

# Templates that take texts alone get the media as the tokens that stand for them.
_FLATTEN = (
    "{%- set flat = namespace(messages=[], content='') -%}"
    "{%- for m in messages -%}"
    "{%- if m['content'] is string -%}{%- set flat.content = m['content'] -%}{%- else -%}"
    "{%- set flat.content = '' -%}"
    "{%- for c in m['content'] -%}{%- if c['type'] == 'image' -%}{%- set flat.content = flat.content + 'IMAGE' -%}"
    "{%- elif c['type'] == 'audio' -%}{%- set flat.content = flat.content + 'AUDIO' -%}"
    "{%- else -%}{%- set flat.content = flat.content + c['text'] -%}{%- endif -%}{%- endfor -%}{%- endif -%}"
    "{%- set flat.messages = flat.messages + [dict(m, content=flat.content)] -%}"
    "{%- endfor -%}{%- set messages = flat.messages -%}"
)


class Phi4MultimodalPreprocessor(TransformersPreprocessor):
    """Pictures through Phi4MultimodalImageProcessor, sounds through Phi4MultimodalFeatureExtractor."""

    def __init__(self, checkpoint: Checkpoint, settings: Settings, model: Any, encoders: Mapping[str, str]) -> None:
        self.published = checkpoint.model_type == PUBLISHED
        self.has_adapters = self.published or bool(_adapter_folders(checkpoint.folder))
        super().__init__(checkpoint, settings, model, encoders)
        self._mean, self._std = normalisation(self.processor.image_processor, "image")
        check_bytes(self.processor.image_processor, "image_pixel_values")
        self._sounds = self.processor.audio_processor

    def load_processor(self, folder: Path, settings: Settings) -> Any:
        """Of the published form the files name classes that come along; transformers' own do the same."""
        if self.published:
            tokenizer = load_tokenizer(folder)
            options = _options(folder)
            processor = model_class("Phi4MultimodalProcessor")(
                model_class("Phi4MultimodalImageProcessor")(**_known(options, ("dynamic_hd", "size", "patch_size"))),
                model_class("Phi4MultimodalFeatureExtractor")(**_known(options, _EXTRACTOR_OPTIONS)),
                tokenizer,
            )
        else:
            processor = super().load_processor(folder, settings)
            tokenizer = processor.tokenizer
        # the name that processors of other families have for it
        processor.feature_extractor = processor.audio_processor
        template = str(tokenizer.chat_template or "")
        if template and not re.search(r"\btype\b", template):
            flatten = _FLATTEN.replace("IMAGE", processor.image_token).replace("AUDIO", processor.audio_token)
            tokenizer.chat_template = flatten + template
        return processor

    def token_id(self, modality: str) -> int:
        """Of the towers' own configurations."""
        section = self.config.vision_config if modality == "image" else self.config.audio_config
        return int(getattr(section, f"{modality}_token_id"))

    def check_medium(self, medium: Medium) -> None:
        """At least one window of sound."""
        super().check_medium(medium)
        check_sound(medium, self.sampling_rate, None, int(self._sounds.win_length))

    def processor_arguments(self, media: Mapping[str, Sequence[Medium]]) -> dict[str, Any]:
        """Pixels stay uint8."""
        arguments: dict[str, Any] = {}
        if images := [m.data.pixels for m in media.get("image", ()) if isinstance(m.data, Image)]:
            arguments |= {"images": images, "images_kwargs": dict(RAW)}
        if sounds := [m.data.samples for m in media.get("audio", ()) if isinstance(m.data, Audio)]:
            arguments |= {"audio": sounds, "audio_kwargs": {"sampling_rate": self.sampling_rate}}
        return arguments

    def split_features(
        self, batch: Mapping[str, Any], media: Mapping[str, Sequence[Medium]]
    ) -> dict[str, list[Tensors]]:
        """See :meth:`_picture` and :meth:`_sound`."""
        out: dict[str, list[Tensors]] = {}
        if "image" in media:
            pixels, sizes, masks = (batch[f"image_{name}"] for name in ("pixel_values", "sizes", "attention_mask"))
            out["image"] = [self._picture(*one) for one in zip(pixels, sizes, masks, strict=True)]
        if "audio" in media:
            frames = batch["audio_input_features"]
            masks = batch.get("audio_attention_mask")
            # where it stands beside pictures, a sound has a projector of its own
            beside = np.array(["image" in media])
            out["audio"] = [
                self._sound(mel, None if masks is None else masks[k], int(batch["audio_embed_sizes"][k]), beside)
                for k, mel in enumerate(frames)
            ]
        return out

    def _picture(self, crops: torch.Tensor, size: torch.Tensor, mask: torch.Tensor) -> Tensors:
        """``crops`` uint8 [n, channels, side, side], cut from a canvas row by row; ``mask`` bool [n, patches, patches],
        False for padding; ``grid`` int64 [2], rows and columns of crops; ``mean``, ``std``.

        The picture as a whole, which the processor puts first, is made of the crops again by the encoder.
        """
        grid = size // crops.shape[-1]
        count = 1 + int(grid.prod())
        return {
            "crops": crops[1:count].contiguous().numpy(),
            "mask": mask[1:count].bool().numpy(),
            "grid": grid.numpy(),
            "mean": self._mean,
            "std": self._std,
        }

    def _sound(self, mel: torch.Tensor, mask: torch.Tensor | None, rows: int, beside: NDArray[np.bool_]) -> Tensors:
        """``mel`` float32 [frames, bins] with the padding that it has in this request, which transformers lets it
        attend to; ``mask`` bool [frames]; ``rows`` int64 [1]; ``beside`` bool [1], whether there are pictures."""
        present = np.ones(len(mel), dtype=np.bool_) if mask is None else mask.numpy()
        return {"mel": mel.numpy(), "mask": present, "rows": np.array([rows]), "beside": beside}

    def num_rows(self, modality: str, tensors: Tensors) -> int:
        """Of a picture: two patches squared, without padding, a row end for each line, and the same of the whole."""
        if modality == "audio":
            return int(tensors["rows"][0])
        height, width = useful(torch.from_numpy(tensors["mask"]), tensors["grid"])
        base = (tensors["mask"].shape[-1] + 1) // 2
        return height * (width + 1) + 1 + base * (base + 1)

    def variant(self, modality: str, tensors: Tensors) -> str:
        """A sound depends on the padding it has in its request, and on whether there are pictures."""
        return f"{len(tensors['mel'])}:{int(tensors['beside'][0])}" if modality == "audio" else ""

    def token_extras(
        self, ids: NDArray[np.int32], batch: Mapping[str, Any], types: NDArray[np.int32]
    ) -> dict[str, int | list[int]]:
        """The adapter of the whole request."""
        if not self.has_adapters:
            return {}
        if (types == TOKEN_TYPES["image"]).any():
            return {"adapter": 1 + ADAPTERS.index("vision")}
        return {"adapter": 1 + ADAPTERS.index("speech") if (types == TOKEN_TYPES["audio"]).any() else 0}


def useful(mask: torch.Tensor, grid: Any) -> tuple[int, int]:
    """Lines and columns of squares of two patches that are no padding. Args: see ``_picture``."""
    squares = mask[:, ::2, ::2]
    rows, columns = (int(n) for n in grid)
    base = squares.shape[-1]
    whole = squares.reshape(rows, columns, base, base).transpose(1, 2).reshape(rows * base, columns * base)
    return int(whole[:, 0].sum()), int(whole[0].sum())


class Phi4VisionEncoder(TransformersEncoder):
    """SigLIP over the crops and the whole, and the projector."""

    def __init__(self, model: Any, device: str, dtype: torch.dtype) -> None:
        super().__init__(model, device, dtype)
        for module in self.base.embed_tokens_extend.image_embed.img_processor.modules():
            # transformers 5.23 takes its layers for causal where nothing is padded; as published they see everything
            if getattr(module, "is_causal", False):
                module.is_causal = False

    def features(self, modality: str, items: Sequence[EncoderItem]) -> Any:
        """Pictures of as many crops go through the tower together."""
        out: list[torch.Tensor] = [torch.empty(0)] * len(items)
        for group in _alike([len(item.tensors["crops"]) for item in items]):
            chosen = [items[k] for k in group]
            masks = [self.to_device(item.tensors["mask"]) for item in chosen]
            side = chosen[0].tensors["crops"].shape[-1]
            rows = _run(
                self.base.embed_tokens_extend.image_embed,
                self.config.vision_config.image_token_id,
                sum(item.num_rows for item in chosen),
                self.width,
                image_pixel_values=torch.cat([self._pixels(item) for item in chosen]),
                image_sizes=torch.from_numpy(np.stack([item.tensors["grid"] for item in chosen])) * side,
                image_attention_mask=torch.stack([torch.cat([torch.ones_like(mask[:1]), mask]) for mask in masks]),
            )
            for k, part in zip(group, torch.split(rows, [item.num_rows for item in chosen]), strict=True):
                out[k] = part
        return out

    def _pixels(self, item: EncoderItem) -> torch.Tensor:
        """[1, 1 + crops, channels, side, side] in the tower's dtype: the whole picture made small, then its crops."""
        crops = self.to_device(item.tensors["crops"])
        mean, std = self.to_device(item.tensors["mean"]), self.to_device(item.tensors["std"])
        # to the kernel each crop is one patch of one frame
        flat = normalise_patches(crops.flatten(2)[:, :, None], mean, std, 1, torch.float32)
        rows, columns = (int(n) for n in item.tensors["grid"])
        _, channels, side, _ = crops.shape
        tiles = flat.view(rows, columns, channels, side, side)
        canvas = tiles.permute(2, 0, 3, 1, 4).reshape(1, channels, rows * side, columns * side)
        whole = F.interpolate(canvas, (side, side), mode="bicubic", align_corners=False, antialias=False)
        return torch.cat([whole, tiles.flatten(0, 1)])[None].to(self.dtype)


class Phi4AudioEncoder(TransformersEncoder):
    """The conformer and its two projectors."""

    def features(self, modality: str, items: Sequence[EncoderItem]) -> Any:
        """Sounds that are padded alike and take the same projector go through the tower together."""
        out: list[torch.Tensor] = [torch.empty(0)] * len(items)
        for group in _alike([(len(item.tensors["mel"]), bool(item.tensors["beside"][0])) for item in items]):
            chosen = [items[k] for k in group]
            counts = [item.num_rows for item in chosen]
            rows = _run(
                self.base.embed_tokens_extend.audio_embed,
                self.config.audio_config.audio_token_id,
                sum(counts),
                self.width,
                audio_input_features=torch.stack([self.to_device(item.tensors["mel"]) for item in chosen]),
                audio_embed_sizes=counts,
                audio_attention_mask=torch.stack([self.to_device(item.tensors["mask"]) for item in chosen]),
                audio_projection_mode="vision" if chosen[0].tensors["beside"][0] else "speech",
            )
            for k, part in zip(group, torch.split(rows, counts), strict=True):
                out[k] = part
        return out


def _alike(keys: Sequence[Any]) -> list[list[int]]:
    """Indices of equal keys together."""
    return [[k for k, key in enumerate(keys) if key == wanted] for wanted in dict.fromkeys(keys)]


def _run(embedder: Any, token_id: int, count: int, width: int, **media: Any) -> torch.Tensor:
    """Rows [count, width]: transformers' embedder puts them at its placeholder tokens, of which there are as many."""
    weight = next(embedder.parameters())
    ids = torch.full((1, count), token_id, device=weight.device)
    rows: torch.Tensor = embedder(ids, weight.new_zeros(1, count, width), **media)
    return rows[0]


class Phi4Multimodal(TransformersFamily):
    """Phi-4-multimodal in either form."""

    model_class = "Phi4MultimodalForCausalLM"
    towers: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "vision": ("embed_tokens_extend.image_embed",),
        "audio": ("embed_tokens_extend.audio_embed",),
    }
    modality_encoders: ClassVar[Mapping[str, str]] = {"image": "vision", "audio": "audio"}
    preprocessor_class = Phi4MultimodalPreprocessor
    encoder_classes: ClassVar[Mapping[str, type[TransformersEncoder]]] = {
        "vision": Phi4VisionEncoder,
        "audio": Phi4AudioEncoder,
    }

    def __init__(self, checkpoint: Checkpoint, settings: Settings) -> None:
        super().__init__(checkpoint, settings)
        self.published = checkpoint.model_type == PUBLISHED
        self.folders = {} if self.published else _adapter_folders(checkpoint.folder)
        self.has_adapters = self.published or bool(self.folders)

    def load_config(self) -> Any:
        """transformers' configuration."""
        return self._translated() if self.published else super().load_config()

    def load_class(self) -> Any:
        """Of the published form a class whose adapters are part of the checkpoint."""
        base = super().load_class()
        if not self.published:
            return base
        from transformers.conversion_mapping import register_checkpoint_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        switch = self.switch

        class Phi4MM(base):  # type: ignore[valid-type,misc]
            def __init__(self, config: Any) -> None:
                super().__init__(config)
                adapt(self.model.layers, _ADAPTED, switch)

        rules: list[WeightConverter | WeightRenaming] = [WeightRenaming(*rule) for rule in _RENAMED]
        register_checkpoint_conversion_mapping(Phi4MM.__name__, rules, overwrite=True)
        return Phi4MM

    def load_tokenizer(self) -> Any:
        """The checkpoint's; of the published form not through the classes that come along."""
        return load_tokenizer(self.checkpoint.folder) if self.published else super().load_tokenizer()

    @cached_property
    def switch(self) -> Switch:
        """Of the decoder's adapters."""
        raw = self.checkpoint.config
        if self.published:
            return Switch({name: int(raw[f"{name}_lora"]["r"]) for name in ADAPTERS})
        return Switch({name: folder.rank for name, folder in self.folders.items()})

    def decoder_parts(self, model: Any) -> list[str]:
        """All but the towers, which transformers keeps inside the decoder stack."""
        return ["lm_head", "model.embed_tokens", "model.layers", "model.norm"]

    def load_preprocessor(self) -> TransformersPreprocessor:
        """See :meth:`.base.Family.load_preprocessor`."""
        return self.preprocessor_class(
            self.checkpoint, self.settings, meta_model(super().load_class(), self.config()), self.modality_encoders
        ).ready()

    def load_decoder(self, device: str, dtype: torch.dtype) -> Decoder:
        """See :meth:`.base.Family.load_decoder`; with the adapters in place."""
        decoder = super().load_decoder(device, dtype)
        if not self.has_adapters:
            return decoder
        model: Any = decoder.text_model
        if self.published:
            sections = {name: self.checkpoint.config[f"{name}_lora"] for name in ADAPTERS}
            scales = {name: section["lora_alpha"] / section["r"] for name, section in sections.items()}
        else:
            adapt(model.layers, _ADAPTED, self.switch)
            for name, folder in self.folders.items():
                folder.load(name, model, "model.")
            scales = {name: folder.scale for name, folder in self.folders.items()}
        for _, layer in adapted(model):
            layer.stack(scales)
        self.switch.follow(model)
        return replace(decoder, token_extras={"adapter": None})

    def _translated(self) -> Any:
        raw = self.checkpoint.config
        audio: dict[str, Any] = dict(raw["audio_processor"]["config"])
        known = model_class("Phi4MultimodalAudioConfig")
        options: dict[str, Any] = {_AUDIO_RENAMED.get(key, key): value for key, value in audio.items()}
        options["nemo_conv_channels"] = audio["nemo_conv_settings"]["conv_channels"]
        options["bias_max_distance"] = audio["relative_attention_bias_args"]["t5_bias_max_distance"]
        options["downsample_rate"] = raw["embd_layer"]["audio_embd_layer"]["downsample_rate"]
        options = _known(options, tuple(known().to_dict()))
        # the published code has the tower's shape in itself, transformers as defaults
        vision = {"crop_size": raw["embd_layer"]["image_embd_layer"]["crop_size"], **(raw.get("vision_config") or {})}
        # as it has these tokens' ids
        tokenizer = load_tokenizer(self.checkpoint.folder)
        vision["image_token_id"] = tokenizer.convert_tokens_to_ids(_TOKENS["image_token"])
        options["audio_token_id"] = tokenizer.convert_tokens_to_ids(_TOKENS["audio_token"])
        rest = {key: value for key, value in raw.items() if key not in (*_OWN, *_NOT_OURS)}
        ends = [tokenizer.convert_tokens_to_ids(token) for token in ("<|endoftext|>", "<|end|>")]
        rest["eos_token_id"] = ends
        return model_class("Phi4MultimodalConfig")(**rest, vision_config=vision, audio_config=options)


_EXTRACTOR_OPTIONS = ("audio_compression_rate", "audio_downsample_rate", "audio_feat_stride", "feature_size")


def load_tokenizer(folder: Path) -> Any:
    """The published tokenizer, told which of its tokens stand for media."""
    tokenizer = composite.load_tokenizer(folder)
    for name, token in _TOKENS.items():
        setattr(tokenizer, name, token)
        setattr(tokenizer, f"{name}_id", tokenizer.convert_tokens_to_ids(token))
    return tokenizer


def _adapter_folders(folder: Path) -> dict[str, AdapterFolder]:
    """Of transformers' form: both adapters, or none."""
    found = [name for name in ADAPTERS if (folder / f"{name}-lora" / "adapter_model.safetensors").is_file()]
    if len(found) == 1:
        raise TriptychError(
            ErrorKind.MODEL_NOT_FOUND,
            f"{folder} has {found[0]}-lora but not the other of {', '.join(f'{name}-lora' for name in ADAPTERS)}",
            "settings.model",
        )
    return {name: AdapterFolder(folder / f"{name}-lora") for name in found}


def _options(folder: Path) -> dict[str, Any]:
    path = folder / "preprocessor_config.json"
    options: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return options


def _known(options: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {name: options[name] for name in names if name in options}
