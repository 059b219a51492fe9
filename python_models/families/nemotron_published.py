"""Nemotron Nano 2 VL (nvidia/NVIDIA-Nemotron-Nano-12B-v2-VL): image, video; its configuration and processor.

The checkpoint brings its own code (model_type NemotronH_Nano_VL_V2); its modules are those of Nemotron Omni without
ears and without an embedder of pairs of frames, its weights have the names that transformers knows from there. What
its processor does was compared with the published config.json, the names of weights and two public servers of it
(vLLM's nano_nemotron_vl, SGLang's processor): a picture is cut into tiles of 512 pixels, up to twelve, in the grid
whose shape is closest to its own, and a small copy of the whole comes last where there are several; a frame of a video
is one tile, written with its time. Tokens of videos are pruned as config.json says (see :mod:`.evs`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image as PILImage

from ..contract.errors import ErrorKind, TriptychError
from ..contract.features import EncoderItem
from ..contract.settings import Settings
from ..media.types import Image, Medium, Video
from .checkpoint import Checkpoint, find_checkpoint
from .nemotron import NemotronOmni, NemotronPreprocessor
from .reading import load_auto
from .transformers_encoder import TransformersEncoder
from .transformers_preprocessor import Tensors, TransformersPreprocessor

_MOST_TILES = 12
_TOWERS = {"vit_base": (768, 12, 12), "vit_large": (1024, 24, 16), "vit_huge": (1280, 32, 16)}
"""Beginning of a tower's name -> hidden size, layers, heads."""


class NanoProcessor:
    """What the checkpoint's own processor does with pictures and frames, beside its tokenizer."""

    image_token, video_token = "<image>", "<video>"

    def __init__(self, tokenizer: Any, config: Mapping[str, Any]) -> None:
        """Args: the checkpoint's tokenizer and config.json."""
        self.tokenizer = tokenizer
        self.image_token = str(config.get("img_context_token", self.image_token))
        self.video_token = str(config.get("video_context_token", self.video_token))
        self.ends = str(config.get("img_start_token", "<img>")), str(config.get("img_end_token", "</img>"))
        self.side = int(config["force_image_size"])
        self.thumbnail = bool(config.get("use_thumbnail", True))
        self.mean = np.array(config["norm_mean"], dtype=np.float32)
        self.std = np.array(config["norm_std"], dtype=np.float32)
        # rows and columns of a tile's tokens
        self.grid = int(self.side // int(config["patch_size"]) * float(config["downsample_ratio"]))

    def __call__(self, text: Sequence[str], **_: Any) -> Any:
        """Of text alone."""
        return self.tokenizer(list(text))

    def tiles(self, picture: PILImage.Image) -> NDArray[np.uint8]:
        """A picture -> uint8 [tiles, channels, side, side]."""
        columns, rows = best_grid(picture.width, picture.height, self.side)
        side = self.side
        whole = picture.resize((columns * side, rows * side), PILImage.Resampling.BICUBIC)
        cut = [
            whole.crop((column * side, row * side, (column + 1) * side, (row + 1) * side))
            for row in range(rows)
            for column in range(columns)
        ]
        if self.thumbnail and len(cut) > 1:
            cut.append(picture.resize((side, side), PILImage.Resampling.BICUBIC))
        return _channels_first(cut)

    def frames(self, video: Video) -> NDArray[np.uint8]:
        """Frames of a video -> uint8 [frames, channels, side, side]."""
        size = self.side, self.side
        bicubic = PILImage.Resampling.BICUBIC
        return _channels_first([PILImage.fromarray(frame).resize(size, bicubic) for frame in video.frames])

    def write(self, tiles: int) -> str:
        """What stands for a picture of so many tiles."""
        return self.ends[0] + self.image_token * (tiles * self.grid**2) + self.ends[1]

    def write_video(self, video: Video) -> str:
        """What stands for a video: each frame after its time, in whole milliseconds a frame."""
        duration = int(1000 / video.source_fps)
        return "".join(
            f"Frame {number} sampled at {index * duration / 1000:.2f} seconds: {self.write(1)}"
            for number, index in enumerate(video.indices, 1)
        )


class NanoPreprocessor(NemotronPreprocessor):
    """Tiles and frames travel as bytes."""

    def load_processor(self, folder: Path, settings: Settings) -> Any:
        """The tokenizer, and the checkpoint's own rules in our words."""
        return NanoProcessor(
            load_auto("AutoTokenizer", "tokenizer", folder, settings), find_checkpoint(settings).config
        )

    def _fingerprint(self, modality: str) -> str:
        own = self.processor
        return f"{own.side}:{own.thumbnail}:{own.mean.tolist()}:{own.std.tolist()}"

    def _call(self, text: str, grouped: Mapping[str, Sequence[Medium]]) -> Mapping[str, Any]:
        processor = self.processor
        features: dict[str, list[Tensors]] = {}
        written: dict[str, list[str]] = {}
        for modality, media in grouped.items():
            token = self._placeholder(modality)
            if text.count(token) != len(media):
                raise ValueError(f"the template writes {text.count(token)} of {token} for {len(media)} {modality}(s)")
            for medium in media:
                if isinstance(medium.data, Video):
                    pixels, replacement = processor.frames(medium.data), processor.write_video(medium.data)
                else:
                    assert isinstance(medium.data, Image)
                    pixels = processor.tiles(medium.data.pixels)
                    replacement = processor.write(len(pixels))
                own = {"pixels": pixels, "mean": processor.mean, "std": processor.std}
                features.setdefault(modality, []).append(own)
                written.setdefault(token, []).append(replacement)
        if written:
            # in one pass: what stands for a video holds the placeholders of pictures
            queues = {token: iter(texts) for token, texts in written.items()}
            text = re.sub("|".join(map(re.escape, queues)), lambda match: next(queues[match[0]]), text)
        return {"input_ids": processor.tokenizer([text])["input_ids"], "features": features}

    def split_features(
        self, batch: Mapping[str, Any], media: Mapping[str, Sequence[Medium]]
    ) -> dict[str, list[Tensors]]:
        """Per item ``pixels`` uint8 [tiles or frames, channels, side, side], ``mean``, ``std`` float32 [channels]."""
        features: dict[str, list[Tensors]] = batch["features"]
        return features

    def num_rows(self, modality: str, tensors: Tensors) -> int:
        """The same for each tile and frame."""
        return len(tensors["pixels"]) * int(self.processor.grid) ** 2

    def video_grid(self, tensors: Tensors) -> tuple[int, int, int]:
        """See :class:`NemotronPreprocessor`."""
        return len(tensors["pixels"]), int(self.processor.grid), int(self.processor.grid)


class NanoVisionEncoder(TransformersEncoder):
    """RADIO and its projector."""

    def features(self, modality: str, items: Sequence[EncoderItem]) -> Any:
        """All tiles and frames in one run of the tower."""
        pixels = torch.cat([self._tiles(item) for item in items])
        tower = self.base.vision_model
        side = pixels.shape[-1] // int(tower.config.patch_size)
        return self.base.project_vision_features(tower(pixels).features, side, side)

    def _tiles(self, item: EncoderItem) -> torch.Tensor:
        """[tiles, channels, side, side] in the tower's dtype; rounded as the published code does it."""
        mean, std = (self.to_device(item.tensors[name])[:, None, None] for name in ("mean", "std"))
        return ((self.to_device(item.tensors["pixels"]).float() / 255 - mean) / std).to(self.dtype)


class NemotronNanoVL(NemotronOmni):
    """Nemotron Nano 2 VL, as it is published."""

    towers: ClassVar[Mapping[str, tuple[str, ...]]] = {"vision": ("vision_model", "multi_modal_projector")}
    modality_encoders: ClassVar[Mapping[str, str]] = {"image": "vision", "video": "vision"}
    preprocessor_class: ClassVar[type[TransformersPreprocessor]] = NanoPreprocessor
    encoder_classes: ClassVar[Mapping[str, type[TransformersEncoder]]] = {"vision": NanoVisionEncoder}

    def load_class(self) -> Any:
        """Nemotron Omni without the embedder of pairs of frames, whose weights there are not."""
        parent = super().load_class()

        class Nano(parent):  # type: ignore[misc, valid-type]
            def __init__(self, config: Any) -> None:
                super().__init__(config)
                self.vision_model.embeddings.video_patch_projection = None

        # transformers looks up the names of weights by that of the class
        Nano.__name__, Nano.__qualname__, Nano.__module__ = parent.__name__, parent.__qualname__, parent.__module__
        return Nano

    def load_config(self) -> Any:
        """config.json in transformers' words."""
        raw = self.checkpoint.config
        names = ("llm_config", "vision_config", "force_image_size", "patch_size", "projector_hidden_size")
        missing = [name for name in (*names, "norm_mean", "norm_std", "img_context_token_id") if name not in raw]
        if missing:
            raise TriptychError(
                ErrorKind.UNSUPPORTED,
                f"config.json of {self.checkpoint.folder} lacks {', '.join(missing)}, which a {raw['model_type']} has",
                "settings.model",
            )
        vision = _vision(raw["vision_config"], int(raw["patch_size"]), self.checkpoint)
        token = raw["img_context_token_id"]
        return (
            super()
            .load_class()
            .config_class(
                text_config={"model_type": "nemotron_h"} | raw["llm_config"],
                vision_config=vision,
                audio_config=None,
                force_image_size=raw["force_image_size"],
                downsample_ratio=raw.get("downsample_ratio", 0.5),
                projector_hidden_size=raw["projector_hidden_size"],
                vision_hidden_size=raw.get("vit_hidden_size", vision["hidden_size"]),
                video_pruning_rate=float(raw.get("video_pruning_rate") or 0),
                image_token_id=token,
                video_token_id=raw.get("video_context_token_id", token),
                eos_token_id=raw.get("eos_token_id", raw["llm_config"].get("eos_token_id")),
            )
        )


def best_grid(width: int, height: int, side: int) -> tuple[int, int]:
    """Columns and rows of tiles for a picture: at most twelve tiles, of the shape closest to its own.

    Of shapes equally close, a larger one takes over where the picture has more than half as many pixels.
    """
    grids = {
        (columns, rows)
        for columns in range(1, _MOST_TILES + 1)
        for rows in range(1, _MOST_TILES + 1)
        if columns * rows <= _MOST_TILES
    }
    best, least = (1, 1), float("inf")
    for columns, rows in sorted(grids, key=lambda grid: grid[0] * grid[1]):
        difference = abs(width / height - columns / rows)
        if difference < least:
            best, least = (columns, rows), difference
        elif difference == least and width * height > 0.5 * side**2 * columns * rows:
            best = columns, rows
    return best


def _channels_first(pictures: Sequence[PILImage.Image]) -> NDArray[np.uint8]:
    """[pictures, channels, height, width]."""
    out: NDArray[np.uint8] = np.stack([np.asarray(picture, dtype=np.uint8) for picture in pictures])
    return out.transpose(0, 3, 1, 2)


def _vision(raw: Mapping[str, Any], patch_size: int, checkpoint: Checkpoint) -> dict[str, Any]:
    """The tower's configuration in transformers' words: most of it goes by the name of its timm model."""
    args = raw.get("args") or {}
    name = str(args.get("model", ""))
    known = next((shape for start, shape in _TOWERS.items() if name.startswith(start)), None)
    if known is None and "hidden_size" not in raw:
        raise TriptychError(
            ErrorKind.UNSUPPORTED,
            f"the vision tower of {checkpoint.folder} is {name!r}; known are {', '.join(_TOWERS)}",
            "settings.model",
        )
    hidden_size, layers, heads = known or (0, 0, 0)
    teachers = args.get("teachers") if args.get("cls_token_per_teacher", True) else None
    classes = len({teacher["name"] for teacher in teachers}) if teachers else 1
    # the first place of each teacher that has a summary; nothing reads it, but it is among the weights
    summaries: dict[str, int] = {}
    for place, teacher in enumerate(teachers or ()):
        if teacher.get("use_summary", True):
            summaries.setdefault(teacher["name"], place)
    multiple = args.get("register_multiple") or 0
    return {
        "model_type": "radio",
        "hidden_size": raw.get("hidden_size", hidden_size),
        "num_hidden_layers": raw.get("num_hidden_layers", layers),
        "num_attention_heads": raw.get("num_attention_heads", heads),
        "mlp_ratio": raw.get("mlp_ratio", 4.0),
        "patch_size": patch_size,
        "max_img_size": args.get("cpe_max_size") or raw.get("max_resolution", 2048),
        "num_cls_tokens": classes,
        # the class tokens are filled up to a multiple, by a whole one where they are one already
        "num_registers": multiple - classes % multiple if multiple else 0,
        "summary_idxs": sorted(summaries.values()) or [0],
        # transformers has no tower without; see NemotronNanoVL.load_class
        "video_temporal_patch_size": 2,
    }
