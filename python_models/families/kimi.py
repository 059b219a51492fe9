"""Kimi K2.5 and Kimi-VL (Kimi Team 2025, arXiv:2504.07491): image; K2.5 also video.

MoonViT keeps a picture's own size: patches of 14 pixels, filled up to squares of two by two, which a projector makes
one row. K2.5 takes up to four frames at once and averages them. The text model is DeepSeek-V3's.

Kimi-VL is published with code of its own. Its tower is K2.5's for a single frame, whose embedding of time is zero; it
was compared with ``modeling_kimi_vl.py`` and ``image_processing_kimi_vl.py`` of moonshotai/Kimi-VL-A3B-Instruct.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image as PILImage
from PIL import ImageOps

from ...kernels.image import normalise_patches
from ..contract.errors import ErrorKind, TriptychError
from ..contract.features import EncoderItem
from ..contract.settings import Settings
from ..media.types import Medium, Video
from . import composite
from .base import Decoder
from .checkpoint import Checkpoint
from .loading import model_class
from .pixels import check_bytes, normalisation
from .qwen_vision import pixel_arguments
from .tiktoken_file import FILE, MOONSHOT_PATTERN, tiktoken_tokenizer
from .transformers_encoder import TransformersEncoder
from .transformers_family import TransformersFamily
from .transformers_preprocessor import Tensors, TransformersPreprocessor

_IMAGE_TOKEN = "<|media_pad|>"
_MOST_PATCHES = 512
"""Along a side: the tower of Kimi-VL knows no more positions."""


class KimiPreprocessor(TransformersPreprocessor):
    """Pictures and videos as patches in the order of their rows, not of squares."""

    def __init__(self, checkpoint: Checkpoint, settings: Settings, model: Any, encoders: Mapping[str, str]) -> None:
        super().__init__(checkpoint, settings, model, encoders)
        self._normalisation = {modality: self._mean_and_std(modality) for modality in encoders}

    def processor_arguments(self, media: Mapping[str, Sequence[Medium]]) -> dict[str, Any]:
        """See :func:`.qwen_vision.pixel_arguments`."""
        return pixel_arguments(media)

    def split_features(
        self, batch: Mapping[str, Any], media: Mapping[str, Sequence[Medium]]
    ) -> dict[str, list[Tensors]]:
        """Per item ``patches`` uint8 [patches, channels, 1, pixels], ``mean``, ``std`` and ``grids`` int64 [runs, 3].

        A run are frames that are taken together; a picture is one.
        """
        out: dict[str, list[Tensors]] = {}
        for modality, pixels in (("image", "pixel_values"), ("video", "pixel_values_videos")):
            if modality not in media:
                continue
            grids = np.asarray(batch[f"{modality}_grid_thw"], dtype=np.int64)
            ends = np.cumsum([self._runs(medium) for medium in media[modality]])
            mean, std = self._normalisation[modality]
            own = np.split(grids, ends[:-1])
            parts = torch.split(torch.as_tensor(batch[pixels]), [int(part.prod(-1).sum()) for part in own])
            out[modality] = [
                {
                    "patches": patches.flatten(2)[:, :, None].contiguous().numpy(),
                    "grids": part,
                    "mean": mean,
                    "std": std,
                }
                for patches, part in zip(parts, own, strict=True)
            ]
        return out

    def num_rows(self, modality: str, tensors: Tensors) -> int:
        """Patches of one frame of each run, merged in squares."""
        merge = int(getattr(self.processor, f"{modality}_processor").merge_size)
        return int(tensors["grids"][:, 1:].prod(-1).sum()) // merge**2

    def _mean_and_std(self, modality: str) -> tuple[NDArray[Any], NDArray[Any]]:
        """In units of pixel values, as the processor fuses them."""
        return normalisation(getattr(self.processor, f"{modality}_processor"), modality)

    def _runs(self, medium: Medium) -> int:
        """Frames that are taken together count as one."""
        if not isinstance(medium.data, Video):
            return 1
        return -(-len(medium.data.frames) // int(self.processor.video_processor.temporal_patch_size))


class Kimi25Preprocessor(KimiPreprocessor):
    """Through the processors of Kimi K2.5."""

    def __init__(self, checkpoint: Checkpoint, settings: Settings, model: Any, encoders: Mapping[str, str]) -> None:
        super().__init__(checkpoint, settings, model, encoders)
        check_bytes(self.processor.image_processor)
        # the last frames of a video may be fewer than are taken at once
        self.frame_sampling = replace(self.frame_sampling, multiple=1, min_frames=1)


class KimiEncoder(TransformersEncoder):
    """MoonViT and its projector."""

    def features(self, modality: str, items: Sequence[EncoderItem]) -> Any:
        """One run of the tower for all that has the same number of frames.

        transformers' own get_video_features counts the rows of every frame, though frames are averaged, and its tower
        refuses a batch with runs of different lengths.
        """
        grids = np.concatenate([item.tensors["grids"] for item in items])
        runs = torch.split(torch.cat([self._pixels(item) for item in items]), grids.prod(-1).tolist())
        seen: dict[int, torch.Tensor] = {}
        for frames in sorted(set(grids[:, 0].tolist())):
            chosen = np.flatnonzero(grids[:, 0] == frames)
            pixels = torch.cat([runs[k] for k in chosen])
            own = grids[chosen]
            squares = self.base.vision_tower(pixels, grid_thw=torch.from_numpy(own).to(self.device)).pooler_output
            counts = (own[:, 1:].prod(-1) // squares.shape[1]).tolist()
            seen.update(zip(chosen.tolist(), squares.split(counts), strict=True))
        return self.base.mm_projector(torch.cat([seen[k] for k in range(len(grids))]))

    def _pixels(self, item: EncoderItem) -> torch.Tensor:
        """[patches, channels, side, side] in the tower's dtype."""
        mean, std = self.to_device(item.tensors["mean"]), self.to_device(item.tensors["std"])
        flat = normalise_patches(self.to_device(item.tensors["patches"]), mean, std, 1, self.dtype)
        side = int(self.config.vision_config.patch_size)
        return flat.view(len(flat), -1, side, side)


class Kimi25(TransformersFamily):
    """Kimi K2.5."""

    model_class = "Kimi_K25ForConditionalGeneration"
    towers: ClassVar[Mapping[str, tuple[str, ...]]] = {"vision": ("vision_tower", "mm_projector")}
    packs_sequences = True
    modality_encoders: ClassVar[Mapping[str, str]] = {"image": "vision", "video": "vision"}
    preprocessor_class: ClassVar[type[TransformersPreprocessor]] = Kimi25Preprocessor
    encoder_classes: ClassVar[Mapping[str, type[TransformersEncoder]]] = {"vision": KimiEncoder}

    def _decoder(self, model: Any, embed: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Decoder:
        """transformers gives placeholders the row of token 0, also those that the model itself writes."""
        image, video = model.config.image_token_id, model.config.video_token_id
        return super()._decoder(model, lambda ids, is_media: embed(ids, is_media | (ids == image) | (ids == video)))


@dataclass(frozen=True)
class MoonPatches:
    """Stands for an image processor.

    Attributes:
        patch_size: pixels along a side.
        merge_size: patches along the side of a square that becomes a row.
        in_token_limit: larger pictures are made smaller until they have about so many patches.
        image_mean, image_std: of pixels between 0 and 1.
    """

    patch_size: int
    merge_size: int
    in_token_limit: int
    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]
    do_rescale: bool = True
    rescale_factor: float = 1 / 255
    do_normalize: bool = True

    @classmethod
    def read(cls, folder: Path) -> MoonPatches:
        """From preprocessor_config.json.

        Raises:
            TriptychError: MODEL_NOT_FOUND without that file, UNSUPPORTED where pictures are cropped, not filled up.
        """
        path = folder / "preprocessor_config.json"
        if not path.is_file():
            raise TriptychError(ErrorKind.MODEL_NOT_FOUND, f"{folder} has no {path.name}", "settings.model")
        raw = json.loads(path.read_text(encoding="utf-8"))
        height, width = raw.get("merge_kernel_size", (2, 2))
        if not raw.get("pad_input") or height != width:
            raise TriptychError(
                ErrorKind.UNSUPPORTED,
                f"{path.name} must have pad_input on and a square merge_kernel_size",
                "settings.model",
            )
        mean, std = (tuple(composite.required(raw, f"image_{name}")) for name in ("mean", "std"))
        return cls(int(raw.get("patch_size", 14)), height, int(raw.get("in_token_limit", 4096)), mean, std)

    def to_dict(self) -> dict[str, Any]:
        """All options."""
        return asdict(self)

    def cut(self, image: PILImage.Image) -> tuple[NDArray[np.uint8], list[int]]:
        """An RGB picture -> patches [n, 3, side, side] row by row, and its grid [1, rows, columns].

        Raises:
            ValueError: it has more patches along a side than the tower has positions.
        """
        patch = self.patch_size
        whole = (image.width // patch) * (image.height // patch)
        if whole > self.in_token_limit:
            scale = math.sqrt(self.in_token_limit / whole)
            size = int(image.width * scale), int(image.height * scale)
            image = image.resize(size, PILImage.Resampling.BICUBIC)
        square = patch * self.merge_size
        image = ImageOps.expand(image, (0, 0, -image.width % square, -image.height % square))
        columns, rows = image.width // patch, image.height // patch
        if max(columns, rows) >= _MOST_PATCHES:
            raise ValueError(
                f"it has {columns} x {rows} patches of {patch} pixels; less than {_MOST_PATCHES} along a side are seen"
            )
        pixels = np.asarray(image).reshape(rows, patch, columns, patch, 3)
        return pixels.transpose(0, 2, 4, 1, 3).reshape(-1, 3, patch, patch).copy(), [1, rows, columns]


class KimiVLProcessor:
    """Called like a processor of transformers, with the options that we give."""

    image_token = _IMAGE_TOKEN

    def __init__(self, folder: Path) -> None:
        self.image_processor = MoonPatches.read(folder)
        self.tokenizer = load_tokenizer(folder)
        self.chat_template = composite.chat_template(folder, self.tokenizer)

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any:
        """With the template of the checkpoint, wherever it lies."""
        return self.tokenizer.apply_chat_template(conversation, chat_template=self.chat_template, **options)

    def __call__(self, text: Sequence[str], images: Sequence[PILImage.Image] = (), **options: Any) -> dict[str, Any]:
        """Token ids of one prompt; ``pixel_values`` uint8 [n, 3, side, side] and ``image_grid_thw`` of its pictures.

        Raises:
            ValueError: another number of pictures than of places in the prompt.
        """
        (prompt,) = text
        pieces = prompt.split(self.image_token)
        if len(pieces) != len(images) + 1:
            raise ValueError(f"the prompt has {len(pieces) - 1} places for {len(images)} pictures")
        cuts = [self.image_processor.cut(image) for image in images]
        square = self.image_processor.merge_size**2
        places = (self.image_token * (math.prod(grid) // square) for _, grid in cuts)
        written = pieces[0] + "".join(place + piece for place, piece in zip(places, pieces[1:], strict=True))
        add_special_tokens = options.get("add_special_tokens", True)
        found = {"input_ids": self.tokenizer([written], add_special_tokens=add_special_tokens)["input_ids"]}
        if cuts:
            found["pixel_values"] = np.concatenate([patches for patches, _ in cuts])
            found["image_grid_thw"] = [grid for _, grid in cuts]
        return found


class KimiVLPreprocessor(KimiPreprocessor):
    """Pictures as the published processor has them."""

    def load_processor(self, folder: Path, settings: Settings) -> Any:
        """It needs no code of the checkpoint."""
        return KimiVLProcessor(folder)

    def _mean_and_std(self, modality: str) -> tuple[NDArray[Any], NDArray[Any]]:
        """Of pixels between 0 and 1."""
        options = self.processor.image_processor
        return np.array(options.image_mean, dtype=np.float32), np.array(options.image_std, dtype=np.float32)


class KimiVLEncoder(KimiEncoder):
    """Pixels are normalised in three steps, each rounded, as the published processor has it."""

    def _pixels(self, item: EncoderItem) -> torch.Tensor:
        mean, std = self.to_device(item.tensors["mean"]), self.to_device(item.tensors["std"])
        patches = self.to_device(item.tensors["patches"]).float()
        side = int(self.config.vision_config.patch_size)
        flat = patches.div_(255).sub_(mean.view(1, -1, 1, 1)).div_(std.view(1, -1, 1, 1))
        return flat.to(self.dtype).view(len(flat), -1, side, side)


class KimiVL(TransformersFamily):
    """Kimi-VL as it is published."""

    towers = Kimi25.towers
    packs_sequences = True
    encoder_classes: ClassVar[Mapping[str, type[TransformersEncoder]]] = {"vision": KimiVLEncoder}
    modality_encoders: ClassVar[Mapping[str, str]] = {"image": "vision"}
    preprocessor_class: ClassVar[type[TransformersPreprocessor]] = KimiVLPreprocessor

    def load_class(self) -> Any:
        """With rules for the published names."""
        return _published_class()

    def load_config(self) -> Any:
        """Of K2.5, in its words."""
        raw = self.checkpoint.config
        vision = composite.required(raw, "vision_config")
        text = composite.text_config("deepseek_v3", composite.required(raw, "text_config"))
        token = composite.required(raw, "media_placeholder_token_id")
        width = composite.required(vision, "hidden_size")
        return self.load_class().config_class(
            text_config=text,
            vision_config={
                "patch_size": vision.get("patch_size", 14),
                "pos_emb_height": vision.get("init_pos_emb_height", 64),
                "pos_emb_width": vision.get("init_pos_emb_width", 64),
                "num_attention_heads": composite.required(vision, "num_attention_heads"),
                "num_hidden_layers": composite.required(vision, "num_hidden_layers"),
                "hidden_size": width,
                "intermediate_size": composite.required(vision, "intermediate_size"),
                "merge_kernel_size": vision.get("merge_kernel_size", (2, 2)),
            },
            projection_hidden_size=width,
            image_token_id=token,
            tie_word_embeddings=text.tie_word_embeddings,
        )

    def load_tokenizer(self) -> Any:
        """See :func:`load_tokenizer`."""
        return load_tokenizer(self.checkpoint.folder)


def load_tokenizer(folder: Path) -> Any:
    """That of tokenizer.json, or else of the published ``tiktoken.model``."""
    if (folder / FILE).is_file() and not (folder / "tokenizer.json").is_file():
        return tiktoken_tokenizer(folder, MOONSHOT_PATTERN)
    return composite.load_tokenizer(folder)


@functools.cache
def _published_class() -> Any:
    from transformers import conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    mapping: Any = conversion_mapping

    name = "PublishedKimiVLForConditionalGeneration"
    own = [
        WeightRenaming(rf"^multi_modal_projector\.{published}\.", f"model.mm_projector.{ours}.")
        for published, ours in (("pre_norm", "pre_norm"), ("linear_1", "in_proj"), ("linear_2", "out_proj"))
    ]
    rules = [*own, *mapping.get_checkpoint_conversion_mapping("kimi_k25")]
    mapping.register_checkpoint_conversion_mapping(name, rules, overwrite=True)
    return type(name, (model_class(Kimi25.model_class),), {"__module__": __name__})
