"""DeepSeek-VL2 (Wu et al. 2024, arXiv:2412.10302): image.

SigLIP over square tiles, a projector that joins 2 x 2 of its patches, learned rows at the end of each line and between
the whole picture and its tiles; the text model is DeepSeek-V2 (small), DeepSeek-V3's way of routing (the large one) or
DeepSeek-V2 with plain attention (tiny). Compared with the repository deepseek-ai/DeepSeek-VL2: names of the weights,
config.json of the three sizes, activations of the tower, layout of a picture's rows, prompt, padding and tiles.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from ..contract.errors import ErrorKind, TriptychError
from ..contract.features import EncoderItem
from ..contract.settings import Settings
from ..media.types import Image, Medium
from .checkpoint import Checkpoint
from .composite import Composite, CompositeConfig, CompositeFamily, chat_template, required, text_config
from .deepseek_ocr import DeepseekOcr, PublishedDeepseekOcr2
from .deepseek_published import CONTROL_TOKENS, IMAGE_TOKEN, dense_text_config, load_tokenizer, processor_options
from .deepseek_vl2_processing import DeepseekVL2Processor, Tiling
from .loading import model_class
from .pixels import normalisation
from .squares import SquareEncoder
from .templates import TEMPLATES
from .timm_names import timm_rules
from .transformers_encoder import TransformersEncoder
from .transformers_family import TransformersFamily
from .transformers_preprocessor import Tensors, TransformersPreprocessor

# Of the published configuration: what it leaves out.
_VISION = {"image_size": 384, "patch_size": 16, "width": 1024, "layers": 24, "heads": 16, "mlp_ratio": 4}
_PROJECTOR = {"projector_type": "downsample_mlp_gelu", "depth": 2, "mlp_ratio": 1, "downsample_ratio": 2}
_TEXT = {
    "attention_bias": False,
    "first_k_dense_replace": 0,
    "hidden_act": "silu",
    "kv_lora_rank": 512,
    "max_position_embeddings": 2048,
    "n_group": 1,
    "norm_topk_prob": False,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "routed_scaling_factor": 1.0,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "v_head_dim": 128,
}


class DeepseekVL2Preprocessor(TransformersPreprocessor):
    """Whole pictures and tiles."""

    control_tokens = CONTROL_TOKENS

    def __init__(self, checkpoint: Checkpoint, settings: Settings, model: Any, encoders: Mapping[str, str]) -> None:
        super().__init__(checkpoint, settings, model, encoders)
        tiling = self.processor.image_processor
        self._mean, self._std = normalisation(tiling, "image")
        if tiling.side != self.config.vision_config.image_size:
            raise TriptychError(
                ErrorKind.UNSUPPORTED,
                f"processor_config.json has tiles of {tiling.side} pixels for a tower of "
                f"{self.config.vision_config.image_size}",
                "settings.model",
            )

    def load_processor(self, folder: Path, settings: Settings) -> Any:
        """Our own, by the published options."""
        tokenizer = load_tokenizer(folder)
        tokenizer.chat_template = chat_template(folder, tokenizer) or TEMPLATES["deepseek-vl2"].text
        return DeepseekVL2Processor(Tiling.of(processor_options(folder)), tokenizer)

    def processor_arguments(self, media: Mapping[str, Sequence[Medium]]) -> dict[str, Any]:
        """The pictures."""
        return {"images": [m.data.pixels for m in media["image"] if isinstance(m.data, Image)]}

    def split_features(
        self, batch: Mapping[str, Any], media: Mapping[str, Sequence[Medium]]
    ) -> dict[str, list[Tensors]]:
        """Per picture: ``pixels`` uint8 [1 + tiles, channels, side, side], ``grid`` int64 [2] (columns, rows), and
        ``mean``, ``std``.
        """
        return {
            "image": [
                {"pixels": tiles, "grid": np.array(grid, np.int64), "mean": self._mean, "std": self._std}
                for tiles, grid in zip(batch["tiles"], batch["grids"], strict=True)
            ]
        }

    def num_rows(self, modality: str, tensors: Tensors) -> int:
        """Of the whole picture and its tiles."""
        columns, rows = tensors["grid"].tolist()
        count: int = self.processor.image_processor.count(columns, rows)
        return count

    def variant(self, modality: str, tensors: Tensors) -> str:
        """Whether a picture is cut depends on how many there are."""
        columns, rows = tensors["grid"].tolist()
        return f"{columns}x{rows}"


class DeepseekVL2Encoder(SquareEncoder):
    """SigLIP, projector and layout."""

    def features(self, modality: str, items: Sequence[EncoderItem]) -> Any:
        """The tiles of all pictures in one run of the tower."""
        grids = [item.tensors["grid"].tolist() for item in items]
        return self.base.get_image_features(torch.cat([self._pixels(item) for item in items]), grids)

    def _pixels(self, item: EncoderItem) -> torch.Tensor:
        """[1 + tiles, channels, side, side] in the tower's dtype."""
        return self.normalised(item, "pixels", "mean", "std")


class Projector(nn.Module):
    """Joins squares of patches, the last filled up with zeros; linear layers with GELU between them."""

    def __init__(self, inputs: int, outputs: int, ratio: int, depth: int, mlp_ratio: int) -> None:
        """Args: widths of patches and rows; patches along a square's side; linear layers; their width in outputs."""
        super().__init__()
        self.ratio = ratio
        widths = [inputs * ratio**2, *[outputs * mlp_ratio] * (depth - 1), outputs]
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            layers += [nn.Linear(before, after), nn.GELU()]
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """[n, patches, inputs] -> [n, squares, outputs]."""
        side = int(patches.shape[1] ** 0.5)
        pad = -side % self.ratio
        square = patches.transpose(1, 2).reshape(len(patches), -1, side, side)
        joined = functional.unfold(functional.pad(square, (0, pad, 0, pad)), self.ratio, stride=self.ratio)
        rows: torch.Tensor = self.layers(joined.transpose(1, 2))
        return rows


class DeepseekVL2Model(Composite):
    """Tower, projector, learned rows and text model."""

    published: ClassVar[tuple[tuple[str, str], ...]] = (
        (r"^language\.model\.", "language_model."),
        (r"^language\.lm_head\.", "lm_head."),
        (r"^view_seperator", "view_separator"),
    )

    def build_text(self, config: Any) -> Any:
        """Plain attention is Unlimited-OCR's, which is DeepSeek-V2 but for that."""
        if config.model_type == "unlimited_ocr_text":
            return model_class("UnlimitedOcrTextModel")(config)
        return super().build_text(config)

    def build(self, config: Any) -> None:
        """Add the tower and what follows it."""
        width = config.text_config.hidden_size
        self.vision_tower = model_class("SiglipVisionModel")(config.vision_config)
        self.projector = Projector(config.vision_config.hidden_size, width, **config.projector)
        self.image_newline = nn.Parameter(torch.zeros(width))
        self.view_separator = nn.Parameter(torch.zeros(width))

    def get_image_features(self, pixels: torch.Tensor, grids: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """Tiles of all pictures [n, channels, side, side], the whole of each first; (columns, rows) of their tiles."""
        rows = self.projector(self.vision_tower(pixels).last_hidden_state)
        side = int(rows.shape[1] ** 0.5)
        out = []
        for (columns, lines), own in zip(grids, rows.split([1 + c * r for c, r in grids]), strict=True):
            whole = self._lines(own[0].view(side, side, -1))
            tiles = (
                own[1:].view(lines, columns, side, side, -1).transpose(1, 2).reshape(lines * side, columns * side, -1)
            )
            views = [whole, self.view_separator[None], self._lines(tiles)]
            out.append(torch.cat(views if self.config.whole_first else views[::-1]))
        return out

    def _lines(self, grid: torch.Tensor) -> torch.Tensor:
        """[lines, columns, width] -> [lines * (columns + 1), width]."""
        ends = self.image_newline.expand(len(grid), 1, -1)
        return torch.cat([grid, ends], dim=1).flatten(0, 1)


class DeepseekVL2(CompositeFamily):
    """DeepSeek-VL2 as it is published."""

    composite = DeepseekVL2Model
    towers: ClassVar[Mapping[str, tuple[str, ...]]] = {"vision": ("vision_tower", "projector")}
    modality_encoders: ClassVar[Mapping[str, str]] = {"image": "vision"}
    preprocessor_class: ClassVar[type[TransformersPreprocessor]] = DeepseekVL2Preprocessor
    encoder_classes: ClassVar[Mapping[str, type[TransformersEncoder]]] = {"vision": DeepseekVL2Encoder}

    def load_class(self) -> Any:
        """The tower has timm's names."""
        from transformers.conversion_mapping import register_checkpoint_conversion_mapping
        from transformers.core_model_loading import WeightRenaming

        rules: list[Any] = [WeightRenaming(*names) for names in self.composite.published]
        rules += timm_rules(r"^vision", "vision_tower", "out_proj")
        register_checkpoint_conversion_mapping(self.composite.__name__, rules, overwrite=True)
        return self.composite

    def load_config(self) -> Any:
        """Raises TriptychError (UNSUPPORTED) for a variant of it that no published checkpoint has."""
        raw = self.checkpoint.config
        vision, projector = _VISION | raw["vision_config"], _PROJECTOR | required(raw, "projector_config")
        language = required(raw, "language_config")
        expected = {"projector_type": "downsample_mlp_gelu", "token_pooling": False, "n_embed": language["hidden_size"]}
        for key, value in expected.items():
            if projector.get(key, value) != value:
                raise _unsupported(f"config.json has a projector with {key} {projector[key]!r}; supported: {value!r}")
        if raw.get("tile_tag") != "2D" or raw.get("global_view_pos", "head") not in ("head", "tail"):
            raise _unsupported(
                f"config.json has tile_tag {raw.get('tile_tag')!r} and global_view_pos {raw.get('global_view_pos')!r}; "
                "supported: '2D' and 'head' or 'tail'"
            )
        return CompositeConfig(
            text_config=_text_config(language),
            vision_config=model_class("SiglipVisionConfig")(
                hidden_size=vision["width"],
                intermediate_size=int(vision["width"] * vision["mlp_ratio"]),
                num_hidden_layers=vision["layers"],
                num_attention_heads=vision["heads"],
                image_size=vision["image_size"],
                patch_size=vision["patch_size"],
                hidden_act="gelu_pytorch_tanh",
                layer_norm_eps=1e-6,
                vision_use_head=False,
            ),
            projector={
                "ratio": projector["downsample_ratio"],
                "depth": projector["depth"],
                "mlp_ratio": projector["mlp_ratio"],
            },
            whole_first=raw.get("global_view_pos", "head") == "head",
            image_token_id=self.load_tokenizer().convert_tokens_to_ids(IMAGE_TOKEN),
        )

    def load_tokenizer(self) -> Any:
        """With the tokens that the published processor adds."""
        return load_tokenizer(self.checkpoint.folder)


def _text_config(raw: Mapping[str, Any]) -> Any:
    if not raw.get("use_mla", True):
        text = dense_text_config(raw)
        return model_class("UnlimitedOcrTextConfig")(
            **text, layer_types=["full_attention"] * int(text["num_hidden_layers"])
        )
    if raw.get("scoring_func", "softmax") == "sigmoid":
        expected: Mapping[str, Any] = {"topk_method": "noaux_tc", "moe_layer_freq": 1, "scoring_func": "sigmoid"}
        model_type = "deepseek_v3"
    else:
        expected = {"topk_method": "greedy", "norm_topk_prob": False, "moe_layer_freq": 1, "scoring_func": "softmax"}
        model_type = "deepseek_v2"
    for key, value in expected.items():
        if raw.get(key, value) != value:
            raise _unsupported(
                f"config.json has a {model_type} text model with {key} {raw[key]!r}; supported: {value!r}"
            )
    own = {"num_mtp_layers": 0} if model_type == "deepseek_v3" else {"topk_method": "greedy"}
    return text_config(model_type, {**_TEXT, **{key: raw[key] for key in raw if key not in expected}, **own})


def published(checkpoint: Checkpoint, settings: Settings) -> TransformersFamily:
    """The family of a checkpoint of ``model_type`` "deepseek_vl_v2": three of them share it.

    Raises:
        TriptychError: UNSUPPORTED for towers that none of them has.
    """
    width = checkpoint.config.get("vision_config", {}).get("width")
    if isinstance(width, int):
        return DeepseekVL2(checkpoint, settings)
    names = set(width) if isinstance(width, dict) else set()
    if names == {"clip-l-14-224", "sam_vit_b"}:
        return DeepseekOcr(checkpoint, settings)
    if names == {"qwen2-0-5b", "sam_vit_b"}:
        return PublishedDeepseekOcr2(checkpoint, settings)
    raise _unsupported(f"{settings.model!r} is not supported because its vision_config names towers {sorted(names)!r}")


def _unsupported(message: str) -> TriptychError:
    return TriptychError(ErrorKind.UNSUPPORTED, message, "settings.model")
