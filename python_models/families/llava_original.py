"""The LLaVA line as first published: liuhaotian/llava-v1.5 and v1.6, lmms-lab/llava-next, llama3-llava-next,
llava-onevision-qwen2 and LLaVA-NeXT-Video.

One config.json describes the text model (Llama, Mistral or Qwen2) and, in keys that begin with ``mm_`` and ``image_``,
how pictures go in; model_type does not tell the generations apart, ``image_aspect_ratio`` does. The models are those of
transformers, with other names of weights. There is neither processor nor template for media nor a token for them, and
v1.5 leaves out the vision tower, which it names in ``mm_vision_tower``. Compared with the published configurations and
names of weights and with the repositories haotian-liu/LLaVA and LLaVA-VL/LLaVA-NeXT.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch

from ..contract.errors import ErrorKind, TriptychError
from ..contract.settings import Settings
from .base import Decoder
from .checkpoint import Checkpoint, find_checkpoint
from .composite import required, text_config
from .files import Files
from .llava import Llava, LlavaPreprocessor
from .llava_next import LlavaNext, LlavaNextPreprocessor, LlavaNextVideo, LlavaNextVideoPreprocessor
from .llava_onevision import LlavaOnevision, LlavaOnevisionPreprocessor
from .loading import load_part, model_class
from .reading import load_auto
from .templates import TEMPLATES, ChatTemplate
from .transformers_encoder import TransformersEncoder
from .transformers_family import TransformersFamily
from .transformers_preprocessor import TransformersPreprocessor

_TEXT_MODELS = {"llava_mistral": "mistral", "llava_mixtral": "mixtral", "llava_qwen": "qwen2"}
_RULES = (
    # what pools the frames of a video stands before the projector, and has no weights
    (r"^model\.(?:vision_resampler\.)?mm_projector\.0\.", "model.multi_modal_projector.linear_1."),
    (r"^model\.(?:vision_resampler\.)?mm_projector\.2\.", "model.multi_modal_projector.linear_2."),
    (r"^model\.vision_tower\.vision_tower\.", "model.vision_tower."),
    (r"^model\.(embed_tokens|layers|norm)\.", r"model.language_model.\1."),
)
_CLIP_L: dict[str, Any] = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": 14,
    "projection_dim": 768,
}
# Towers by the last part of their name, so that a checkpoint which holds its own needs no other repository.
_TOWERS: dict[str, dict[str, Any]] = {
    "clip-vit-large-patch14": _CLIP_L | {"image_size": 224},
    "clip-vit-large-patch14-336": _CLIP_L | {"image_size": 336},
    "siglip-so400m-patch14-384": {
        "model_type": "siglip_vision_model",
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "patch_size": 14,
        "image_size": 384,
    },
}
_TOKENS = {"image": "<image>", "video": "<video>"}


class Published:
    """What a published checkpoint says of itself."""

    def __init__(self, checkpoint: Checkpoint, settings: Settings) -> None:
        """Raises TriptychError (UNSUPPORTED) for a projector or placeholders of generations before v1.5."""
        self.checkpoint, self.settings = checkpoint, settings
        self.raw = checkpoint.config
        projector = self.raw.get("mm_projector_type")
        if projector != "mlp2x_gelu" or self.raw.get("mm_use_im_start_end"):
            raise TriptychError(
                ErrorKind.UNSUPPORTED,
                f"{checkpoint.folder} has mm_projector_type {projector!r} and mm_use_im_start_end "
                f"{bool(self.raw.get('mm_use_im_start_end'))}; supported is 'mlp2x_gelu' without it, as of LLaVA 1.5",
                "settings.model",
            )
        self.tower_name = str(self.raw.get("mm_vision_tower"))
        self.tower = self._tower()
        self.side, self.patch = int(self.tower["image_size"]), int(self.tower["patch_size"])
        self.is_clip = self.tower["model_type"] == "clip_vision_model"
        self.full = not self.is_clip or self.raw.get("mm_vision_select_feature", "patch") == "cls_patch"

    @property
    def text_type(self) -> str:
        """transformers' name of the text model."""
        architecture = (self.raw.get("architectures") or [""])[0]
        # some are called "llava" whatever their text model
        if "Qwen" in architecture:
            return "qwen2"
        return _TEXT_MODELS.get(self.checkpoint.model_type, "mistral" if "Mistral" in architecture else "llama")

    @property
    def template(self) -> ChatTemplate:
        """Of the conversations it was trained on."""
        if self.text_type == "qwen2":
            return TEMPLATES["chatml-llava"]
        if self.text_type in ("mistral", "mixtral"):
            return TEMPLATES["llava_mistral_instruct"]
        # vocabularies of Llama 3 and of Yi
        size = int(required(self.raw, "vocab_size"))
        return TEMPLATES["llava_llama_3" if size > 100_000 else "chatml_direct" if size >= 64_000 else "vicuna_v1.1"]

    @property
    def pinpoints(self) -> list[list[int]]:
        """Height and width of each canvas that tiles may fill; published are width and height, or a range of both."""
        given = required(self.raw, "image_grid_pinpoints")
        if isinstance(given, str):
            bounds = [(int(a), int(b)) for a, b in re.findall(r"\((\d+)x(\d+)\)", given)]
            if len(bounds) == 2:
                (low_x, low_y), (high_x, high_y) = bounds
                tiles = [(x, y) for x in range(low_x, high_x + 1) for y in range(low_y, high_y + 1)]
                return [[y * self.side, x * self.side] for x, y in tiles]
            given = json.loads(given.replace("(", "[").replace(")", "]"))
        return [[int(height), int(width)] for width, height in given]

    def config(self, cls: Any) -> Any:
        """The configuration of transformers' class."""
        layer = self.raw.get("mm_vision_select_layer", -2)
        vision = dict(self.tower)
        if not self.is_clip:
            # its last layer was taken off, and what comes out of the one before is not normalised
            vision |= {"num_hidden_layers": vision["num_hidden_layers"] - 1, "vision_use_head": False}
            layer = -1
        values = {
            "vision_config": vision,
            "text_config": text_config(self.text_type, self.raw),
            "vision_feature_layer": layer,
            "vision_feature_select_strategy": "full" if self.full else "default",
            "image_seq_length": (self.side // self.patch) ** 2,
            "tie_word_embeddings": bool(self.raw.get("tie_word_embeddings", False)),
        }
        aspect = str(self.raw.get("image_aspect_ratio"))
        if aspect.startswith("anyres"):
            values["image_grid_pinpoints"] = self.pinpoints
        if aspect.startswith("anyres_max"):
            values["vision_aspect_ratio"] = aspect
        return cls.config_class(**values)

    def tokenizer(self) -> Any:
        """The checkpoint's, with a token for each modality."""
        from tokenizers import AddedToken

        # of no type of model, so that its own files alone say which tokenizer it is
        config = model_class("PreTrainedConfig")()
        tokenizer = load_auto("AutoTokenizer", "tokenizer", self.checkpoint.folder, self.settings, config=config)
        new = [AddedToken(token, normalized=False, special=True) for token in _TOKENS.values()]
        tokenizer.add_tokens(new, special_tokens=True)
        return tokenizer

    def holds_tower(self) -> bool:
        """The tower's weights are among the checkpoint's own."""
        return any(key.startswith("model.vision_tower.") for key in Files(self.checkpoint.folder, "cpu").keys())  # noqa: SIM118

    def tower_checkpoint(self) -> Checkpoint:
        """Where ``mm_vision_tower`` is.

        Raises:
            TriptychError: MODEL_NOT_FOUND saying what is missing and what to do.
        """
        beside = self.checkpoint.folder / self.tower_name
        model = str(beside) if beside.is_dir() else self.tower_name
        try:
            return find_checkpoint(replace(self.settings, model=model, revision=""))
        except TriptychError as error:
            raise TriptychError(
                ErrorKind.MODEL_NOT_FOUND,
                f"{self.checkpoint.folder} has its vision tower in another repository, {self.tower_name!r} "
                f"(mm_vision_tower in config.json): {error.message}. Download it elsewhere and let mm_vision_tower "
                "name its folder",
                "settings.model",
            ) from None

    def _tower(self) -> dict[str, Any]:
        name = self.tower_name.rstrip("/").rpartition("/")[2]
        if not (self.checkpoint.folder / self.tower_name).is_dir() and name in _TOWERS:
            return _TOWERS[name]
        found = self.tower_checkpoint().config
        vision: dict[str, Any] = dict(found.get("vision_config") or found)
        vision.setdefault("model_type", f"{found.get('model_type')}_vision_model")
        if vision["model_type"] not in ("clip_vision_model", "siglip_vision_model"):
            raise TriptychError(
                ErrorKind.UNSUPPORTED,
                f"the vision tower {self.tower_name!r} is of type {vision['model_type']!r}; CLIP and SigLIP are "
                "supported",
                "settings.model",
            )
        return vision


class OriginalPreprocessor(LlavaPreprocessor):
    """Processor and tokenizer as transformers' converted checkpoints have them."""

    def __init__(self, checkpoint: Checkpoint, settings: Settings, model: Any, encoders: Mapping[str, str]) -> None:
        self.published = Published(checkpoint, settings)
        super().__init__(checkpoint, settings, model, encoders)

    def load_processor(self, folder: Path, settings: Settings) -> Any:
        """Made from config.json."""
        return self.make_processor(self.published.tokenizer(), self.published.template.text)

    def token_id(self, modality: str) -> int:
        """Of the token that was added."""
        return int(self.processor.tokenizer.convert_tokens_to_ids(_TOKENS[modality]))

    def make_processor(self, tokenizer: Any, template: str) -> Any:
        """transformers' processor of this generation."""
        raw = self.published.raw
        images = self._vision("LlavaImageProcessor", do_pad=raw.get("image_aspect_ratio") == "pad")
        return model_class("LlavaProcessor")(
            image_processor=images, tokenizer=tokenizer, chat_template=template, **self._patches()
        )

    def _vision(self, name: str, **options: Any) -> Any:
        """An image or video processor for the tower."""
        published = self.published
        square = {"height": published.side, "width": published.side}
        if published.is_clip:
            sizes: dict[str, Any] = {"size": {"shortest_edge": published.side}, "crop_size": square}
        else:
            # SigLIP's towers were trained on pictures scaled to a square, of values between -1 and 1
            half = [0.5, 0.5, 0.5]
            sizes = {"size": square, "image_mean": half, "image_std": half, "do_center_crop": False}
        return model_class(name)(**sizes, **options)

    def _patches(self) -> dict[str, Any]:
        return {
            "patch_size": self.published.patch,
            "vision_feature_select_strategy": "full" if self.published.full else "default",
            "num_additional_image_tokens": int(self.published.is_clip),
        }


class OriginalNextPreprocessor(OriginalPreprocessor, LlavaNextPreprocessor):
    """LLaVA 1.6 and lmms-lab's."""

    def make_processor(self, tokenizer: Any, template: str) -> Any:
        """See :meth:`OriginalPreprocessor.make_processor`."""
        images = self._vision("LlavaNextImageProcessor", image_grid_pinpoints=self.published.pinpoints)
        return model_class("LlavaNextProcessor")(
            image_processor=images, tokenizer=tokenizer, chat_template=template, **self._patches()
        )


class OriginalNextVideoPreprocessor(OriginalPreprocessor, LlavaNextVideoPreprocessor):
    """LLaVA-NeXT-Video."""

    def make_processor(self, tokenizer: Any, template: str) -> Any:
        """See :meth:`OriginalPreprocessor.make_processor`."""
        images = self._vision("LlavaNextImageProcessor", image_grid_pinpoints=self.published.pinpoints)
        return model_class("LlavaNextVideoProcessor")(
            image_processor=images,
            video_processor=self._vision("LlavaNextVideoVideoProcessor"),
            tokenizer=tokenizer,
            chat_template=template,
            **self._patches(),
        )


class OriginalOnevisionPreprocessor(OriginalPreprocessor, LlavaOnevisionPreprocessor):
    """LLaVA-OneVision."""

    def make_processor(self, tokenizer: Any, template: str) -> Any:
        """See :meth:`OriginalPreprocessor.make_processor`."""
        published = self.published
        images = self._vision("LlavaOnevisionImageProcessor", image_grid_pinpoints=published.pinpoints)
        return model_class("LlavaOnevisionProcessor")(
            image_processor=images,
            video_processor=self._vision("LlavaOnevisionVideoProcessor"),
            tokenizer=tokenizer,
            chat_template=template,
            num_image_tokens=(published.side // published.patch) ** 2,
            vision_feature_select_strategy="full" if published.full else "default",
            vision_aspect_ratio=published.raw["image_aspect_ratio"],
        )


class Original(TransformersFamily):
    """What the published formats share."""

    @functools.cached_property
    def published(self) -> Published:
        """What the checkpoint says of itself."""
        return Published(self.checkpoint, self.settings)

    def load_class(self) -> Any:
        """transformers' class under another name, for which the published names of weights are known."""
        return _renamed(self.model_class)

    def load_config(self) -> Any:
        """Translated."""
        return self.published.config(self.load_class())

    def load_tokenizer(self) -> Any:
        """The checkpoint's, with a token for each modality."""
        return self.published.tokenizer()

    def load_encoder(self, encoder: str, device: str, dtype: torch.dtype) -> TransformersEncoder:
        """Projector, and tower from where it is."""
        published = self.published
        if encoder != "vision" or self.settings.load_format == "dummy" or published.holds_tower():
            return super().load_encoder(encoder, device, dtype)
        source = published.tower_checkpoint()
        cls = model_class("CLIPVisionModel" if published.is_clip else "SiglipVisionModel")
        model = self._load(lambda _: ["model.multi_modal_projector"], "projector", device, dtype)
        model.base_model.vision_tower = load_part(
            cls,
            model.config.vision_config,
            source.folder,
            lambda tower: [name for name, _ in tower.named_children()],
            part="vision tower",
            device=device,
            dtype=dtype,
        )
        return self.encoder_classes[encoder](model, device, dtype)

    def _decoder(self, model: Any, embed: Any) -> Decoder:
        decoder = super()._decoder(model, embed)
        ends = self.published.template.end_ids(decoder.tokenizer)
        return replace(decoder, eos_token_ids=decoder.eos_token_ids | ends)


class OriginalLlava(Original, Llava):
    """LLaVA 1.5."""

    preprocessor_class: ClassVar[type[TransformersPreprocessor]] = OriginalPreprocessor


class OriginalNext(Original, LlavaNext):
    """LLaVA 1.6."""

    preprocessor_class: ClassVar[type[TransformersPreprocessor]] = OriginalNextPreprocessor


class OriginalNextVideo(Original, LlavaNextVideo):
    """LLaVA-NeXT-Video."""

    preprocessor_class: ClassVar[type[TransformersPreprocessor]] = OriginalNextVideoPreprocessor


class OriginalOnevision(Original, LlavaOnevision):
    """LLaVA-OneVision."""

    preprocessor_class: ClassVar[type[TransformersPreprocessor]] = OriginalOnevisionPreprocessor


def original(checkpoint: Checkpoint, settings: Settings) -> Original:
    """The generation that a published config.json is of."""
    raw = checkpoint.config
    aspect = str(raw.get("image_aspect_ratio"))
    if aspect.startswith("anyres_max"):
        return OriginalOnevision(checkpoint, settings)
    pools = raw.get("mm_resampler_type") == "spatial_pool" or raw.get("mm_spatial_pool_mode") == "average"
    if pools or "LlavaVid" in (raw.get("architectures") or [""])[0]:
        return OriginalNextVideo(checkpoint, settings)
    if aspect == "anyres":
        return OriginalNext(checkpoint, settings)
    return OriginalLlava(checkpoint, settings)


@functools.cache
def _renamed(name: str) -> Any:
    """A class of transformers that reads the published names of weights."""
    from transformers.conversion_mapping import register_checkpoint_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming

    cls = type(f"Original{name}", (model_class(name),), {})
    rules: list[WeightConverter | WeightRenaming] = [WeightRenaming(pattern, target) for pattern, target in _RULES]
    register_checkpoint_conversion_mapping(cls.__name__, rules, overwrite=True)
    return cls
